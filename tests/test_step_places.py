"""Where the nodes of a captured step run, and what is exchanged, without ranks."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from autodist.compiler import compile_piece
from autodist.job import start_job
from autodist.passes.analysis.hardware import hardware
from autodist.passes.base import Context, Phase, StepError, run_passes
from autodist.passes.capture import functional
from autodist.passes.memory import MemoryBoundError
from autodist.passes.optimizer import SplitForeach
from autodist.passes.regions import leaf_inputs, regions_of
from autodist.passes.step_parts import step_parts
from autodist.passes.step_places import Exchange, Run, StepPlaces, related_places, step_places
from autodist.plan import Plan
from autodist.runtime import compat
from autodist.runtime.exchange import Sent, _layout
from autodist.step_capture import Captured, capture
from autodist.step_state import State, roots_of

BOTH = frozenset({0, 1})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).square().mean()  # type: ignore[no-any-return]


def found(function: Any, *arguments: Any) -> tuple[Captured, StepPlaces, list[Node]]:
    """The step on a :class:`Net` whose first parameter is at place 0, its second at 1; what else it is given
    lies at both."""
    state = State.of(roots_of(function, list(arguments)))
    captured = capture(function, (arguments, {}), state, {})
    graph, written = functional(captured.graph, captured.inputs)
    with compat.compiling_in(captured.mode):
        context = Context(Phase.STEP_CAPTURED, hardware("cpu"))
        graph = run_passes(graph, [SplitForeach()], context, [])
    regions = regions_of(graph, leaf_inputs(captured.graph), numbers_apart=True)
    inputs = graph.graph.find_nodes(op="placeholder")
    places = [frozenset({0}), frozenset({1}), *[BOTH] * (len(inputs) - 2)]
    outputs = [BOTH] * sum(r.kind == "tensor" for r in captured.results)
    outputs += [places[i] for i in [*captured.new_gradients, *written]]
    parameters = [set(inputs[:2])] * len(regions)
    made = step_places(graph, regions, places, outputs, BOTH, parameters, captured.names)
    return captured, made, inputs


def clipped(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    loss = model(x)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss.detach()


def test_each_place_updates_its_own_and_norms_are_exchanged() -> None:
    model = Net()
    _, made, inputs = found(clipped, model, torch.optim.SGD(model.parameters(), 0.1), torch.ones(2, 3))
    run, exchange = made.barriers
    assert run == Run(0) and isinstance(exchange, Exchange)
    assert [made.places[n] for n in exchange.values] == [frozenset({0}), frozenset({1})]
    assert all(n.meta["val"].dim() == 0 for n in exchange.values)
    assert made.text().splitlines()[0] == "run region 0"
    readings = made.readings[None]
    for place in range(2):
        written = {inputs[place]: readings[-2:][place]}
        *_, last = step_parts(made, place, [readings[0]], written)
        assert last.graph is not None
        taken = [node for node, _ in last.takes]
        assert inputs[place] in taken and inputs[1 - place] not in taken
        assert {n for n, sent in last.takes if sent} == set(exchange.values)


def mixed(model: Any, optimizer: Any, x: Tensor) -> Tensor:
    loss = model(x)
    loss.backward()
    with torch.no_grad():
        model.first.weight.add_(model.second.weight.T.repeat(1, 1) * 0.5)
    return loss.detach()


def test_large_values_are_refused_small_ones_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    given = model, torch.optim.SGD(model.parameters(), 0.1), torch.ones(2, 3)
    captured, made, inputs = found(mixed, *given)
    assert [type(b) for b in made.barriers] == [Run, Exchange]
    written = {inputs[0]: made.readings[None][-1]}
    *_, last = step_parts(made, 0, [], written)
    assert last.graph is not None and {(inputs[0], True), (inputs[0], False)} <= set(last.takes)
    job = start_job(Plan(lowering="eager"), torch.device("cpu"), alone=True)
    taken = [torch.full(n.meta["val"].shape, float(i)) for i, (n, _) in enumerate(last.takes)]
    own, sent = (last.takes.index((inputs[0], exchanged)) for exchanged in (False, True))
    before = taken[sent].clone()
    compile_piece(last.graph, captured.mode, job, "", True, 0)(*taken)
    assert not torch.equal(taken[own], torch.full_like(before, float(own)))
    assert torch.equal(taken[sent], before)
    monkeypatch.setattr("autodist.passes.step_places._LARGEST", 16)
    with pytest.raises(StepError, match=r"^'first.weight', 48 B of parameters.*in mixed"):
        found(mixed, *given)


def averaged(model: nn.Module, optimizer: Any, average: list[Tensor], x: Tensor) -> None:
    model(x).backward()
    with torch.no_grad():
        for a, p in zip(average, model.parameters(), strict=True):
            a.lerp_(p, 0.5)


def test_an_average_lies_where_its_original_does() -> None:
    model = Net()
    average = [p.detach().clone() for p in model.parameters()]
    given = model, torch.optim.SGD(model.parameters(), 0.1), average, torch.ones(2, 3)
    captured, made, inputs = found(averaged, *given)
    at = len(inputs) - len(captured.batch)
    places: list[Any] = [frozenset({0}), frozenset({1}), *[BOTH] * (len(inputs) - 2)]
    places[at : at + 2] = None, None
    settled = related_places(made.step, places, BOTH)
    assert settled[at : at + 2] == [frozenset({0}), frozenset({1})]


def test_values_of_all_types_are_aligned() -> None:
    cpu = torch.device("cpu")
    kinds: list[tuple[int, tuple[int, ...], torch.dtype]] = [
        (0, (), torch.float32), (1, (5,), torch.bfloat16), (0, (2,), torch.int64)
    ]  # fmt: skip
    sent = [Sent(*kind, cpu) for kind in kinds]
    starts, lengths = _layout(sent)
    assert starts == [0, 0, 16] and lengths == {0: 32, 1: 16}


def test_what_does_not_fit_is_refused() -> None:
    model = Net()
    captured, made, inputs = found(clipped, model, torch.optim.SGD(model.parameters(), 0.1), torch.ones(2, 3))
    readings = made.readings[None]
    *_, last = step_parts(made, 0, [readings[0]], {inputs[0]: readings[-2]})
    assert last.graph is not None
    refused = pytest.raises(MemoryBoundError, match="clipping, optimizer")
    for memory, expected in ((1000, contextlib.nullcontext()), (100, refused)):
        job = start_job(Plan(memory=memory, lowering="eager"), torch.device("cpu"), alone=True)
        with expected:
            compile_piece(last.graph, captured.mode, job, "", True, 100)
