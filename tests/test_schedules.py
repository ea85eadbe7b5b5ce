"""Schedules: what the lists promise, for any number of ranks, stages and microbatches."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodist.runtime.schedules import (
    KINDS,
    Action,
    Schedule,
    ScheduleError,
    Span,
    Step,
    bubble,
    check,
    ideal_bubble,
    in_flight,
    mate,
    schedule,
    timeline,
)

UNITS = {Step.FORWARD: 1.0, Step.BACKWARD: 2.0, Step.BACKWARD_INPUT: 1.0, Step.BACKWARD_WEIGHT: 1.0}


def units(action: Action) -> float:
    return UNITS.get(action.step, 0.0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, int, int, int]:
    kind = draw(st.sampled_from(KINDS))
    ranks = draw(st.integers(1, 6))
    stages = ranks * (1 if kind == "1f1b" else draw(st.integers(1, 3)))
    return kind, ranks, stages, draw(st.integers(1, 20))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_every_schedule_is_valid(case: tuple[str, int, int, int]) -> None:
    """Everything once, after what it needs, and never waiting in a circle even where sends wait."""
    made = schedule(*case)
    check(made, {s: in_flight(*case, s) for s in range(made.num_stages)})
    kind, ranks, stages, microbatches = case
    steps = [a.step for actions in made.lists for a in actions]
    assert steps.count(Step.FORWARD) == stages * microbatches
    crossings = (stages - 1) * microbatches if ranks > 1 else 0
    assert steps.count(Step.SEND_FORWARD) == steps.count(Step.RECEIVE_FORWARD) == crossings
    assert steps.count(Step.SEND_BACKWARD) == (0 if kind == "forward" else crossings)


@settings(max_examples=60, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_time_on_paper(case: tuple[str, int, int, int], random: object) -> None:
    """Whatever actions take, each begins after what it needs, and a rank does one thing at a time."""
    made = schedule(*case)
    taken: dict[Action, float] = {}

    def seconds(action: Action) -> float:
        return taken.setdefault(action, random.uniform(0, 3))  # type: ignore[attr-defined]

    spans = timeline(made.lists, seconds)
    ends = {s.action: s.end for each in spans for s in each}
    for each in spans:
        computed = [s for s in each if not s.action.step.is_transfer]
        assert all(a.end <= b.start for a, b in pairwise(computed))
        for span in each:
            assert span.start >= max((ends[n] for n in needs(span.action, ends)), default=0.0)
    assert 0 <= bubble(spans) < 1


def needs(action: Action, ends: dict[Action, float]) -> list[Action]:
    """Said anew, beside the module's own way of saying it: of those, the ones that are done at all."""
    step, s, m = action.step, action.stage, action.microbatch
    found = {
        Step.FORWARD: [Action(Step.FORWARD, s - 1, m), Action(Step.RECEIVE_FORWARD, s, m)],
        Step.SEND_FORWARD: [Action(Step.FORWARD, s, m)],
        Step.RECEIVE_FORWARD: [Action(Step.FORWARD, s - 1, m)],
        Step.SEND_BACKWARD: [Action(Step.BACKWARD, s, m), Action(Step.BACKWARD_INPUT, s, m)],
        Step.RECEIVE_BACKWARD: [Action(Step.BACKWARD, s + 1, m), Action(Step.BACKWARD_INPUT, s + 1, m)],
        Step.BACKWARD_WEIGHT: [Action(Step.BACKWARD_INPUT, s, m)],
    }.get(step) or [
        Action(Step.FORWARD, s, m),
        Action(step, s + 1, m),
        Action(Step.RECEIVE_BACKWARD, s, m),
    ]
    return [a for a in found if a in ends]


def held(made: Schedule, rank: int) -> int:
    return made.in_flight_of_rank(rank)


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("microbatches", [1, 3, 4, 9, 16])
def test_in_flight(ranks: int, microbatches: int) -> None:
    """What the module's table says."""
    for rank in range(ranks):
        assert in_flight("gpipe", ranks, 2 * ranks, microbatches, ranks + rank) == microbatches
        assert in_flight("1f1b", ranks, ranks, microbatches, rank) == min(microbatches, ranks - rank)
        assert in_flight("forward", ranks, ranks, microbatches, rank) == 0
    for stages in (2, 3):
        count = max(1, microbatches // ranks)
        largest = -(-microbatches // count)
        whole = stages * microbatches
        for rank in range(ranks):
            interleaved = schedule("interleaved", ranks, stages * ranks, microbatches)
            most = (stages - 1) * largest + 2 * (ranks - 1 - rank) + 1
            assert held(interleaved, rank) == min(whole, most)
            zero_bubble = schedule("zero-bubble", ranks, stages * ranks, microbatches)
            assert held(zero_bubble, rank) <= stages * largest
    for rank in range(ranks):
        assert held(schedule("zero-bubble", ranks, ranks, microbatches), rank) <= min(microbatches, ranks)


def test_what_is_received_ahead() -> None:
    assert schedule("1f1b", 4, 4, 8).received_ahead(0) == (0, 1)
    assert schedule("1f1b", 4, 4, 8).received_ahead(3)[1] == 0
    for kind in KINDS:
        made = schedule(kind, 4, 4 if kind == "1f1b" else 8, 9)
        for stage in range(1, made.num_stages):
            assert 1 <= made.received_ahead(stage)[0] <= 9


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("per_rank", [1, 2, 3])
@pytest.mark.parametrize("more", [0, 1, 9])
def test_bubbles_are_those_of_theory(ranks: int, per_rank: int, more: int) -> None:
    """Equal stages, transfers that take no time; also where microbatches are no multiple of the ranks."""
    stages, microbatches = ranks * per_rank, ranks + more
    for kind in KINDS:
        if kind == "1f1b" and per_rank > 1:
            continue
        found = bubble(timeline(schedule(kind, ranks, stages, microbatches).lists, units))
        expected = ideal_bubble(kind, ranks, stages, microbatches)
        assert found == pytest.approx(expected), kind


def test_with_fewer_microbatches_than_ranks() -> None:
    """One microbatch goes through all stages and back, and nothing runs beside it."""
    spans = timeline(schedule("interleaved", 3, 6, 1).lists, units)
    assert bubble(spans) == pytest.approx(1 - 1 / 3)


def test_a_list_as_text() -> None:
    lists = schedule("zero-bubble", 2, 2, 3).lists
    short = {
        Step.FORWARD: "F",
        Step.BACKWARD_INPUT: "I",
        Step.BACKWARD_WEIGHT: "W",
        Step.SEND_FORWARD: "f>",
        Step.RECEIVE_FORWARD: ">f",
        Step.SEND_BACKWARD: "b>",
        Step.RECEIVE_BACKWARD: ">b",
    }
    text = [" ".join(f"{short[a.step]}{a.microbatch}" for a in actions) for actions in lists]
    assert text == [
        "F0 f>0 F1 f>1 >b0 I0 W0 >b1 F2 f>2 I1 W1 >b2 I2 W2",
        ">f0 F0 >f1 I0 b>0 F1 I1 b>1 W0 >f2 F2 I2 b>2 W1 W2",
    ]
    assert str(lists[0][0]) == "forward of microbatch 0 on stage 0"


def test_what_cannot_be_made() -> None:
    with pytest.raises(ScheduleError, match="no schedule is called 'dualpipe'"):
        schedule("dualpipe", 2, 2, 2)
    with pytest.raises(ScheduleError, match=r"3 stages of 4 microbatches .* 2 ranks"):
        schedule("interleaved", 2, 3, 4)
    with pytest.raises(ScheduleError, match="one stage a rank, not 4 on 2 ranks"):
        schedule("1f1b", 2, 4, 4)


# --- lists that are wrong ------------------------------------------------------------------------------


def changed(made: Schedule, rank: int, actions: list[Action]) -> Schedule:
    lists = list(made.lists)
    lists[rank] = tuple(actions)
    return replace(made, lists=tuple(lists))


GOOD = schedule("1f1b", 2, 2, 3)


def test_the_check_finds_what_is_wrong() -> None:
    first, second = (list(actions) for actions in GOOD.lists)
    with pytest.raises(ScheduleError, match="is done 2 times"):
        check(changed(GOOD, 0, [*first, first[0]]))
    with pytest.raises(ScheduleError, match="does not go through stage 0 once"):
        check(changed(GOOD, 0, first[:-1]))
    with pytest.raises(ScheduleError, match="rank 1 does not have the stage of"):
        check(changed(GOOD, 1, [*second, Action(Step.FORWARD, 2, 0)]))
    with pytest.raises(ScheduleError, match="out of order"):
        check(changed(GOOD, 0, [first[2], first[3], first[0], first[1], *first[4:]]))
    with pytest.raises(ScheduleError, match="stage 0 holds 2 microbatches at once, and may hold 1"):
        check(GOOD, {0: 1, 1: 1})
    lost = [a for a in first if a.step is not Step.SEND_FORWARD or a.microbatch != 1]
    with pytest.raises(ScheduleError, match=r"a transfer has one end only|different orders"):
        check(changed(GOOD, 0, lost))


def test_circles_and_crossed_transfers_are_found() -> None:
    first, second = (list(actions) for actions in GOOD.lists)
    late = Action(Step.RECEIVE_FORWARD, 1, 0)
    with pytest.raises(ScheduleError, match=r"without end: rank 0 in .*, rank 1 in"):
        check(changed(GOOD, 1, [a for a in second if a != late] + [late]))
    sends = [i for i, a in enumerate(first) if a.step is Step.SEND_FORWARD]
    crossed = [*first]
    crossed[sends[0]], crossed[sends[1]] = first[sends[1]], first[sends[0]]
    with pytest.raises(ScheduleError, match=r"different orders|without end"):
        timeline(changed(GOOD, 0, crossed).lists, units)


def test_a_transfer_waits_for_both_ends_and_for_the_pair() -> None:
    lists = [
        [Action(step, 0, m) for m in (0, 1) for step in (Step.FORWARD, Step.SEND_FORWARD)],
        [Action(Step.RECEIVE_FORWARD, 1, m) for m in (0, 1)] + [Action(Step.FORWARD, 1, m) for m in (0, 1)],
    ]
    seconds = {Step.FORWARD: 1.0, Step.SEND_FORWARD: 5.0}
    spans = timeline(lists, lambda a: seconds[a.step])
    assert spans[1] == [
        Span(lists[1][0], 1, 6),
        Span(lists[1][1], 6, 11),
        Span(lists[1][2], 6, 7),
        Span(lists[1][3], 11, 12),
    ]
    assert timeline(lists, lambda a: seconds[a.step], blocking=True)[0][2].start == 6


def test_the_other_end() -> None:
    for step in (Step.SEND_FORWARD, Step.RECEIVE_FORWARD, Step.SEND_BACKWARD, Step.RECEIVE_BACKWARD):
        action = Action(step, 2, 1)
        assert mate(mate(action)) == action != mate(action)
    assert mate(Action(Step.SEND_BACKWARD, 2, 1)) == Action(Step.RECEIVE_BACKWARD, 1, 1)
