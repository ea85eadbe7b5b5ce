"""Pipeline schedules: which microbatch each rank takes through which stage, and when values travel.

A model is cut into ``S`` *stages*, run on ``P`` ranks, ``v = S / P`` on each: stage ``s`` on rank ``s % P``.
A batch is cut into ``M`` *microbatches*. An :class:`Action` is one thing that a rank does with one microbatch
on one of its stages; a :class:`Schedule` is a list of actions for each rank.

    kind           what a rank does                                         bubble                in flight
    gpipe          all forwards, then all backwards                         (P-1)/(vM + P-1)      M
    1f1b           min(M, P-p) forwards, then a backward for each, v = 1    (P-1)/(M + P-1)       min(M, P-s)
    interleaved    the same with v stages a rank, in rounds                 (P-1)/(vM + P-1)      see below
    zero-bubble    backwards in two: gradients of inputs at once, those     (P-1)(F+I-W)          min(M, P),
                   of weights where the rank would stand still              / (vM(F+I+W)          or v rounds
                                                                              + (P-1)(F+I-W))
    forward        forwards only, for evaluation                            (P-1)/(vM + P-1)      0

The *bubble* is the part of all ranks' time in which they stand still, when stages are equal, transfers take
no time and ``M >= P``; ``F``, ``I`` and ``W`` are the seconds of a stage's forward, gradients of inputs and
of weights. With ``M < P`` stages that share a rank wait for each other, too.

*In flight* on a stage is a microbatch whose forward has run and whose backward (with split backwards: whose
weight gradients) has not: what it saved is in memory. :meth:`Schedule.in_flight` counts exactly.

With several stages a rank, microbatches come in ``max(1, M // P)`` *rounds* of equal size, within one, so
each has at least ``P`` where there are as many. A rank takes a round through one of its stages, then through
the next; backwards in the opposite order. Rank ``p`` runs ``(v-1) g + 2(P-1-p)`` forwards before its first
backward, with ``g`` the size of the largest round; holds one more than that at the most; and with split
backwards ``v g``.

Invariants, which :func:`check` tests:

- every list is the restriction of *one* order of all actions to those of a rank, a transfer standing once in
  that order, for both its ends. So ranks that know nothing of each other and run their lists in order never
  wait in a circle, even where a send waits for its receive; both ends of each pair of ranks see the pair's
  transfers in one order, which is how NCCL matches them;
- every forward, backward and weight gradient runs exactly once, after what it needs, and a stage's backwards
  in the order of microbatches, so sums over them are the same sums in every schedule.

Papers: GPipe, arXiv:1811.06965; PipeDream-Flush (1F1B), arXiv:2006.09503; interleaved 1F1B, arXiv:2104.04473;
zero bubble, arXiv:2401.10241; breadth-first order of several stages a rank, arXiv:2211.05953.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

KINDS = ("gpipe", "1f1b", "interleaved", "zero-bubble", "forward")


class ScheduleError(ValueError):
    """A schedule that cannot be made, or that cannot be run."""


class Step(Enum):
    """What an action does. ``BACKWARD`` is ``BACKWARD_INPUT`` and ``BACKWARD_WEIGHT`` in one."""

    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_INPUT = "gradients of inputs"
    BACKWARD_WEIGHT = "gradients of weights"
    SEND_FORWARD = "sending values"
    RECEIVE_FORWARD = "receiving values"
    SEND_BACKWARD = "sending gradients"
    RECEIVE_BACKWARD = "receiving gradients"

    @property
    def is_transfer(self) -> bool:
        return self in _TRANSFERS


_TRANSFERS = {Step.SEND_FORWARD, Step.RECEIVE_FORWARD, Step.SEND_BACKWARD, Step.RECEIVE_BACKWARD}
_SENDS = {Step.SEND_FORWARD, Step.SEND_BACKWARD}
_BACKWARDS = (Step.BACKWARD, Step.BACKWARD_INPUT)


@dataclass(frozen=True)
class Action:
    """``step`` for ``microbatch`` on ``stage``, which is one of the rank's own.

    Values are sent to stage + 1 and received from stage - 1, gradients the other way round.
    """

    step: Step
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.step.value} of microbatch {self.microbatch} on stage {self.stage}"


@dataclass(frozen=True)
class Span:
    """An action from ``start`` to ``end``, in seconds."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """``lists[p]`` is what rank ``p`` does, in order."""

    kind: str
    num_ranks: int
    num_stages: int
    num_microbatches: int
    lists: tuple[tuple[Action, ...], ...]

    def in_flight(self, stage: int) -> int:
        """The largest number of microbatches whose saved values ``stage`` holds at once."""
        return most_saved([a for a in self.lists[stage % self.num_ranks] if a.stage == stage])

    def in_flight_of_rank(self, rank: int) -> int:
        """The largest number of (stage, microbatch) pairs whose saved values ``rank`` holds at once."""
        return most_saved(self.lists[rank])

    def received_ahead(self, stage: int) -> tuple[int, int]:
        """How many microbatches' values, and gradients, are at the most received before ``stage`` reads them.

        With what is in flight, it bounds the memory for receives.
        """
        actions = [a for a in self.lists[stage % self.num_ranks] if a.stage == stage]
        return (
            _most(actions, (Step.RECEIVE_FORWARD,), (Step.FORWARD,)),
            _most(actions, (Step.RECEIVE_BACKWARD,), _BACKWARDS),
        )

    def stages_of(self, rank: int) -> range:
        return range(rank, self.num_stages, self.num_ranks)


def in_flight(kind: str, num_ranks: int, num_stages: int, num_microbatches: int, stage: int) -> int:
    """The largest number of microbatches whose saved values ``stage`` holds at once."""
    return schedule(kind, num_ranks, num_stages, num_microbatches).in_flight(stage)


def most_saved(actions: Sequence[Action]) -> int:
    """How many saved forwards a list of actions holds at the most. A list without backwards saves nothing."""
    ends = (Step.BACKWARD, Step.BACKWARD_WEIGHT)
    if not any(a.step in ends for a in actions):
        return 0
    return _most(actions, (Step.FORWARD,), ends)


def _most(actions: Sequence[Action], starts: Sequence[Step], ends: Sequence[Step]) -> int:
    """The largest number of starts without their ends."""
    now = most = 0
    for action in actions:
        now += (action.step in starts) - (action.step in ends)
        most = max(most, now)
    return most


def ideal_bubble(
    kind: str,
    num_ranks: int,
    num_stages: int,
    num_microbatches: int,
    *,
    forward: float = 1,
    backward_input: float = 1,
    backward_weight: float = 1,
) -> float:
    """The part of all ranks' time in which they stand still, in theory, for ``M >= P`` (the formulas above).

    The last three are the times of a stage, in any unit.
    """
    work = forward if kind == "forward" else forward + backward_input + backward_weight
    idle = work - 2 * backward_weight if kind == "zero-bubble" else work
    idle = (num_ranks - 1) * max(0.0, idle)
    busy = num_stages // num_ranks * num_microbatches * work
    return idle / (busy + idle)


# --- making ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def schedule(kind: str, num_ranks: int, num_stages: int, num_microbatches: int) -> Schedule:
    """The lists of a schedule of :data:`KINDS`, for any positive number of microbatches.

    Raises :class:`ScheduleError` where the kind has no meaning for these numbers.
    """
    _require(kind, num_ranks, num_stages, num_microbatches)
    orders = [_Orders.of(rank, num_ranks, num_stages, num_microbatches) for rank in range(num_ranks)]
    if kind == "zero-bubble":
        computed = _filled(orders, num_ranks, num_stages, num_microbatches)
    else:
        computed = [_alternating(kind, o, rank, num_ranks) for rank, o in enumerate(orders)]
    lists = _with_transfers(computed, num_ranks, num_stages)
    return Schedule(kind, num_ranks, num_stages, num_microbatches, tuple(tuple(x) for x in lists))


def _require(kind: str, num_ranks: int, num_stages: int, num_microbatches: int) -> None:
    if kind not in KINDS:
        raise ScheduleError(f"no schedule is called {kind!r}; there are {', '.join(KINDS)}")
    if num_ranks < 1 or num_microbatches < 1 or num_stages < 1 or num_stages % num_ranks:
        raise ScheduleError(
            f"{num_stages} stages of {num_microbatches} microbatches cannot be shared out over {num_ranks} "
            "ranks: all are at least one, and the stages a multiple of the ranks"
        )
    if kind == "1f1b" and num_stages != num_ranks:
        raise ScheduleError(
            f"1f1b has one stage a rank, not {num_stages} on {num_ranks} ranks; 'interleaved' has several"
        )


@dataclass(frozen=True)
class _Orders:
    """In which order a rank takes (stage, microbatch) forwards and backwards; its rounds' largest size."""

    forwards: list[tuple[int, int]]
    backwards: list[tuple[int, int]]
    largest: int

    @classmethod
    def of(cls, rank: int, num_ranks: int, num_stages: int, num_microbatches: int) -> _Orders:
        stages = range(rank, num_stages, num_ranks)
        rounds = list(_rounds(num_microbatches, num_ranks))
        return cls(
            [(s, m) for r in rounds for s in stages for m in r],
            [(s, m) for r in rounds for s in reversed(stages) for m in r],
            max(len(r) for r in rounds),
        )


def _rounds(num_microbatches: int, num_ranks: int) -> Iterator[range]:
    count = max(1, num_microbatches // num_ranks)
    size, longer = divmod(num_microbatches, count)
    start = 0
    for number in range(count):
        end = start + size + (number < longer)
        yield range(start, end)
        start = end


def _alternating(kind: str, orders: _Orders, rank: int, num_ranks: int) -> list[Action]:
    """Some forwards first, then a forward and a backward in turn, then the remaining backwards."""
    forwards = [Action(Step.FORWARD, s, m) for s, m in orders.forwards]
    backwards = [Action(Step.BACKWARD, s, m) for s, m in orders.backwards]
    if kind == "forward":
        return forwards
    stages = len({s for s, _ in orders.forwards})
    downstream = num_ranks - 1 - rank
    first = downstream if stages == 1 else (stages - 1) * orders.largest + 2 * downstream
    first = len(forwards) if kind == "gpipe" else min(first, len(forwards))
    turns = zip(forwards[first:], backwards, strict=False)
    return [*forwards[:first], *(a for turn in turns for a in turn), *backwards[len(forwards) - first :]]


def _filled(
    orders: Sequence[_Orders], num_ranks: int, num_stages: int, num_microbatches: int
) -> list[list[Action]]:
    """Zero bubble: in each unit of time a rank does the first it can of: gradients of inputs, a forward
    (while it holds fewer than v rounds), the oldest gradients of weights that are due.

    With one stage a rank the first two take turns as in 1F1B: a rank that goes ahead of its turn there is
    late later.
    """
    lists: list[list[Action]] = [[] for _ in orders]
    forwards = [deque(o.forwards) for o in orders]
    backwards = [deque(o.backwards) for o in orders]
    due: list[deque[tuple[int, int]]] = [deque() for _ in orders]
    held, below = [0] * num_ranks, [0] * num_ranks  # forwards without gradients of weights, and of inputs
    stages = num_stages // num_ranks
    most = stages * orders[0].largest if stages > 1 else num_ranks
    done: set[Action] = set()
    left = 3 * num_stages * num_microbatches
    while left:
        now: list[Action] = []
        for rank in range(num_ranks):
            back, ahead, weights = backwards[rank], forwards[rank], due[rank]
            backs_turn = below[rank] >= num_ranks - rank or not ahead
            if (
                back
                and (stages > 1 or backs_turn)
                and _needs(Action(Step.BACKWARD_INPUT, *back[0]), num_stages) <= done
            ):
                below[rank] -= 1
                weights.append(back[0])
                action = Action(Step.BACKWARD_INPUT, *back.popleft())
            elif (
                ahead
                and (stages > 1 or not backs_turn)
                and held[rank] < most
                and _needs(Action(Step.FORWARD, *ahead[0]), num_stages) <= done
            ):
                below[rank] += 1
                held[rank] += 1
                action = Action(Step.FORWARD, *ahead.popleft())
            elif weights:
                held[rank] -= 1
                action = Action(Step.BACKWARD_WEIGHT, *weights.popleft())
            else:
                continue
            lists[rank].append(action)
            now.append(action)
        assert now, "a rank can always go on"
        left -= len(now)
        done.update(now)
    return lists


def _needs(action: Action, num_stages: int) -> set[Action]:
    """What must have been computed before, on any rank."""
    step, stage, microbatch = action.step, action.stage, action.microbatch
    if step is Step.FORWARD:
        return {Action(step, stage - 1, microbatch)} if stage > 0 else set()
    if step is Step.BACKWARD_WEIGHT:
        return {Action(Step.BACKWARD_INPUT, stage, microbatch)}
    above = {Action(step, stage + 1, microbatch)} if stage < num_stages - 1 else set()
    return above | {Action(Step.FORWARD, stage, microbatch)}


_UNITS = {Step.FORWARD: 1, Step.BACKWARD: 2, Step.BACKWARD_INPUT: 1, Step.BACKWARD_WEIGHT: 1}


def _with_transfers(
    computed: Sequence[Sequence[Action]], num_ranks: int, num_stages: int
) -> list[list[Action]]:
    """The lists with the transfers between ranks, each at the moment when its value is ready.

    All actions are put in one order, by the time at which a computation starts or a transfer's value is
    ready; each rank is given its part of it.
    """
    placed: list[list[tuple[tuple[float, int, int, int, int], Action]]] = [[] for _ in computed]
    for rank, spans in enumerate(timeline(computed, lambda a: _UNITS[a.step])):
        for span in spans:
            action, stage, microbatch = span.action, span.action.stage, span.action.microbatch
            # What follows the time keeps actions apart: transfers first, by direction, stage, microbatch.
            placed[rank].append(((span.start, 1, 0, stage, microbatch), action))
            forward = action.step is Step.FORWARD
            other = stage + 1 if forward else stage - 1
            crosses = 0 <= other < num_stages and other % num_ranks != rank
            if crosses and action.step is not Step.BACKWARD_WEIGHT:
                send = Step.SEND_FORWARD if forward else Step.SEND_BACKWARD
                receive = Step.RECEIVE_FORWARD if forward else Step.RECEIVE_BACKWARD
                key = (span.end, 0, int(forward), stage, microbatch)
                placed[rank].append((key, Action(send, stage, microbatch)))
                placed[other % num_ranks].append((key, Action(receive, other, microbatch)))
    return [[action for _, action in sorted(each, key=lambda x: x[0])] for each in placed]


# --- running on paper --------------------------------------------------------------------------------


def mate(action: Action) -> Action:
    """The other end of a transfer."""
    step = _MATES[action.step]
    up = action.step in (Step.SEND_FORWARD, Step.RECEIVE_BACKWARD)
    return Action(step, action.stage + 1 if up else action.stage - 1, action.microbatch)


_MATES = {
    Step.SEND_FORWARD: Step.RECEIVE_FORWARD,
    Step.RECEIVE_FORWARD: Step.SEND_FORWARD,
    Step.SEND_BACKWARD: Step.RECEIVE_BACKWARD,
    Step.RECEIVE_BACKWARD: Step.SEND_BACKWARD,
}


def timeline(
    lists: Sequence[Sequence[Action]], seconds: Callable[[Action], float], *, blocking: bool = False
) -> list[list[Span]]:
    """When each rank does what: its list in order, ``seconds(action)`` each (of a transfer, those of its
    send).

    A rank begins a computation when it is free and what the computation needs is there. A transfer begins
    when both ends have come to it and the pair's earlier transfers are over. Ranks go on meanwhile; with
    ``blocking`` both ends wait. Lists without transfers hand values over in no time. A rank's spans are in
    the order of its list.

    Raises :class:`ScheduleError` when ranks wait for each other without end, or take a pair's transfers in
    different orders.
    """
    return _Clocks(lists, seconds, blocking).run()


class _Clocks:
    """Each rank's time and place in its list, and the transfers that wait for their other end."""

    def __init__(
        self, lists: Sequence[Sequence[Action]], seconds: Callable[[Action], float], blocking: bool
    ) -> None:
        self.lists, self.seconds, self.blocking = lists, seconds, blocking
        self.num_stages = 1 + max((a.stage for actions in lists for a in actions), default=0)
        self.rank_of = {a: rank for rank, actions in enumerate(lists) for a in actions}
        self.clocks = [0.0] * len(lists)
        self.places = [0] * len(lists)
        self.spans: dict[Action, Span] = {}
        self.posted: dict[Action, float] = {}
        self.queues: dict[tuple[int, int], deque[Action]] = {}  # (rank, peer): transfers posted and not begun
        self.free: dict[frozenset[int], float] = {}  # when a pair's last transfer is over

    def run(self) -> list[list[Span]]:
        while any(self._advance(rank) for rank in range(len(self.lists))):
            pass
        if any(place < len(actions) for place, actions in zip(self.places, self.lists, strict=True)):
            raise ScheduleError(f"ranks wait for each other without end: {self._stuck()}")
        unmatched = [a for queue in self.queues.values() for a in queue]
        if unmatched:
            raise ScheduleError(f"a transfer has one end only: {unmatched[0]}")
        return [[self.spans[a] for a in actions] for actions in self.lists]

    def _advance(self, rank: int) -> bool:
        """Go on with a rank's list as far as possible; whether that was any way at all."""
        start = self.places[rank]
        while self.places[rank] < len(self.lists[rank]):
            action = self.lists[rank][self.places[rank]]
            if action.step.is_transfer:
                self._post(rank, action)
                if self.blocking:
                    if action not in self.spans:
                        break
                    self.clocks[rank] = self.spans[action].end
            elif not self._compute(rank, action):
                break
            self.places[rank] += 1
        return self.places[rank] > start

    def _compute(self, rank: int, action: Action) -> bool:
        ready = self.clocks[rank]
        for need in _needs(action, self.num_stages):
            need = self._local(need, action)
            if need not in self.spans:
                return False
            ready = max(ready, self.spans[need].end)
        self.spans[action] = Span(action, ready, ready + self.seconds(action))
        self.clocks[rank] = self.spans[action].end
        return True

    def _local(self, need: Action, action: Action) -> Action:
        """What a rank waits for itself: the receive, where another rank computes what it needs."""
        if need.step in _BACKWARDS and need not in self.rank_of:
            (other,) = set(_BACKWARDS) - {need.step}
            need = Action(other, need.stage, need.microbatch)
        if need.stage == action.stage:
            return need
        step = Step.RECEIVE_FORWARD if need.step is Step.FORWARD else Step.RECEIVE_BACKWARD
        receive = Action(step, action.stage, action.microbatch)
        return receive if receive in self.rank_of else need

    def _post(self, rank: int, action: Action) -> None:
        other = mate(action)
        if action in self.posted:  # a blocked rank asks again
            return
        if other not in self.rank_of:
            raise ScheduleError(f"a transfer has one end only: {action}")
        peer = self.rank_of[other]
        self.posted[action] = self.clocks[rank]
        mine = self.queues.setdefault((rank, peer), deque())
        theirs = self.queues.setdefault((peer, rank), deque())
        mine.append(action)
        while mine and theirs:
            one, two = mine.popleft(), theirs.popleft()
            if mate(one) != two:
                raise ScheduleError(
                    f"ranks {rank} and {peer} take their transfers in different orders: {one} meets {two}"
                )
            pair = frozenset((rank, peer))
            start = max(self.posted[one], self.posted[two], self.free.get(pair, 0.0))
            end = start + self.seconds(one if one.step in _SENDS else two)
            self.free[pair] = end
            self.spans[one], self.spans[two] = Span(one, start, end), Span(two, start, end)

    def _stuck(self) -> str:
        waits = []
        for rank, (place, actions) in enumerate(zip(self.places, self.lists, strict=True)):
            if place < len(actions):
                waits.append(f"rank {rank} in {actions[place]}")
        return ", ".join(waits)


def bubble(timelines: Sequence[Sequence[Span]]) -> float:
    """The part of all ranks' time, from the first start to the last end, in which they do not compute."""
    spans = [s for spans in timelines for s in spans if not s.action.step.is_transfer]
    whole = max((s.end for s in spans), default=0.0) - min((s.start for s in spans), default=0.0)
    return 1 - sum(s.end - s.start for s in spans) / (whole * len(timelines)) if whole else 0.0


# --- checking ----------------------------------------------------------------------------------------


def check(made: Schedule, in_flight: Mapping[int, int] | None = None) -> None:
    """Raise :class:`ScheduleError` where the lists break one of this module's invariants.

    ``in_flight`` bounds the microbatches that each stage may hold.
    """
    counts = Counter(a for actions in made.lists for a in actions)
    twice = [a for a, count in counts.items() if count > 1]
    if twice:
        raise ScheduleError(f"{twice[0]} is done {counts[twice[0]]} times")
    for rank, actions in enumerate(made.lists):
        foreign = [a for a in actions if a.stage not in made.stages_of(rank)]
        if foreign:
            raise ScheduleError(f"rank {rank} does not have the stage of: {foreign[0]}")
    for stage in range(made.num_stages):
        _check_stage(made, stage, counts)
        if in_flight is not None and made.in_flight(stage) > in_flight[stage]:
            raise ScheduleError(
                f"stage {stage} holds {made.in_flight(stage)} microbatches at once, and may hold "
                f"{in_flight[stage]}"
            )
    timeline(made.lists, lambda a: 1.0, blocking=True)


def _check_stage(made: Schedule, stage: int, counts: Mapping[Action, int]) -> None:
    backward = any(a.step in _BACKWARDS for actions in made.lists for a in actions)
    for microbatch in range(made.num_microbatches):
        forward, whole, inputs, weights = (
            counts.get(Action(step, stage, microbatch), 0)
            for step in (Step.FORWARD, Step.BACKWARD, Step.BACKWARD_INPUT, Step.BACKWARD_WEIGHT)
        )
        if forward != 1 or whole + inputs != int(backward) or inputs != weights:
            raise ScheduleError(
                f"microbatch {microbatch} does not go through stage {stage} once and back once"
            )
        for step, crosses in (
            (Step.RECEIVE_FORWARD, stage > 0),
            (Step.RECEIVE_BACKWARD, backward and stage < made.num_stages - 1),
        ):
            received = counts.get(Action(step, stage, microbatch), 0)
            if received != int(crosses and made.num_ranks > 1):
                raise ScheduleError(f"{Action(step, stage, microbatch)} is done {received} times")
    actions = made.lists[stage % made.num_ranks]
    for steps in ((Step.FORWARD,), _BACKWARDS, (Step.BACKWARD_WEIGHT,)):
        order = [a.microbatch for a in actions if a.stage == stage and a.step in steps]
        if order != sorted(order):
            raise ScheduleError(f"stage {stage} takes microbatches out of order: {order}")
