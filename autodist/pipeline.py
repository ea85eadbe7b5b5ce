"""A captured program as a pipeline: cut into stages, made in microbatches, differentiated as one function.

    captured ──core──> functional ──microbatches──> program of one ──capture passes──> cut ──> stages
    call     weights ready, requests of the whole batch met, schedule run, gradients summed and reduced, loss
    shared

One call of the compiled program is the whole schedule, backwards included: the executor runs the stages'
compiled forwards and backwards, and ``loss.backward()`` then hands out the gradients it has kept, times the
gradient of the loss. So a schedule may begin a backward before the last forward is done, and nothing runs
under autograd.

A model that has not been prepared is cut when its first program is traced. That decides which ranks hold
which parameters (*places*, :mod:`autodist.runtime.stage_parameters`); later programs of the model, for
evaluation, say, are cut where that fits.

Invariants: all ranks of a pipeline are given the same batch; the loss is that of the whole batch, on every
rank; gradients are summed over microbatches, over the places that hold a parameter, and averaged over
data-parallel coordinates, each once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from autodist.artifacts import write_pipeline
from autodist.compiler import Compilation, GraphReport
from autodist.job import Job, job_of
from autodist.logs import log
from autodist.passes.analysis.bottleneck import Terms
from autodist.passes.analysis.chain import Inputs
from autodist.passes.analysis.microbatches import Microbatch, batch_size, microbatch, parts_of
from autodist.passes.analysis.placement import PlacementError
from autodist.passes.analysis.stages import Setting, StageError, StagePlan, partition, priced
from autodist.passes.base import Phase, run_passes
from autodist.passes.capture import RETURNED, Core, core_of
from autodist.passes.graph import insert, output_of
from autodist.passes.sequence_parallel import POLICIES, SHARDED_OUTPUTS
from autodist.passes.stages import StageGraph, cut
from autodist.passes.writes import RefuseWeightWrites
from autodist.plan import PlanError
from autodist.prepare import shard_model
from autodist.runtime import compat, dialect
from autodist.runtime.agreement import graph_lines
from autodist.runtime.outputs import ELSEWHERE, SameBatch, withheld
from autodist.runtime.parameters import check_same, parameter_name
from autodist.runtime.pipeline import Executor, Outcome, Recorder
from autodist.runtime.schedules import Action, Schedule, Span, Step, schedule, timeline
from autodist.runtime.stage_parameters import (
    StageGradientError,
    is_here,
    not_differentiable,
    owners,
    refuse_norms,
)
from autodist.stage_program import BoundStage, CompiledStage, Reads, compile_stage, reads_of

_PER_RANK = 4  # microbatches for each rank of a pipeline, where the plan does not say: a bubble of a fifth
_RECORDED = 3  # which run of a program is recorded: the first ones warm up


class PipelineError(ValueError):
    """A program that cannot be run as a pipeline; the message says what of it, and what to do."""


@dataclass(frozen=True)
class Captured:
    """A program as Dynamo captured it, on the way to a pipeline.

    ``core`` is the program without its reads of parameters. ``parameters`` maps positions among the core's
    inputs to parameters' names, ``buffers`` are the positions of the model's buffers; ``places`` are
    positions of the core's inputs among the program's. ``loss`` is the output that is differentiated, the
    first that can be when None; ``returned`` are those that only the user sees, all of them when None.
    """

    core: Core
    parameters: Mapping[int, str]
    buffers: frozenset[int]
    places: tuple[int, ...]
    frozen: frozenset[int]
    trains: bool
    loss: int | None = None
    returned: frozenset[int] | None = None

    @property
    def batch(self) -> tuple[int, ...]:
        """Positions of the core's inputs that are the user's."""
        taken = {*self.parameters, *self.buffers}
        return tuple(i for i in range(len(self.core.inputs)) if i not in taken)


def captured(graph: GraphModule, inputs: Sequence[Any], names: Mapping[int, str], job: Job) -> Captured:
    """``names`` are those of the program's inputs that are parameters. Raises :class:`PipelineError`."""
    run_passes(graph, [RefuseWeightWrites()], Compilation.plain_context(job, names), [])
    core = core_of(graph)
    places = core.places(graph)
    held = _buffers(job)
    parameters = {i: names[p] for i, p in enumerate(places) if p in names}
    buffers = frozenset(i for i, p in enumerate(places) if id(inputs[p]) in held)
    frozen = frozenset(i for i in parameters if not inputs[places[i]].requires_grad)
    if core.written:
        name = core.inputs[core.written[0]].name
        raise PipelineError(
            f"the program writes into '{name}' (a buffer, such as a batch norm's running statistics), which "
            "it would do once for each microbatch of a pipeline. Put such layers into eval(), use norms "
            "without statistics of the batch (GroupNorm, LayerNorm), or a plan without pp."
        )
    trains = torch.is_grad_enabled() and len(frozen) < len(parameters)
    return Captured(core, parameters, buffers, places, frozen, trains)


def _buffers(job: Job) -> set[int]:
    model = None if job.model is None else job.model()
    return set() if model is None else {id(b) for b in model.buffers()}


# --- the program of one microbatch, and where it is cut ---------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A program cut for inputs of given sizes.

    ``names`` are those of the microbatch program's inputs in the stages, in the order of
    :class:`Microbatch`'s; ``shapes`` are like its combined results, ``kept`` outputs that stay in pieces of
    sequences.
    """

    batch: Microbatch
    plan: StagePlan
    stages: tuple[StageGraph, ...]
    names: Mapping[str, int]
    policies: Mapping[int, Any]
    shapes: tuple[Any, ...]
    loss: int | None
    kept: frozenset[int]
    schedule: Schedule


def find_cut(
    program: Captured,
    values: Sequence[Any],
    job: Job,
    run: Compilation,
    *owned: Mapping[str, Sequence[int]] | None,
) -> Cut:
    """Cut a program for ``values`` of its core's inputs (numbers and tensors; a parameter's is not read).

    ``owned`` are the places of parameters, None while nobody holds them; where the program cannot be cut
    with the first, with the next. Raises
    :class:`~autodist.passes.analysis.placement.PlacementError`,
    :class:`~autodist.passes.analysis.stages.StageError`.
    """
    mode = compat.fake_mode_of(values) or compat.FakeTensorMode(allow_non_fake_inputs=True)
    with compat.compiling_in(mode):
        return _cut(*_static(program, values, mode), program, job, run, owned)


def _cut(
    graph: GraphModule,
    fakes: Sequence[Any],
    program: Captured,
    job: Job,
    run: Compilation,
    owned: Sequence[Mapping[str, Sequence[int]] | None],
) -> Cut:
    plan = job.plan
    assert job.pipeline is not None
    placeholders = graph.graph.find_nodes(op="placeholder")
    weights = {placeholders[i].name for i in (*program.parameters, *program.buffers)}
    made = microbatch(graph, fakes, weights, _microbatches(job), compat.mesh_group_name(job.pipeline))
    _note_numbers(made.graph, fakes)
    shapes = _shapes(graph) + _shapes(made.graph)[made.num_outputs :]
    loss = _loss_of(made, program) if program.trains else None
    _detach_others(made.graph, loss)
    returned = _as_captured(made.graph, program)
    one = run.transform(returned, Phase.CAPTURED)
    core = core_of(one)
    names = _names(core, one)
    inputs = _inputs(core, names, made, program)
    kind = plan.schedule if program.trains else "forward"
    order = schedule(kind, plan.pp, plan.num_stages, made.count)
    setting = _setting(job, order)
    owning = [None if o is None else _owning_stages(o, plan.pp, plan.num_stages) for o in owned]
    found = _chosen(core.graph, inputs, job, setting, owning, kind)
    return Cut(
        batch=made,
        plan=found,
        stages=tuple(cut(core.graph, inputs, found)),
        names=names,
        policies={**program.core.policies, **one.meta.get(POLICIES, {}), **core.policies},
        shapes=shapes,
        loss=loss,
        kept=frozenset(one.meta.get(SHARDED_OUTPUTS, {})),
        schedule=order,
    )


def _microbatches(job: Job) -> int:
    """How many a batch is made in, if it has the rows."""
    return job.plan.microbatches or _PER_RANK * job.plan.pp


def places_of(found: Cut, program: Captured, all_names: Sequence[str], pp: int) -> dict[str, tuple[int, ...]]:
    """Which places hold each parameter: those of the stages that use it. One that none uses may be used by a
    later program, and nobody knows where: all places have it."""
    places: dict[str, set[int]] = {}
    for number, stage in enumerate(found.stages):
        for name in stage.parameters:
            places.setdefault(name, set()).add(number % pp)
    return {name: tuple(sorted(places.get(name, range(pp)))) for name in all_names}


def _owning_stages(owned: Mapping[str, Sequence[int]], pp: int, stages: int) -> dict[str, set[int]]:
    return {name: {s for s in range(stages) if s % pp in places} for name, places in owned.items()}


def _shapes(graph: GraphModule) -> tuple[Any, ...]:
    return tuple(n.meta["val"] if isinstance(n, Node) else n for n in output_of(graph).args[0])  # type: ignore[union-attr]


def _static(
    program: Captured, values: Sequence[Any], mode: compat.FakeTensorMode
) -> tuple[GraphModule, list[Any]]:
    """The core on inputs of these sizes, and fakes of those."""
    with mode:
        fakes = [
            torch.empty(v.shape, dtype=v.dtype, device=v.device).requires_grad_(_trained(i, program))
            if isinstance(v, Tensor)
            else v
            for i, v in enumerate(values)
        ]

    def run(*inputs: Any) -> list[Any]:
        return list(Interpreter(program.core.graph).run(*inputs))

    graph = compat.trace_before_autograd(run, fakes)
    _note_numbers(graph, fakes)
    return graph, fakes


def _note_numbers(graph: GraphModule, inputs: Sequence[Any]) -> None:
    """Say of inputs that are numbers which they are: tracing says it of tensors alone."""
    for node, value in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=False):
        node.meta.setdefault("val", value)


def _trained(position: int, program: Captured) -> bool:
    return position in program.parameters and position not in program.frozen


def _loss_of(made: Microbatch, program: Captured) -> int:
    """Which output is the loss: the first that is one number, a sum over microbatches, and of weights."""
    inputs = made.graph.graph.find_nodes(op="placeholder")
    weights = {inputs[i] for i in program.parameters if i not in program.frozen}
    differentiable = _differentiable(made.graph, weights)
    outputs: Sequence[Any] = output_of(made.graph).args[0]  # type: ignore[assignment]
    own = zip(outputs[: made.num_outputs], made.results, strict=False)
    for index, (node, result) in enumerate(own):
        if program.loss not in (None, index):
            continue
        value = node.meta.get("val") if isinstance(node, Node) else None
        scalar = isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()
        if scalar and (result.kind == "sum" or made.count == 1) and node in differentiable:
            return index
    if made.late is not None:
        raise PlacementError(made.late.why)
    raise PipelineError(
        "no output of the compiled program is a loss: one number that the parameters are trained by. A "
        "pipeline makes the backward of each microbatch itself, so the loss belongs into the compiled "
        "program: give the model its labels, or compile a function of model and batch that returns the "
        "loss. To compute without training, call it under torch.no_grad()."
    )


def _differentiable(graph: GraphModule, weights: set[Node]) -> set[Node]:
    """What autograd would follow from ``weights``."""
    found, enabled = set(weights), True
    for node in graph.graph.nodes:
        if compat.sets_grad_mode(node.target):
            enabled = bool(node.args[0])
        follows = enabled and node.target is not torch.ops.aten.detach.default
        if follows and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _detach_others(graph: GraphModule, loss: int | None) -> None:
    """Only the loss is differentiated."""
    output = output_of(graph)
    results = list(output.args[0])  # type: ignore[arg-type]
    with graph.graph.inserting_before(output):
        for index, node in enumerate(results):
            if index != loss and isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor):
                results[index] = insert(graph.graph, torch.ops.aten.detach.default, (node,), node)
    output.args = (results,)
    graph.recompile()


def _as_captured(graph: GraphModule, program: Captured) -> GraphModule:
    """A program of one microbatch as capture passes expect one: its parameters are read."""
    made, env = Graph(), {}
    placeholders = graph.graph.find_nodes(op="placeholder")
    for number, node in enumerate(placeholders):
        given = made.placeholder(f"input_{number}")
        value = node.meta["val"]
        given.meta = {"val": value, "example_value": value}
        env[node] = given
        if number in program.parameters:
            with compat.fake_mode_of([value]) or contextlib.nullcontext():
                leaf = torch.empty_like(value).requires_grad_(_trained(number, program))
            given.meta["example_value"] = leaf
    for number in program.parameters:
        given = env[placeholders[number]]
        # The divisor and group are of no consequence here: a stage has reads of its own.
        read = made.call_function(dialect.replica, (given, 1, given.meta["val"].dtype, ""))
        read.meta = dict(given.meta)
        env[placeholders[number]] = read
    for node in graph.graph.nodes:
        if node.op not in ("placeholder", "output"):
            env[node] = made.node_copy(node, env.__getitem__)
            env[node].meta.setdefault("example_value", node.meta.get("val"))
    results = [env[n] if isinstance(n, Node) else n for n in output_of(graph).args[0]]  # type: ignore[union-attr]
    made.output(tuple(results))
    found = GraphModule(graph, made)
    found.meta[RETURNED] = frozenset(range(len(results))) if program.returned is None else program.returned
    return found


def _names(core: Core, one: GraphModule) -> dict[str, int]:
    """Names of the cut program's inputs, and their numbers among the microbatch program's."""
    mine = core.graph.graph.find_nodes(op="placeholder")
    return {n.name: i for n, i in zip(mine, core.places(one), strict=True)}


def _inputs(core: Core, names: Mapping[str, int], made: Microbatch, program: Captured) -> Inputs:
    total = len(made.graph.graph.find_nodes(op="placeholder"))
    batch = {*made.batched, total - 1}  # and the number of the first row
    return Inputs(
        parameters={name: program.parameters[i] for name, i in names.items() if i in program.parameters},
        batch=frozenset(name for name, i in names.items() if i in batch),
        frozen=frozenset(name for name, i in names.items() if i in program.frozen),
    )


def _setting(job: Job, order: Schedule) -> Setting:
    def in_flight(stage: int, stages: int) -> int:
        return max(1, order.in_flight(stage))

    phases = order.kind in ("gpipe", "forward")
    terms = Terms(order.num_microbatches, in_flight, phases, job.memory_bytes)
    shared = job.stages[0].size() if job.plan.zero else 1
    return Setting(job.hardware, terms, state=4.0 / shared, fused=job.plan.lowering == "inductor")


def _chosen(
    graph: GraphModule,
    inputs: Inputs,
    job: Job,
    setting: Setting,
    owned: Sequence[Mapping[str, set[int]] | None],
    kind: str,
) -> StagePlan:
    """The first rank's plan, on every rank: with the first of ``owned`` with which there is one."""
    mine = set(inputs.parameters.values())
    tries = [None if o is None else {n: s for n, s in o.items() if n in mine} for o in owned]

    def choose() -> str:
        for held in tries[:-1]:
            with contextlib.suppress(StageError):
                return choose_with(held)
        return choose_with(tries[-1])

    def choose_with(held: Mapping[str, set[int]] | None) -> str:
        if held and job.cut is not None:
            with contextlib.suppress(StageError):  # another program than the one that was cut first, perhaps
                again = priced(graph, inputs, job.cut.cuts, setting, owners=held)
                return dataclasses.replace(again, why=job.cut.why).to_json()
        if job.plan.cuts is not None and not held:
            return _given_cuts(job.plan.cuts, graph, inputs, setting)
        return partition(graph, inputs, job.plan.num_stages, setting, owners=held).to_json()

    digest = hash_of(graph_lines(graph, job.group_labels, mask_sizes=True))
    of_places = "" if tries[0] is None else ", whose parameters have places"
    subject = f"the {kind} stages of program {digest}{of_places}{', or more' * (len(tries) - 1)}"
    return StagePlan.from_json(job.lead(subject, choose))


def hash_of(lines: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _given_cuts(path: str, graph: GraphModule, inputs: Inputs, setting: Setting) -> str:
    try:
        given = StagePlan.from_json(Path(path).read_text())
    except OSError as error:
        raise PlanError(f"cannot read plan field 'cuts' ({path!r}): {error}") from None
    return priced(graph, inputs, given.cuts, setting).to_json()


# --- a program in use -------------------------------------------------------------------------------------


class Pipeline:
    """What runs in place of a captured program, on one rank of a pipeline.

    Programs are compiled for each set of sizes that it is called with.
    """

    def __init__(self, program: Captured, job: Job, parameters: Mapping[str, DTensor]) -> None:
        assert job.pipeline is not None
        self.program, self.job = program, job
        self.parameters = dict(parameters)
        self.group = compat.mesh_group_name(job.pipeline)
        self.compiled: dict[Any, CompiledPipeline] = {}
        self.others: dict[int, Pipeline] = {}
        self.same_batch = SameBatch(job.pipeline, job.device)

    def compile(self, values: Sequence[Any]) -> CompiledPipeline:
        key = tuple(_size(values[i]) for i in self.program.batch)
        if key not in self.compiled:
            job = self.job
            job.at("compiling a pipeline")
            with job.failing_together(), job.stage.failing_together(), job.line.failing_together():
                made = _compile(self, values)
                if job.line.agreement is not None:  # nobody begins before all are ready
                    subject = f"pipeline program {len(self.compiled)}"
                    job.line.agreement.require(subject, {"stages": _borders(made.cut)})
            self.compiled[key] = made
        return self.compiled[key]

    def parameters_in(self, values: Sequence[Any]) -> dict[str, DTensor]:
        """The parameters that a call is given, by their names: Dynamo runs the program of one model with
        another of the same class, as parameters are inputs."""
        return {name: values[i] for i, name in self.program.parameters.items()}

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        values = [arguments[p] for p in self.program.places]
        jobs = (job_of(values[i]) for i in self.program.parameters)
        job = next((j for j in jobs if j is not None), self.job)
        if job is not self.job:  # another model, whose parameters may lie elsewhere
            if job.number not in self.others:
                self.others[job.number] = Pipeline(self.program, job, self.parameters_in(values))
            return self.others[job.number](*arguments)
        mine = [values[i] for i in self.program.batch]
        with self.job.watch("comparing batches"):
            self.same_batch.check(mine)
        if self.program.trains:
            _refuse_inputs_with_gradients(mine)
        self._check_alike(mine)
        compiled = self.compile(values)
        trained = [values[i] for i in self.program.parameters if _trained(i, self.program)]
        if compiled.cut.loss is None:
            with torch.no_grad():
                return tuple(compiled.run(values)[0])
        # Results other than the loss have no gradient: what asks for one is told so, rather than given none.
        made = _Differentiable.apply(compiled, values, *trained)
        loss = compiled.cut.loss
        return tuple(
            not_differentiable(x, trained[0])
            if i != loss and type(x) is Tensor and x.is_floating_point()
            else x
            for i, x in enumerate(made)
        )

    def _check_alike(self, batch: Sequence[Any]) -> None:
        """Where stages gather weights for each microbatch, replicas must make as many."""
        if self.job.dry_run or not reads_of(self.job.stage).in_program:
            return
        rows = batch_size([x for x in batch if isinstance(x, Tensor)])
        _, count = parts_of(rows, _microbatches(self.job))
        text = f"{count} {'with' if self.program.trains else 'without'} gradients"
        doing = f"makes its batch of {rows} rows in {count} microbatches"
        with self.job.watch("comparing numbers of microbatches"):
            check_same(text, doing, self.job.stage.group, self.job.device)


def _refuse_inputs_with_gradients(values: Sequence[Any]) -> None:
    found = next((x for x in values if isinstance(x, Tensor) and x.requires_grad), None)
    if found is not None:
        raise PipelineError(
            f"an input of shape {tuple(found.shape)} asks for a gradient (it was computed from parameters "
            "outside of the compiled program, say), and a pipeline makes gradients of its own parameters "
            "alone. Compile all that is trained as one program, or detach the input."
        )


def _borders(found: Cut) -> str:
    """What stages send each other, in which order."""
    lines = [f"{found.schedule.kind} of {found.batch.count} microbatches"]
    for number, stage in enumerate(found.stages):
        sent = (f"{tuple(p.value.shape)} {p.value.dtype} gradient={p.gradient}" for p in stage.sent)
        lines.append(f"stage {number} sends {'; '.join(sent)}")
    return "\n".join(lines)


def _size(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


class _Differentiable(torch.autograd.Function):
    """The schedule as one function of the parameters: its forward makes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any, compiled: CompiledPipeline, values: Sequence[Any], *trained: Tensor
    ) -> tuple[Any, ...]:
        results, ctx.gradients = compiled.run(values)
        loss = compiled.cut.loss
        ctx.mark_non_differentiable(
            *(x for i, x in enumerate(results) if i != loss and isinstance(x, Tensor))
        )
        ctx.set_materialize_grads(False)
        ctx.loss = loss
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise StageGradientError(
                "backward was called twice on a loss of a pipeline, which keeps its gradients for one "
                "backward. Call the model again."
            )
        gradients, ctx.gradients = ctx.gradients, None
        scale = cotangents[ctx.loss]
        if scale is None:
            return None, None, *(None for _ in gradients)
        for gradient in gradients:
            if gradient is not None:
                local = compat.local_part(gradient)
                local.mul_(scale.to(local.dtype))
        return None, None, *gradients


@dataclass
class CompiledPipeline:
    """A pipeline's programs for inputs of given sizes."""

    owner: Pipeline
    cut: Cut
    stages: list[CompiledStage]
    executor: Executor
    number: int
    runs: int = 0

    @property
    def job(self) -> Job:
        return self.owner.job

    def run(self, values: Sequence[Any]) -> tuple[list[Any], list[DTensor | None]]:
        """The program's results on every rank, and this rank's gradients of the parameters that are
        trained."""
        batch, job = self.cut.batch, self.job
        if job.dry_run:
            return self._without_data(values)
        seed = self._seed(values)
        inputs = self._inputs(values, seed)
        one = torch.ones((), dtype=self._loss_type(), device=job.device)
        parameters = self.owner.parameters_in(values)
        whole = self._weights(parameters)
        programs = [
            BoundStage(stage, [whole[name] for name in stage.graph.parameters], inputs, one)
            for stage in self.stages
        ]
        outcome = self._executed(programs, int(seed))
        trains = self.cut.loss is not None
        gradients = self._gradients(outcome.gradients, parameters) if trains else []
        return self._results(outcome.results, batch), gradients

    def _executed(self, programs: Sequence[BoundStage], seed: int) -> Outcome:
        """One run; that of number ``_RECORDED`` is written down where somebody reads artifacts."""
        self.runs += 1
        if self.runs != _RECORDED or not self._is_recorded:
            return self.executor.run(programs, seed)
        recorder = Recorder(self.job.device)
        outcome = self.executor.run(programs, seed, recorder)
        spans: list[Any] = [None] * self.job.plan.pp
        dist.all_gather_object(spans, recorder.spans(), group=compat.process_group(self.owner.group))
        lines = {"planned": planned(self.cut.plan, self.cut.schedule), "measured": spans}
        write_pipeline(self.job, self.number, self.cut.plan, lines)
        return outcome

    @cached_property
    def _is_recorded(self) -> bool:
        """All ranks take part in it, or none: the first rank says."""
        if compat.is_fake_group(self.owner.group):
            return False
        wanted = self.job.artifacts is not None
        return self.job.lead("whether pipelines are recorded", lambda: "yes" if wanted else "no") == "yes"

    def _without_data(self, values: Sequence[Any]) -> tuple[list[Any], list[DTensor | None]]:
        trained = sum(_trained(i, self.owner.program) for i in self.owner.program.parameters)
        with compat.fake_mode_of(values) or contextlib.nullcontext():
            made = [
                torch.empty(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x
                for x in self.cut.shapes
            ]
            made = self.cut.batch.finished(made)
        return made, [None] * trained

    # What stages take.

    def _seed(self, values: Sequence[Any]) -> Tensor:
        """A number that the ranks of a pipeline share, drawn anew for every run."""
        drawn = torch.randint(0, 2**31 - 1, (1,), dtype=torch.int64)
        if self._draws:
            source = compat.group_ranks(self.owner.group)[0]
            drawn = drawn.to(self.job.device)
            dist.broadcast(drawn, source, group=compat.process_group(self.owner.group))
        return drawn

    @cached_property
    def _draws(self) -> bool:
        """Whether anything in the program is random: decided by all of it, so alike on all ranks."""
        nodes = (n for s in self.cut.stages for n in s.graph.graph.nodes)
        return any(compat.is_random(n.target) or n.target is torch.ops.autodist.keep.default for n in nodes)

    def _inputs(self, values: Sequence[Any], seed: Tensor) -> Callable[[str, int], Any]:
        batch = self.cut.batch
        pieces = {i: batch.pieces(values[i]) for i in batch.batched}
        met: list[Tensor] = []
        count = len(values)
        first = [torch.tensor(m * batch.rows, device=self.job.device) for m in range(batch.count)]
        seed = seed.to(self.job.device)

        def given(number: int, microbatch: int) -> Any:
            if number < 0:
                return (seed, first[microbatch])[number + 2]
            if number >= count:
                number -= count
                if number < len(met):
                    return met[number]
                return (seed, first[microbatch])[number - len(batch.prologue)]
            return pieces[number][microbatch] if number in pieces else values[number]

        with torch.no_grad():
            for request in batch.prologue:
                parts = []
                for m in range(batch.count):
                    taken = [given(i, m) for i in request.inputs]
                    parts.append(request.graph(*taken, *(met[e] for e in request.earlier)))
                met.append(request.meet(parts))
        return lambda name, microbatch: given(self.cut.names[name], microbatch)

    def _loss_type(self) -> torch.dtype:
        value = None if self.cut.loss is None else self.cut.shapes[self.cut.loss]
        return torch.float32 if value is None else value.dtype

    def _weights(self, parameters: Mapping[str, DTensor]) -> dict[str, Tensor]:
        """What this rank's stages are given for each parameter: shards, or whole values gathered now."""
        names = list(dict.fromkeys(n for s in self.stages for n in s.graph.parameters))
        local = {n: compat.local_part(parameters[n]).detach() for n in names}
        reads = reads_of(self.job.stage)
        if reads.in_program or self.job.stage.mesh.size() == 1:  # type: ignore[union-attr]
            return local
        sharded = [n for n in names if parameters[n].placements[0].is_shard()]
        by_type: dict[torch.dtype, list[str]] = {}
        for name in sharded:
            by_type.setdefault(local[name].dtype, []).append(name)
        for dtype, group in by_type.items():
            rows = [int(parameters[n].shape[0]) for n in group]
            whole = dialect.unshard_bucket([local[n] for n in group], rows, dtype, reads.group)
            local.update(zip(group, whole, strict=True))
        return local

    # What comes of them.

    def _gradients(
        self, found: Mapping[int, Sequence[Tensor | None]], parameters: Mapping[str, DTensor]
    ) -> list[DTensor | None]:
        totals: dict[str, Tensor] = {}
        for stage in self.stages:
            names = [stage.graph.parameters[i] for i in stage.trained]
            for name, gradient in zip(names, found[stage.index], strict=True):
                if gradient is not None:
                    totals[name] = totals[name] + gradient if name in totals else gradient
        totals = self._reduced(totals, parameters)
        self._sum_copies(totals, parameters)
        trained = [n for i, n in self.owner.program.parameters.items() if _trained(i, self.owner.program)]
        return [_as_gradient(parameters[name], totals[name]) if name in totals else None for name in trained]

    def _reduced(
        self, totals: dict[str, Tensor], parameters: Mapping[str, DTensor]
    ) -> dict[str, Tensor]:
        """Summed over the ranks of the stage, where its programs have not done so."""
        reads = reads_of(self.job.stage)
        if reads.in_program or self.job.stage.mesh.size() == 1:  # type: ignore[union-attr]
            return totals
        groups: dict[tuple[bool, torch.dtype], list[str]] = {}
        for name in totals:
            key = parameters[name].placements[0].is_shard(), totals[name].dtype
            groups.setdefault(key, []).append(name)
        made = dict(totals)
        for (sharded, dtype), names in groups.items():
            reduce = dialect.reduce_bucket if sharded else dialect.average_bucket
            mine = reduce([totals[n] for n in names], reads.divisor, dtype, reads.group)
            made.update(zip(names, mine, strict=True))
        return made

    def _sum_copies(self, totals: dict[str, Tensor], parameters: Mapping[str, DTensor]) -> None:
        """Add up the gradients of a parameter that several places hold: in one order on all of them."""
        for name in sorted(parameters):
            parameter = parameters[name]
            places = owners(parameter)
            if len(places) < 2 or not is_here(parameter) or not parameter.requires_grad:
                continue
            mine = totals.get(name)
            if mine is None:
                mine = torch.zeros_like(compat.local_part(parameter))
            dist.all_reduce(mine, group=self.job.shared_groups[places])
            totals[name] = mine

    def _results(self, found: Mapping[int, Sequence[Sequence[Tensor]]], batch: Microbatch) -> list[Any]:
        """The program's outputs: from the place of the stage that makes each to all others."""
        made_by = {r.index: (s, at) for s, g in enumerate(self.cut.stages) for at, r in enumerate(g.results)}
        results: list[Any] = list(self.cut.shapes)
        ranks, pp = compat.group_ranks(self.owner.group), self.job.plan.pp
        for index, whole in enumerate(self.cut.shapes):
            if not isinstance(whole, Tensor) or batch.results[index].kind == "late":
                continue
            stage, at = made_by[index]
            if self.withholds(index):
                results[index] = withheld(whole.shape, whole.dtype, ELSEWHERE)
                continue
            if stage % pp == self.job.place:
                value = batch.results[index].combined([parts[at] for parts in found[stage]]).contiguous()
            else:
                value = torch.empty(whole.shape, dtype=whole.dtype, device=self.job.device)
            if not compat.is_fake_group(self.owner.group):
                dist.broadcast(value, ranks[stage % pp], group=compat.process_group(self.owner.group))
            results[index] = value
        with torch.no_grad():
            return batch.finished(results)

    def withholds(self, index: int) -> bool:
        """Of results with rows, those of up to a number a token are sent to all ranks; larger ones follow
        the plan."""
        if index >= self.cut.batch.num_outputs:
            return False
        if index in self.cut.kept:
            return True
        whole = self.cut.shapes[index]
        rows = isinstance(whole, Tensor) and whole.ndim > 2 and whole.shape[0] == self.cut.batch.batch
        return rows and self.job.plan.outputs != "gathered"


def _as_gradient(parameter: DTensor, local: Tensor) -> DTensor:
    return compat.dtensor_of(local, compat.specification(parameter), False)


def _compile(owner: Pipeline, values: Sequence[Any]) -> CompiledPipeline:
    job, program = owner.job, owner.program
    run = _compilation(job)
    owned = {name: owners(p) for name, p in owner.parameters.items()}
    found = find_cut(program, values, job, run, owned)
    if job.is_first_rank:
        _explain(found.plan)
    reads = reads_of(job.stage)
    splits = found.schedule.kind == "zero-bubble"
    mine = {n: found.stages[n] for n in found.schedule.stages_of(job.place)}
    held = {n: _held(owner, stage, reads) for n, stage in mine.items()}
    stages = []
    for number, stage in mine.items():
        resident, weights = held[number]
        others = sum(map(sum, held.values())) - resident - weights
        one = _one_microbatch(job, number, resident + weights, others, found.schedule)
        stage_run = _compilation(job, found.policies, one)
        stage_run.resident = resident
        stages.append(
            compile_stage(stage, number, stage_run, owner.parameters, reads, program.trains, splits)
        )
    write_pipeline(job, run.report.number, found.plan, {"planned": planned(found.plan, found.schedule)})
    executor = Executor(found.schedule, job.place, compat.process_group(owner.group), job.device, job.monitor)
    return CompiledPipeline(owner, found, stages, executor, run.report.number)


def planned(plan: StagePlan, order: Schedule) -> list[list[Span]]:
    """The ranks' timelines as the plan's costs foretell them."""

    def seconds(action: Action) -> float:
        stage = plan.stages[action.stage]
        half = stage.backward / 2
        return {
            Step.FORWARD: stage.forward,
            Step.BACKWARD: stage.backward,
            Step.BACKWARD_INPUT: half,
            Step.BACKWARD_WEIGHT: half,
            Step.SEND_FORWARD: stage.forward_transfer / 2,
            Step.SEND_BACKWARD: stage.backward_transfer / 2,
        }.get(action.step, 0.0)

    return timeline(order.lists, seconds)


def _held(owner: Pipeline, stage: StageGraph, reads: Reads) -> tuple[int, int]:
    """Bytes that a stage holds all the time: of gradients and Adam's moments, and of parameters."""
    mine = [owner.parameters[n] for n in stage.parameters]
    local = {n: compat.local_part(p).nbytes for n, p in enumerate(mine)}
    whole = {n: p.numel() * p.element_size() for n, p in enumerate(mine)}
    given = local if reads.in_program else whole
    trained = [n for n, p in enumerate(mine) if p.requires_grad]
    return sum(2 * local[n] + given[n] for n in trained), sum(given.values())


def _one_microbatch(job: Job, stage: int, held: int, others: int, order: Schedule) -> Job:
    """The job of a stage, its memory that of one microbatch of those in flight: what all of them may take in
    equal parts, beside what this stage and ``others`` of the rank hold. Nothing is offloaded: what a
    microbatch leaves on the host would be there as often as there are microbatches."""
    if job.memory_bytes is None:
        return job.stage
    each = max(0, job.memory_bytes - held - others) // max(1, order.in_flight_of_rank(job.place))
    plan = dataclasses.replace(job.plan, memory=max(1, held + each), host_memory=0)
    label = f"{job.stage.label}, stage {stage}, {order.kind} of {order.num_microbatches}"
    made = dataclasses.replace(job.stage, plan=plan, label=label, agreed=set(), led={})
    made.__dict__["monitor"] = job.monitor
    return made


def _compilation(job: Job, policies: Mapping[int, Any] | None = None, of: Job | None = None) -> Compilation:
    """``of`` is the job of a stage, by default that of all stages at this rank's place."""
    report = GraphReport(job.next_graph(), job.hardware.stages_collectives)
    job.reports.append(report)
    return Compilation(of or job.stage, {}, report, 0, "", policies or {})


def _explain(plan: StagePlan) -> None:
    for number, stage in enumerate(plan.stages):
        log.info("pipeline stage %d: %s to %s", number, stage.first, stage.last)
    for number, why in enumerate(plan.why, 1):
        log.info("pipeline cut %d: %s", number, why)


# --- from a plain model -----------------------------------------------------------------------------------


def pipelined(graph: GraphModule, inputs: Sequence[Any], job: Job) -> Callable[..., Any]:
    """What runs in place of a captured program of a model that has been sharded by stages."""
    _refuse_breaks()
    names = {i: n for i, n in enumerate(map(parameter_name, inputs)) if n is not None}
    lost = [x for i, x in enumerate(inputs) if isinstance(x, DTensor) and i not in names]
    if lost:
        raise PipelineError(
            f"a parameter of shape {tuple(lost[0].shape)} was copied or converted (Module.to, deepcopy) "
            "after its model had been sharded, and does not know its stage any more. Convert and copy "
            "models before they are compiled or prepared."
        )
    for parameter in (x for i, x in enumerate(inputs) if i in names):
        refuse_norms(parameter)
    return Pipeline(captured(graph, inputs, names, job), job, {names[i]: inputs[i] for i in names})


def shard_by_stages(graph: GraphModule, inputs: Sequence[Any], model: nn.Module, job: Job) -> None:
    """Cut a plain ``model`` by its first captured program, and shard it accordingly."""
    job.model = weakref.ref(model)
    _refuse_breaks()
    shard_model(model, job, places=first_places(graph, inputs, model, job))


class _Traced(Exception):
    """Raised where a model has been traced, which is all that was wanted."""


def shard_on_batch(
    model: nn.Module, job: Job, batch: Any, init: Callable[[nn.Module], None] | None
) -> nn.Module:
    """Cut ``model`` by its program on ``batch``, and shard it accordingly. Raises :class:`PlanError`."""
    if batch is None:
        raise PlanError(
            f"plan field 'pp' is {job.plan.pp}: where a model is cut into stages follows from its program. "
            "Give prepare a batch to trace it on, prepare(model, plan, batch={...}), or leave prepare "
            "out: the first call of the compiled model cuts it."
        )
    device = next((p.device for p in model.parameters()), job.device)
    given = compat.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, batch)
    positional = () if isinstance(given, Mapping) else given if isinstance(given, tuple) else (given,)
    named = given if isinstance(given, Mapping) else {}
    places: list[dict[str, tuple[int, ...]]] = []

    def look(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        _refuse_breaks()
        places.append(first_places(graph, inputs, model, job))
        raise _Traced

    job.model = weakref.ref(model)
    try:
        with compat.fake_mode_of(list(model.parameters())) or contextlib.nullcontext():
            torch.compile(model, backend=look)(*positional, **named)
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        if not isinstance(cause, _Traced):
            raise cause from None
    if not places:
        raise PlanError("the model uses none of its parameters on this batch, so there is nothing to cut")
    return shard_model(model, job, init, places[0])


def _refuse_breaks() -> None:
    """A program that goes on after its graph is not a whole one, and has no loss to pipeline."""
    if compat.returns_to_user():
        return
    if compat.ignore_logged_warnings():
        compat.retrace()
    raise PipelineError(
        "the compiled function is not one graph: Dynamo breaks it, or a part of it is compiled that does "
        "not return to your program. A pipeline cuts a whole program, from its inputs to its loss. See "
        "where it breaks with TORCH_LOGS=graph_breaks, and mend or move what stands there; or use a plan "
        "without pp."
    )


def first_places(
    graph: GraphModule, inputs: Sequence[Any], model: nn.Module, job: Job
) -> dict[str, tuple[int, ...]]:
    """Where the parameters of a model that nobody has prepared belong, from its first captured program."""
    known = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    first = {id(p): n for n, p in model.named_parameters()}
    names = {i: first[id(x)] for i, x in enumerate(inputs) if id(x) in first}
    program = captured(graph, inputs, names, job)
    values = [inputs[p] for p in program.places]
    with job.failing_together():
        found = find_cut(program, _concrete(values), job, _compilation(job), None)
    job.cut = found.plan
    places = places_of(found, program, list(first.values()), job.plan.pp)
    return {name: places[first[i]] for i, name in known.items()} | places


def _concrete(values: Sequence[Any]) -> list[Any]:
    return [compat.size_hint(v) if isinstance(v, torch.SymInt) else v for v in values]


__all__ = [
    "Captured",
    "CompiledPipeline",
    "Pipeline",
    "PipelineError",
    "captured",
    "find_cut",
    "first_places",
    "hash_of",
    "places_of",
]
