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
Where one stage sets the pace, much of the rest is free: of the plans with no larger maxima, and a latency
larger by no more than a thousandth of T, the most even one is taken: that of the least sum of squares of
F + B. It holds less memory, and errors of the costs make less of a difference.

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

_SLACK = 1e-12  # relative: what is equal
_ROUNDING = 1e-9  # relative: what sums in another order may differ by
_EVEN = 1e-3  # of T: what an even plan may cost
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
        best = _fastest(costs, every, pins, terms)
        return None if best is None else _evened(costs, best, every, pins, terms)
    ends = _thinned(costs, every, pins, blocks)
    best = _fastest(costs, ends, pins, terms)
    if best is None:
        best = least_memory(costs, pins, terms, blocks)
        if best is None or terms.memory is None or max(memory_of(costs, best, terms)) > terms.memory:
            return None
    best = _closer(best, every, costs, pins, blocks, lambda e: _fastest(costs, e, pins, terms),
                   lambda e: evaluate(costs, e, terms))  # fmt: skip
    return _evened(costs, best, ends, pins, terms)


def least_memory(costs: Costs, pins: Pins, terms: Terms, blocks: int | None = None) -> list[int] | None:
    """The plan whose largest stage is smallest; None where no plan keeps the pins."""

    def best(ends: Sequence[int]) -> list[int] | None:
        found, count = prices(costs, ends), pins.num_stages
        held = [found.memory(terms.in_flight(s, count))[..., None] for s in range(count)]
        return _plan(found.ends, _nothing(found), held, _allowed(found.ends, pins), _largest)

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


def _fastest(costs: Costs, ends: Sequence[int], pins: Pins, terms: Terms) -> list[int] | None:
    """The best plan with boundaries among ``ends``."""
    found, count, rounds = prices(costs, ends), pins.num_stages, terms.microbatches - 1
    limits = _limits(found, count, terms)
    allowed = [a & m for a, m in zip(_allowed(found.ends, pins), limits, strict=True)]
    both = found.loads(False)
    first = _plan(found.ends, _nothing(found), [both] * count, allowed, _largest)
    if first is None:
        return None
    bound = evaluate(costs, first, terms) * (1 + _ROUNDING)
    loads, latency = found.loads(terms.phases), found.latency[..., None]
    work = found.rest.sum(-1)
    rest = found.rest if terms.phases else work[:, None]

    def seconds(states: np.ndarray) -> np.ndarray:
        return states[:, 0] + rounds * states[:, 1:].sum(1)

    def promising(states: np.ndarray, j: int, left: int) -> np.ndarray:
        least = np.maximum(states[:, 1:], rest[j] / max(left, 1))
        return states[:, 0] + work[j] + rounds * least.sum(1) <= bound

    best = _plan(found.ends, latency, [loads] * count, allowed, seconds, promising)
    assert best is not None  # ``first`` is one
    return best


def _evened(costs: Costs, plan: list[int], ends: Sequence[int], pins: Pins, terms: Terms) -> list[int]:
    """The most even plan with boundaries among ``ends`` that is as good as ``plan``."""
    found, count = prices(costs, sorted({*ends, *plan})), pins.num_stages
    number = {int(end): i for i, end in enumerate(found.ends)}
    stages = list(itertools.pairwise(number[e] for e in plan))
    rows, columns = zip(*stages, strict=True)
    loads, both, work = found.loads(terms.phases), found.loads(False), found.rest.sum(-1)
    pace = (loads <= loads[rows, columns].max(0) * (1 + _ROUNDING)).all(-1)
    longest = found.latency[rows, columns].sum() + _EVEN * schedule_seconds(found, stages, terms)
    limits = _limits(found, count, terms)
    even = _plan(
        found.ends,
        np.concatenate([found.latency[..., None], both**2], -1),
        [_nothing(found)] * count,
        [a & m & pace for a, m in zip(_allowed(found.ends, pins), limits, strict=True)],
        lambda states: states[:, 1],
        lambda states, j, left: states[:, 0] + work[j] <= longest,
    )
    assert even is not None  # ``plan`` is one
    return even


def _nothing(found: Prices) -> np.ndarray:
    return np.zeros((*found.forward.shape, 0))


def _largest(states: np.ndarray) -> np.ndarray:
    return states[:, 0]


def _plan(
    ends: np.ndarray,
    sums: np.ndarray,
    maxima: Sequence[np.ndarray],
    allowed: Sequence[np.ndarray],
    value: Callable[[np.ndarray], np.ndarray],
    promising: Callable[[np.ndarray, int, int], np.ndarray] | None = None,
) -> list[int] | None:
    """The plan of least ``value``, which grows with every column of a state.

    A state's columns are the sums over stages of ``sums`` (from, to, columns), then the maxima over stages
    of ``maxima`` (for each stage likewise). ``allowed`` says for each stage which (from, to) it may be.
    ``promising(states, j, left)`` is False for states that have reached ``ends[j]``, with so many stages
    left, and are not worth going on with.
    """
    count, last, width = len(maxima), len(ends) - 1, sums.shape[-1]
    # A level's states: the boundary reached, the columns, and the state of the level before.
    levels = [(np.zeros(1, int), np.zeros((1, width + maxima[0].shape[-1])), np.zeros(1, int))]
    for s in range(count):
        at, states, _ = levels[-1]
        left = count - 1 - s
        reached, kept, came = [], [], []
        for j in range(s + 1, last + 1 - left) if left else [last]:
            rows = np.flatnonzero(allowed[s][at, j])
            if not len(rows):
                continue
            i, before = at[rows], states[rows]
            most = np.maximum(before[:, width:], maxima[s][i, j])
            after = np.concatenate([before[:, :width] + sums[i, j], most], 1)
            fits = np.arange(len(after)) if promising is None else np.flatnonzero(promising(after, j, left))
            chosen = fits[_pareto(after[fits])]
            reached.append(np.full(len(chosen), j))
            kept.append(after[chosen])
            came.append(rows[chosen])
        if not sum(map(len, reached)):
            return None
        levels.append((np.concatenate(reached), np.concatenate(kept), np.concatenate(came)))
    state = int(np.argmin(value(levels[-1][1])))
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
