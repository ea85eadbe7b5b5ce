"""The parts of a training step that are differentiated, found, taken out and put back.

A captured step (:mod:`autodist.step_capture`) has a ``gradients(loss, leaves)`` wherever the user's program
asked for gradients. The *region* of one is the program that computes its loss:

    inputs     the leaves, and whatever else comes from outside (the batch, buffers, earlier results)
    body       every node on the way to the loss, and what is computed from those alone
    outputs    the loss first, then what the rest of the step reads

A region is a program as a model's author writes one, so what is done to captured programs is done to it; then
it becomes a forward and a backward graph, which take its place (:func:`assembled`). What is left, the
optimizer and everything else that reads gradients, is *glue*, and stays as it is.

Invariant: two regions share no value that carries a gradient. A step that differentiates one forward twice
(``retain_graph``) is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from autodist.passes.base import PassError
from autodist.passes.graph import fill_values, output_of, where
from autodist.runtime import compat
from autodist.runtime.compat import tree_leaves
from autodist.runtime.gradients import gradients

_aten = torch.ops.aten


@dataclass
class Region:
    """See the module's text. ``marker`` is the ``gradients`` node; nodes are the step's own."""

    marker: Node
    inputs: list[Node] = field(default_factory=list)
    body: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)

    @property
    def loss(self) -> Node:
        return self.marker.args[0]  # type: ignore[return-value]

    @property
    def leaves(self) -> list[Node]:
        return list(self.marker.args[1])  # type: ignore[arg-type]


def regions_of(step: GraphModule) -> list[Region]:
    """The regions of a functional step, in the order of their gradients."""
    nodes = list(step.graph.nodes)
    for number, node in enumerate(step.graph.find_nodes(op="placeholder")):
        node.meta["input"] = number
    after = _after_gradients(nodes)
    enabled = _grad_enabled(nodes)
    owner: dict[Node, int] = {}
    carrying: dict[Node, int] = {}
    regions = []
    for number, marker in enumerate(n for n in nodes if n.target is gradients):
        region = Region(marker)
        leaves = set(region.leaves)
        differentiable = _differentiable(nodes, leaves, enabled)
        needed: set[Node] = set()
        frontier = [region.loss]
        while frontier:
            node = frontier.pop()
            if node in needed or node in leaves or node.op in ("placeholder", "get_attr"):
                continue
            if node in carrying and node in differentiable and owner[node] != number:
                raise PassError(
                    f"two losses of the step depend on '{node.name}' ({where(node)}), which is "
                    "differentiated twice. Add the losses up and call backward once, or detach the value in "
                    "one of them."
                )
            if node in owner or (node in after and node not in differentiable):
                continue
            needed.add(node)
            frontier += node.all_input_nodes
        region.body = [n for n in nodes if n in needed]
        owner |= dict.fromkeys(needed, number)
        carrying |= dict.fromkeys(needed & differentiable, number)
        regions.append(region)
    _absorb(nodes, regions, owner, after)
    for region in regions:
        _find_ends(region)
    return regions


def _after_gradients(nodes: Sequence[Node]) -> set[Node]:
    found: set[Node] = set()
    for node in nodes:
        if node.target is gradients or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _grad_enabled(nodes: Sequence[Node]) -> set[Node]:
    """Nodes that autograd follows: those that run while gradients are enabled."""
    found, now = set(), True
    for node in nodes:
        if compat.sets_grad_mode(node.target):
            now = bool(node.args[0])
        elif now:
            found.add(node)
    return found


def _differentiable(nodes: Sequence[Node], leaves: set[Node], enabled: set[Node]) -> set[Node]:
    """What autograd would follow from ``leaves``."""
    found: set[Node] = set()
    for node in nodes:
        if node not in enabled or node.target in (_aten.detach.default, gradients):
            continue
        if any(n in found or n in leaves for n in node.all_input_nodes) and _has_gradients(node):
            found.add(node)
    return found


def _has_gradients(node: Node) -> bool:
    values = tree_leaves(node.meta.get("val"))
    return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)


def _absorb(
    nodes: Sequence[Node], regions: Sequence[Region], owner: dict[Node, int], after: set[Node]
) -> None:
    """Give regions what is computed from their values alone: a metric, say, read after the backward."""
    for node in nodes:
        if node.op != "call_function" or node in owner or node in after or compat.sets_mode(node.target):
            continue
        of = {owner[n] for n in node.all_input_nodes if n in owner}
        others = [n for n in node.all_input_nodes if n not in owner and n.op != "placeholder"]
        if len(of) == 1 and not others:
            owner[node] = of.pop()
            regions[owner[node]].body.append(node)


def _find_ends(region: Region) -> None:
    body = set(region.body)
    outside = [n for node in region.body for n in node.all_input_nodes if n not in body]
    region.inputs = list(dict.fromkeys([*region.leaves, *outside]))
    read = [n for n in region.body if any(u not in body and u is not region.marker for u in n.users)]
    region.outputs = [region.loss, *(n for n in read if n is not region.loss)]


# --- a region as a program ---------------------------------------------------------------------------


def program_of(step: GraphModule, region: Region) -> GraphModule:
    """A region as a captured program: its inputs' values are in ``meta["example_value"]`` too."""
    graph, env = Graph(), {}
    leaves = set(region.leaves)
    constants = [n for n in region.inputs if n.op == "get_attr"]
    for node in region.inputs:
        if node in constants:
            env[node] = graph.node_copy(node)
            continue
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
        env[node].meta["example_value"] = _leaf(node) if node in leaves else node.meta["val"]
    region.inputs = [n for n in region.inputs if n not in constants]
    wanted, modes = set(region.body), _Modes(graph)
    last = region.body[-1]
    for node in step.graph.nodes:
        if node in wanted:
            modes.begin()
            env[node] = graph.node_copy(node, env.__getitem__)
        elif compat.sets_mode(node.target):
            modes.see(node)
        if node is last:
            break
    modes.end()
    graph.output(tuple(env[n] for n in region.outputs))
    return GraphModule(step, graph)


def returned_outputs(region: Region) -> dict[int, int]:
    """Outputs of a region that the step returns and does nothing else with: where, in the step's outputs."""
    found = {}
    for i, node in enumerate(region.outputs[1:], 1):
        outside = [u for u in node.users if u not in region.body]
        if all(u.op == "output" for u in outside):
            results = list(outside[0].args[0])  # type: ignore[arg-type]
            found[i] = results.index(node)
    return found


def _leaf(node: Node) -> Any:
    return node.meta["val"].detach().requires_grad_()


class _Modes:
    """Copies what sets a mode (gradients off, autocast) into a program that is a part of another."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.begun = graph, False
        self.grad = True
        self.casts: list[tuple[Node, Node | None]] = []

    def begin(self) -> None:
        if not self.begun:
            self.begun = True
            if not self.grad:
                self._set_grad(False)
            self.casts = [(old, self._copy(old)) for old, _ in self.casts]

    def see(self, node: Node) -> None:
        if compat.sets_grad_mode(node.target):
            self.grad = bool(node.args[0])
            if self.begun:
                self._set_grad(self.grad)
        elif node.target is compat.enter_autocast:
            self.casts.append((node, self._copy(node) if self.begun else None))
        else:
            entered = next(i for i, (old, _) in enumerate(self.casts) if old is node.args[0])
            _, new = self.casts.pop(entered)
            if new is not None:
                self._leave(new)

    def end(self) -> None:
        for _, new in reversed(self.casts):
            if new is not None:
                self._leave(new)
        if not self.grad:
            self._set_grad(True)

    def _set_grad(self, enabled: bool) -> None:
        self.graph.call_function(compat.SET_GRAD_ENABLED, (enabled,)).meta["example_value"] = None

    def _copy(self, node: Node) -> Node:
        copied = self.graph.node_copy(node)
        copied.meta["example_value"] = None
        return copied

    def _leave(self, entered: Node) -> None:
        self.graph.call_function(compat.exit_autocast, (entered,)).meta["example_value"] = None


def joint_of(program: GraphModule, region: Region) -> tuple[GraphModule, tuple[list[Any], list[Any]]]:
    """Forward and backward of a region's program in one graph, and its inputs (primals, tangents).

    It returns the region's outputs, then the gradients of its leaves.
    """
    primals = [n.meta["example_value"] for n in program.graph.find_nodes(op="placeholder")]
    primals = [p.detach() if isinstance(p, torch.Tensor) else p for p in primals]
    leaves = [region.inputs.index(leaf) for leaf in region.leaves]
    loss = region.loss.meta["val"]
    with compat.fake_mode_of([loss]) or contextlib.nullcontext():
        tangent = torch.ones_like(loss)
    graph = compat.trace_joint(torch.fx.Interpreter(program).run, primals, leaves, tangent)
    graph.graph.eliminate_dead_code()
    fill_values(graph)
    for node, source in zip(graph.graph.find_nodes(op="placeholder"), region.inputs, strict=False):
        if source.op == "placeholder":
            node.meta["desc"] = compat.input_descriptor(source.meta["input"])
    return graph, (primals, [tangent])


# --- putting parts back ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What becomes of a region: the forward returns its outputs and the values saved; the backward takes
    those, and the gradient of the loss, and returns the gradients of the leaves."""

    forward: GraphModule
    backward: GraphModule


def assembled(step: GraphModule, regions: Sequence[Region], parts: Sequence[Parts]) -> GraphModule:
    """The step with each region's parts in its place."""
    graph = Graph()
    made = GraphModule(step, graph)
    builder = _Builder(step, made, regions, parts)
    for node in step.graph.nodes:
        builder.add(node)
    made.graph.lint()
    made.recompile()
    return made


class _Builder:
    def __init__(
        self, step: GraphModule, made: GraphModule, regions: Sequence[Region], parts: Sequence[Parts]
    ) -> None:
        self.step, self.made = step, made
        self.env: dict[Node, Any] = {}
        self.regions, self.parts = regions, parts
        self.inside = {n: i for i, r in enumerate(regions) for n in r.body}
        self.markers = {r.marker: i for i, r in enumerate(regions)}
        self.saved: dict[int, dict[str, Node]] = {}
        self.constants = 0

    def add(self, node: Node) -> None:
        if node in self.inside or compat.sets_mode(node.target) or compat.is_profiling(node.target):
            return
        for needed in node.all_input_nodes:
            if needed in self.inside:
                self._forward(self.inside[needed])
        if node in self.markers:
            self._backward(self.markers[node])
        elif node.op == "call_function" and isinstance(node.args[0] if node.args else None, Node) and (
            node.args[0] in self.markers
        ):
            self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        elif node.op == "get_attr":
            self.env[node] = self._constant(self.step, node)
        else:
            self.env[node] = self.made.graph.node_copy(node, self.env.__getitem__)

    def _forward(self, number: int) -> None:
        if number in self.saved:
            return
        region, part = self.regions[number], self.parts[number].forward
        for needed in region.inputs:
            if needed in self.inside:
                self._forward(self.inside[needed])
        inputs = [self.env[n] for n in region.inputs]
        results = self._inline(part, inputs)
        count = len(region.outputs)
        self.env |= dict(zip(region.outputs, results[:count], strict=True))
        saved = output_of(part).args[0][count:]  # type: ignore[index]
        self.saved[number] = {n.name: r for n, r in zip(saved, results[count:], strict=True)}

    def _backward(self, number: int) -> None:
        self._forward(number)
        region, part = self.regions[number], self.parts[number].backward
        loss = region.loss.meta["val"]
        one = insert_full(self.made.graph, loss)
        saved = self.saved[number]
        placeholders = part.graph.find_nodes(op="placeholder")
        taken = {n.name for n in placeholders}
        # Random states go by other names where they are taken.
        others = iter([v for name, v in saved.items() if name not in taken])
        inputs = [one if compat.is_tangent(n) else saved.get(n.name) or next(others) for n in placeholders]
        self.env[region.marker] = self._inline(part, inputs)  # type: ignore[assignment]

    def _inline(self, part: GraphModule, inputs: Sequence[Node]) -> list[Any]:
        env: dict[Node, Any] = dict(zip(part.graph.find_nodes(op="placeholder"), inputs, strict=True))
        for node in part.graph.nodes:
            if node.op == "output":
                return [env[n] if isinstance(n, Node) else n for n in node.args[0]]
            if node.op == "get_attr":
                env[node] = self._constant(part, node)
            elif node not in env:
                env[node] = self.made.graph.node_copy(node, env.__getitem__)
        raise AssertionError("a graph without an output")

    def _constant(self, part: GraphModule, node: Node) -> Node:
        name = f"_part_constant{self.constants}"
        self.constants += 1
        value = getattr(part, node.target)  # type: ignore[arg-type]
        if isinstance(value, torch.Tensor):
            self.made.register_buffer(name, value)
        else:
            setattr(self.made, name, value)
        made = self.made.graph.get_attr(name)
        made.meta = dict(node.meta)
        return made


def write_back(step: GraphModule, written: Sequence[int]) -> None:
    """Let a step write its last outputs, the new values of its inputs ``written``, into those."""
    output = output_of(step)
    inputs = step.graph.find_nodes(op="placeholder")
    values = list(output.args[0])  # type: ignore[arg-type]
    count = len(values) - len(written)
    with step.graph.inserting_before(output):
        for position, value in zip(written, values[count:], strict=True):
            copy = step.graph.call_function(_aten.copy_.default, (inputs[position], value))
            copy.meta["val"] = inputs[position].meta["val"]
    output.args = (tuple(values[:count]),)
    step.recompile()


def insert_full(graph: Graph, like: torch.Tensor) -> Node:
    """A one of the kind of a loss."""
    node = graph.call_function(
        _aten.full.default, (list(like.shape), 1), {"dtype": like.dtype, "device": like.device}
    )
    with compat.fake_mode_of([like]) or contextlib.nullcontext():
        node.meta["val"] = torch.ones_like(like)
    return node


__all__ = [
    "Parts",
    "Region",
    "assembled",
    "joint_of",
    "program_of",
    "regions_of",
    "returned_outputs",
    "write_back",
]
