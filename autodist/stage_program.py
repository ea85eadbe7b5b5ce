"""One pipeline stage, compiled: forward and backward of a microbatch as functions of tensors.

    stage graph ──weights' reads, autograd──> joint graph ──joint passes, partition──> forward, backward
    backward ──(schedules that split it)──> gradients of what was received; gradients of weights
    each ──bucket, lower, overlap──> Inductor (or eager)

They are what the executor (:mod:`autodist.runtime.pipeline`) calls, as often as there are microbatches;
autograd is not there when they run. With ZeRO-3 a weight is gathered, and its gradient reduced, inside of
them: once for each microbatch. With less, and on one rank, they take whole weights and give whole gradients,
which are gathered before the first microbatch and reduced after the last (:mod:`autodist.pipeline`).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule, Interpreter, Node

from autodist.compiler import KEEP_ORDER, Compilation
from autodist.job import Job
from autodist.passes.base import Phase
from autodist.passes.graph import behind, fill_values, output_of, part_of
from autodist.passes.stages import StageGraph
from autodist.runtime import compat, dialect
from autodist.runtime.pipeline import Spec

Function = Callable[[list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class CompiledStage:
    """A stage's programs, without the tensors that they run on.

    ``forward`` takes parameters, received values and other inputs, as ``graph``'s placeholders are; it
    returns results, sent values, then saved ones. ``trained`` are the places of parameters that have
    gradients.
    """

    index: int
    graph: StageGraph
    forward: Function
    backward: Function | None = None
    backward_input: Function | None = None
    backward_weight: Function | None = None
    trained: tuple[int, ...] = ()
    draws: bool = False


@dataclass
class BoundStage:
    """A stage with the tensors of one run: a :class:`~autodist.runtime.pipeline.StageProgram`.

    ``others(name, microbatch)`` is the value of an input that is neither a parameter nor received.
    """

    stage: CompiledStage
    weights: Sequence[Tensor]
    others: Callable[[str, int], Any]
    one: Tensor
    specs: tuple[tuple[Spec, ...], tuple[Spec, ...]] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.stage.graph
        self.specs = _specs(graph.received), _specs(graph.sent)

    @property
    def index(self) -> int:
        return self.stage.index

    @property
    def draws(self) -> bool:
        return self.stage.draws

    def received(self, microbatch: int) -> Sequence[Spec]:
        return self.specs[0]

    def sent(self, microbatch: int) -> Sequence[Spec]:
        return self.specs[1]

    def forward(
        self, received: list[Tensor], microbatch: int
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], list[Any]]:
        graph = self.stage.graph
        others = [self.others(name, microbatch) for name in (*graph.batch, *graph.constants)]
        made = list(self.stage.forward([*self.weights, *received, *others]))
        results, sent = len(graph.results), len(graph.results) + len(graph.sent)
        return made[results:sent], made[:results], made[sent:]

    def backward(
        self, saved: list[Any], gradients: list[Tensor | None]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        trained = len(self.stage.trained)
        if self.stage.backward is None:
            return [None] * len(self.stage.graph.received), [None] * trained
        made = self.stage.backward([*saved, *self._tangents(gradients)])
        return self._of_received(made[trained:]), made[:trained]

    def backward_input(
        self, saved: list[Any], gradients: list[Tensor | None]
    ) -> tuple[Sequence[Tensor | None], list[Any]]:
        if self.stage.backward_input is None:
            return [None] * len(self.stage.graph.received), []
        given = [*saved, *self._tangents(gradients)]
        count = sum(p.gradient for p in self.stage.graph.received)
        made = list(self.stage.backward_input(list(given)))
        return self._of_received(made[:count]), [*given, *made[count:]]

    def backward_weight(self, kept: list[Any]) -> Sequence[Tensor | None]:
        if self.stage.backward_weight is None:
            return [None] * len(self.stage.trained)
        return self.stage.backward_weight(kept)

    def _tangents(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        loss = [self.one] if self.stage.graph.loss is not None else []
        return [*loss, *(g.contiguous() for g in gradients if g is not None)]

    def _of_received(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        found = iter(gradients)
        return [next(found) if p.gradient else None for p in self.stage.graph.received]


def _specs(values: Sequence[Any]) -> tuple[Spec, ...]:
    return tuple(Spec(tuple(map(int, p.value.shape)), p.value.dtype, p.gradient) for p in values)


@dataclass(frozen=True)
class Reads:
    """How a stage reads its parameters: from shards, in its programs, or whole."""

    group: str
    divisor: int
    in_program: bool

    def example(self, parameter: DTensor, weight: Node) -> Tensor:
        """A fake of what the stage's program is given for ``parameter``, in the mode of its ``weight``."""
        value = weight.meta["val"]
        with compat.fake_mode_of([value]) or contextlib.nullcontext():
            local = parameter.to_local()
            shape = local.shape if self.in_program else parameter.shape
            return torch.empty(shape, dtype=parameter.dtype, device=value.device)

    def weight(self, parameter: DTensor, given: Tensor) -> Tensor:
        if not self.in_program:
            return given
        if parameter.placements[0].is_shard():
            rows = int(parameter.shape[0])
            return dialect.unshard(given, rows, self.divisor, given.dtype, self.group)
        return dialect.replica(given, self.divisor, given.dtype, self.group)


def compile_stage(
    stage: StageGraph,
    index: int,
    run: Compilation,
    parameters: Mapping[str, DTensor],
    reads: Reads,
    trains: bool,
    splits: bool,
) -> CompiledStage:
    """The programs of a stage; ``run`` is of its own job. With ``splits`` the backward is in two parts."""
    placeholders = stage.graph.graph.find_nodes(op="placeholder")
    mine = [parameters[name] for name in stage.parameters]
    count = len(mine)
    examples = [reads.example(p, n) for p, n in zip(mine, placeholders, strict=False)]
    examples += [n.meta["val"] for n in placeholders[count:]]
    run.parameters = dict(enumerate(stage.parameters))
    draws = any(compat.is_random(n.target) for n in stage.graph.graph.nodes)

    def program(*inputs: Any) -> Sequence[Any]:
        weights = [reads.weight(p, x) for p, x in zip(mine, inputs, strict=False)]
        return Interpreter(stage.graph).run(*weights, *inputs[count:])  # type: ignore[no-any-return]

    trained = tuple(i for i, p in enumerate(mine) if trains and p.requires_grad)
    received = [count + i for i, p in enumerate(stage.received) if trains and p.gradient]
    leaves = [*trained, *received]
    results = len(stage.results)
    sent = [results + i for i, p in enumerate(stage.sent) if p.gradient]
    loss = [] if stage.loss is None else [stage.loss]
    if not leaves or not (loss or sent):  # nothing in the stage is trained, or nothing of it by this loss
        graph = run.transform(_described(compat.trace_plain(program, examples), count), Phase.JOINT)
        text = run.program_text(graph)
        part = run.transform(graph, Phase.FORWARD_PART)
        run.finish({"forward": part}, text)
        return CompiledStage(index, stage, _lowered("forward", part, run), trained=trained, draws=draws)

    tangents = [_like(n) for n in _outputs(stage.graph, [*loss, *sent])]
    joint = compat.trace_joint(program, examples, leaves, tangents, [*loss, *sent], zeros=False)
    joint.graph.eliminate_dead_code()
    fill_values(joint)
    joint = run.transform(_described(joint, count), Phase.JOINT)
    text = run.program_text(joint)
    options = {
        "num_fwd_outputs": results + len(stage.sent),
        "static_lifetime_input_indices": list(range(count)),
    }
    mode = compat.fake_mode_of(examples)
    with contextlib.nullcontext() if mode is None else compat.compiling_in(mode):
        forward, backward = run.split(joint, (examples, tangents), **options)
    parts = {"forward": forward}
    if splits:
        of_inputs, of_weights = _split_backward(backward, len(trained))
        parts |= {"backward_input": of_inputs, "backward_weight": of_weights}
    else:
        parts["backward"] = backward
    phases = {name: Phase.FORWARD_PART if name == "forward" else Phase.BACKWARD_PART for name in parts}
    parts = {name: run.transform(part, phases[name]) for name, part in parts.items()}
    run.finish(parts, text)
    lowered = {name: _lowered(name, part, run) for name, part in parts.items()}
    return CompiledStage(index, stage, trained=trained, draws=draws, **lowered)


def _like(node: Node) -> Tensor:
    value = node.meta["val"]
    with compat.fake_mode_of([value]) or contextlib.nullcontext():
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _outputs(graph: GraphModule, places: Sequence[int]) -> list[Node]:
    outputs = list(output_of(graph).args[0])  # type: ignore[arg-type]
    return [outputs[i] for i in places]


def _described(graph: GraphModule, parameters: int) -> GraphModule:
    """``graph``, its placeholders noted as what AOTAutograd would note them as."""
    for number, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        if number < parameters:
            node.meta["desc"] = compat.input_descriptor(number)
    return graph


def _split_backward(backward: GraphModule, trained: int) -> tuple[GraphModule, GraphModule]:
    """The part of a backward that makes gradients of received values, and the rest.

    The first returns those gradients, then what it has made that the second reads; the second takes the
    inputs of the first, then that.
    """
    outputs = list(output_of(backward).args[0])  # type: ignore[arg-type]
    of_weights, of_received = outputs[:trained], outputs[trained:]
    first = behind(of_received)
    second = behind(of_weights) - first
    crossing = [
        n
        for n in backward.graph.nodes
        if n in first and n.op == "call_function" and any(u in second for u in n.users)
    ]
    crossing += [n for n in of_weights if n in first and n.op == "call_function" and n not in crossing]
    # Tuples do not cross; their items, which are taken from them at once, do.
    for node in [n for n in crossing if not isinstance(n.meta["val"], Tensor)]:
        crossing.remove(node)
        items = [u for u in node.users if u.target is operator.getitem]
        crossing += [u for u in items if u not in crossing]
        first.update(items)
        second.difference_update(items)
    inputs = backward.graph.find_nodes(op="placeholder")
    return (
        part_of(backward, inputs, first, (*of_received, *crossing)),
        part_of(backward, [*inputs, *crossing], second, tuple(of_weights)),
    )


def _lowered(name: str, part: GraphModule, run: Compilation) -> Function:
    computes = any(n.op == "call_function" for n in part.graph.nodes)
    if run.job.plan.lowering == "eager" or run.job.dry_run or not computes:
        return compat.boxed(part)  # type: ignore[no-any-return]
    compiled = compat.compile_part(part, name.startswith("backward"), KEEP_ORDER)
    run.report.programs[name] = compat.emitted_program(compiled)
    return compiled  # type: ignore[no-any-return]


def reads_of(job: Job) -> Reads:
    """How stages of ``job``, that of the ranks with the same stages, read their parameters."""
    assert job.mesh is not None and job.plan.dp is not None
    in_program = job.plan.zero == 3 and job.mesh.size() > 1
    return Reads(job.group, job.plan.dp, in_program)


__all__ = ["BoundStage", "CompiledStage", "Reads", "compile_stage", "reads_of"]
