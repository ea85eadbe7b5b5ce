"""Cutting a chain into stages so that a schedule of microbatches ends soonest: the problem and its solution.

A chain has positions ``0 .. N-1``; a *plan* is boundaries ``0 = e_0 < e_1 < ... < e_S = N``, stage ``s``
runs the positions ``[e_s, e_{s+1})``. A stage ``[i, j)`` needs

    f(i, j), b(i, j)    seconds of one microbatch's forward and backward: the sums over its positions, and
                        over the *items* that they use, each once (what a stage makes for itself)
    x(i), y(i)          seconds to bring over boundary ``i`` what crosses it, and the gradients back: these
                        occupy both ends. Besides, there and back is a delay of ``d(i)`` in which both work on
    F = f + x(i) + x(j),  B = b + y(i) + y(j)
    m_s(i, j)           bytes: what its distinct items hold, and for each of the microbatches that stage s
                        has in flight what the backward reads and what was received

and the schedule of ``M`` microbatches takes

    T = sum_s (f(e_s, e_{s+1}) + b(e_s, e_{s+1}) + (x + y + d)(e_s)) + (M - 1) * period

    period = max_s F_s + max_s B_s     in phases: all forwards, then all backwards (GPipe)
             max_s (F_s + B_s)         otherwise: a stage's forwards and backwards alternate (1F1B and later)

The first microbatch goes through all stages and back, then the slowest stage sets the pace. (For GPipe this
is the makespan of a flow shop of equal jobs, and exact. With 1F1B every cycle of dependences is an average
of some stages' F + B, so their maximum is the pace.) Minimise T subject to m_s <= memory, boundaries that are
open, those that are forced, and the stages in which a position may lie.

*Exactly, by dynamic programming.* Over (s, j), j the end of stage s. Because maxima do not add, the best
plan need not contain the best plan of its first stages: each state keeps the Pareto set of

    (sum of latencies, max F, max B)    or    (sum of latencies, max (F + B))

which is exact, since T grows with each of them and each grows with those of the stages before. States whose
lower bound (the rest of the chain shared evenly among the stages left) exceeds a plan in hand are dropped.

*With many positions* only some boundaries are tried. The cheapest block is merged with a neighbour, over the
dearer of its two boundaries, until few are left. The same is done again with those in ever narrower windows
around the cuts of the plan in hand, until in the narrowest, where none is left out, no plan is better. Every
round is exact for the boundaries it has, and has the plan of the round before.

The paper: RaNNC, arXiv:2103.16063, which keeps one pair (max F, max B) for each state.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

_SLACK = 1e-12  # relative: rounding
_BETTER = 1e-4  # relative gain that is worth another round


@dataclass(frozen=True)
class Item:
    """What a stage has once, however often its positions use it: a parameter, or what it makes for itself.

    ``held`` are bytes for as long as the stage lives, ``saved`` bytes for each microbatch in flight.
    """

    name: str
    forward: float = 0.0
    backward: float = 0.0
    held: float = 0.0
    saved: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Arrays over the ``N`` positions: seconds and saved bytes; over the ``N + 1`` boundaries: seconds of
    transfer forward and back (N + 1, 2), of delay, and bytes received. ``uses[k]`` are indices into
    ``items``."""

    forward: np.ndarray
    backward: np.ndarray
    saved: np.ndarray
    transfer: np.ndarray
    delay: np.ndarray
    received: np.ndarray
    items: Sequence[Item]
    uses: Sequence[Iterable[int]]

    def __len__(self) -> int:
        return len(self.forward)


@dataclass(frozen=True)
class Terms:
    """``microbatches``; ``in_flight(stage, num_stages)`` of them at once in a stage; whether the schedule is
    in ``phases``; ``memory``, the bytes a stage may take (None: any number)."""

    microbatches: int
    in_flight: Callable[[int, int], int]
    phases: bool = False
    memory: float | None = None


@dataclass(frozen=True)
class Pins:
    """``open`` (N + 1): where a stage may end. ``forced``: boundaries where one must. ``may`` (S, N): whether
    a position may lie in a stage."""

    open: np.ndarray
    forced: frozenset[int]
    may: np.ndarray

    @property
    def num_stages(self) -> int:
        return self.may.shape[0]


@dataclass(frozen=True)
class Prices:
    """What every stage between two of the boundaries ``ends`` would cost: matrices (from, to)."""

    ends: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    transfer: np.ndarray
    delay: np.ndarray
    held: np.ndarray
    in_flight: np.ndarray
    """Bytes for each microbatch in flight."""
    rest: np.ndarray = field(repr=False)
    """(boundary, 2): seconds of the positions behind a boundary, items left out."""

    @property
    def latency(self) -> np.ndarray:
        """What a stage adds to the time of the first microbatch: itself, and what it receives."""
        return self.forward + self.backward + (self.transfer.sum(-1) + self.delay)[:, None]

    def loads(self, phases: bool) -> np.ndarray:
        """(from, to, how many maxima): F and B, or their sum."""
        both = self.transfer[:, None] + self.transfer[None, :]
        pair = np.stack([self.forward, self.backward], -1) + both
        return pair if phases else pair.sum(-1, keepdims=True)

    def memory(self, in_flight: int) -> np.ndarray:
        return self.held + in_flight * self.in_flight


def prices(costs: Costs, ends: Sequence[int]) -> Prices:
    """Price all stages between boundaries ``ends``, the first 0 and the last N."""
    at = np.asarray(ends)
    sums = [np.concatenate([[0.0], np.cumsum(a)]) for a in (costs.forward, costs.backward, costs.saved)]
    forward, backward, saved = (s[at][None, :] - s[at][:, None] for s in sums)
    used = [{i for k in range(a, b) for i in costs.uses[k]} for a, b in itertools.pairwise(at)]
    weights = np.array([(i.forward, i.backward, i.saved, i.held) for i in costs.items]).reshape(-1, 4)
    distinct = _distinct(weights, used)
    rest = np.stack([s[-1] - s[at] for s in sums[:2]], -1)
    return Prices(
        at,
        forward + distinct[..., 0],
        backward + distinct[..., 1],
        costs.transfer[at],
        costs.delay[at],
        distinct[..., 3],
        saved + distinct[..., 2] + costs.received[at][:, None],
        rest,
    )


def _distinct(weights: np.ndarray, used: Sequence[set[int]]) -> np.ndarray:
    """[i, j]: the sums of the weights of all that the blocks ``i .. j-1`` use."""
    count = len(used)
    found = np.zeros((count + 1, count + 1, weights.shape[1]))
    column = np.zeros((count + 1, weights.shape[1]))
    last = np.full(len(weights), -1)
    for j, items in enumerate(used, 1):
        for item in sorted(items):  # new to every stage that begins after its last use
            column[last[item] + 1 : j] += weights[item]
            last[item] = j - 1
        found[:, j] = column
    return found


def schedule_seconds(found: Prices, stages: Sequence[tuple[int, int]], terms: Terms) -> float:
    """T of a plan, its stages given as (row, column) of ``found``."""
    rows, columns = zip(*stages, strict=True)
    period = found.loads(terms.phases)[rows, columns].max(0).sum()
    return float(found.latency[rows, columns].sum() + (terms.microbatches - 1) * period)


def evaluate(costs: Costs, ends: Sequence[int], terms: Terms) -> float:
    """T of the plan with boundaries ``ends``."""
    found = prices(costs, ends)
    return schedule_seconds(found, [(s, s + 1) for s in range(len(ends) - 1)], terms)


def memory_of(costs: Costs, ends: Sequence[int], terms: Terms) -> list[float]:
    """Bytes of each stage of a plan."""
    found, count = prices(costs, ends), len(ends) - 1
    return [float(found.memory(terms.in_flight(s, count))[s, s + 1]) for s in range(count)]


def alternatives(
    costs: Costs, ends: Sequence[int], cut: int, places: Iterable[int], pins: Pins, terms: Terms
) -> dict[int, float]:
    """T with boundary number ``cut`` of a plan moved to each of ``places`` where pins and memory allow it,
    though it be forced."""
    places = [p for p in places if pins.open[p]]
    everywhere = sorted({*ends, *places})
    number = {end: i for i, end in enumerate(everywhere)}
    found = prices(costs, everywhere)
    allowed = _allowed(found.ends, replace(pins, forced=pins.forced - {ends[cut]}))
    limits = _limits(found, pins.num_stages, terms)
    seconds = {}
    for place in places:
        moved = [number[e] for e in (*ends[:cut], place, *ends[cut + 1 :])]
        stages = list(itertools.pairwise(moved))
        if all(allowed[s][stage] and limits[s][stage] for s, stage in enumerate(stages)):
            seconds[place] = schedule_seconds(found, stages, terms)
    return seconds


def _limits(found: Prices, count: int, terms: Terms) -> list[np.ndarray]:
    """For each stage, which (from, to) fit in memory."""
    most = math.inf if terms.memory is None else terms.memory * (1 + _SLACK)
    return [found.memory(terms.in_flight(s, count)) <= most for s in range(count)]


# --- solving ---------------------------------------------------------------------------------------


def solve(costs: Costs, pins: Pins, terms: Terms, blocks: int | None = None) -> list[int] | None:
    """The boundaries of the best plan; None where there is none. ``blocks`` bounds how many are tried at a
    time (None: all are, and the plan is optimal)."""
    every = _open(pins)
    if blocks is None or len(every) - 1 <= blocks:
        return _best(costs, every, pins, terms)
    ends = _thinned(costs, every, pins, blocks)
    best = _best(costs, ends, pins, terms)
    if best is None:
        small = least_memory(costs, pins, terms, blocks)
        if small is None or terms.memory is None or max(memory_of(costs, small, terms)) > terms.memory:
            return None
        best = _best(costs, sorted({*ends, *small}), pins, terms)
        assert best is not None  # ``small`` is one
    return _closer(best, every, costs, pins, blocks, lambda e: _best(costs, e, pins, terms),
                   lambda e: evaluate(costs, e, terms))  # fmt: skip


def least_memory(costs: Costs, pins: Pins, terms: Terms, blocks: int | None = None) -> list[int] | None:
    """The plan whose largest stage is smallest; None where no plan keeps the pins."""

    def best(ends: Sequence[int]) -> list[int] | None:
        found, count = prices(costs, ends), pins.num_stages
        loads = [found.memory(terms.in_flight(s, count))[..., None] for s in range(count)]
        rest = np.zeros((len(ends), 1))
        limits = [np.ones_like(found.forward, bool)] * count
        return _plan(found, loads, np.zeros_like(found.forward), rest, 2, pins, limits)

    every = _open(pins)
    if blocks is None or len(every) - 1 <= blocks:
        return best(every)
    first = best(_thinned(costs, every, pins, blocks))
    if first is None:
        return None
    return _closer(
        first, every, costs, pins, blocks, best, lambda e: max(memory_of(costs, e, terms))
    )


def _open(pins: Pins) -> list[int]:
    return [0, *np.flatnonzero(pins.open[1:-1]) + 1, len(pins.open) - 1]


def _closer(
    plan: list[int],
    every: Sequence[int],
    costs: Costs,
    pins: Pins,
    blocks: int,
    best: Callable[[Sequence[int]], list[int] | None],
    value: Callable[[Sequence[int]], float],
) -> list[int]:
    """``plan``, improved while boundaries near its own make it better."""
    last, width, narrow = value(plan), len(every), max(1, blocks // (2 * len(plan)))
    while True:
        width = max(2 * width // 3, narrow)
        near = set(plan)
        for end in plan[1:-1]:
            place = int(np.searchsorted(every, end))
            near.update(every[max(0, place - width) : place + width + 1])
        found = best(_thinned(costs, sorted(near), pins, blocks, keep=plan))
        assert found is not None  # ``plan`` is one
        plan, before, last = found, last, value(found)
        if width == narrow and last >= before * (1 - _BETTER):
            return plan


def _best(costs: Costs, ends: Sequence[int], pins: Pins, terms: Terms) -> list[int] | None:
    """The best plan with boundaries among ``ends``."""
    found, count = prices(costs, ends), pins.num_stages
    limits = _limits(found, count, terms)
    single = found.loads(False)
    zero = np.zeros_like(found.forward)
    total = found.rest.sum(-1, keepdims=True)
    first = _plan(found, [single] * count, zero, total, 2, pins, limits)
    if first is None:
        return None
    bound = evaluate(costs, first, terms)
    loads = found.loads(terms.phases)
    rest = found.rest if terms.phases else total
    return _plan(
        found, [loads] * count, found.latency, rest, terms.microbatches, pins, limits, bound
    )


def _plan(
    found: Prices,
    loads: Sequence[np.ndarray],
    latency: np.ndarray,
    rest: np.ndarray,
    microbatches: int,
    pins: Pins,
    limits: Sequence[np.ndarray],
    bound: float = math.inf,
) -> list[int] | None:
    """The plan with the least sum of ``latency`` + (microbatches - 1) * sum of maxima of ``loads``.

    ``rest`` (boundary, maxima) is a lower bound of the loads behind it. Plans dearer than ``bound`` are left
    out.
    """
    ends, count = found.ends, pins.num_stages
    allowed = [a & m for a, m in zip(_allowed(ends, pins), limits, strict=True)]
    last = len(ends) - 1
    weigh = latency.any()
    # A level's states: the boundary reached, (latency, maxima), and the state each came from.
    levels = [(np.zeros(1, int), np.zeros((1, 1 + rest.shape[1])), np.zeros(1, int))]
    for s in range(count):
        at, costs, _ = levels[-1]
        left = count - 1 - s
        reached, kept, came = [], [], []
        for j in range(s + 1, last + 1 - left) if left else [last]:
            rows = np.flatnonzero(allowed[s][at, j])
            if not len(rows):
                continue
            i = at[rows]
            total = costs[rows, :1] + latency[i, j, None]
            most = np.maximum(costs[rows, 1:], loads[s][i, j])
            cost = np.concatenate([total, most], 1)
            least = total[:, 0] + (rest[j].sum() if weigh else 0.0)
            share = np.maximum(most, rest[j] / left) if left else most
            fits = np.flatnonzero(least + (microbatches - 1) * share.sum(1) <= bound * (1 + 1e-9))
            chosen = fits[_pareto(cost[fits])]
            reached.append(np.full(len(chosen), j))
            kept.append(cost[chosen])
            came.append(rows[chosen])
        if not reached:
            return None
        levels.append((np.concatenate(reached), np.concatenate(kept), np.concatenate(came)))
    reached_last = levels[-1][1]
    if not len(reached_last):
        return None
    state = int(np.argmin(reached_last[:, 0] + (microbatches - 1) * reached_last[:, 1:].sum(1)))
    plan = [last]
    for level in range(count, 0, -1):
        state = int(levels[level][2][state])
        plan.append(int(levels[level - 1][0][state]))
    return [int(ends[p]) for p in reversed(plan)]


def _pareto(costs: np.ndarray) -> np.ndarray:
    """Indices of the rows that no other is as good as in every column, one of equal ones."""
    order = np.lexsort(costs.T[::-1])
    kept = []
    while len(order):
        kept.append(order[0])
        better = costs[order] < costs[order[0]] * (1 - _SLACK)
        order = order[better.any(1)]
    return np.array(kept, dtype=int)


def _allowed(ends: np.ndarray, pins: Pins) -> list[np.ndarray]:
    """For each stage, which (from, to) keep the pins."""
    forced = np.zeros(len(pins.open), int)
    forced[list(pins.forced)] = 1
    passed = np.cumsum(forced)
    # No forced boundary strictly inside: as many up to before ``to`` as up to ``from``.
    whole = passed[ends - 1][None, :] == passed[ends][:, None]
    whole &= ends[None, :] > ends[:, None]
    may_not = np.concatenate([np.zeros((pins.num_stages, 1), int), np.cumsum(~pins.may, 1)], 1)[:, ends]
    return [whole & (row[None, :] == row[:, None]) for row in may_not]


def reachable(may: np.ndarray) -> tuple[np.ndarray, int | None]:
    """``may`` (S, N) without what the order of stages rules out: stages never go down along the costs.

    The second is the first position for which no stage is left, or None.
    """
    count, length = may.shape
    stages = np.arange(count)
    low, high = np.zeros(length, int), np.full(length, count - 1)
    now = 0
    for k in range(length):
        ahead = np.flatnonzero(may[now:, k])
        if not len(ahead):
            return may, k
        low[k] = now = now + int(ahead[0])
    now = count - 1
    for k in range(length - 1, -1, -1):
        high[k] = now = int(np.flatnonzero(may[: now + 1, k])[-1])
    return may & (stages[:, None] >= low) & (stages[:, None] <= high), None


def _thinned(
    costs: Costs, ends: Sequence[int], pins: Pins, blocks: int, keep: Iterable[int] = ()
) -> list[int]:
    """At most ``blocks`` blocks between some of the boundaries ``ends``; those that are pinned stay.

    The cheapest block is merged with its neighbour over the boundary that more crosses, and of two alike
    with the cheaper one.
    """
    changes = np.flatnonzero((pins.may[:, 1:] != pins.may[:, :-1]).any(0)) + 1
    stay = {0, len(costs), *pins.forced, *keep, *changes.tolist()}
    sums = np.concatenate([[0.0], np.cumsum(costs.forward + costs.backward)])
    crossing = costs.transfer.sum(-1)
    after = dict(itertools.pairwise(ends))
    before = {b: a for a, b in after.items()}
    heap = [(sums[b] - sums[a], a, b) for a, b in after.items()]
    heapq.heapify(heap)
    while len(after) > blocks and heap:
        _, start, end = heapq.heappop(heap)
        if after.get(start) != end:
            continue  # merged since
        sides = [(-crossing[e], sums[b] - sums[a], e) for e, a, b in (
            (start, before.get(start, start), start), (end, end, after.get(end, end)),
        ) if e not in stay]  # fmt: skip
        if not sides:
            continue
        gone = min(sides)[2]
        a, b = before.pop(gone), after.pop(gone)
        after[a], before[b] = b, a
        heapq.heappush(heap, (sums[b] - sums[a], a, b))
    return [0, *sorted(before)]
