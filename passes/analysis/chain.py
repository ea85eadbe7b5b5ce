"""What flows through a program: the chain of nodes that pipeline stages are cut from.

A program computes from *parameters*, inputs from the *batch* and *constants* (buffers, literals). Its nodes
are of three kinds:

    chain       what depends on parameters and on the batch, in an order in which it can run: c_0 .. c_{N-1}
    producers   what does not: masks, position tables, casts of weights. Every stage that reads one makes it
                again, from inputs that every stage has
    remade      views of chain values that are no smaller than what they show, and sizes: a stage that reads
                one makes it from the value it shows, so a storage is never sent twice for being seen twice

Random operators are always on the chain: made twice, they would draw other numbers. So are operators that
are called for their effect alone (assertions). Items of a tuple follow the tuple at once.

*Boundary* ``b`` (1 <= b < N) lies between ``c_{b-1}`` and ``c_b``. A chain value with position ``p`` and last
reader ``l``, read directly or through what is remade, *crosses* the boundaries ``p < b <= l``, also those of
stages that do not read it: it is handed on. Its gradient crosses back where a reader behind the boundary
takes part in the loss. A view smaller than what it shows (a slice, an item of a split) is a chain value too,
but crosses only the boundaries that what it shows does not; elsewhere it is remade.

Tuples cannot cross. A boundary that an operator's tuple would have to cross is *closed*.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from autodist.passes.analysis.fusion import storages, tensors
from autodist.passes.graph import behind, is_view, num_bytes, output_of
from autodist.runtime import compat
from autodist.runtime.compat import tree_leaves

_aten = torch.ops.aten


@dataclass(frozen=True)
class Inputs:
    """What a program's placeholders, by their names in the graph, stand for.

    ``parameters`` maps the placeholders that are parameters, or reads of them, to the parameters' names:
    several may be reads of one. ``batch`` are those that differ between microbatches; all others are
    constants. ``frozen`` are the parameters' placeholders that take no gradient.
    """

    parameters: Mapping[str, str]
    batch: frozenset[str]
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Crossing:
    """A chain value crosses the boundaries ``start < b <= end``; its gradient, up to ``gradient_end``."""

    node: Node
    start: int
    end: int
    gradient_end: int

    def at(self, boundary: int) -> bool:
        return self.start < boundary <= self.end

    def carries_gradient(self, boundary: int) -> bool:
        return boundary <= self.gradient_end


@dataclass(frozen=True)
class Result:
    """An output of the program: ``index`` among its outputs, and the chain position it is returned at."""

    index: int
    node: Node
    position: int


class Chain:
    """The chain of a functional forward graph whose nodes carry values (``meta["val"]``).

    ``nodes`` are the chain's, ``position`` their places. ``differentiable`` are the nodes of the graph that
    have a gradient, ``followed`` those of them that the loss is differentiated through; ``loss`` is the
    first output that has a gradient, ``loss_result`` that output. ``closed`` maps boundaries where no
    stage can end to the tuple that would have to cross.
    """

    def __init__(self, graph: GraphModule, inputs: Inputs) -> None:
        self.graph, self.inputs = graph, inputs
        self.order = {node: i for i, node in enumerate(graph.graph.nodes)}
        self.outputs: list[Node | None] = [
            leaf if isinstance(leaf, Node) else None for leaf in tree_leaves(output_of(graph).args[0])
        ]
        self._flowing = self._flow()
        self.nodes = self._in_order()
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.differentiable = self._differentiable()
        self.loss = next((n for n in self.outputs if n is not None and n in self.differentiable), None)
        self.followed = self._followed()
        self._ends: dict[Node, int] = {}
        self._gradient_ends: dict[Node, int] = {}
        self.crossings = self._crossings()
        self.closed = self._closed()
        self.results = [
            Result(i, n, self._returned_at(n)) for i, n in enumerate(self.outputs) if n is not None
        ]
        self.loss_result = next((r for r in self.results if r.node is self.loss), None)
        self._returned: dict[int, list[Node]] = {}
        for result in self.results:
            self._returned.setdefault(result.position, []).append(result.node)
        self._needs: dict[Node, frozenset[Node]] = {}

    def remade(self, node: Node) -> bool:
        """Whether a node that depends on the chain is not on it."""
        return node in self._flowing and node not in self.position

    def needs(self, position: int) -> frozenset[Node]:
        """Nodes off the chain, placeholders included, that ``c_position`` and what is returned there need."""
        found: set[Node] = set()
        for node in [*self.nodes[position].all_input_nodes, *self._returned.get(position, ())]:
            if node not in self.position:
                if node not in self._needs:
                    self._needs[node] = frozenset(self._behind(node))
                found |= self._needs[node]
        return frozenset(found)

    def crossing(self, boundary: int) -> list[Crossing]:
        """What crosses a boundary, in the chain's order."""
        return [c for c in self.crossings if c.at(boundary)]

    def parameter(self, node: Node) -> str | None:
        """The name of the parameter that a placeholder stands for, if it does."""
        return self.inputs.parameters.get(node.name) if node.op == "placeholder" else None

    # --- pieces ------------------------------------------------------------------------------------

    def _flow(self) -> set[Node]:
        parameters, batch, found = set[Node](), set[Node](), set[Node]()
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                parameters |= {node} if node.name in self.inputs.parameters else set()
                batch |= {node} if node.name in self.inputs.batch else set()
            if node.op != "call_function" or compat.sets_mode(node.target):
                continue
            given = node.all_input_nodes
            parameters |= {node} if any(n in parameters for n in given) else set()
            batch |= {node} if any(n in batch for n in given) else set()
            own = compat.is_random(node.target) or compat.returns_nothing(node.target)
            if own or (node in parameters and node in batch) or any(n in found for n in given):
                found.add(node)
        return found

    def _in_order(self) -> list[Node]:
        nodes: dict[Node, None] = {}

        def place(node: Node) -> None:
            if node not in nodes and not self._is_remade(node):
                nodes[node] = None
                for item in _items(node, self.order):
                    place(item)

        for node in self.graph.graph.nodes:
            if node in self._flowing:
                place(node)
        return list(nodes)

    def _is_remade(self, node: Node) -> bool:
        if compat.is_random(node.target) or compat.returns_nothing(node.target):
            return False
        if not tensors(node):
            return True
        shown = _viewed(node)
        return shown is not None and num_bytes(shown) <= num_bytes(node)

    def _differentiable(self) -> set[Node]:
        found, enabled = set[Node](), True
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                takes = node.name in self.inputs.parameters and node.name not in self.inputs.frozen
                found |= {node} if takes and _has_gradients(node) else set()
            elif compat.sets_grad_mode(node.target):
                enabled = bool(node.args[0])
            elif node.op == "call_function" and enabled and node.target is not _aten.detach.default:
                inputs = any(n in found for n in node.all_input_nodes)
                found |= {node} if inputs and _has_gradients(node) else set()
        return found

    def _followed(self) -> set[Node]:
        found: set[Node] = set()
        frontier = [] if self.loss is None else [self.loss]
        while frontier:
            node = frontier.pop()
            if node not in found:
                found.add(node)
                frontier += [n for n in node.all_input_nodes if n in self.differentiable]
        return found

    def _readers(self, node: Node) -> list[tuple[Node, bool]]:
        """Chain nodes that read a value, directly or through what is remade of it, and whether the loss is
        differentiated through that."""
        found: list[tuple[Node, bool]] = []
        frontier = [(node, True)]
        seen = {*frontier}
        while frontier:
            value, followed = frontier.pop()
            for user in value.users:
                step = (user, followed and user in self.followed)
                if user in self.position:
                    found.append(step)
                elif user.op == "call_function" and step not in seen:
                    seen.add(step)
                    frontier.append(step)
        return found

    def _crossings(self) -> list[Crossing]:
        for node in self.nodes:
            at = self.position[node]
            readers = [(self.position[r], f) for r, f in self._readers(node)]
            self._ends[node] = max((p for p, _ in readers), default=at)
            followed = [p for p, f in readers if f and node in self.followed]
            self._gradient_ends[node] = max(followed, default=at)
        starts: dict[Node, int] = {}
        for node in reversed(self.nodes):
            shown = self._shown(node)
            starts[node] = self.position[node]
            if shown is not None:
                # Where what it shows crosses, it is remade from that, which then has its gradient too.
                starts[node] = max(starts[node], self._ends[shown])
                if self._gradient_ends[node] > self.position[node]:
                    through = min(self._ends[shown], self._gradient_ends[node])
                    self._gradient_ends[shown] = max(self._gradient_ends[shown], through)
        return [
            Crossing(n, starts[n], self._ends[n], self._gradient_ends[n])
            for n in self.nodes
            if isinstance(n.meta.get("val"), torch.Tensor) and starts[n] < self._ends[n]
        ]

    def _shown(self, node: Node) -> Node | None:
        """The chain value that a chain value is a view of."""
        shown = _viewed(node)
        while shown is not None and shown not in self.position:
            shown = _viewed(shown)
        return shown

    def _closed(self) -> dict[int, Node]:
        found: dict[int, Node] = {}
        for node in self.nodes:
            if not isinstance(node.meta.get("val"), torch.Tensor):
                for boundary in range(self.position[node] + 1, self._ends[node] + 1):
                    found.setdefault(boundary, node)
        return found

    def _returned_at(self, node: Node) -> int:
        """The first chain position at which an output is known; for a producer, where its parameters are."""
        if node in self.position:
            return self.position[node]
        behind = self._behind(node)
        known = [self.position[n] for b in behind for n in b.all_input_nodes if n in self.position]
        if known:
            return max(known)
        parameters = [n for n in behind if self.parameter(n) is not None]
        readers = (self.position[r] for p in parameters for r, _ in self._readers(p))
        return min(readers, default=0)

    def _behind(self, node: Node) -> set[Node]:
        """``node`` and what it is made from, up to the chain."""
        return behind([node], self.position)


def _viewed(node: Node) -> Node | None:
    """The node whose memory a view, or an item of views, shows."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return _viewed(node.args[0])  # type: ignore[arg-type]
    if is_view(node):
        return node.args[0]  # type: ignore[return-value]
    mine = set(storages(node))
    shown = (n for n in node.all_input_nodes if mine and mine <= set(storages(n)))
    return next(shown, None)


def _items(node: Node, order: Mapping[Node, int]) -> Sequence[Node]:
    """The items of a tuple, in the graph's order."""
    if isinstance(node.meta.get("val"), torch.Tensor):
        return []
    return sorted((u for u in node.users if u.target is operator.getitem), key=order.__getitem__)


def _has_gradients(node: Node) -> bool:
    return any(t.is_floating_point() or t.is_complex() for t in tensors(node))
