"""Which values to keep for the backward, where, and which to compute again: the problem and its solution.

A *value* ``v`` of the forward has ``b_v`` bytes and is computed from its inputs ``I_v`` in ``t_v`` seconds.
Those in ``N`` are read by the backward. For each value there are three binary choices: *save* it on the
device, *offload* it to the host, *recompute* it; and two budgets, of ``D`` bytes on the device and ``H`` on
the host:

    minimise    sum  save_v s_v + offload_v o_v + recompute_v r_v
    subject to  s_v + o_v + r_v >= 1                    v in N
                s_u + o_u + r_u >= r_v                  u in I_v: what is recomputed has its inputs at hand
                sum b_v s_v <= D,   sum b_v o_v <= H

An infinite cost rules a choice out (a random number is not drawn again, a view is not kept).

*With prices instead of budgets* it is a minimum cut, hence solved exactly and quickly. Let ``lambda`` and
``mu`` be seconds per byte on device and host, ``keep_v = min(save_v + lambda b_v, offload_v + mu b_v)``, and
give each value two vertices, ``A_v`` (it is at hand) and ``R_v`` (it is recomputed), with edges

    source -> A_v: infinite, v in N     A_v -> R_v: keep_v
    R_v -> sink: recompute_v            R_v -> A_u: infinite

A vertex on the source's side says yes; a cut separates ``A_v`` from ``R_v`` where ``v`` is kept. The value of
the cut less ``lambda D + mu H`` is a lower bound of the problem (Lagrange). It is concave in the prices, and
is maximised by cutting planes (Kelley): each choice seen bounds it from above, and the next prices are those
of the highest point below all these bounds. A cut says as much about one budget as about another, so a
:class:`Solver` that is asked for many budgets makes few cuts for each. A view that is kept by nobody is no
vertex of its own: who asks for it asks for what it shows.

*From there to the budgets.* Two choices differ in parts of the graph that are independent of each other (as
many as there are layers, where layers repeat). Beginning with a choice that fits, each part is switched by
itself to what another choice does with it, while that fits and saves time. What remains is about one part,
and is reported: ``bound`` is the lower bound at the best prices. Problems with few values are solved to the
end by HiGHS instead.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, maximum_flow

_FEW = 150  # values, up to which the whole problem goes to HiGHS
_UNITS = 4e8  # what all finite capacities together are scaled to: scipy's flows are 32-bit integers
_INFINITE = 10**9
_SECONDS = 10.0  # for HiGHS
_STEPS = 40  # of the search for the best prices
_EXACT = 1e-5  # of the bound: where that search ends
_OTHERS = 8  # choices whose parts are tried
_ROUNDS = 3  # of switching parts


class How(Enum):
    """What becomes of a value: NOT_NEEDED by the backward, or by anything recomputed for it."""

    NOT_NEEDED = "not needed"
    SAVE = "save"
    OFFLOAD = "offload"
    RECOMPUTE = "recompute"

    __hash__ = object.__hash__  # Enum's own runs in Python, and choices of thousands are looked up by these


_HOW = (How.SAVE, How.OFFLOAD, How.RECOMPUTE, How.NOT_NEEDED)
_CODES = {how: code for code, how in enumerate(_HOW)}


@dataclass(frozen=True)
class Value:
    """``inputs`` are positions of earlier values; costs are in seconds, infinite where ruled out. What can be
    offloaded can be saved."""

    name: str
    num_bytes: int
    inputs: tuple[int, ...]
    needed: bool
    recompute: float
    save: float = 0.0
    offload: float = math.inf


@dataclass(frozen=True)
class Choice:
    """``how`` for each value; the added ``seconds``, bytes kept on either side, and a lower ``bound`` of the
    seconds that any choice within the budgets adds."""

    how: tuple[How, ...]
    seconds: float
    device_bytes: int
    host_bytes: int
    bound: float = 0.0

    @cached_property
    def codes(self) -> np.ndarray:
        """``how`` as numbers, by place in ``_HOW``."""
        return np.array([_CODES[h] for h in self.how])

    @property
    def gap(self) -> float:
        """How much of ``seconds`` might be saved by a better choice, as a fraction; 0 is the optimum."""
        return max(0.0, self.seconds - self.bound) / self.seconds if self.seconds > 0 else 0.0


class BudgetError(ValueError):
    """No choice fits. ``least`` is the least that can be kept on the device, in bytes."""

    def __init__(self, least: int, device: int) -> None:
        super().__init__(f"at least {least} bytes must be kept, and the budget is {device}")
        self.least = least


def solve(values: Sequence[Value], device: int, host: int = 0) -> Choice:
    """What :meth:`Solver.solve` says of ``values``."""
    return Solver(values).solve(device, host)


def _check(values: Sequence[Value]) -> None:
    """Whether each needed value can be had at all."""
    possible: list[bool] = []
    for v in values:
        again = math.isfinite(v.recompute) and all(possible[u] for u in v.inputs)
        possible.append(math.isfinite(v.save) or again)
        if v.needed and not possible[-1]:
            raise ValueError(f"{v.name} is needed, and can be neither saved nor computed again")


def evaluate(values: Sequence[Value], how: Sequence[How]) -> Choice:
    """The choice ``how``, without what nothing needs, and what it costs.

    Raises :class:`ValueError` for a choice that leaves something needed without a source.
    """
    needed = [v.needed for v in values]
    final = [How.NOT_NEEDED] * len(values)
    seconds, device, host = 0.0, 0, 0
    for i in reversed(range(len(values))):
        if not needed[i]:
            continue
        v, h = values[i], how[i]
        final[i] = h
        if h is How.RECOMPUTE:
            seconds += v.recompute
            for u in v.inputs:
                needed[u] = True
        elif h is How.SAVE:
            seconds += v.save
            device += v.num_bytes
        elif h is How.OFFLOAD:
            seconds += v.offload
            host += v.num_bytes
        else:
            raise ValueError(f"{v.name} is needed, and nothing provides it")
    return Choice(tuple(final), seconds, device, host)


# --- prices ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cut:
    """The best ``choice`` at these prices; no choice costs less than ``value``, memory paid for."""

    choice: Choice
    price: float
    price_of_host: float
    value: float

    def bound(self, device: int, host: int) -> float:
        """The seconds that any choice within these budgets adds at the least."""
        return self.value - self.price * device - (self.price_of_host * host if host > 0 else 0.0)


class Solver:
    """Solves the problem of ``values`` for one budget after another; what one has shown the next one knows.

    Raises :class:`ValueError` for a value that is needed and can be neither saved nor recomputed, whatever
    the budgets are.
    """

    def __init__(self, values: Sequence[Value]) -> None:
        _check(values)
        self.values = values
        self.network = _Network(values)
        self.cuts: list[_Cut] = []
        self.tight: dict[int, Choice] = {}

    def solve(self, device: int, host: int = 0) -> Choice:
        """The choice that adds the fewest seconds with at most so many bytes kept on either side.

        Raises :class:`BudgetError` when there is none.
        """
        host = max(host, 0)
        tight = self.least(host)
        if host == 0 and tight.device_bytes > device:
            raise BudgetError(tight.device_bytes, device)
        near, bound = self._priced(device, host)
        fitting = [c for c in near if c.device_bytes <= device and c.host_bytes <= host]
        if not fitting:
            raise BudgetError(tight.device_bytes, device)
        found = min(fitting, key=operator.attrgetter("seconds"))
        for _ in range(_ROUNDS):
            before = found
            for other in near[:_OTHERS]:
                found = self.network.switched(found, other, device, host)
            if found.seconds >= before.seconds:
                break
        found = replace(found, bound=bound)
        if len(self.values) <= _FEW and found.gap > 1e-6:
            found = _exact(self.values, device, host, found)
        return found

    def least(self, host: int = 0) -> Choice:
        """The choice that keeps the fewest bytes on the device, whatever that costs.

        With a budget for the host nearly so.
        """
        if host not in self.tight:
            tight = self.network.cut(1.0, math.inf, seconds=0.0).choice
            if host > 0:
                offloaded = self.network.cut(1.0, 1e-6, seconds=0.0).choice
                tight = self.network.switched(tight, offloaded, 0, host)
            self.tight[host] = tight
        return self.tight[host]

    def _priced(self, device: int, host: int) -> tuple[list[Choice], float]:
        """Choices that are best at some prices, those at the best prices first, and the lower bound there."""
        closed = host == 0  # no offloading
        price, price_of_host, promised = 0.0, math.inf if closed else 0.0, math.inf
        known = [c for c in self.cuts if closed == math.isinf(c.price_of_host)]
        seen = [self.least(host), *(c.choice for c in known)]
        bound = max((c.bound(device, host) for c in known), default=-math.inf)
        for step in range(_STEPS):
            if step or known:
                price, price_of_host, promised = _highest(seen, device, host)
                if promised - bound <= _EXACT * abs(bound):
                    break
            cut = self.network.cut(price, price_of_host)
            bound = max(bound, cut.bound(device, host))
            self.cuts.append(cut)
            if step and cut.choice in seen:
                break  # as good as rounded capacities tell
            seen.append(cut.choice)
        paid = 0.0 if closed else price_of_host
        near = sorted(
            dict.fromkeys(seen), key=lambda c: c.seconds + price * c.device_bytes + paid * c.host_bytes
        )
        return near, bound


def _highest(seen: Sequence[Choice], device: int, host: int) -> tuple[float, float, float]:
    """The prices at which the bounds that the choices ``seen`` set are highest, and how high that is."""
    second = max(c.seconds for c in seen) or 1.0
    byte = float(max(1, *(c.device_bytes for c in seen), *(c.host_bytes for c in seen)))
    rows = [[-c.device_bytes / byte, -c.host_bytes / byte, 1.0] for c in seen]
    found = linprog(
        [device / byte, host / byte, -1.0],
        A_ub=rows,
        b_ub=[c.seconds / second for c in seen],
        bounds=[(0, 1e6), (0, 1e6) if host > 0 else (0, 0), (None, None)],
    )
    price, price_of_host, _ = found.x
    on_host = price_of_host * second / byte if host > 0 else math.inf
    return price * second / byte, on_host, -found.fun * second


class _Network:
    """The graph whose cuts are choices; prices change its capacities alone."""

    def __init__(self, values: Sequence[Value]) -> None:
        self.values = values
        self.sizes, self.save, self.offload, self.again = (
            np.array([getattr(v, what) for v in values], dtype=float)
            for what in ("num_bytes", "save", "offload", "recompute")
        )
        seen_through, inputs, needed = self._seen_through()
        self.own = np.array([i for i in range(len(values)) if i not in seen_through], dtype=int)
        place = {i: k for k, i in enumerate(self.own)}
        self.needed = np.array([place[i] for i in self.own if needed[i]], dtype=int)
        self.readers = np.array([place[i] for i in self.own for _ in inputs[i]], dtype=int)
        self.read = np.array([place[u] for i in self.own for u in inputs[i]], dtype=int)
        edges = [(i, u) for i, v in enumerate(values) for u in v.inputs]
        self.edges = np.array(edges, dtype=int).reshape(-1, 2)

    def _seen_through(self) -> tuple[set[int], list[tuple[int, ...]], list[bool]]:
        """Values that cost nothing to make from one other and are kept nowhere; and the inputs of all, and
        whether they are needed, without these."""
        stands_for = list(range(len(self.values)))
        needed, inputs = [False] * len(self.values), []
        for i, v in enumerate(self.values):
            if len(set(v.inputs)) == 1 and v.recompute == 0.0 and math.isinf(v.save):
                stands_for[i] = stands_for[v.inputs[0]]
            inputs.append(tuple({stands_for[u] for u in v.inputs}))
            needed[stands_for[i]] |= v.needed
        return {i for i, j in enumerate(stands_for) if i != j}, inputs, needed

    def cut(self, price: float, price_of_host: float, seconds: float = 1.0) -> _Cut:
        """The best choice at these prices; the value is what it costs, less what rounding may have cost.

        ``seconds`` is what a second costs.
        """
        with np.errstate(invalid="ignore"):
            paid = np.where(self.sizes > 0, price_of_host * self.sizes, 0.0)
        saving = _times(self.save, seconds) + price * self.sizes
        offloading = _times(self.offload, seconds) + paid
        keeping, again = np.minimum(saving, offloading), _times(self.again, seconds)
        side, unsure = self._side_of_source(keeping[self.own], again[self.own])
        anew = np.ones(len(self.values), dtype=bool)
        anew[self.own] = side
        kept = np.where(saving <= offloading, _CODES[How.SAVE], _CODES[How.OFFLOAD])
        how = np.where(anew, _CODES[How.RECOMPUTE], kept)
        choice = evaluate(self.values, [_HOW[h] for h in how])
        total = seconds * choice.seconds + price * choice.device_bytes
        total += price_of_host * choice.host_bytes if choice.host_bytes else 0.0
        return _Cut(choice, price, price_of_host, total - unsure)

    def _side_of_source(self, keeping: np.ndarray, again: np.ndarray) -> tuple[np.ndarray, float]:
        """For each value of its own whether ``R_v`` is on the source's side of a minimum cut; and by how much
        the cut may exceed the minimum, because capacities are rounded."""
        n = len(self.own)
        source, sink = 2 * n, 2 * n + 1
        finite = keeping[np.isfinite(keeping)].sum() + again[np.isfinite(again)].sum()
        scale = _UNITS / finite if finite > 0 else 0.0

        def units(costs: np.ndarray) -> np.ndarray:
            scaled = np.round(_times(costs, scale))
            return np.where(np.isfinite(scaled), scaled, _INFINITE)

        every = np.arange(n)
        tails = np.concatenate([np.full(len(self.needed), source), every, n + every, n + self.readers])
        heads = np.concatenate([self.needed, n + every, np.full(n, sink), self.read])
        endless = [np.full(len(self.needed), _INFINITE), np.full(len(self.readers), _INFINITE)]
        capacities = np.concatenate([endless[0], units(keeping), units(again), endless[1]])
        graph = csr_array((capacities.astype(np.int32), (tails, heads)), shape=(2 * n + 2, 2 * n + 2))
        flow = maximum_flow(graph, source, sink).flow
        residual = csr_array(graph - flow)
        residual.eliminate_zeros()
        reached = breadth_first_order(residual, source, return_predecessors=False)
        side = np.zeros(2 * n + 2, dtype=bool)
        side[reached] = True
        scaled = scale * np.concatenate([c[np.isfinite(c)] for c in (keeping, again)])
        rounded = float(np.abs(scaled - np.round(scaled)).sum())
        return side[n : 2 * n], rounded / scale if scale else 0.0

    # --- from prices to budgets ----------------------------------------------------------------------

    def switched(self, choice: Choice, other: Choice, device: int, host: int) -> Choice:
        """``choice`` with independent parts of it as in ``other``: those that fit and save time.

        A choice that does not fit the device is brought as near to it as the host has room.
        """
        now, then = choice.codes.copy(), other.codes
        count, part = self._parts(now != then)
        if not count:
            return choice
        apart = np.flatnonzero(now != then)
        label = part[apart]

        def more(amount: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
            return np.bincount(label, (amount(then) - amount(now))[apart], count)

        seconds = more(self._seconds)
        on_device = more(lambda how: np.where(how == _CODES[How.SAVE], self.sizes, 0))
        on_host = more(lambda how: np.where(how == _CODES[How.OFFLOAD], self.sizes, 0))
        device_bytes, host_bytes, taken = choice.device_bytes, choice.host_bytes, np.zeros(count, dtype=bool)
        for i in np.argsort(seconds / np.maximum(np.abs(on_device), 1), kind="stable"):
            nearer = device_bytes > device and on_device[i] < 0
            fits = seconds[i] < 0 and device_bytes + on_device[i] <= device
            if host_bytes + on_host[i] <= host and (nearer or fits):
                device_bytes, host_bytes = device_bytes + on_device[i], host_bytes + on_host[i]
                taken[i] = True
        if not taken.any():
            return choice
        now[apart[taken[label]]] = then[apart[taken[label]]]
        return evaluate(self.values, [_HOW[h] for h in now])

    def _seconds(self, how: np.ndarray) -> np.ndarray:
        costs = np.stack([self.save, self.offload, self.again, np.zeros_like(self.save)])
        return costs[how, np.arange(len(how))]

    def _parts(self, differ: np.ndarray) -> tuple[int, np.ndarray]:
        """How many parts the values are of that ``differ``, those together that depend on each other, and the
        part of each."""
        apart = np.flatnonzero(differ)
        place = np.full(len(differ), -1)
        place[apart] = np.arange(len(apart))
        both = self.edges[differ[self.edges].all(axis=1)] if len(self.edges) else self.edges
        tails, heads = place[both[:, 0]], place[both[:, 1]]
        joined = csr_array((np.ones(len(tails)), (tails, heads)), shape=(len(apart), len(apart)))
        count, label = connected_components(joined, directed=False) if len(apart) else (0, apart)
        part = np.full(len(differ), -1)
        part[apart] = label
        return count, part


def _times(costs: np.ndarray, factor: float) -> np.ndarray:
    return np.where(np.isfinite(costs), costs, 0.0) * factor + np.where(np.isfinite(costs), 0.0, math.inf)


# --- few values --------------------------------------------------------------------------------------


def _exact(values: Sequence[Value], device: int, host: int, known: Choice) -> Choice:
    """The optimum by branch and bound, or ``known`` when time runs out before anything better is found."""
    n = len(values)
    saves, offloads, again = range(n), range(n, 2 * n), range(2 * n, 3 * n)
    costs = np.array([(v.save, v.offload, v.recompute) for v in values]).T.ravel()
    upper = np.isfinite(costs).astype(float)
    unit = known.seconds or 1.0
    rows: list[dict[int, float]] = []
    lower: list[float] = []
    for i, v in enumerate(values):
        if v.needed:
            rows.append({saves[i]: 1, offloads[i]: 1, again[i]: 1})
            lower.append(1)
        for u in set(v.inputs):
            rows.append({saves[u]: 1, offloads[u]: 1, again[u]: 1, again[i]: -1})
            lower.append(0)
    upper_rows = [math.inf] * len(rows)
    for kind, budget in ((saves, device), (offloads, host)):
        rows.append({kind[i]: float(v.num_bytes) for i, v in enumerate(values)})
        lower.append(-math.inf)
        upper_rows.append(budget)
    entries = [(r, c, x) for r, row in enumerate(rows) for c, x in row.items()]
    r, c, x = zip(*entries, strict=True)
    matrix = csr_array((x, (r, c)), shape=(len(rows), 3 * n))
    found = milp(
        np.where(upper > 0, costs, 0.0) / unit,
        constraints=LinearConstraint(matrix, lower, upper_rows),
        bounds=Bounds(0, upper),
        integrality=np.ones(3 * n),
        options={"time_limit": _SECONDS, "mip_rel_gap": 0.0},
    )
    if found.x is None:
        return known
    on = found.x > 0.5
    kinds = (How.SAVE, How.OFFLOAD, How.RECOMPUTE)
    ways = on.reshape(3, n).T
    how = [next((k for k, chosen in zip(kinds, w, strict=True) if chosen), How.NOT_NEEDED) for w in ways]
    better = evaluate(values, how)
    bound = max(known.bound, (found.mip_dual_bound or -math.inf) * unit)
    fits = better.device_bytes <= device and better.host_bytes <= host
    return replace(better if fits and better.seconds <= known.seconds else known, bound=bound)


__all__ = ["BudgetError", "Choice", "How", "Solver", "Value", "evaluate", "solve"]
