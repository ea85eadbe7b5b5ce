"""Programs as stages are cut from them, and stages run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from autodist.passes.analysis.chain import Inputs
from autodist.passes.analysis.stages import StagePlan
from autodist.passes.capture import functional
from autodist.passes.stages import StageGraph
from autodist.runtime import compat
from autodist.runtime.compat import tree_leaves


@dataclass
class Program:
    """A model's functional forward graph on one batch; ``values`` are those of its placeholders, by name."""

    graph: GraphModule
    inputs: Inputs
    values: dict[str, Any]

    def __repr__(self) -> str:
        return self.graph.code


def captured(model: nn.Module, batch: dict[str, Tensor]) -> Program:
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    values = [*parameters.values(), *buffers.values(), *batch.values()]

    def run(*given: Any) -> list[Any]:
        named = dict(zip([*parameters, *buffers], given, strict=False))
        arguments = dict(zip(batch, given[len(named) :], strict=True))
        leaves = tree_leaves(torch.func.functional_call(model, named, (), arguments))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    return traced(run, values, list(parameters), len(buffers))


def traced(
    function: Callable[..., Sequence[Any]],
    values: Sequence[Tensor],
    parameters: Sequence[str],
    constants: int = 0,
) -> Program:
    """``function``'s graph; its arguments are parameters, so many constants, and the batch."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(v, static_shapes=True) for v in values]
    graph, _ = functional(compat.trace_before_autograd(function, fakes), fakes)
    names = [n.name for n in graph.graph.find_nodes(op="placeholder")]
    frozen = [n for n, v in zip(names[: len(parameters)], values, strict=False) if not v.requires_grad]
    inputs = Inputs(
        dict(zip(names, parameters, strict=False)),
        frozenset(names[len(parameters) + constants :]),
        frozenset(frozen),
    )
    return Program(graph, inputs, dict(zip(names, values, strict=True)))


def plan_of(cuts: Sequence[str]) -> StagePlan:
    return StagePlan(tuple(cuts), (), (), 1, 0.0)


def run_whole(program: Program) -> tuple[list[Any], dict[str, Tensor]]:
    """Outputs, and the gradients of the first one by parameters' names."""
    given = {n: _leaf(program, n) for n in program.values}
    torch.manual_seed(0)
    outputs = tree_leaves(program.graph(*given.values()))
    wanted = {n: t for n, t in given.items() if t.requires_grad}
    loss = next((o for o in outputs if isinstance(o, Tensor) and o.requires_grad), None)
    if loss is None:
        return outputs, {}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return outputs, _summed((program.inputs.parameters[n], g) for n, g in zip(wanted, grads, strict=True))


def run_stages(program: Program, stages: Sequence[StageGraph]) -> tuple[dict[int, Any], dict[str, Tensor]]:
    """Outputs by their places, and gradients of the loss: forward through the stages, then back."""
    outputs: dict[int, Any] = {}
    ran: list[Any] = []
    received: list[Tensor] = []
    torch.manual_seed(0)
    for stage in stages:
        names = [n.name for n in stage.graph.graph.find_nodes(op="placeholder")]
        count = len(stage.parameters)
        own = [_leaf(program, n) for n in names[:count]]
        assert [program.inputs.parameters[n] for n in names[:count]] == list(stage.parameters)
        taken = [t.detach().requires_grad_(p.gradient) for t, p in zip(received, stage.received, strict=True)]
        rest = [program.values[n] for n in (*stage.batch, *stage.constants)]
        returned = stage.graph(*own, *taken, *rest)
        results, sent = returned[: len(stage.results)], returned[len(stage.results) :]
        _check(stage, [*own, *taken, *rest], results, sent)
        outputs |= {r.index: value for r, value in zip(stage.results, results, strict=True)}
        ran.append((stage, own, taken, results, sent))
        received = [t.detach() for t in sent]
    gradients: list[tuple[str, Tensor | None]] = []
    back: list[Tensor] = []
    for stage, own, taken, results, sent in reversed(ran):
        followed = [t for t, p in zip(sent, stage.sent, strict=True) if p.gradient]
        ends = list(zip(followed, back, strict=True))
        if stage.loss is not None and results[stage.loss].requires_grad:
            ends.append((results[stage.loss], torch.ones_like(results[stage.loss])))
        trained = [(n, t) for n, t in zip(stage.parameters, own, strict=True) if t.requires_grad]
        asked = [t for t, p in zip(taken, stage.received, strict=True) if p.gradient]
        if not ends:
            assert not asked
            continue
        given = torch.autograd.grad(
            [t for t, _ in ends], [*(t for _, t in trained), *asked], [g for _, g in ends], allow_unused=True
        )
        gradients += zip([n for n, _ in trained], given, strict=False)
        back = list(given[len(trained) :])
        assert all(g is not None for g in back)  # what is said to carry a gradient has one
    return outputs, _summed(gradients)


def assert_same(program: Program, stages: Sequence[StageGraph]) -> None:
    """The stages compute what the program does: outputs, and the loss's gradients."""
    wanted, gradients = run_whole(program)
    found, parts = run_stages(program, stages)
    losses = [s.results[s.loss].index for s in stages if s.loss is not None]
    for index, value in found.items():
        torch.testing.assert_close(value, wanted[index], equal_nan=True)
        assert value.requires_grad == (index in losses)
    assert set(found) == set(range(len(wanted)))
    assert {n for n, g in gradients.items() if g.any()} <= set(parts) <= set(gradients)
    for name, gradient in parts.items():  # products of many values may overflow, in both
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-6, equal_nan=True)


def _leaf(program: Program, name: str) -> Tensor:
    value = program.values[name]
    trained = name in program.inputs.parameters and name not in program.inputs.frozen
    return value.detach().requires_grad_(trained and value.is_floating_point())


def _summed(gradients: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, gradient in gradients:
        if gradient is not None:
            found[name] = found[name] + gradient if name in found else gradient
    return found


def _check(stage: StageGraph, given: Sequence[Any], results: Sequence[Any], sent: Sequence[Tensor]) -> None:
    """Values are as announced, and nothing shares memory."""
    nodes = stage.graph.graph.find_nodes(op="output")[0].args[0]
    for node, value in zip(nodes, (*results, *sent), strict=True):
        if isinstance(value, Tensor):
            fake = node.meta["val"]
            assert (fake.dtype, fake.ndim) == (value.dtype, value.ndim)
            if not compat.is_symbolic(fake):
                assert (fake.shape, fake.stride()) == (value.shape, value.stride())
    assert all(t.is_contiguous() for t in sent)
    tensors = [t for t in (*given, *results, *sent) if isinstance(t, Tensor)]
    taken = [t.untyped_storage()._cdata for t in tensors]
    assert len(set(taken[len(given) :])) == len(taken) - len(given)
    assert set(taken[: len(given)]).isdisjoint(taken[len(given) :])
