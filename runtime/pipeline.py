"""Runs a pipeline schedule on one rank: its list of actions, over programs that need no autograd.

A :class:`StageProgram` is one stage of a model as functions of tensors. With ``r`` what it receives from the
stage before, ``w`` its weights and ``m`` the microbatch (the program holds both), and a bar for a gradient,

    sent, results, saved = forward(r, m)              r_bar, w_bar = backward(saved, sent_bar)

or, where the schedule splits the backward, in two parts with what the second needs kept between them:

    r_bar, kept = backward_input(saved, sent_bar)     w_bar = backward_weight(kept)

The :class:`Executor` calls each as its list says, exchanges values and gradients with the ranks of the stages
beside, and sums ``w_bar`` over microbatches. Which values carry gradients is said in advance, by both sides
alike (:class:`Spec`); one that turns out to have none is sent as zeros.

Order. Sends and receives are begun in the list's order and waited for as late as may be: a receive by the
action that reads it, a send when ``_SENDS_AT_ONCE`` later ones have been begun at the same border of the same
stage. Since lists are restrictions of one order of all actions (:mod:`autodist.runtime.schedules`), this
cannot wait in a circle, and NCCL, which matches a pair's transfers by their order, matches those that belong
together.

Memory. What a forward saved is let go by its backward; the executor asserts that a stage never holds more
than the schedule's bound. Receives go into buffers of a pool. A buffer is free again when nothing that the
program saved or kept lies in it (where those are objects of which this cannot be told, after the microbatch's
last action on the stage). What leaves a program in such memory (a value only passed on) is copied. So there
are at most as many buffers for a border as microbatches in flight, and receives begun ahead of them.

Randomness. Before a forward that draws, torch's generators are seeded from (seed of the run, stage,
microbatch), and put back after the run: what a microbatch draws depends neither on the schedule nor on what
ran before.

Invariants: each action of the list runs exactly once; gradients are summed in the order of microbatches, into
memory that is the executor's own.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from autodist.runtime import compat
from autodist.runtime.monitor import RankMonitor
from autodist.runtime.schedules import Action, Schedule, Span, Step, most_saved

_SENDS_AT_ONCE = 4  # a border's sends that may be under way, each holding what it sends


@dataclass(frozen=True)
class Spec:
    """What crosses a border: a contiguous tensor, and whether its gradient comes back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    carries_gradient: bool


class StageProgram(Protocol):
    """One stage, with its weights and the parts of the batch that it reads.

    ``draws`` says whether its forward draws random numbers. Programs are functional: they write to nothing
    that they are given, and what they return is not written to later; it may lie in the memory of what they
    were given.
    """

    @property
    def index(self) -> int: ...

    @property
    def draws(self) -> bool: ...

    def received(self, microbatch: int) -> Sequence[Spec]:
        """What comes from the stage before, in order; equal to that stage's ``sent``."""
        ...

    def sent(self, microbatch: int) -> Sequence[Spec]:
        """What goes to the stage after, in order. Microbatches may differ in shape."""
        ...

    def forward(
        self, received: list[Tensor], microbatch: int
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], list[Any]]:
        """(sent, results, saved): for the stage after, for the caller, for the backward."""
        ...

    def backward(
        self, saved: list[Any], gradients: list[Tensor | None]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """(gradients of received, gradients of weights) from those of sent; it may empty ``saved``.

        Every position has an entry: of ``gradients``, None where the value carries none; of the results, None
        where there is none. Results start their own gradients (a loss one, as a rule).
        """
        ...

    def backward_input(
        self, saved: list[Any], gradients: list[Tensor | None]
    ) -> tuple[Sequence[Tensor | None], list[Any]]:
        """(gradients of received, kept)."""
        ...

    def backward_weight(self, kept: list[Any]) -> Sequence[Tensor | None]:
        """Gradients of weights; it may empty ``kept``."""
        ...


@dataclass
class Outcome:
    """What a run made on this rank.

    ``results[stage][microbatch]`` is what the program returned for the caller, ``gradients[stage]`` the sums
    over microbatches of its weights' gradients, None for a weight that never got one.
    """

    results: dict[int, list[Sequence[Tensor]]] = field(default_factory=dict)
    gradients: dict[int, list[Tensor | None]] = field(default_factory=dict)


class Recorder:
    """When this rank computed: start and end of each action, on the device's own clock.

    A computation starts when what it needs is there. Zero is the moment at which all ranks began the run,
    told by a barrier, so the ranks' spans can be laid beside each other as far as a barrier lets them go
    together.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: Any = None
        self._marks: list[tuple[Action, Any, Any]] = []

    def begin(self, group: dist.ProcessGroup | None) -> None:
        self._marks.clear()
        if group is not None:
            dist.barrier(group)
        self._began = self.now()

    def now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, action: Action, start: Any, end: Any) -> None:
        self._marks.append((action, start, end))

    def spans(self) -> list[Span]:
        """The last run's computations, in order. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [Span(a, self._since(start), self._since(end)) for a, start, end in self._marks]

    def everyones(self, group: dist.ProcessGroup) -> list[list[Span]]:
        """The spans of all the group's ranks, on each of them."""
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, self.spans(), group=group)
        return every

    def _since(self, mark: Any) -> float:
        if self._device.type == "cuda":
            return float(self._began.elapsed_time(mark)) / 1e3
        return float(mark - self._began)


class Executor:
    """Runs ``rank``'s list of ``schedule``, as often as asked to.

    ``group`` has the pipeline's ranks in their order, and carries nothing else while a run is under way; None
    where there is one rank. With a ``monitor``, a rank that waits in vain ends with a
    :class:`~autodist.runtime.monitor.PeerError` that names its action and the others'.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        monitor: RankMonitor | None = None,
    ) -> None:
        if group is None and schedule.num_ranks > 1:
            raise ValueError(f"a pipeline of {schedule.num_ranks} ranks needs their process group")
        if group is not None and dist.get_world_size(group) != schedule.num_ranks:
            raise ValueError(
                f"a schedule for {schedule.num_ranks} ranks cannot run on a group of "
                f"{dist.get_world_size(group)}"
            )
        self.schedule, self.rank, self.group, self.device = schedule, rank, group, device
        self.monitor = monitor
        self.actions = [(a, f"pipeline: {a}") for a in schedule.lists[rank]]
        self.bounds = {s: schedule.in_flight(s) for s in schedule.stages_of(rank)}
        self.pool = Buffers(device)

    def run(
        self, programs: Sequence[StageProgram], seed: int = 0, recorder: Recorder | None = None
    ) -> Outcome:
        """One batch through this rank's ``programs``, one for each of its stages.

        ``seed`` is the same on all ranks of the pipeline, and another for each run and each replica that is
        to draw other numbers; programs that draw nothing need none.
        """
        wanted, given = list(self.bounds), sorted(p.index for p in programs)
        if wanted != given:
            raise ValueError(f"rank {self.rank} runs stages {wanted}, and was given programs of {given}")
        run = _Run(self, {p.index: p for p in programs}, seed, recorder)
        draws = any(p.draws for p in programs)
        with torch.no_grad(), _generators_kept(self.device) if draws else nullcontext():
            if recorder is not None:
                with self._watch("pipeline: the start of a recorded run"):
                    recorder.begin(self.group)
            for action, place in self.actions:
                with self._watch(place):
                    run.do(action)
            with self._watch("pipeline: the last sends"):
                run.finish()
        self.pool.trim()
        return run.outcome

    def _watch(self, place: str) -> AbstractContextManager[None]:
        return nullcontext() if self.monitor is None else self.monitor.guard(place)


Place = tuple[int, int]  # stage and microbatch


class _Run:
    """What is under way on a rank during one batch."""

    def __init__(
        self,
        executor: Executor,
        programs: Mapping[int, StageProgram],
        seed: int,
        recorder: Recorder | None,
    ) -> None:
        self.programs, self.seed, self.recorder = programs, seed, recorder
        self.group, self.pool, self.bounds = executor.group, executor.pool, executor.bounds
        self.num_ranks = executor.schedule.num_ranks
        self.last_stage = executor.schedule.num_stages - 1
        self.trains = most_saved(executor.schedule.lists[executor.rank]) > 0
        self.outcome = Outcome({s: [] for s in programs}, {})
        self.held = dict.fromkeys(programs, 0)
        self.saved: dict[Place, list[Any]] = {}
        self.kept: dict[Place, list[Any]] = {}
        self.values: dict[Place, list[Tensor]] = {}  # by the stage that reads them
        self.gradients: dict[Place, list[Tensor | None]] = {}  # by the stage that reads them
        self.receiving: dict[Action, tuple[list[Tensor], list[Any]]] = {}
        self.sending: dict[tuple[Step, int], deque[tuple[list[Tensor], list[Any]]]] = defaultdict(deque)
        self.lent: dict[Place, list[Tensor]] = defaultdict(list)

    def do(self, action: Action) -> None:
        _DOES[action.step](self, action.stage, action.microbatch)

    def finish(self) -> None:
        for queue in self.sending.values():
            while queue:
                _wait(queue.popleft()[1])
        left = [*self.saved, *self.kept, *self.values, *self.gradients, *self.receiving, *self.lent]
        assert not left, f"left over after a run: {left}"

    # --- computing -----------------------------------------------------------------------------------

    def forward(self, stage: int, microbatch: int) -> None:
        place, program = (stage, microbatch), self.programs[stage]
        received = self._received(Step.RECEIVE_FORWARD, place) if stage > 0 else []
        if program.draws:
            _seed(self.pool.device, stage_seed(self.seed, stage, microbatch))
        with self._recording(Action(Step.FORWARD, stage, microbatch)):
            sent, results, saved = program.forward(received, microbatch)
        _require_as_announced(program, microbatch, sent)
        self.outcome.results[stage].append(self._own(place, results))
        if stage < self.last_stage:
            self.values[stage + 1, microbatch] = self._own(place, sent)
        if self.trains:
            self.saved[place] = saved
            self.held[stage] += 1
            assert self.held[stage] <= self.bounds[stage], f"stage {stage} holds more than planned"
            self._give_back(place, saved)
        else:
            self._give_back(place)

    def backward(self, stage: int, microbatch: int) -> None:
        place, program = (stage, microbatch), self.programs[stage]
        gradients, saved = self._incoming(place), self.saved.pop(place)
        taken = self._taken(stage, gradients, saved)
        with self._recording(Action(Step.BACKWARD, stage, microbatch)):
            of_received, of_weights = program.backward(saved, gradients)
        self._accumulate(stage, of_weights, taken, of_received)
        self._outgoing(place, of_received)
        self.held[stage] -= 1
        self._give_back(place)

    def backward_input(self, stage: int, microbatch: int) -> None:
        place, program = (stage, microbatch), self.programs[stage]
        gradients, saved = self._incoming(place), self.saved.pop(place)
        with self._recording(Action(Step.BACKWARD_INPUT, stage, microbatch)):
            of_received, kept = program.backward_input(saved, gradients)
        self._outgoing(place, of_received)
        self.kept[place] = kept
        self._give_back(place, kept)

    def backward_weight(self, stage: int, microbatch: int) -> None:
        place, program = (stage, microbatch), self.programs[stage]
        kept = self.kept.pop(place)
        taken = self._taken(stage, kept)
        with self._recording(Action(Step.BACKWARD_WEIGHT, stage, microbatch)):
            of_weights = program.backward_weight(kept)
        self._accumulate(stage, of_weights, taken)
        self.held[stage] -= 1
        self._give_back(place)

    @contextmanager
    def _recording(self, action: Action) -> Iterator[None]:
        if self.recorder is None:
            yield
            return
        start = self.recorder.now()
        yield
        self.recorder.add(action, start, self.recorder.now())

    # --- gradients -----------------------------------------------------------------------------------

    def _incoming(self, place: Place) -> list[Tensor | None]:
        """Gradients of what the stage sent, an entry for each."""
        stage, microbatch = place
        if stage == self.last_stage:
            return []
        if place in self.gradients:
            return self.gradients.pop(place)
        found = iter(self._received(Step.RECEIVE_BACKWARD, place))
        specs = self.programs[stage].sent(microbatch)
        return [next(found) if s.carries_gradient else None for s in specs]

    def _outgoing(self, place: Place, gradients: Sequence[Tensor | None]) -> None:
        """Gradients of what the stage received, for the stage before: a tensor for each value that carries
        one."""
        stage, microbatch = place
        if stage == 0:
            return
        specs = self.programs[stage].received(microbatch)
        if len(gradients) != len(specs):
            raise ValueError(f"stage {stage} has {len(gradients)} gradients for {len(specs)} received values")
        whole = [
            None if not s.carries_gradient else _zeros(s, self.pool.device) if g is None else g
            for s, g in zip(specs, gradients, strict=True)
        ]
        mine = self._own(place, whole)
        self.gradients[stage - 1, microbatch] = mine

    def _taken(self, stage: int, *given: Iterable[Any]) -> set[int]:
        """Memory that a first gradient must not be summed in: that of what a backward was given."""
        if stage in self.outcome.gradients:
            return set()
        return {m for values in given for m in _memory(values)}

    def _accumulate(
        self, stage: int, gradients: Sequence[Tensor | None], taken: set[int], others: Sequence[Any] = ()
    ) -> None:
        totals = self.outcome.gradients.get(stage)
        if totals is None:
            taken.update(_memory(others))
            self.outcome.gradients[stage] = [_apart(g, taken) for g in gradients]
            return
        pairs = [(i, g) for i, g in enumerate(gradients) if g is not None]
        for i, g in pairs:
            if totals[i] is None:
                totals[i] = g.clone(memory_format=torch.contiguous_format)
        old = [(totals[i], g) for i, g in pairs if totals[i] is not None]
        compat.add_each([t for t, _ in old], [g for _, g in old])

    # --- values and their memory ---------------------------------------------------------------------

    def _own(self, place: Place, tensors: Sequence[Any]) -> list[Any]:
        """``tensors``, copied where they lie in buffers that will be used again."""
        buffers = _memory(self.lent.get(place, ()))
        if not buffers:
            return list(tensors)
        return [t.clone() if buffers.intersection(_memory([t])) else t for t in tensors]

    def _give_back(self, place: Place, holding: Iterable[Any] = ()) -> None:
        """Buffers of ``place`` are free, but for those that ``holding`` lies in."""
        lent = self.lent.pop(place, None)
        if not lent:
            return
        values = compat.tree_leaves(list(holding))
        known = all(_holds_only_itself(v) for v in values)
        memory = _memory(values)
        still = [b for b in lent if not known or memory.intersection(_memory([b]))]
        self.pool.give_back(b for b in lent if not any(b is s for s in still))
        if still:
            self.lent[place] = still

    # --- transfers -----------------------------------------------------------------------------------

    def send_forward(self, stage: int, microbatch: int) -> None:
        self._send(Step.SEND_FORWARD, stage, stage + 1, self.values.pop((stage + 1, microbatch)))

    def send_backward(self, stage: int, microbatch: int) -> None:
        self._send(Step.SEND_BACKWARD, stage, stage - 1, self.gradients.pop((stage - 1, microbatch)))

    def receive_forward(self, stage: int, microbatch: int) -> None:
        specs = self.programs[stage].received(microbatch)
        self._receive(Action(Step.RECEIVE_FORWARD, stage, microbatch), stage - 1, specs)

    def receive_backward(self, stage: int, microbatch: int) -> None:
        specs = [s for s in self.programs[stage].sent(microbatch) if s.carries_gradient]
        self._receive(Action(Step.RECEIVE_BACKWARD, stage, microbatch), stage + 1, specs)

    def _send(self, step: Step, stage: int, to: int, tensors: Sequence[Tensor | None]) -> None:
        queue, peer = self.sending[step, stage], to % self.num_ranks
        whole = [t.contiguous() for t in tensors if t is not None and t.numel() > 0]
        queue.append((whole, [dist.isend(t, group=self.group, group_dst=peer) for t in whole]))
        if len(queue) > _SENDS_AT_ONCE:
            _wait(queue.popleft()[1])

    def _receive(self, action: Action, source: int, specs: Sequence[Spec]) -> None:
        buffers, peer = [self.pool.take(s) for s in specs], source % self.num_ranks
        works = [dist.irecv(b, group=self.group, group_src=peer) for b in buffers if b.numel() > 0]
        self.receiving[action] = (buffers, works)

    def _received(self, step: Step, place: Place) -> list[Tensor]:
        if step is Step.RECEIVE_FORWARD and place in self.values:
            return self.values.pop(place)
        buffers, works = self.receiving.pop(Action(step, *place))
        _wait(works)
        self.lent[place] += buffers
        return list(buffers)


_DOES: dict[Step, Callable[[_Run, int, int], None]] = {
    Step.FORWARD: _Run.forward,
    Step.BACKWARD: _Run.backward,
    Step.BACKWARD_INPUT: _Run.backward_input,
    Step.BACKWARD_WEIGHT: _Run.backward_weight,
    Step.SEND_FORWARD: _Run.send_forward,
    Step.RECEIVE_FORWARD: _Run.receive_forward,
    Step.SEND_BACKWARD: _Run.send_backward,
    Step.RECEIVE_BACKWARD: _Run.receive_backward,
}


class Buffers:
    """Memory for receives, used again by later ones of the same shape and type."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.made = 0  # since the last trim
        self.free: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = defaultdict(list)
        self._used: set[tuple[tuple[int, ...], torch.dtype]] = set()

    def take(self, spec: Spec) -> Tensor:
        key = (tuple(spec.shape), spec.dtype)
        self._used.add(key)
        if self.free[key]:
            return self.free[key].pop()
        self.made += 1
        return torch.empty(spec.shape, dtype=spec.dtype, device=self.device)

    def give_back(self, buffers: Iterable[Tensor]) -> None:
        for buffer in buffers:
            self.free[tuple(buffer.shape), buffer.dtype].append(buffer)

    def trim(self) -> None:
        """Let go of buffers of shapes that nobody has asked for since the last trim."""
        for key in set(self.free) - self._used:
            del self.free[key]
        self._used.clear()


# --- small things --------------------------------------------------------------------------------------


def stage_seed(seed: int, stage: int, microbatch: int) -> int:
    """What torch is seeded with for one forward: a number of 63 bits that shows no pattern."""
    text = f"{seed} {stage} {microbatch}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _seed(device: torch.device, seed: int) -> None:
    """Seed the two generators that a program on ``device`` may draw from."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _generators_kept(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _wait(works: Iterable[Any]) -> None:
    for work in works:
        work.wait()


def _memory(values: Iterable[Any]) -> set[int]:
    """Where tensors lie."""
    return {v.untyped_storage().data_ptr() for v in values if isinstance(v, Tensor)} - {0}


def _holds_only_itself(value: Any) -> bool:
    """Whether what keeps ``value`` keeps no other memory. An autograd graph does, and so may any object."""
    return value.grad_fn is None if isinstance(value, Tensor) else isinstance(value, int | float | None)


def _apart(gradient: Tensor | None, taken: set[int]) -> Tensor | None:
    """``gradient``, copied if it lies in memory that is ``taken``, or if its elements share memory."""
    if gradient is None:
        return None
    steps = zip(gradient.stride(), gradient.shape, strict=True)
    overlaps = any(step == 0 and size > 1 for step, size in steps)
    if overlaps or taken.intersection(_memory([gradient])):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
    taken.update(_memory([gradient]))
    return gradient


def _zeros(spec: Spec, device: torch.device) -> Tensor:
    return torch.zeros(spec.shape, dtype=spec.dtype, device=device)


def _require_as_announced(program: StageProgram, microbatch: int, sent: Sequence[Tensor]) -> None:
    """A tensor of another size would be read as if it had the announced one."""
    found = [(tuple(t.shape), t.dtype) for t in sent]
    announced = [(tuple(s.shape), s.dtype) for s in program.sent(microbatch)]
    if found != announced:
        raise ValueError(
            f"stage {program.index} sends {found} for microbatch {microbatch}, and had announced {announced}"
        )
