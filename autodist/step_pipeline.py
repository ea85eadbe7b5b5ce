"""A captured training step as a pipeline: each rank runs what is its stages' own.

    unprepared     captured as if nothing were sharded, its losses' programs cut into stages: that says where
                   parameters lie (:func:`shard_by_step`)
    then           captured as if all parameters lay at this rank's place, so alike on all ranks of a pipeline
    regions        each is a pipeline call: the schedule of its microbatches, which returns the loss and the
                   gradients of this rank's parameters (:mod:`autodist.pipeline`)
    the rest       accumulation, clipping, optimizer, averages: programs between calls and exchanges of
                   numbers, for what lies here (:mod:`autodist.passes.step_places`)

Outside of a program a rank has gradients and optimizer state of its own parameters alone. So before a capture
the ranks of a pipeline tell each other what they have (:func:`of_all_places`), and before a run which program
it is (:meth:`StepPipelines.common`): Python values that only some of them see differ on those alone.

Invariants: nothing is ever held of parameters that lie elsewhere; the ranks of a pipeline make the same
programs in the same order.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule, Node

from autodist.compiler import Compilation, CompiledStep, GraphReport, compile_piece
from autodist.job import Job, start_job
from autodist.passes.analysis.cost import is_collective_start
from autodist.passes.base import Phase, StepError
from autodist.passes.capture import core_of, functional
from autodist.passes.graph import num_bytes, where
from autodist.passes.regions import Region, leaf_inputs, program_of, regions_of, returned_outputs
from autodist.passes.step_parts import StepPart, step_parts
from autodist.passes.step_places import (
    Exchange,
    Places,
    Reading,
    Run,
    StepPlaces,
    related_places,
    step_places,
)
from autodist.pipeline import Captured as Program
from autodist.pipeline import CompiledPipeline, Pipeline, find_cut, hash_of, places_of
from autodist.plan import Plan, PlanError
from autodist.prepare import check_same_plan, device_of, prepared_job, shard_model
from autodist.runtime import compat, dialect
from autodist.runtime.agreement import graph_lines
from autodist.runtime.exchange import Sent, exchange
from autodist.runtime.parameters import adopt, check_same, plain_parameters
from autodist.runtime.stage_parameters import absent_like, is_here, note_owners, owners, place_of
from autodist.stage_program import reads_of
from autodist.step_capture import Captured, capture
from autodist.step_layout import AsIfHere, Whole
from autodist.step_state import Moment, State

_COMPARED = 62  # programs that ranks compare before a run: the bits of a number

# --- what lies elsewhere -----------------------------------------------------------------------------


def places_of_tensor(x: Tensor, job: Job) -> Places:
    """Where a tensor that a step is given lies: a plain one is on every rank."""
    if not isinstance(x, DTensor):
        return everywhere(job)
    if owners(x):
        return frozenset(owners(x))
    place = place_of(x, job.stages)
    if place is None:
        raise StepError(
            f"the step is given a DTensor of shape {tuple(x.shape)} on the mesh {x.device_mesh}, and in a "
            "pipeline DTensors lie where a stage's parameters do. Pass a plain tensor, the same on all ranks "
            "of the pipeline, or one that is made of a parameter."
        )
    return frozenset({place})


def everywhere(job: Job) -> Places:
    return frozenset(range(job.plan.pp))


@dataclass(frozen=True)
class _Kept:
    """What an optimizer keeps of a parameter under ``key``: a tensor of this kind, sharded as ``placement``
    says if it is sharded, or a Python value."""

    key: Any
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: str = ""
    placement: Any = None
    value: Any = None


def of_all_places(state: State, job: Job) -> State:
    """The state with what other ranks of the pipeline have beside theirs, without its memory; collective."""
    assert job.pipeline is not None
    group = compat.process_group(compat.mesh_group_name(job.pipeline))
    mine = {
        number: (parameter.grad is not None, _kept(state, number))
        for number, parameter in enumerate(state.parameters)
        if min(places_of_tensor(parameter, job)) == job.place
    }
    told: list[Any] = [None] * job.plan.pp
    dist.all_gather_object(told, mine, group=group)
    made = copy.copy(state)
    for name in ("kept_parts", "values"):
        made.__dict__.pop(name, None)
    gradients: dict[int, Tensor] = {}
    values: dict[tuple[int, int], dict[Any, Any]] = {}
    moments = [m for m in state.moments if _has(state.parameters[m.parameter])]
    for number, (has_gradient, kept) in sorted(x for place in told for x in place.items()):
        parameter = state.parameters[number]
        if _has(parameter):
            continue
        if has_gradient:
            gradients[number] = _nothing(parameter, tuple(parameter.shape), parameter.dtype, None)
        for optimizer, found in kept.items():
            values[optimizer, number] = {k.key: k.value for k in found if k.dtype is None}
            moments += [
                Moment(optimizer, number, k.key, _nothing(parameter, k.shape, k.dtype, k))
                for k in found
                if k.dtype is not None
            ]
    order = {id(m): i for i, m in enumerate(moments)}
    made.moments = sorted(moments, key=lambda m: (m.optimizer, m.parameter, order[id(m)]))
    made.gradients_elsewhere, made.values_elsewhere = gradients, values
    return made


def _has(parameter: Tensor) -> bool:
    return not isinstance(parameter, DTensor) or is_here(parameter)


def _kept(state: State, number: int) -> dict[int, list[_Kept]]:
    found = {}
    for i, optimizer in enumerate(state.roots.optimizers):
        values = optimizer.state.get(state.parameters[number])
        if values:
            found[i] = [_described(k, v) for k, v in values.items()]
    return found


def _described(key: Any, value: Any) -> _Kept:
    if not isinstance(value, Tensor):
        return _Kept(key, value=value)
    placement = value.placements[0] if isinstance(value, DTensor) else None
    device = compat.local_part(value).device.type
    return _Kept(key, tuple(value.shape), value.dtype, device, placement)


def _nothing(parameter: DTensor, shape: tuple[int, ...], dtype: torch.dtype, kept: _Kept | None) -> Tensor:
    """What stands for a gradient or a moment of a parameter that lies elsewhere. Of what is not sharded there
    is a tensor: a number, as a rule."""
    if kept is not None and kept.placement is None:
        device = kept.device if kept.device != parameter.device.type else parameter.device
        return torch.zeros(shape, dtype=dtype, device=device)
    placement = parameter.placements[0] if kept is None else kept.placement
    return absent_like(torch.Size(shape), dtype, parameter.device, parameter.device_mesh, placement)


# --- a step's losses as pipelines ----------------------------------------------------------------------


@dataclass
class _Step:
    """A captured step, functional, lists taken apart: its regions, and which parameters each takes."""

    captured: Captured
    graph: GraphModule
    written: tuple[int, ...]
    regions: list[Region]
    parameters: list[dict[Node, int]] = field(default_factory=list)


def _functional(captured: Captured, run: Compilation) -> _Step:
    graph, written = functional(captured.graph, captured.inputs)
    leaves = leaf_inputs(captured.graph)
    with compat.compiling_in(captured.mode):
        graph = run.transform(graph, Phase.STEP_CAPTURED)
    regions = regions_of(graph, leaves, numbers_apart=True)
    if not regions:
        raise StepError(
            "the step calls no backward, and a plan with pp cuts what a step differentiates. Evaluate with "
            "the model itself, under torch.no_grad()."
        )
    found = _Step(captured, graph, written, regions)
    count = captured.parameters
    for region, numbers in zip(regions, leaves, strict=True):
        mine = {n: n.meta["input"] for n in region.inputs if n.meta.get("input", count) < count}
        mine |= {n: i for n, i in zip(region.leaves, numbers, strict=True) if i is not None}
        found.parameters.append(mine)
    return found


def _program(step: _Step, number: int, names: Sequence[str], buffers: range) -> Program:
    """A region as a program to be cut."""
    region, parameters = step.regions[number], step.parameters[number]
    program = program_of(step.graph, region)
    returned = frozenset(returned_outputs(region))
    core = dataclasses.replace(core_of(program), policies=step.captured.policies)
    places = core.places(program)
    given = [region.inputs[p] for p in places]
    leaves = set(region.leaves)
    return Program(
        core=core,
        parameters={i: names[parameters[n]] for i, n in enumerate(given) if n in parameters},
        buffers=frozenset(i for i, n in enumerate(given) if n.meta.get("input") in buffers),
        places=places,
        frozen=frozenset(i for i, n in enumerate(given) if n in parameters and n not in leaves),
        trains=True,
        loss=0,
        returned=returned,
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """Names that tell parameters of several models apart."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _buffers(state: State, captured: Captured) -> range:
    """Positions of the state's buffers among a step's inputs."""
    last = len(captured.inputs) - len(captured.batch) - len(state.rates()) - len(state.moments)
    return range(last - len(state.buffers), last)


# --- from plain models ---------------------------------------------------------------------------------


def shard_by_step(
    function: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    state: State,
    plan: Plan,
) -> Job:
    """Cut the models of a step where its losses' programs can be cut, and shard them accordingly; models
    that have been are left as they are."""
    modules = state.roots.modules
    for module in modules:
        adopt(module)
    jobs = {id(j): j for j in map(prepared_job, modules) if j is not None}
    for known in jobs.values():
        check_same_plan(known.plan, plan)
    if not modules:
        raise PlanError(f"plan field 'pp' is {plan.pp}, and the step is given no model to cut.")
    plain = [m for m in modules if any(True for _ in plain_parameters(m))]
    job = next(iter(jobs.values()), None) or start_job(plan, device_of(modules[0]))
    job.share(map(owners, state.parameters))
    if not plain:
        return job
    with job.failing_together():
        try:
            places = _places_of_parameters(function, arguments, state, job)
        except AttributeError as error:
            if not isinstance(error.obj, Tensor):
                raise
            raise StepError(
                f"the step asks for what only sharded tensors have ({error}), and its models are cut before "
                "they are sharded. Prepare them before the step: autodist.prepare(model, plan, batch=...)."
            ) from error
    for module in plain:
        named = dict(module.named_parameters(remove_duplicate=False))
        mine = {n: places[state.index[id(p)]] for n, p in named.items() if id(p) in state.index}
        shard_model(module, job, places=mine)
    job.model = weakref.ref(modules[0])
    return job


def _places_of_parameters(
    function: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    state: State,
    job: Job,
) -> list[tuple[int, ...]]:
    """Where each of a step's parameters belongs."""
    captured = capture(function, arguments, state, {}, Whole(job.device))
    run = _compilation(job)
    step = _functional(captured, run)
    names = _distinct(state.names)
    named = zip(names, state.parameters, strict=True)
    held = {n: places_of_tensor(p, job) for n, p in named if isinstance(p, DTensor)}
    found: dict[str, Places] = {}
    for number, parameters in enumerate(step.parameters):
        mine = [names[i] for i in parameters.values()]
        if held.keys() >= set(mine):
            continue
        program = _program(step, number, names, _buffers(state, captured))
        inputs = [step.regions[number].inputs[p].meta["val"] for p in program.places]
        owned = [_ordered({**held, **found}), _ordered(held)] if found else [_ordered(held) or None]
        made = find_cut(program, inputs, job, _compilation(job), *owned)
        job.cut = job.cut or made.plan
        for name, places in places_of(made, program, mine, job.plan.pp).items():
            if name not in held:  # losses that use it in other stages have it in more places
                found[name] = found.get(name, frozenset()).union(places)
    held |= found
    given: list[Places | None] = [held.get(n) for n in names]
    given += [everywhere(job)] * (len(captured.inputs) - len(given))
    settled = related_places(step.graph, given, everywhere(job))
    return [tuple(sorted(settled[i] or everywhere(job))) for i in range(len(names))]


def _ordered(places: Mapping[str, Places]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(sorted(p)) for name, p in places.items()}


def _compilation(job: Job) -> Compilation:
    return Compilation(job.stage, {}, GraphReport(job.next_graph()), 0, "")


# --- compiled ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A region that runs: what it takes, in the order of its program, and what becomes of its results.

    ``takes`` has the number of a parameter, where an input is one, beside what is read for it (None where it
    lies elsewhere); ``gradients`` has, of each that this rank keeps, its places among the gradients that a
    run returns and among ``takes``.
    """

    compiled: CompiledPipeline
    takes: tuple[tuple[int | None, Reading | None], ...]
    results: tuple[Reading, ...]
    gradients: tuple[tuple[Reading, int, int], ...]


class StepPipelines:
    """Makes programs of a step for the ranks of a pipeline, and keeps its losses' pipelines from one to the
    next."""

    def __init__(self, job: Job) -> None:
        assert job.pipeline is not None
        self.job, self.group = job, compat.mesh_group_name(job.pipeline)
        self.made: dict[str, Pipeline] = {}
        self._number = itertools.count()
        self._whole: State | None = None

    def common(self, fits: Sequence[bool]) -> int | None:
        """The first program that fits on every rank of the pipeline, of the last ``_COMPARED``; ``fits`` says
        of each program whether it does on this one."""
        recent = fits[-_COMPARED:]
        mine = torch.tensor([sum(1 << i for i, fit in enumerate(recent) if fit)])
        with self.job.watch("comparing which program of a step it is"):
            shared, *others = dialect.all_gather_now(mine.to(self.job.device), self.group).tolist()
        for bits in others:
            shared &= bits
        found = next((i for i in range(len(recent)) if shared >> i & 1), None)
        return None if found is None else found + len(fits) - len(recent)

    def capture(
        self, function: Callable[..., Any], arguments: tuple[tuple[Any, ...], dict[str, Any]], state: State
    ) -> Captured:
        """The step of the whole model, the same on all ranks of the pipeline."""
        with self.job.watch("telling what there is of a step's state"):
            self._whole = of_all_places(state, self.job)
        captured = capture(function, arguments, self._whole, {}, AsIfHere(self.job.stages[self.job.place]))
        # DTensor remembers what it did on a mesh of the same ranks, another job's perhaps, with groups of its
        # own. Here there is one mesh, that of this rank's stages.
        mine = self.job.stage.group
        for node in captured.graph.graph.nodes:
            if is_collective_start(node):
                ranks = compat.group_ranks(str(node.args[-1]))
                if set(ranks) != set(compat.group_ranks(mine)):
                    raise StepError(
                        f"'{node.name}' ({where(node)}) communicates among ranks {sorted(ranks)}, and in a "
                        "pipeline other ranks have other stages' part of a step. Communicate outside of the "
                        "step."
                    )
                node.args = (*node.args[:-1], mine)
        captured.graph.recompile()
        return captured

    def compile(
        self, captured: Captured, state: State, tensors: Sequence[Tensor]
    ) -> tuple[Captured, CompiledStep]:
        """This rank's share of what the step ``captured`` last does, and a program for it; ``state`` is what
        this rank has, ``tensors`` are the arguments."""
        job, whole = self.job, self._whole
        assert whole is not None
        job.at("compiling a training step")
        with self.failing_together():
            found = _Compiler(self, captured, state, whole, tensors)
            run = found.made(captured.lasts)
            if job.line.agreement is not None:  # nobody begins before all are ready
                subject = f"what ranks of a pipeline do in step {next(self._number)}"
                job.line.agreement.require(subject, {"calls and exchanges": found.places.text()})
        return found.here, CompiledStep(run, frozenset())

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Where this rank fails in the block, so do those that it shares a stage or a pipeline with."""
        job = self.job
        with job.failing_together(), job.stage.failing_together(), job.line.failing_together():
            yield


class _Compiler:
    """One program."""

    def __init__(
        self, owner: StepPipelines, captured: Captured, state: State, whole: State, tensors: Sequence[Tensor]
    ) -> None:
        self.owner, self.job, self.captured = owner, owner.job, captured
        self.state, self.whole, self.tensors = state, whole, tensors
        self.names = _distinct(state.names)
        self.step = _functional(captured, _compilation(self.job))
        self.inputs = self.step.graph.graph.find_nodes(op="placeholder")
        of_inputs, self.of_parameters = self._input_places()
        self.places: StepPlaces = step_places(
            self.step.graph, self.step.regions, of_inputs, self._output_places(of_inputs),
            everywhere(self.job), self.step.parameters, captured.names,
        )  # fmt: skip
        self.here, self.returned, self.written = self._share(of_inputs)

    # Where things lie.

    def _input_places(self) -> tuple[list[Places], list[Places]]:
        all_places = everywhere(self.job)
        of = [places_of_tensor(p, self.job) for p in self.whole.parameters]
        gradients = [p for p, g in zip(of, self.whole.gradients(), strict=True) if g is not None]
        moments = [of[m.parameter] for m in self.whole.moments]
        plain = [all_places] * len(self.whole.buffers)
        rates = [all_places] * len(self.whole.rates())
        batch = [places_of_tensor(x, self.job) for x in self.tensors]
        return [*of, *gradients, *plain, *moments, *rates, *batch], of

    def _output_places(self, of_inputs: Sequence[Places]) -> list[Places]:
        captured, all_places = self.captured, everywhere(self.job)
        found = [all_places for r in captured.results if r.kind == "tensor"]
        found += [self.of_parameters[i] for i in captured.new_gradients]
        found += [self.of_parameters[m.parameter] for m in captured.new_moments]
        found += [all_places for _ in captured.new_buffers]
        return [*found, *(of_inputs[i] for i in self.step.written)]

    def _share(self, of_inputs: Sequence[Places]) -> tuple[Captured, list[Reading], dict[Node, Reading]]:
        """This rank's share of what the step returns, and of what it writes."""
        captured, place = self.captured, self.job.place

        def here(parameter: int) -> bool:
            return place in self.of_parameters[parameter]

        share = copy.copy(captured)
        share.new_gradients = [i for i in captured.new_gradients if here(i)]
        share.new_moments = [m for m in captured.new_moments if here(m.parameter)]
        share.moments = []
        mine = [True for r in captured.results if r.kind == "tensor"]
        mine += [here(i) for i in captured.new_gradients]
        mine += [here(m.parameter) for m in captured.new_moments]
        mine += [True for _ in captured.new_buffers]
        readings = self.places.readings[None]
        made = [r for r, is_mine in zip(readings, mine, strict=False) if is_mine]
        share.specs = [s for s, is_mine in zip(captured.specs, mine, strict=True) if is_mine]
        new_values = zip(self.step.written, readings[len(mine) :], strict=True)
        written = {self.inputs[i]: reading for i, reading in new_values if place in of_inputs[i]}
        return share, made, written

    def _runtime_inputs(self) -> dict[Node, int]:
        """The step's inputs that this rank has, and where among the tensors that it gives to a run."""
        state, whole = self.state, self.whole
        count = len(state.parameters)
        numbers: dict[Node, int] = {n: i for i, n in enumerate(self.inputs[:count])}
        own = {i: k for k, i in enumerate(i for i, g in enumerate(state.gradients()) if g is not None)}
        theirs = [i for i, g in enumerate(whole.gradients()) if g is not None]
        numbers |= {self.inputs[count + k]: count + own[i] for k, i in enumerate(theirs) if i in own}
        at, mine = count + len(theirs), count + len(own)
        for k in range(len(state.buffers)):
            numbers[self.inputs[at + k]] = mine + k
        at, mine = at + len(state.buffers), mine + len(state.buffers)
        held = {(m.optimizer, m.parameter, m.key): k for k, m in enumerate(state.moments)}
        for k, m in enumerate(whole.moments):
            if (m.optimizer, m.parameter, m.key) in held:
                numbers[self.inputs[at + k]] = mine + held[m.optimizer, m.parameter, m.key]
        at, mine = at + len(whole.moments), mine + len(state.moments)
        for k in range(len(self.inputs) - at):
            numbers[self.inputs[at + k]] = mine + k
        return numbers

    # Programs.

    def made(self, kernels: bool) -> _Running:
        calls = [self._call(number) for number in range(len(self.step.regions))]
        wanted = [r for call in calls for _, r in call.takes if r is not None]
        parts = step_parts(self.places, self.job.place, [*self.returned, *wanted], self.written)
        inputs = self._runtime_inputs()
        batch = "; ".join(f"{tuple(x.shape)} {x.dtype}" for x in self.captured.batch)
        compiled = []
        for part in parts:
            taken = {node for node, _ in part.takes}
            beside = sum(num_bytes(n) for n in self._held(inputs) if n not in taken)
            compiled.append(
                None if part.graph is None
                else compile_piece(part.graph, self.captured.mode, self.job.stage, batch, kernels, beside)
            )  # fmt: skip
        return _Running(
            self.job, inputs, parts, compiled, self._barriers(calls), self.returned, self.state
        )

    def _held(self, inputs: Mapping[Node, int]) -> list[Node]:
        """The inputs that this rank holds."""
        absent = {self.inputs[i] for i, p in enumerate(self.state.parameters) if not _has(p)}
        return [n for n in inputs if n not in absent]

    def _barriers(self, calls: Sequence[_Call]) -> list[_Call | tuple[tuple[Node, Sent], ...]]:
        found: list[Any] = []
        for barrier in self.places.barriers:
            if isinstance(barrier, Run):
                found.append(calls[barrier.region])
            else:
                assert isinstance(barrier, Exchange)
                found.append(tuple((n, _sent(n, min(self.places.places[n]))) for n in barrier.values))
        return found

    def _call(self, number: int) -> _Call:
        region, parameters = self.step.regions[number], self.step.parameters[number]
        program = _program(self.step, number, self.names, _buffers(self.whole, self.captured))
        given = [region.inputs[p] for p in program.places]
        numbers = [parameters[n] for n in given if n in parameters]
        mine = {self.names[i]: self.whole.parameters[i] for i in numbers}
        plain = next((n for n, p in mine.items() if not isinstance(p, DTensor)), None)
        if plain is not None:
            raise StepError(
                f"the loss depends on '{plain}', a parameter of no model that the step is given. With pp "
                "parameters belong to models, which are cut: make it a parameter of one (register_parameter)."
            )
        pipeline = self._pipeline(program, mine)
        values = [self.whole.parameters[parameters[n]] if n in parameters else n.meta["val"] for n in given]
        compiled = pipeline.compile(values)
        self._refuse_withheld(region, program, compiled)
        trained = [i for i in program.parameters if i not in program.frozen]
        leaves = {n: k for k, n in enumerate(region.leaves)}
        users = {u.args[1]: u for u in region.marker.users}
        gradients = list[tuple[Reading, int, int]]()
        for position, i in enumerate(trained):
            node = users.get(leaves[given[i]])
            if node is not None and self.job.place in self.places.places[node]:
                gradients.append(((node, False), position, i))
        return _Call(
            compiled,
            tuple(self._taken(n, parameters.get(n)) for n in given),
            tuple((n, False) for n in region.outputs),
            tuple(gradients),
        )

    def _taken(self, node: Node, parameter: int | None) -> tuple[int | None, Reading | None]:
        if parameter is None:
            return None, (node, not everywhere(self.job) <= self.places.places[node])
        return parameter, (node, False) if self.job.place in self.places.places[node] else None

    def _pipeline(self, program: Program, parameters: Mapping[str, DTensor]) -> Pipeline:
        """The same program's, if there is one already."""
        lines = graph_lines(program.core.graph, self.job.group_labels, mask_sizes=False)
        key = hash_of([*lines, str((program.parameters, program.buffers, program.frozen, program.returned))])
        if key not in self.owner.made:
            self.owner.made[key] = Pipeline(program, self.job, parameters)
        return self.owner.made[key]

    def _refuse_withheld(self, region: Region, program: Program, compiled: CompiledPipeline) -> None:
        assert program.returned is not None
        for i, node in enumerate(region.outputs):
            if i not in program.returned and compiled.withholds(i):
                reader = next(u for u in node.users if u not in region.body)
                raise StepError(
                    f"'{reader.name}' ({where(reader)}) computes with '{node.name}' ({where(node)}) of shape "
                    f"{tuple(node.meta['val'].shape)}, which lies at one place of the pipeline and which the "
                    'plan does not send. Compute it in the forward, or set outputs="gathered" in the plan.'
                )


def _sent(node: Node, place: int) -> Sent:
    value = node.meta["val"]
    return Sent(place, tuple(map(int, value.shape)), value.dtype, value.device)


class _Running:
    """A program, run: parts and barriers in turn. A value is let go after its last reader."""

    def __init__(
        self,
        job: Job,
        inputs: Mapping[Node, int],
        parts: Sequence[StepPart],
        compiled: Sequence[Callable[..., Any] | None],
        barriers: Sequence[Any],
        returned: Sequence[Reading],
        state: State,
    ) -> None:
        assert job.pipeline is not None
        self.job, self.group = job, compat.mesh_group_name(job.pipeline)
        self.inputs = {(n, False): i for n, i in inputs.items()}
        self.parts, self.compiled, self.barriers, self.returned = parts, compiled, barriers, returned
        self.parameters = [_Parameter(p) for p in state.parameters]
        self.dead = self._last_readers()

    def _last_readers(self) -> list[list[Reading]]:
        """What nothing reads after each interval and its barrier."""
        last: dict[Reading, int] = {}
        for i, part in enumerate(self.parts):
            last |= dict.fromkeys(part.takes, i)
            if i < len(self.barriers):
                last |= dict.fromkeys(_takes(self.barriers[i]), i)
        found: list[list[Reading]] = [[] for _ in self.parts]
        for reading, i in last.items():
            if reading not in self.inputs and reading not in self.returned:
                found[i].append(reading)
        return found

    def _check_alike(self) -> None:
        """Replicas reduce gradients once a loss; where stages gather weights, once a microbatch."""
        calls = [b for b in self.barriers if isinstance(b, _Call)]
        counts = [c.compiled.cut.batch.count for c in calls]
        stage = self.job.stage
        if self.job.dry_run or stage.mesh is None or stage.mesh.size() == 1:
            return
        text = str(counts if reads_of(stage).in_program else len(counts))
        doing = f"differentiates {len(counts)} losses, of {counts} microbatches,"
        with self.job.watch("comparing numbers of losses"):
            check_same(text, doing, stage.group, self.job.device)

    def __call__(self, *tensors: Tensor) -> list[Any]:
        self._check_alike()
        values: dict[Reading, Any] = {r: tensors[i] for r, i in self.inputs.items()}
        for i, (part, compiled) in enumerate(zip(self.parts, self.compiled, strict=True)):
            if compiled is not None:
                made = compiled(*(values[r] for r in part.takes))
                values.update(zip(part.gives, made, strict=False))
            if i < len(self.barriers):
                self._pass(self.barriers[i], values, tensors)
            for reading in self.dead[i]:
                values.pop(reading, None)
        return [values[r] for r in self.returned]

    def _pass(self, barrier: Any, values: dict[Reading, Any], tensors: Sequence[Tensor]) -> None:
        if isinstance(barrier, _Call):
            self._run(barrier, values, tensors)
            return
        mine = {
            k: values[node, False] for k, (node, sent) in enumerate(barrier) if sent.place == self.job.place
        }
        with self.job.watch("an exchange between stages"):
            found = exchange([sent for _, sent in barrier], mine, self.group, self.job.device)
        values.update(((node, True), value) for (node, _), value in zip(barrier, found, strict=True))

    def _run(self, call: _Call, values: dict[Reading, Any], tensors: Sequence[Tensor]) -> None:
        given = []
        for number, reading in call.takes:
            if number is None:
                given.append(values[reading])  # type: ignore[index]
            else:
                local = tensors[number] if reading is None else values[reading]
                given.append(self.parameters[number].of(local))
        results, gradients = call.compiled.run(given)
        values.update(zip(call.results, results, strict=True))
        for reading, position, taken in call.gradients:
            found = gradients[position]  # none of a stage that the loss does not reach
            local = compat.local_part(given[taken])
            values[reading] = torch.zeros_like(local) if found is None else compat.local_part(found)


def _takes(barrier: Any) -> list[Reading]:
    if isinstance(barrier, _Call):
        return [r for _, r in barrier.takes if r is not None]
    return [(node, False) for node, _ in barrier]


class _Parameter:
    """A parameter's DTensor of this rank's part, which a program has written, or is given."""

    def __init__(self, parameter: Any) -> None:
        self.spec, self.owners = compat.specification(parameter), owners(parameter)
        self.trained = parameter.requires_grad
        self.held: DTensor | None = None

    def of(self, local: Tensor) -> DTensor:
        if self.held is None or compat.local_part(self.held) is not local:
            self.held = compat.dtensor_of(local, self.spec, self.trained)
            note_owners(self.held, self.owners)
        return self.held


__all__ = ["StepPipelines", "of_all_places", "shard_by_step"]
