"""A program cut into the programs of its pipeline stages.

    stage s:    parameters, received, batch, constants  ->  results, sent

Run one after the other, each with what the one before has sent, the stages compute what the program computes:

    received    the chain values that cross the boundary before the stage
                (:mod:`autodist.passes.analysis.chain`), in the chain's order; they are contiguous
    sent        the same for the boundary behind it: what one stage sends is what the next receives. What a
                later stage needs is handed on by those between
    results     the program's outputs that are known here. Only the loss has a gradient; all others are
                detached, or the backward would be made for gradients of zero that are as large as logits
    producers   whatever the stage's nodes need that is not on the chain is in the stage too

What a stage returns shares no memory with what it is given or with anything else it returns, so that buffers
can be reused. Nodes keep their names, source lines, checkpoint tags, and whether gradients are followed there
(``torch.no_grad``). Views of what was received may meet other strides than in the program: there, ``view``
becomes ``reshape``, and values are evaluated anew.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from autodist.passes.analysis.chain import Chain, Crossing, Inputs
from autodist.passes.analysis.fusion import storages, tensors
from autodist.passes.analysis.stages import StagePlan, boundaries
from autodist.passes.graph import evaluate, insert
from autodist.runtime import compat

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)


@dataclass(frozen=True)
class Passed:
    """A value handed from one stage to the next: a contiguous tensor like ``value``, under ``name`` in both.

    ``gradient`` says that one like it comes back. It has one in the program, and a reader behind the boundary
    takes part in the loss.
    """

    name: str
    value: torch.Tensor
    gradient: bool


@dataclass(frozen=True)
class Returned:
    """An output of the whole program that a stage makes: its ``index`` among the program's outputs."""

    index: int
    value: Any


@dataclass(frozen=True)
class StageGraph:
    """One stage's program.

    Its placeholders are ``parameters`` (their names), ``received``, ``batch`` and ``constants`` (their
    placeholders' names in the whole program), in this order; its outputs ``results``, then ``sent``. ``loss``
    is the place of the loss among the results, in the stage that has it.
    """

    graph: GraphModule
    parameters: tuple[str, ...]
    received: tuple[Passed, ...]
    batch: tuple[str, ...]
    constants: tuple[str, ...]
    results: tuple[Returned, ...]
    sent: tuple[Passed, ...]
    loss: int | None


def cut(graph: GraphModule, inputs: Inputs, plan: StagePlan) -> list[StageGraph]:
    """The stages of a functional forward graph, as ``plan`` cuts it. ``graph`` is left as it is.

    Raises :class:`autodist.passes.analysis.stages.StageError` for a plan that is not one of this graph's.
    """
    chain = Chain(graph, inputs)
    ends = boundaries(chain, plan.cuts)
    length = len(chain.nodes)
    crossing = [chain.crossing(b) if 0 < b < length else [] for b in ends]
    modes = _modes(graph)
    return [
        _Stage(chain, (a, b), crossing[s], crossing[s + 1], modes).made()
        for s, (a, b) in enumerate(itertools.pairwise(ends))
    ]


class _Stage:
    """Writes the program of the positions ``[start, end)``."""

    def __init__(
        self,
        chain: Chain,
        ends: tuple[int, int],
        received: Sequence[Crossing],
        sent: Sequence[Crossing],
        modes: dict[Node, _Modes],
    ) -> None:
        self.chain, self.received, self.sent, self.modes = chain, received, sent, modes
        self.start, self.end = ends
        self.results = [r for r in chain.results if self.start <= r.position < self.end]
        self.graph = Graph()
        self.env: dict[Node, Node] = {}
        self.moved: set[Node] = set()
        """Nodes whose strides may be other than in the program."""

    def made(self) -> StageGraph:
        own = self.chain.nodes[self.start : self.end]
        needed = self._needed([*own, *(c.node for c in self.sent), *(r.node for r in self.results)])
        given = [n for n in needed if n.op == "placeholder"]
        parameters = [n for n in given if self.chain.parameter(n) is not None]
        batch = [n for n in given if n.name in self.chain.inputs.batch]
        constants = [n for n in given if n not in parameters and n not in batch]
        self._placeholders(parameters)
        received = self._receive()
        self._placeholders([*batch, *constants])
        self._copy([n for n in needed if n.op != "placeholder"])
        results, sent = self._return()
        self.graph.output((*results, *sent))
        made = GraphModule(self.chain.graph, self.graph)
        made.graph.lint()
        losses = [i for i, r in enumerate(self.results) if r is self.chain.loss_result]
        return StageGraph(
            made,
            tuple(self.chain.parameter(n) or "" for n in parameters),
            received,
            tuple(n.name for n in batch),
            tuple(n.name for n in constants),
            tuple(Returned(r.index, n.meta["val"]) for r, n in zip(self.results, results, strict=True)),
            tuple(
                Passed(c.node.name, n.meta["val"], c.carries_gradient(self.end))
                for c, n in zip(self.sent, sent, strict=True)
            ),
            losses[0] if losses else None,
        )

    def _needed(self, wanted: Iterable[Node]) -> list[Node]:
        """``wanted`` and all they need beside what is received, in the program's order."""
        have = {c.node for c in self.received}
        found: set[Node] = set()
        frontier = [n for n in wanted if n not in have]
        while frontier:
            node = frontier.pop()
            if node not in found:
                found.add(node)
                frontier += [n for n in node.all_input_nodes if n not in have]
        return sorted(found, key=self.chain.order.__getitem__)

    def _placeholders(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self.env[node] = self.graph.node_copy(node)
            compat.copy_source(node, self.env[node])

    def _receive(self) -> tuple[Passed, ...]:
        found = []
        for crossing in self.received:
            node = crossing.node
            made = self.env[node] = self.graph.placeholder(node.name)
            made.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
            made.meta["val"] = _fresh(node.meta["val"])
            self.moved.add(node)
            found.append(Passed(made.name, made.meta["val"], crossing.carries_gradient(self.start)))
        return tuple(found)

    def _copy(self, nodes: Sequence[Node]) -> None:
        now = _Modes()
        entered: dict[Node, Node] = {}
        for node in nodes:
            now = self._enter(now, self.modes.get(node, now), entered)
            made = self.env[node] = self.graph.node_copy(node, self.env.__getitem__)
            if not self.moved.isdisjoint(node.all_input_nodes):
                self.moved.add(node)
                if node.target in _VIEWS:
                    made.target = _aten.reshape.default
                if not compat.returns_nothing(node.target):
                    evaluate(made)
        self._enter(now, _Modes(), entered)

    def _enter(self, now: _Modes, wanted: _Modes, entered: dict[Node, Node]) -> _Modes:
        """Leave and enter modes until they are those ``wanted``."""
        pairs = zip(now.casts, wanted.casts, strict=False)
        common = len(list(itertools.takewhile(lambda pair: pair[0] is pair[1], pairs)))
        for node in reversed(now.casts[common:]):
            self.graph.call_function(compat.exit_autocast, (entered.pop(node),))
        for node in wanted.casts[common:]:
            entered[node] = self.graph.node_copy(node)
        if now.grad != wanted.grad:
            self.graph.call_function(compat.SET_GRAD_ENABLED, (wanted.grad,))
        return wanted

    def _return(self) -> tuple[list[Node], list[Node]]:
        """The results and what is sent, with memory of their own."""
        taken = {key for n in self.graph.find_nodes(op="placeholder") for key in storages(n)}
        results, sent = [], []
        for result in self.results:
            node = self.env[result.node]
            if result is not self.chain.loss_result and tensors(node):
                node = insert(self.graph, _aten.detach.default, (node,), like=node)
            results.append(self._own(node, taken, any_layout=True))
        for crossing in self.sent:
            sent.append(self._own(self.env[crossing.node], taken, any_layout=False))
        return results, sent

    def _own(self, node: Node, taken: set[int], any_layout: bool) -> Node:
        """``node``, or a copy of it where its memory is ``taken``, or not contiguous."""
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return node
        if not taken.isdisjoint(storages(node)) or not (any_layout or value.is_contiguous()):
            layout = {"memory_format": torch.contiguous_format}
            node = insert(self.graph, _aten.clone.default, (node,), like=node, kwargs=layout)
        taken.update(storages(node))
        return node


@dataclass(frozen=True)
class _Modes:
    """The modes that a node runs under: whether gradients are followed, and the autocasts entered."""

    grad: bool = True
    casts: tuple[Node, ...] = ()


def _modes(graph: GraphModule) -> dict[Node, _Modes]:
    found, now = {}, _Modes()
    for node in graph.graph.nodes:
        if compat.sets_grad_mode(node.target):
            now = replace(now, grad=bool(node.args[0]))
        elif node.target is compat.enter_autocast:
            now = replace(now, casts=(*now.casts, node))
        elif node.target is compat.exit_autocast:
            now = replace(now, casts=tuple(n for n in now.casts if n is not node.args[0]))
        else:
            found[node] = now
    return found


def _fresh(value: torch.Tensor) -> torch.Tensor:
    """A fake of a contiguous tensor like ``value``."""
    with compat.fake_mode_of([value]) or contextlib.nullcontext():
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
