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
of the highest point below all these bounds.

*From there to the budgets.* Two choices differ in parts of the graph that are independent of each other (as
many as there are layers, where layers repeat). Beginning with a choice that fits, each part is switched by
itself to what another choice does with it, while that fits and saves time. What remains is about one part,
and is reported: ``bound`` is the lower bound at the best prices. Problems with few values are solved to the
end by HiGHS instead.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

_FEW = 150  # values, up to which the whole problem goes to HiGHS
_UNITS = 4e8  # what all finite capacities together are scaled to: scipy's flows are 32-bit integers
_INFINITE = 10**9
_SECONDS = 10.0  # for HiGHS
_STEPS = 40  # of the search for the best prices
_ROUNDS = 3  # of switching parts


class How(Enum):
    """What becomes of a value: NOT_NEEDED by the backward, or by anything recomputed for it."""

    NOT_NEEDED = "not needed"
    SAVE = "save"
    OFFLOAD = "offload"
    RECOMPUTE = "recompute"


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
    """The choice that adds the fewest seconds with at most so many bytes kept on either side.

    Raises :class:`BudgetError` when there is none, and :class:`ValueError` for a value that is needed and can
    be neither saved nor recomputed, whatever the budgets are.
    """
    _check(values)
    seen, bound = _priced(values, device, host)
    tight = _least(values, host)
    fitting = [c for c in (*seen, tight) if c.device_bytes <= device and c.host_bytes <= host]
    if not fitting:
        raise BudgetError(tight.device_bytes, device)
    found = min(fitting, key=operator.attrgetter("seconds"))
    for _ in range(_ROUNDS):
        before = found
        for other in seen:
            found = _switched(values, found, other, device, host)
        if found.seconds >= before.seconds:
            break
    found = replace(found, bound=bound)
    if len(values) <= _FEW and found.gap > 1e-6:
        found = _exact(values, device, host, found)
    return found


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
    for i in reversed(range(len(values))):
        if not needed[i]:
            continue
        if how[i] is How.NOT_NEEDED:
            raise ValueError(f"{values[i].name} is needed, and nothing provides it")
        final[i] = how[i]
        if how[i] is How.RECOMPUTE:
            for u in values[i].inputs:
                needed[u] = True
    seconds = sum(_cost(v, h) for v, h in zip(values, final, strict=True))
    device = sum(v.num_bytes for v, h in zip(values, final, strict=True) if h is How.SAVE)
    host = sum(v.num_bytes for v, h in zip(values, final, strict=True) if h is How.OFFLOAD)
    return Choice(tuple(final), seconds, device, host)


def _cost(value: Value, how: How) -> float:
    costs = {How.SAVE: value.save, How.OFFLOAD: value.offload, How.RECOMPUTE: value.recompute}
    return costs.get(how, 0.0)


# --- prices ------------------------------------------------------------------------------------------


def _priced(values: Sequence[Value], device: int, host: int) -> tuple[list[Choice], float]:
    """Choices that are best at some prices, those at the best prices first, and the lower bound there."""
    closed = host <= 0  # no offloading
    price, price_of_host = 0.0, math.inf if closed else 0.0
    seen: list[Choice] = []
    bound, promised = -math.inf, math.inf
    for _ in range(_STEPS):
        choice, value = _cut(values, price, price_of_host)
        bound = max(bound, value - price * device - (0.0 if closed else price_of_host * host))
        seen.append(choice)
        free = closed and price == 0.0 and choice.device_bytes <= device
        if free or promised - bound <= 1e-5 * abs(bound):
            break
        if len(seen) == 1:
            seen.append(_least(values, host))
        prices, promised = _highest(seen, device, host)
        price, price_of_host = prices[0], math.inf if closed else prices[1]
    at_best = sorted(
        seen,
        key=lambda c: c.seconds + price * c.device_bytes + (0.0 if closed else price_of_host * c.host_bytes),
    )
    return at_best, bound


def _highest(seen: Sequence[Choice], device: int, host: int) -> tuple[tuple[float, float], float]:
    """The prices at which the bounds that the choices ``seen`` set are highest, and how high that is."""
    second = max(c.seconds for c in seen) or 1.0
    byte = float(max(1, *(c.device_bytes for c in seen), *(c.host_bytes for c in seen)))
    rows = [[-c.device_bytes / byte, -c.host_bytes / byte, 1.0] for c in seen]
    found = linprog(
        [device / byte, host / byte, -1.0],
        A_ub=rows,
        b_ub=[c.seconds / second for c in seen],
        bounds=[(0, 1e6), (0, 1e6), (None, None)],
    )
    price, price_of_host, _ = found.x
    return (price * second / byte, price_of_host * second / byte), -found.fun * second


def _least(values: Sequence[Value], host: int) -> Choice:
    """The choice that keeps the fewest bytes on the device, whatever that costs."""
    tight, _ = _cut(values, 1.0, math.inf, seconds=0.0)
    if host > 0:
        offloaded, _ = _cut(values, 1.0, 1e-6, seconds=0.0)
        tight = _switched(values, tight, offloaded, 0, host)
    return tight


def _cut(
    values: Sequence[Value], price: float, price_of_host: float, seconds: float = 1.0
) -> tuple[Choice, float]:
    """The best choice at these prices, and what it costs with what is paid for memory, less what rounding may
    have cost: no choice costs less.

    ``seconds`` is what a second costs.
    """
    sizes = np.array([v.num_bytes for v in values], dtype=float)
    with np.errstate(invalid="ignore"):
        paid = np.where(sizes > 0, price_of_host * sizes, 0.0)
    saving = _times(np.array([v.save for v in values]), seconds) + price * sizes
    offloading = _times(np.array([v.offload for v in values]), seconds) + paid
    again = _times(np.array([v.recompute for v in values]), seconds)
    at_hand, anew, unsure = _side_of_source(values, np.minimum(saving, offloading), again)
    kept = [How.SAVE if s <= o else How.OFFLOAD for s, o in zip(saving, offloading, strict=True)]
    how = [
        How.NOT_NEEDED if not a else How.RECOMPUTE if r else k
        for a, r, k in zip(at_hand, anew, kept, strict=True)
    ]
    choice = evaluate(values, how)
    total = seconds * choice.seconds + price * choice.device_bytes
    return choice, total + (price_of_host * choice.host_bytes if choice.host_bytes else 0.0) - unsure


def _times(costs: np.ndarray, factor: float) -> np.ndarray:
    return np.where(np.isfinite(costs), costs, 0.0) * factor + np.where(np.isfinite(costs), 0.0, math.inf)


def _side_of_source(
    values: Sequence[Value], keeping: np.ndarray, again: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """For each value whether ``A_v``, and whether ``R_v``, is on the source's side of a minimum cut; and by
    how much the cut may exceed the minimum, because capacities are rounded."""
    n = len(values)
    source, sink = 2 * n, 2 * n + 1
    finite = keeping[np.isfinite(keeping)].sum() + again[np.isfinite(again)].sum()
    scale = _UNITS / finite if finite > 0 else 0.0

    def units(costs: np.ndarray) -> np.ndarray:
        scaled = np.round(_times(costs, scale))
        return np.where(np.isfinite(scaled), scaled, _INFINITE).astype(np.int32)

    every = np.arange(n)
    needed = np.array([i for i, v in enumerate(values) if v.needed], dtype=int)
    readers = np.array([i for i, v in enumerate(values) for _ in set(v.inputs)], dtype=int)
    read = np.array([u for v in values for u in set(v.inputs)], dtype=int)
    tails = np.concatenate([np.full(len(needed), source), every, n + every, n + readers])
    heads = np.concatenate([needed, n + every, np.full(n, sink), read])
    endless = [np.full(len(needed), _INFINITE), np.full(len(readers), _INFINITE)]
    capacities = np.concatenate([endless[0], units(keeping), units(again), endless[1]])
    size = (2 * n + 2, 2 * n + 2)
    graph = csr_array((capacities.astype(np.int32), (tails, heads)), shape=size)
    flow = maximum_flow(graph, source, sink).flow
    residual = csr_array(graph - flow)
    residual.eliminate_zeros()
    reached = breadth_first_order(residual, source, return_predecessors=False)
    side = np.zeros(2 * n + 2, dtype=bool)
    side[reached] = True
    scaled = scale * np.concatenate([c[np.isfinite(c)] for c in (keeping, again)])
    rounded = float(np.abs(scaled - np.round(scaled)).sum())
    return side[:n], side[n : 2 * n], rounded / scale if scale else 0.0


# --- from prices to budgets --------------------------------------------------------------------------


def _switched(values: Sequence[Value], choice: Choice, other: Choice, device: int, host: int) -> Choice:
    """``choice`` with independent parts of it as in ``other``: those that fit and save time, the most first.

    A choice that does not fit the device is brought as near to it as the host has room.
    """
    changes = []
    for part in _parts(values, choice, other):
        seconds = sum(_cost(values[i], other.how[i]) - _cost(values[i], choice.how[i]) for i in part)
        changes.append((seconds, _more(values, choice, other, part, How.SAVE), part))
    device_bytes, host_bytes, how = choice.device_bytes, choice.host_bytes, list(choice.how)
    for seconds, more, part in sorted(changes, key=lambda c: c[0] / max(abs(c[1]), 1)):
        hosted = host_bytes + _more(values, choice, other, part, How.OFFLOAD)
        nearer = device_bytes > device and more < 0
        if hosted > host or not (nearer or (seconds < 0 and device_bytes + more <= device)):
            continue
        device_bytes, host_bytes = device_bytes + more, hosted
        for i in part:
            how[i] = other.how[i]
    return evaluate(values, how)


def _more(values: Sequence[Value], choice: Choice, other: Choice, part: Sequence[int], kind: How) -> int:
    """Bytes of ``kind`` that the values of a part keep in the other choice, less those that they keep now."""
    then = sum(values[i].num_bytes for i in part if other.how[i] is kind)
    return then - sum(values[i].num_bytes for i in part if choice.how[i] is kind)


def _parts(values: Sequence[Value], one: Choice, other: Choice) -> list[list[int]]:
    """Values that two choices treat differently, those together that depend on each other."""
    differ = {i for i in range(len(values)) if one.how[i] is not other.how[i]}
    root = {i: i for i in differ}

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i in differ:
        for u in values[i].inputs:
            if u in differ:
                root[find(i)] = find(u)
    parts: dict[int, list[int]] = {}
    for i in sorted(differ):
        parts.setdefault(find(i), []).append(i)
    return list(parts.values())


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


__all__ = ["BudgetError", "Choice", "How", "Value", "evaluate", "solve"]
