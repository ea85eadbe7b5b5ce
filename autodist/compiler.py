"""The compiler: which passes, in which order, and what carries a graph through them.

    captured ──refuse_weight_writes, autocast, sequence_parallel──> AOTAutograd
    joint    ──ask_policies, unmark, merge_reads, narrow_gathers──> partition
    parts    ──bucket, lower, overlap──> Inductor (or eager)

A captured training step (:mod:`autodist.step_capture`) takes the same way: what it differentiates is a
captured program each, goes through capture passes, joint passes and partition, and is put back in its place;
then the whole is one graph, and is scheduled as one.

    step     ──regions──> captured ... parts ──back in place, split_foreach──> AOTAutograd
    whole    ──drop_aliases, hoist_scalars, bucket, lower, overlap, host_state──> Inductor (or eager)

The order is :func:`default_passes`, here and nowhere else. A graph that needs no gradient is not
partitioned: it goes through the joint passes and then through those of a forward part.

Before a graph's first collective all ranks have compared what they are about to run
(:meth:`Compilation.agree`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from autodist.artifacts import write_graph
from autodist.job import Job
from autodist.logs import log
from autodist.passes.analysis.cost import collective_kind, is_collective_start
from autodist.passes.analysis.liveness import is_on_host, liveness
from autodist.passes.analysis.savable import SMALLEST
from autodist.passes.analysis.timeline import Timeline, simulate
from autodist.passes.analysis.wrapper import wrapper_peak
from autodist.passes.base import Context, Pass, Phase, Record, operators, run_passes, size_text
from autodist.passes.bucket import Bucket
from autodist.passes.capture import RETURNED, functional
from autodist.passes.checkpoints import AskPolicies
from autodist.passes.graph import behind, num_bytes, output_of, parameter_of, part_of, tensor_bytes
from autodist.passes.host_state import HostState
from autodist.passes.lower import Lower
from autodist.passes.memory import Beside, Budget, MemoryBoundError, Peak, Program, fit
from autodist.passes.optimizer import DropAliases, HoistScalars, SplitForeach
from autodist.passes.overlap import Overlap
from autodist.passes.partition import Partition, min_cut, saved_names
from autodist.passes.precision import Autocast
from autodist.passes.regions import (
    Parts,
    Region,
    assembled,
    joint_of,
    keep_draws,
    leaf_inputs,
    program_of,
    regions_of,
    returned_outputs,
    updates_of,
    write_back,
)
from autodist.passes.sequence_parallel import POLICIES, SHARDED_OUTPUTS, SequenceParallel, Unmark
from autodist.passes.tile import WITHHELD, WITHHOLDABLE, Tile
from autodist.passes.writes import RefuseWeightWrites
from autodist.passes.zero import MergeReads, NarrowGathers
from autodist.plan import Plan
from autodist.resident import resident_bytes
from autodist.runtime import compat, offload
from autodist.runtime.agreement import collective_lines, graph_lines
from autodist.runtime.outputs import Kept, SameBatch, returned, shape_of, withheld
from autodist.runtime.parameters import GatheredWeight, check_same, parameter_name, plain_tensor
from autodist.step_capture import Captured

_TILES = (1, 4, 16, 64)  # that token-local regions are made in, where memory is short
_LESS = 0.95  # times what fewer tiles need: where more tiles do not need less than that, they do not help
_CHEAP = 0.02  # of the time: what a plan may add without asking whether tiles add less
_MISS = 0.1  # of a peak: a guess that is farther off is told of
_PLANS = 5  # of memory, until Inductor's program keeps to one
# Inductor moves nodes to shorten lifetimes and to bring producers to consumers; both undo a schedule.
KEEP_ORDER = {"reorder_for_peak_memory": False, "reorder_for_locality": False}


def default_passes(
    plan: Plan,
    device_type: str,
    sequence_group: str | None = None,
    policies: Mapping[int, Any] | None = None,
    tiles: int = 1,
    withhold: bool = False,
    host: HostState | None = None,
) -> list[Pass]:
    """The passes of ``plan``, in order. Those for other phases than the graph's are skipped.

    ``sequence_group`` is the group of ranks that share sequences; ``policies`` are those of the checkpoints
    whose bodies have been inlined. Where memory is short there may be more than one of ``tiles``, and
    results in them may be withheld, and ``host`` says what state of a step is on the host.
    """
    passes: list[Pass] = [RefuseWeightWrites()]
    if plan.precision == "bf16":
        passes.append(Autocast(torch.bfloat16, device_type))
    if sequence_group is not None:
        assert plan.dp is not None
        passes.append(SequenceParallel(plan.sp, sequence_group, plan.dp, plan.outputs, plan.strict))
    if tiles > 1:
        passes.append(Tile(tiles, withhold))
    passes += [
        AskPolicies(policies or {}),
        Unmark(),
        MergeReads(),
        NarrowGathers(),
        SplitForeach(),
        DropAliases(),
        HoistScalars(),
        Bucket(reduce_at_end=plan.zero == 1),
        Lower(),
        Overlap(),
    ]
    if host is not None:
        passes.append(host)
    return passes


@dataclass
class GraphReport:
    """What the compiler did to one captured graph.

    ``parts`` (the scheduled graphs) is filled for artifacts and in a dry run.
    ``programs`` are the Python programs Inductor emitted, ``saved_bytes`` the sizes of the inputs that each
    part alone holds; ``staged`` says that the ranks' transport copies what it sends, ``synchronises`` that
    all ranks run it together; ``resident`` bytes of gradients and optimizer state live beside the graph.
    """

    number: int
    staged: bool = False
    resident: int = 0
    signature: str = ""
    synchronises: bool = False
    records: list[Record] = field(default_factory=list)
    timelines: dict[str, Timeline] = field(default_factory=dict)
    parts: dict[str, GraphModule] = field(default_factory=dict)
    programs: dict[str, str] = field(default_factory=dict)
    saved_bytes: dict[str, dict[str, int]] = field(default_factory=dict)

    def emitted_peak(self, part: str) -> int:
        """Peak bytes of the program Inductor emitted for ``part``, exact but for scratch memory.

        Above what the caller holds (parameters, batch): saved values and what the program allocates.
        """
        saved = self.saved_bytes.get(part, {})
        return wrapper_peak(self.programs[part], saved, staged=self.staged).peak

    def clear(self) -> None:
        """Forget a plan, for the next one."""
        for found in (self.records, self.timelines, self.parts, self.programs, self.saved_bytes):
            found.clear()  # type: ignore[attr-defined]

    def kept(self) -> GraphReport:
        """A copy that later plans do not change."""
        return dataclasses.replace(
            self,
            records=list(self.records),
            timelines=dict(self.timelines),
            parts=dict(self.parts),
            programs=dict(self.programs),
            saved_bytes=dict(self.saved_bytes),
        )

    def restore(self, other: GraphReport) -> None:
        self.__dict__.update(vars(other.kept()))

    @property
    def tiles(self) -> int:
        """The most tiles that any region could be made in, of those that are tiled."""
        return max((d.tiles for r in self.records for d in r.decisions), default=0)

    @property
    def seconds(self) -> float:
        """Time spent in passes."""
        return sum(r.seconds for r in self.records)


@dataclass(frozen=True)
class Movable:
    """Optimizer state of a step that can be on the host: its input number ``position``, or its result number
    ``output``; this rank has ``num_bytes`` of it. ``on_host``, it is there already."""

    name: str
    num_bytes: int
    position: int | None = None
    output: int | None = None
    on_host: bool = False


@dataclass
class Compilation:
    """One captured graph on its way through the compiler.

    ``parameters`` maps the graph's inputs, by position, to parameter names; ``batch`` describes the others.
    ``resident`` counts bytes that live outside the graph while it runs, ``counted`` says which; ``beside``
    counts a step's inputs that are not those of the region at hand; ``kept`` are outputs of a training step
    that stay in pieces, ``updates`` says what it does to parameters, and ``lasts`` is False for one that runs
    only once; ``aim`` is what the peak of the next plan is to be, once one has missed, and ``tries`` counts
    those that did.
    ``tiles`` are those that token-local regions are made in; the plan's choices cost ``added`` seconds.
    With ``withhold``, results that do not fit are ``withheld``; ``withholdable`` are those that might
    be. Of a step's ``state``, the plan wants those ``moved`` on the host, and plans for ``planned``
    bytes at the peaks of its forwards and backwards.
    """

    job: Job
    parameters: dict[int, str]
    report: GraphReport
    resident: int
    batch: str
    policies: Mapping[int, Any] = field(default_factory=dict)
    is_step: bool = False
    lasts: bool = True
    updates: str = ""
    kept: dict[int, Kept] = field(default_factory=dict)
    aim: int | None = None
    tries: int = 0
    tiles: int = 1
    added: float = 0.0
    beside: int = 0
    withhold: bool = False
    withheld: set[int] = field(default_factory=set)
    withholdable: set[int] = field(default_factory=set)
    state: Sequence[Movable] = ()
    moved: set[int] = field(default_factory=set)
    planned: int = 0
    counted: str = ""

    def context(self, phase: Phase) -> Context:
        return Context(
            phase=phase,
            hardware=self.job.hardware,
            parameters=self.parameters,
            group_sizes=self.job.group_sizes,
            memory=self.job.memory_bytes,
            resident=self.resident + self.beside,
            fused=self.job.plan.lowering == "inductor",
            agree=self.job.lead,
            largest=self.job.largest,
            samples=self.job.samples,
        )

    @classmethod
    def plain_context(cls, job: Job, names: Mapping[int, str]) -> Context:
        """What a pass may know of a program as it was captured."""
        return cls(job, dict(names), GraphReport(0), 0, "").context(Phase.CAPTURED)

    def transform(self, graph: GraphModule, phase: Phase) -> GraphModule:
        context, records = self.context(phase), self.report.records
        return run_passes(graph, self._passes(), context, records, self.job.keep_text)

    def partition(
        self, joint: GraphModule, inputs: Sequence[Any], **options: Any
    ) -> tuple[GraphModule, GraphModule]:
        """Joint graph to scheduled forward and backward parts; the partitioner AOTAutograd calls."""
        joint = self.transform(joint, Phase.JOINT)
        program = self.program_text(joint)
        forward, backward = self.split(joint, inputs, **options)
        forward = self.transform(forward, Phase.FORWARD_PART)
        backward = self.transform(backward, Phase.BACKWARD_PART)
        self.finish({"forward": forward, "backward": backward}, program)
        return forward, backward

    def split(
        self, joint: GraphModule, inputs: Sequence[Any], **options: Any
    ) -> tuple[GraphModule, GraphModule]:
        context = self.context(Phase.JOINT)
        before, start = operators(joint), time.thread_time()
        keep = self.job.plan.zero < 3
        if context.memory is None:
            parts = Partition(keep).split(joint, inputs, context, **options)
        else:
            parts = self._fitted(joint, inputs, context, keep, **options)
        seconds = time.thread_time() - start
        now = operators(parts[0]) + operators(parts[1])
        self.report.records.append(
            Record(
                name="partition",
                phase=Phase.JOINT,
                seconds=seconds,
                decisions=tuple(context.decisions),
                added=dict(now - before),
                removed=dict(before - now),
            )
        )
        return parts

    def _fitted(
        self, joint: GraphModule, inputs: Sequence[Any], context: Context, keep_weights: bool, **options: Any
    ) -> tuple[GraphModule, GraphModule]:
        """The parts within the plan's memory."""
        num_outputs, lasting = options["num_fwd_outputs"], options.get("static_lifetime_input_indices") or []
        forward, _ = min_cut(joint, inputs, **options)
        saved, subject = saved_names(forward, num_outputs), self._planned(joint)
        rounding = offload.PAGE * len(self.state)
        host = max(self.job.host_bytes - sum(m.num_bytes for m in self._on_host()) - rounding, 0)
        stays = [i for i, m in enumerate(self.state) if not m.on_host and i not in self.moved]
        free = stays if host else []
        self.beside += sum(self.state[i].num_bytes for i in stays if not free)
        context.resident = self.resident + self.beside
        beside = [Beside(self.state[i].name, self.state[i].num_bytes) for i in free]
        program = Program(joint, num_outputs, lasting, saved, subject, beside)
        assert context.memory is not None
        room = context.memory - context.resident
        fused = self.job.plan.lowering == "inductor" and not self.job.dry_run
        budget = Budget(
            device=room if self.aim is None else self.aim - self.beside,
            host=host,
            keep_weights=keep_weights,
            as_is=fused and self.aim is None,
            least=fused,
            anyway=self.aim is not None,
        )
        if self.counted:
            context.decide("outside", "counted", f"{size_text(self.resident)}: {self.counted}")
        fitted = fit(program, budget, context, self._peak)
        self.added += fitted.seconds
        self.planned = max(self.planned, fitted.peak + self.beside)
        self.moved.update(free[i] for i in fitted.on_host)
        return fitted.parts

    def _on_host(self) -> list[Movable]:
        return [m for i, m in enumerate(self.state) if m.on_host or i in self.moved]

    def host_inputs(self) -> frozenset[int]:
        """A step's inputs that are to be on the host."""
        return frozenset(m.position for m in self._on_host() if m.position is not None)

    def _planned(self, graph: GraphModule) -> str:
        """What ranks call a graph whose memory they plan: the same for other sizes of a batch."""
        tensors = (n for n in graph.graph.nodes if isinstance(_example(n), torch.Tensor))
        text = "\n".join(getattr(n.target, "__qualname__", str(n.target)) for n in tensors)
        made = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        runs = "" if self.lasts else ", which runs once"
        return f"program {made} of {', '.join(sorted(self.parameters.values()))}{runs}, try {self.tries}"

    def _peak(self, parts: tuple[GraphModule, GraphModule]) -> Peak:
        """What two parts hold at the most, once they are scheduled."""
        found = []
        for part, phase in zip(parts, (Phase.FORWARD_PART, Phase.BACKWARD_PART), strict=True):
            context = dataclasses.replace(self.context(phase), agree=lambda subject, make: make())
            scheduled = run_passes(part, self._passes(), context, [])
            live = liveness(scheduled, fused=context.fused, staged=self.job.hardware.stages_collectives)
            found.append(Peak(live.peak, tuple((b.name, b.num_bytes) for b in live.top)))
        return max(found, key=lambda p: p.num_bytes)

    def _passes(self) -> list[Pass]:
        sequence = self.job.sequence
        group = None if sequence is None else compat.mesh_group_name(sequence)
        plan, kind = self.job.plan, self.job.device.type
        return default_passes(plan, kind, group, self.policies, self.tiles, self.withhold, self._host_state())

    def _host_state(self) -> HostState | None:
        """What is done to a step's state; without a bound on memory nothing is, unless it is on the host."""
        if not self.state or (self.job.memory_bytes is None and not self._on_host()):
            return None
        made = frozenset(m.output for m in self._on_host() if m.output is not None)
        inputs = frozenset(m.position for m in self.state if m.position is not None)
        outputs = frozenset(m.output for m in self.state if m.output is not None)
        return HostState(inputs, outputs, self.host_inputs(), made, self.job.host_bytes)

    def within_memory(
        self,
        graph: GraphModule,
        compiled: Callable[[GraphModule], Callable[..., Any]],
        held: int,
        returned: int,
    ) -> Callable[..., Any]:
        """``compiled(graph)``, within the plan's memory.

        ``held`` counts the bytes of the graph's inputs, ``returned`` those of what it gives to its caller.
        First without tiles; where that does not fit, or costs time, with ever more of them, as long as the
        predicted time gets less. Results are withheld only where nothing else fits. Raises
        :class:`~autodist.passes.memory.MemoryBoundError` with the least of what would do.
        """
        memory = self.job.memory_bytes
        if memory is None:
            return compiled(graph)
        if self.job.samples is not None:
            return self._sampled(graph, compiled)
        needed = held - sum(m.num_bytes for m in self.state if m.position is not None)
        lacks = needed + returned + self.resident - memory
        lacks = self.job.largest(f"what {self._planned(graph)} lacks for its results", lacks)
        if lacks <= 0 or self.job.plan.outputs != "withheld":
            try:
                return self._fastest(graph, compiled, held, _TILES)
            except MemoryBoundError as error:
                if error.alone or self.job.plan.outputs != "withheld" or not self.withholdable:
                    raise
        self.withhold = True
        return self._fastest(graph, compiled, held, _TILES[1:])

    def _fastest(
        self,
        graph: GraphModule,
        compiled: Callable[[GraphModule], Callable[..., Any]],
        held: int,
        numbers: Sequence[int],
    ) -> Callable[..., Any]:
        """``compiled(graph)`` with one of these numbers of tiles."""
        best: tuple[float, Callable[..., Any], GraphReport, set[int], set[int]] | None = None
        refusals: list[MemoryBoundError] = []
        for self.tiles in numbers:
            try:
                made = self._with_tiles(graph, compiled, held)
            except MemoryBoundError as error:
                if error.alone:
                    raise
                refusals.append(error)
                if len(refusals) > 1 and error.least > _LESS * refusals[-2].least:
                    break
            else:
                seconds = sum(t.seconds for t in self.report.timelines.values())
                if best is not None and not self._all_say("faster", graph, seconds < 0.99 * best[0]):
                    break
                best = seconds, made, self.report.kept(), set(self.withheld), set(self.moved)
                if self._all_say("cheap", graph, self.added <= _CHEAP * seconds):
                    break
            if 1 < self.tiles >= self.report.tiles:
                break  # more would make the same program
        if best is None:
            raise min(refusals, key=lambda e: e.least)
        self.report.restore(best[2])
        self.withheld, self.moved = best[3:]
        return best[1]

    def _sampled(
        self, graph: GraphModule, compiled: Callable[[GraphModule], Callable[..., Any]]
    ) -> Callable[..., Any]:
        """``compiled(graph)``, without tiles and with few."""
        for self.tiles in _TILES[:2]:
            self.report.clear()
            made = compiled(copy.deepcopy(graph))
        return made

    def _all_say(self, what: str, graph: GraphModule, answer: bool) -> bool:
        """The first rank's answer."""
        subject = f"whether {self.tiles} tiles are {what} for {self._planned(graph)}"
        return self.job.lead(subject, lambda: "yes" if answer else "no") == "yes"

    def _with_tiles(
        self, graph: GraphModule, compiled: Callable[[GraphModule], Callable[..., Any]], held: int
    ) -> Callable[..., Any]:
        """``compiled(graph)``, planned again while the program that Inductor emits exceeds the plan's memory.

        The plan is made before Inductor fuses, and is a guess of what that does. The program is read; where
        it holds too much, the next plan is corrected by how far the guess was off. The largest excess of all
        ranks holds for all.
        """
        memory = self.job.memory_bytes
        assert memory is not None
        room, earlier, self.aim = memory - self.resident, set(), None
        for attempt in range(_PLANS):
            self.tries += 1
            self.added = 0.0
            self.report.clear()
            self.withheld.clear()
            self.moved.clear()
            self.planned = 0
            made = compiled(copy.deepcopy(graph))
            held_at_peak = self._held_at_peak(held)
            self._tell_of_a_miss(held_at_peak)
            over = self.job.largest(f"what {self._planned(graph)} lacks", held_at_peak - room)
            alone = held_at_peak > room + over  # this batch is larger than those that it was settled for
            held_at_peak = max(held_at_peak, room + over)
            if held_at_peak <= room:
                return made
            if alone or held_at_peak in earlier:  # the same program again: there is nothing tighter
                break
            earlier.add(held_at_peak)
            log.info(
                "graph %d: the program holds %s more than the plan's memory; planning again",
                self.report.number, size_text(held_at_peak - room),
            )  # fmt: skip
            self.aim = 0 if attempt == _PLANS - 2 else self._tighter(held_at_peak, room)  # at last, the least
        raise MemoryBoundError(
            f"the plan's memory bound is {size_text(memory)}, and planned as tightly as can be "
            f"the program needs {size_text(held_at_peak + self.resident)}: "
            f"{size_text(self._on_device(held))} of parameters, batch and state, {size_text(self.resident)} "
            f"of gradients and optimizer state beside it, and "
            f"{size_text(held_at_peak - self._on_device(held))} that it makes. "
            "Raise 'memory', shard over more ranks, split sequences ('sp'), or make the batch smaller."
            + (" The plan was made with smaller batches: begin with the largest." if alone else ""),
            held_at_peak + self.resident,
            alone,
        )

    def _tighter(self, held: int, room: int) -> int:
        """What the next plan aims at, where the program made of the last one holds more than its room."""
        if self.is_step:  # also between and after forwards and backwards, of which alone there are plans
            return self.planned - int(1.1 * (held - room))
        aim = room - (held - self._guessed)  # as far off as this guess was, the next may be
        return aim if self.aim is None else min(aim, self.aim - int(1.25 * (held - room)))

    def _held_at_peak(self, held: int) -> int:
        """What the programs just made hold at their peak, with ``held`` bytes of inputs; 0 for what has been
        planned as it runs."""
        emitted = [self.report.emitted_peak(part) for part in self.report.programs]
        if emitted:
            return max(emitted) + self._on_device(held)
        return self._guessed if self.is_step else 0

    @property
    def _guessed(self) -> int:
        """What the programs just made hold at their peak, by their schedules."""
        return max((t.peak_bytes for t in self.report.timelines.values()), default=0)

    def _tell_of_a_miss(self, held: int) -> None:
        if self.report.programs and abs(self._guessed - held) > _MISS * held:
            log.warning(
                "graph %d: the program that Inductor emitted holds %s, where %s were guessed",
                self.report.number, size_text(held), size_text(self._guessed),
            )  # fmt: skip

    def _on_device(self, held: int) -> int:
        """Of the bytes of a program's inputs, those on the device."""
        return held - sum(m.num_bytes for m in self._on_host() if m.position is not None)

    def whole(self, graph: GraphModule) -> GraphModule:
        """A graph without gradients, or a whole training step, scheduled."""
        if not self.is_step:
            graph = self.transform(graph, Phase.JOINT)
        program = self.program_text(graph)
        graph = self.transform(graph, Phase.STEP if self.is_step else Phase.FORWARD_PART)
        self.finish({self.whole_name: graph}, program)
        return graph

    @property
    def whole_name(self) -> str:
        """What a graph is called that has not been partitioned."""
        return "step" if self.is_step else "forward"

    def split_step(self, step: GraphModule, captured: Captured, written: Sequence[int]) -> GraphModule:
        """A functional step with each of its regions transformed, differentiated and partitioned.

        Its last outputs are the new values of its inputs ``written``.
        """
        regions = regions_of(step, leaf_inputs(captured.graph))
        self.updates = self._updates(step, regions, captured, written)
        return assembled(step, regions, [self._region(step, r) for r in regions])

    def _updates(
        self, step: GraphModule, regions: Sequence[Region], captured: Captured, written: Sequence[int]
    ) -> str:
        """What a step does to parameters, gradients and moments, which ranks hold parts of.

        Its own buffers and batch a rank may treat as it likes.
        """
        outputs: list[Any] = list(output_of(step).args[0])  # type: ignore[arg-type]
        first = sum(r.kind == "tensor" for r in captured.results)
        made = outputs[first : first + len(captured.new_gradients) + len(captured.new_moments)]
        values = outputs[len(outputs) - len(written) :]
        kept = {i: v for i, v in zip(written, values, strict=True) if i in captured.names}
        if not (made or kept or captured.calls):
            return ""
        names = [captured.names[i] for i in range(captured.parameters)]
        said = [
            f"makes gradients of {[names[i] for i in captured.new_gradients]}",
            f"leaves without gradient {[names[i] for i in captured.without_gradient]}",
            f"makes {[f'{names[m.parameter]}.{m.key}' for m in captured.new_moments]}",
            f"changes {[captured.names[i] for i in kept]}",
            f"calls {[type(c.scheduler).__name__ for c in captured.calls]}",
        ]
        updates = updates_of(step, regions, [*made, *kept.values()])
        return "\n".join([*said, *graph_lines(updates, self.job.group_labels, mask_sizes=True)])

    def _region(self, step: GraphModule, region: Region) -> Parts:
        captured, returned = program_of(step, region), returned_outputs(region)
        captured.meta[RETURNED] = frozenset(returned)
        program = self.transform(captured, Phase.CAPTURED)
        for i, kept in program.meta.get(SHARDED_OUTPUTS, {}).items():
            self.kept[returned[i]] = _of_the_step(kept, region)
        self.see_withheld(program, returned)
        policies = self.policies
        self.policies = {**policies, **program.meta.get(POLICIES, {})}
        joint, inputs = joint_of(program, region)
        joint = self.transform(joint, Phase.JOINT)
        for node in joint.graph.nodes:
            if compat.is_random(node.target):  # what is drawn once is kept: to draw it again takes the state
                # of a generator, which a whole step does not carry. Of several results each is kept.
                several = not isinstance(node.meta["val"], torch.Tensor)
                for tag in compat.saved_tags() if several else ():
                    node.meta.pop(tag, None)  # only tensors are saved
                for result in node.users if several else (node,):
                    result.meta |= compat.saved_tags()
        own = {*region.inputs}
        movable = {m.position for m in self.state}
        placeholders = enumerate(step.graph.find_nodes(op="placeholder"))
        self.beside = sum(num_bytes(n) for i, n in placeholders if n not in own and i not in movable)
        lasting = [i for i, n in enumerate(region.inputs) if n.op == "placeholder"]
        counts = {"num_fwd_outputs": len(region.outputs), "static_lifetime_input_indices": lasting}
        parts = Parts(*self.split(joint, inputs, **counts))
        self.policies = policies
        return parts

    def see_withheld(self, program: GraphModule, returned: Mapping[int, int] | None = None) -> None:
        """Note what a program withholds, or might; ``returned`` gives a step's number of an output."""
        number = (lambda i: i) if returned is None else returned.__getitem__
        self.withheld.update(map(number, program.meta.get(WITHHELD, ())))
        self.withholdable.update(map(number, program.meta.get(WITHHOLDABLE, ())))

    def program_text(self, graph: GraphModule) -> str:
        """The program before partitioning and lowering, without what legitimately differs by rank."""
        labels = self.job.group_labels
        return "\n".join(graph_lines(graph, group_labels=labels, mask_sizes=True))

    def finish(self, parts: dict[str, GraphModule], program: str) -> None:
        sizes = self.job.group_sizes
        for name, part in parts.items():
            self.report.timelines[name] = simulate(
                part, self.job.hardware, sizes, fused=self.job.plan.lowering == "inductor"
            )
            self.report.saved_bytes[name] = _saved_bytes(part)
        if self.job.keep_text or self.job.dry_run:
            self.report.parts = parts
        if self.job.keep_text:
            write_graph(self.job, self.report, self.parameters, self.resident)
        self.agree(parts, program)

    def agree(self, parts: dict[str, GraphModule], program: str) -> None:
        """All ranks will run the same collectives, and do the same to parameters, or all end here with what
        differs.

        The comparison waits for every rank, so it is made only for what is not agreed on yet: a rank that
        compiles again because its batch has another size runs the same, and waits for nobody.
        """
        agreement = self.job.agreement
        if agreement is None:
            return
        labels = self.job.group_labels
        lines = {n: "\n".join(collective_lines(p, labels)) for n, p in parts.items()}
        if not any(lines.values()) and not self.updates:
            return
        lines |= {f"{n}, weights gathered": self._gathered(p) for n, p in parts.items()}
        signature = hashlib.sha256(repr((self.updates, sorted(lines.items()))).encode()).hexdigest()
        self.report.signature = signature
        self.report.synchronises = any(lines.values()) and self.job.sequence is None
        if signature in self.job.agreed:
            return
        text = {"what is done to parameters": self.updates} if self.is_step else {}
        text |= {f"collectives of the {n}": t for n, t in lines.items()}
        # Not the graph's own number: a rank may have compiled more often than others.
        subject = f"communicating program {len(self.job.agreed)}"
        # A batch of one row, say, makes another program of the same collectives.
        agreement.require(subject, {"program": program, **text}, {"program": self.batch})
        if self.lasts:
            self.job.agreed.add(signature)

    def _gathered(self, part: GraphModule) -> str:
        """The parameters whose shards each gather sends, in order: shapes alone may look alike."""
        gathers = [n for n in part.graph.nodes if is_collective_start(n)]
        return "\n".join(
            " ".join(_names_of(_sent(g), self.parameters))
            for g in gathers
            if collective_kind(g) == "all_gather"
        )


def compile_graph(
    graph: GraphModule, inputs: Sequence[Any], job: Job, mode: str | None
) -> Callable[..., Any]:
    """A callable for a captured graph, transformed and lowered as ``job``'s plan says."""
    names = {i: parameter_name(x) for i, x in enumerate(inputs)}
    resident = resident_bytes(inputs, search=job.memory_bytes is not None)
    report = GraphReport(job.next_graph(), job.hardware.stages_collectives, resident.num_bytes)
    job.reports.append(report)
    own = {i: n for i, n in names.items() if n is not None}
    run = Compilation(job, own, report, resident.num_bytes, _batch(inputs), counted=resident.reason)
    job.at(f"compiling graph {report.number}")
    lower = _inductor if job.plan.lowering == "inductor" and not job.dry_run else _eager
    kept: dict[int, Kept] = {}

    def compiled_program(program: GraphModule) -> Callable[..., Any]:
        program = run.transform(program, Phase.CAPTURED)
        kept.update(program.meta.get(SHARDED_OUTPUTS, {}))
        run.policies = program.meta.get(POLICIES, {})
        run.see_withheld(program)
        return lower(program, inputs, run, mode)

    # Under a memory bound both programs are read before either runs.
    bound = job.memory_bytes is not None
    patch = compat.functorch_patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=bound)
    with job.failing_together(), patch:
        compiled = run.within_memory(graph, compiled_program, _bytes(inputs), _returned_bytes(graph))
    if job.is_first_rank:
        _summarise(report)
    return _at_the_border(compiled, inputs, job, kept, run.withheld)


@dataclass(frozen=True)
class CompiledStep:
    """``run`` takes the real inputs of a captured step, of which those at the positions ``on_host`` lie on
    the host; it writes into those that the step changes, and returns a list of the program's outputs and of
    what else it keeps alive."""

    run: Callable[..., Sequence[Any]]
    on_host: frozenset[int]


def compile_step(captured: Captured, job: Job, kernels: bool = True) -> CompiledStep:
    """A captured training step, compiled.

    Without ``kernels`` it runs once, and is not lowered to Inductor, whatever the plan says.
    """
    report = GraphReport(job.next_graph(), job.hardware.stages_collectives)
    job.reports.append(report)
    own = {i: n for i, n in captured.names.items() if i < captured.parameters}
    run = Compilation(
        job, own, report, 0, _batch(captured.batch), captured.policies, is_step=True, lasts=kernels
    )
    run.state = _movable(captured)
    job.at(f"compiling graph {report.number}")
    step, written = functional(captured.graph, captured.inputs)
    lower = _inductor if job.plan.lowering == "inductor" and kernels and not job.dry_run else _eager
    with captured.mode:
        inputs = [x.detach() for x in captured.inputs]
    returned = _returned_bytes(step, sum(r.kind == "tensor" for r in captured.results))

    def compiled_program(step: GraphModule) -> Callable[..., Any]:
        with compat.compiling_in(captured.mode):
            graph = run.transform(run.split_step(step, captured, written), Phase.STEP_CAPTURED)
        write_back(graph, written)
        keep_draws(graph)
        uncached = compat.functorch_patch(enable_autograd_cache=False)
        with torch.no_grad(), compat.compiling_in(captured.mode), uncached:
            return lower(graph, inputs, run, None)

    with job.failing_together():
        compiled = run.within_memory(step, compiled_program, _bytes(inputs), returned)
    if job.is_first_rank:
        _summarise(report)
    return CompiledStep(_step_border(compiled, job, run.kept, run.withheld), run.host_inputs())


def compile_piece(
    graph: GraphModule, mode: compat.FakeTensorMode, job: Job, batch: str, kernels: bool, beside: int
) -> Callable[..., Any]:
    """A piece of a captured training step that differentiates nothing, with its writes at its end.

    ``job`` is that of the ranks that run it, ``beside`` counts the bytes that they hold meanwhile and that it
    does not take. Without ``kernels`` as for :func:`compile_step`. Raises
    :class:`~autodist.passes.memory.MemoryBoundError`: such a piece is not planned for memory.
    """
    report = GraphReport(job.next_graph(), job.hardware.stages_collectives)
    job.reports.append(report)
    run = Compilation(job, {}, report, 0, batch, is_step=True, lasts=kernels)
    run.updates = _writes_text(graph, run)
    lower = _inductor if job.plan.lowering == "inductor" and kernels and not job.dry_run else _eager
    # Memory of its own for each: of an input and what an exchange has brought of it, one may be written.
    values = (n.meta["val"] for n in graph.graph.find_nodes(op="placeholder"))
    inputs = [compat.fake_like(mode, x, x.device) for x in values]
    uncached = compat.functorch_patch(enable_autograd_cache=False)
    with torch.no_grad(), compat.compiling_in(mode), uncached:
        compiled = lower(graph, inputs, run, None)
    if job.memory_bytes is None:
        return compiled
    needed = beside + run._held_at_peak(_bytes(inputs))
    if needed > job.memory_bytes:
        raise MemoryBoundError(
            f"the plan's memory bound is {size_text(job.memory_bytes)}, and what the step does with its "
            f"gradients (clipping, optimizer) needs {size_text(needed)} on this rank, parameters, gradients "
            "and optimizer state among it. Raise 'memory', or shard over more ranks ('zero', 'pp').",
            needed,
        )
    return compiled


def _writes_text(graph: GraphModule, run: Compilation) -> str:
    """What a piece of a step does to its inputs. The rest, a rank's own results, may follow its batch."""
    writes = [n for n in graph.graph.nodes if compat.is_mutating(n.target)]
    given = graph.graph.find_nodes(op="placeholder")
    return run.program_text(part_of(graph, given, behind(writes), tuple(writes))) if writes else ""


def _movable(captured: Captured) -> list[Movable]:
    """The state of a step that can be on the host: the same on all ranks, whatever parts they have of it."""
    found = []
    for moment in captured.moments:
        value = captured.inputs[moment.position]
        if moment.on_host or (moment.whole_bytes >= SMALLEST and compat.is_dense(value)):
            size = tensor_bytes(value)
            found.append(Movable(moment.name, size, position=moment.position, on_host=moment.on_host))
    outputs: list[Any] = list(output_of(captured.graph).args[0])  # type: ignore[arg-type]
    first = sum(r.kind == "tensor" for r in captured.results) + len(captured.new_gradients)
    for number, made in enumerate(captured.new_moments, first):
        value = outputs[number].meta["val"]
        if made.whole_bytes >= SMALLEST and outputs.count(outputs[number]) == 1 and compat.is_dense(value):
            name = f"{captured.names[made.parameter]}.{made.key}"
            found.append(Movable(name, tensor_bytes(value), output=number))
    return found


def _step_border(
    compiled: Callable[..., Any], job: Job, kept: Mapping[int, Kept], unmade: Collection[int]
) -> Callable[..., Sequence[Any]]:
    """``compiled``, with outputs that stay in pieces as the plan wants them."""
    if not kept and not unmade:
        return compiled

    def call(*arguments: Any) -> Sequence[Any]:
        return _handed_out(compiled(*arguments), kept, unmade, arguments, job)

    return call


def _handed_out(
    results: Sequence[Any],
    kept: Mapping[int, Kept],
    unmade: Collection[int],
    arguments: Sequence[Any],
    job: Job,
) -> list[Any]:
    """``results``, those that are ``kept`` in pieces as the plan wants them; those that are ``unmade`` are
    withheld."""
    handed = [shape_of(r) if i in unmade else r for i, r in enumerate(results)]
    for i, r in enumerate(handed):
        if i in kept:
            assert job.sequence is not None
            handed[i] = returned(r, kept[i], arguments, job.sequence, job.plan.outputs == "sharded")
        elif i in unmade and not isinstance(r, compat.FakeTensor):
            handed[i] = withheld(r.shape, r.dtype)
    return handed


def _of_the_step(kept: Kept, region: Region) -> Kept:
    """The same with its length read from the step's inputs rather than the region's."""
    if not isinstance(kept.length, tuple):
        return kept
    place, dim = kept.length
    source = region.inputs[place]
    return Kept(kept.dim, (source.meta["input"], dim) if source.op == "placeholder" else None)


def _at_the_border(
    compiled: Callable[..., Any],
    inputs: Sequence[Any],
    job: Job,
    kept: Mapping[int, Kept],
    unmade: Collection[int],
) -> Callable[..., Any]:
    """``compiled``, with what the user's program holds made plain on the way in, and back on the way out."""
    sequence = job.sequence
    changed = bool(kept or unmade)
    if sequence is None and not changed and not any(isinstance(x, GatheredWeight) for x in inputs):
        return compiled
    batch = None if sequence is None else SameBatch(sequence, job.device)

    def call(*arguments: Any) -> Any:
        if batch is not None:
            with job.watch("comparing batches"):
                batch.check(arguments)
        results = compiled(*map(plain_tensor, arguments))
        return type(results)(_handed_out(results, kept, unmade, arguments, job)) if changed else results

    return call


def _sent(gather: Node) -> list[Node]:
    """What a gather sends, in order."""
    return [x for x in compat.tree_leaves(gather.args[0]) if isinstance(x, Node)]


def _names_of(nodes: Sequence[Node], parameters: Mapping[int, str]) -> list[str]:
    """Names of the graph inputs that ``nodes`` are views, casts and pads of."""
    found = []
    for node in nodes:
        while node.op == "call_function" and node.all_input_nodes:
            node = node.all_input_nodes[0]
        found.append(parameter_of(node, parameters))
    return found


def _batch(inputs: Sequence[Any]) -> str:
    """Shapes and types of the inputs that are not parameters."""
    plain = (x for x in inputs if not isinstance(x, torch.distributed.tensor.DTensor))
    return "; ".join(
        f"{tuple(map(str, x.shape))} {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        for x in plain
    )


def _saved_bytes(part: GraphModule) -> dict[str, int]:
    inputs = [n for n in part.graph.find_nodes(op="placeholder") if not is_on_host(n)]
    return {n.name: num_bytes(n) for n in inputs if compat.placeholder_index(n) is None}


def _returned_bytes(graph: GraphModule, count: int | None = None) -> int:
    """Bytes of a captured graph's outputs, or of the first ``count``."""
    outputs = [n for n in compat.tree_leaves(output_of(graph).args[0])[:count] if isinstance(n, Node)]
    made = [n for n in dict.fromkeys(outputs) if n.op == "call_function"]
    return sum(tensor_bytes(v) for v in map(_example, made) if isinstance(v, torch.Tensor))


def _example(node: Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _bytes(inputs: Sequence[Any]) -> int:
    """Bytes of this rank's parts of the tensors among ``inputs``."""
    parts = [compat.local_part(x) for x in inputs if isinstance(x, torch.Tensor)]
    return sum(compat.size_hint(x.numel()) * x.element_size() for x in parts)


class _Partitioner(compat.CustomPartitionerFn):
    """Inductor's hook for a partitioner of one's own."""

    def __init__(self, partition: Callable[..., tuple[GraphModule, GraphModule]]) -> None:
        self.partition = partition

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[Any], **options: Any
    ) -> tuple[GraphModule, GraphModule]:
        return self.partition(gm, joint_inputs, **options)

    def uuid(self) -> str:
        # Inductor's cache is keyed by the graphs that come out of here; nothing more is needed.
        return "autodist"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        # Part of the configuration that Inductor pickles into its cache key: a constant there too.
        return str, (self.uuid(),)


def _inductor(
    graph: GraphModule, inputs: Sequence[Any], run: Compilation, mode: str | None
) -> Callable[..., Any]:
    def inner(gm: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        if options.get("is_inference"):
            gm = run.whole(gm)
        part = "backward" if options.get("is_backward") else run.whole_name
        compiled = compat.compile_fx_inner(gm, example_inputs, **options)
        run.report.programs[part] = compat.emitted_program(compiled)
        return _guarded(compiled, run, part)

    patches = {
        **compat.inductor_mode_options(mode),
        **KEEP_ORDER,
        "custom_partitioner_fn": _Partitioner(run.partition),
    }
    return compat.compile_fx(graph, inputs, inner_compile=inner, config_patches=patches)


def _eager(
    graph: GraphModule, inputs: Sequence[Any], run: Compilation, mode: str | None
) -> Callable[..., Any]:
    def part(name: str, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return _guarded(compat.boxed(gm), run, name)

    def inference(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return part(run.whole_name, run.whole(gm), example_inputs)

    backend = compat.aot_autograd(
        fw_compiler=functools.partial(part, "forward"),
        bw_compiler=functools.partial(part, "backward"),
        inference_compiler=inference,
        partition_fn=run.partition,
        keep_inference_input_mutations=run.is_step,
    )
    return backend(graph, inputs)


def _guarded(compiled: Callable[..., Any], run: Compilation, part: str) -> Callable[..., Any]:
    """``compiled``, with a peer's death or silence reported as such."""
    monitor = run.job.monitor
    if monitor is None:
        return compiled
    doing = f"the {part} of graph {run.report.number}"

    def call(arguments: list[Any]) -> Any:
        monitor.at(doing)
        with monitor.guard(doing, together=run.report.synchronises):
            if part != "backward" and len(run.job.agreed) > 1 and run.report.signature:
                # There are several programs: Python may have gone different ways on different ranks.
                check_same(run.report.signature, f"runs {doing}", run.job.group, run.job.device)
            return compiled(arguments)

    return compat.takes_list(call)


def _summarise(report: GraphReport) -> None:
    for decision in (d for r in report.records if r.name == SequenceParallel.name for d in r.decisions):
        log.info("graph %d: %s %s: %s", report.number, decision.subject, decision.action, decision.reason)
    for name, timeline in report.timelines.items():
        log.info(
            "graph %d %s: predicted %.1f ms, %.1f ms of communication exposed, peak %.1f MiB",
            report.number,
            name,
            timeline.seconds * 1e3,
            timeline.exposed_seconds * 1e3,
            timeline.peak_bytes / 2**20,
        )


__all__ = ["Compilation", "GraphReport", "compile_graph", "default_passes"]
