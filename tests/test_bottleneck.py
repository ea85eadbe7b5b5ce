"""Cuts of a chain: against brute force, with few blocks, on ten thousand positions."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodist.passes.analysis.bottleneck import (
    Costs,
    Item,
    Pins,
    Terms,
    alternatives,
    evaluate,
    least_memory,
    memory_of,
    reachable,
    solve,
)


def in_flight(stage: int, num_stages: int) -> int:
    return num_stages - stage


def free(length: int, num_stages: int) -> Pins:
    return Pins(np.ones(length + 1, bool), frozenset(), np.ones((num_stages, length), bool))


def by_hand(costs: Costs, ends: Sequence[int], terms: Terms) -> tuple[float, list[float]]:
    """T and the stages' memory, from the definitions."""
    count, latency, loads, memory = len(ends) - 1, 0.0, [], []
    for s, (i, j) in enumerate(itertools.pairwise(ends)):
        items = [costs.items[n] for n in {n for k in range(i, j) for n in costs.uses[k]}]
        f = sum(costs.forward[i:j]) + sum(n.forward for n in items)
        b = sum(costs.backward[i:j]) + sum(n.backward for n in items)
        (xi, yi), (xj, yj) = costs.transfer[i], costs.transfer[j]
        latency += f + b + xi + yi + costs.delay[i]
        loads.append((f + xi + xj, b + yi + yj))
        each = sum(costs.saved[i:j]) + sum(n.saved for n in items) + costs.received[i]
        memory.append(sum(n.held for n in items) + terms.in_flight(s, count) * each)
    if terms.phases:
        period = max(f for f, _ in loads) + max(b for _, b in loads)
    else:
        period = max(f + b for f, b in loads)
    return latency + (terms.microbatches - 1) * period, memory


def plans(length: int, pins: Pins) -> Sequence[list[int]]:
    """All plans that keep the pins."""
    found = []
    for inner in itertools.combinations(range(1, length), pins.num_stages - 1):
        ends = [0, *inner, length]
        kept = all(pins.open[b] for b in inner) and pins.forced <= set(inner)
        stages = enumerate(itertools.pairwise(ends))
        if kept and all(pins.may[s, i:j].all() for s, (i, j) in stages):
            found.append(ends)
    return found


numbers = st.integers(0, 20).map(float)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Costs, Pins, Terms]:
    length = draw(st.integers(2, 9))
    count = draw(st.integers(1, min(4, length)))
    items = draw(st.lists(st.builds(Item, st.just("w"), numbers, numbers, numbers, numbers), max_size=3))
    uses = st.sets(st.integers(0, len(items) - 1)) if items else st.just(set())
    row = lambda n: np.array(draw(st.lists(numbers, min_size=n, max_size=n)))  # noqa: E731
    inside = np.zeros(length + 1)
    inside[1:-1] = 1
    costs = Costs(
        row(length), row(length), row(length),
        np.stack([row(length + 1), row(length + 1)], -1) * inside[:, None],
        row(length + 1) * inside, row(length + 1) * inside, items, [draw(uses) for _ in range(length)],
    )  # fmt: skip
    pins = free(length, count)
    for boundary in draw(st.sets(st.integers(1, length - 1), max_size=2)):
        pins.open[boundary] = False
    if draw(st.booleans()):
        pins = Pins(pins.open, frozenset(draw(st.sets(st.integers(1, length - 1), max_size=1))), pins.may)
    for s, k in draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, length - 1)), max_size=2)):
        pins.may[s, k] = False
    memory = draw(st.sampled_from([None, 40.0, 80.0, 120.0, 200.0, 400.0]))
    return costs, pins, Terms(draw(st.integers(1, 8)), in_flight, draw(st.booleans()), memory)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_as_brute_force(problem: tuple[Costs, Pins, Terms]) -> None:
    costs, pins, terms = problem
    best, least = math.inf, math.inf
    for ends in plans(len(costs), pins):
        seconds, memory = by_hand(costs, ends, terms)
        least = min(least, max(memory))
        if terms.memory is None or max(memory) <= terms.memory:
            best = min(best, seconds)
    found = solve(costs, pins, terms)
    if found is None:
        assert best == math.inf
    else:
        assert found in plans(len(costs), pins)
        # An even plan may cost a thousandth; with these numbers nothing is as close as that.
        assert evaluate(costs, found, terms) == pytest.approx(best, rel=1e-3)
        seconds, memory = by_hand(costs, found, terms)
        assert seconds == pytest.approx(best, rel=1e-3)
        assert memory_of(costs, found, terms) == pytest.approx(memory)
        assert terms.memory is None or max(memory) <= terms.memory
        for cut in range(1, pins.num_stages):
            others = alternatives(costs, found, cut, range(found[cut - 1] + 1, found[cut + 1]), pins, terms)
            for place, other in others.items():
                moved = [*found[:cut], place, *found[cut + 1 :]]
                assert other == pytest.approx(by_hand(costs, moved, terms)[0])
                assert other >= best * (1 - 1e-9) or found[cut] in pins.forced
    small = least_memory(costs, pins, terms)
    assert (math.inf if small is None else max(by_hand(costs, small, terms)[1])) == pytest.approx(least)


def test_one_pair_for_each_state_would_not_do() -> None:
    """The best plan need not contain the best plan of its first stages: maxima do not add. Whoever keeps
    one pair of maxima for each (stage, end) finds a period of 20."""
    forward, backward = np.array([1.0, 5, 6, 5, 6]), np.array([5.0, 4, 1, 1, 1])
    zero = np.zeros(6)
    costs = Costs(forward, backward, zero[:5], np.zeros((6, 2)), zero, zero, [], [()] * 5)
    found = solve(costs, free(5, 3), Terms(1001, in_flight, phases=True))
    assert found is not None
    f, b = (max(sum(a[i:j]) for i, j in itertools.pairwise(found)) for a in (forward, backward))
    assert f + b == 16


def test_stages_that_do_not_set_the_pace_are_even() -> None:
    """One large node sets the pace: the others share what is left, however little that would matter."""
    forward = np.array([1.0] * 12 + [9.0])
    zero = np.zeros(14)
    costs = Costs(forward, forward, zero[:13], np.zeros((14, 2)), zero, zero, [], [()] * 13)
    for phases in (False, True):
        terms = Terms(8, in_flight, phases)
        assert solve(costs, free(13, 5), terms) == [0, 3, 6, 9, 12, 13]


def layered(layers: int, period: int, seed: int, tail: float) -> Costs:
    """Layers of nodes of uneven cost, between which little crosses; and a large last node."""
    rng = np.random.default_rng(seed)
    length = layers * period + 1
    forward = np.tile(rng.pareto(1.5, period), layers) * 1e-4
    forward = np.append(forward, tail * forward.sum())
    backward = forward * rng.uniform(1.5, 2.5, length)
    crossing = np.append(np.tile(rng.uniform(1, 4, period), layers), [1.0, 1.0])
    crossing[:-1:period] = 1
    crossing[[0, -1]] = 0
    transfer = np.stack([crossing, crossing], -1) * 2e-5
    weights = (Item(f"w{k}", held=rng.uniform(0, 9)) for k in range(length))
    items = [Item("table", 1e-5, 2e-5, 100, 1), *weights]
    uses = [(0, k + 1) if k % period == 1 or k == length - 1 else (k + 1,) for k in range(length)]
    saved = rng.uniform(0, 1, length)
    return Costs(forward, backward, saved, transfer, np.zeros(length + 1), crossing, items, uses)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("phases", [False, True])
def test_few_blocks_lose_at_most_a_hundredth(seed: int, phases: bool) -> None:
    costs = layered(10, 17, seed, tail=0.1)
    pins, bounded = free(len(costs), 5), Terms(8, in_flight, phases)
    least = least_memory(costs, pins, bounded)
    assert least is not None
    for memory in (None, 1.05 * max(memory_of(costs, least, bounded))):
        terms = Terms(8, in_flight, phases, memory)
        best, found = solve(costs, pins, terms), solve(costs, pins, terms, blocks=24)
        assert best is not None and found is not None
        assert evaluate(costs, best, terms) <= evaluate(costs, found, terms) * (1 + 1e-3)
        assert evaluate(costs, found, terms) <= 1.01 * evaluate(costs, best, terms)
        assert memory is None or max(memory_of(costs, found, terms)) <= memory


@pytest.mark.parametrize("count", [4, 16])
def test_ten_thousand_positions(count: int) -> None:
    costs = layered(250, 40, 0, tail=0.02)
    terms = Terms(32, in_flight, phases=True)
    start = time.process_time()
    found = solve(costs, free(len(costs), count), terms, blocks=128)
    assert time.process_time() - start < 60
    assert found is not None
    total = (costs.forward + costs.backward).sum()
    assert evaluate(costs, found, terms) < 1.1 * total * (1 + 31 / count)


def test_reachable() -> None:
    may = np.ones((3, 5), bool)
    may[:, 1] = [False, True, False]
    may[:, 3] = [True, False, True]  # owned by the first and the last
    possible, conflict = reachable(may)
    assert conflict is None
    assert possible.T.tolist() == [
        [True, True, False], [False, True, False], [False, True, True], [False, False, True],
        [False, False, True],
    ]  # fmt: skip
    may[:, 4] = [True, False, False]
    assert reachable(may)[1] == 4
