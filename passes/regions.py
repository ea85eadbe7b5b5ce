"""The parts of a training step that are differentiated, found, taken out and put back.

A captured step (:mod:`autodist.step_capture`) has a ``gradients(loss, leaves)`` wherever the user's program
asked for gradients. The *region* of one is the program that computes its loss:

    inputs     the leaves, and whatever else comes from outside (the batch, buffers, earlier results)
    body       every node on the way to the loss, and what is computed from those alone
    outputs    the loss first, then what the rest of the step reads

A region is a program as a model's author writes one, so what is done to captured programs is done to it; then
it becomes a forward and a backward graph, which take its place (:func:`assembled`). What is left, the
optimizer and everything else that reads gradients, is *glue*, and stays as it is.

A node belongs to the region whose loss is differentiated through it; one that no loss is differentiated
through belongs to the first that needs it. So a value that one loss reads detached may be another's.

Invariants: two regions share no value that carries a gradient (a step that differentiates one forward twice,
``retain_graph``, is refused); random numbers are drawn in the order in which the step draws them.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from autodist.passes.base import StepError
from autodist.passes.graph import fill_values, insert, output_of, where
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


def leaf_inputs(step: GraphModule) -> list[list[int | None]]:
    """Which inputs a step as captured, before writes are taken out of it, asks gradients of: for each
    ``gradients``, the leaves' positions."""
    number = {n: i for i, n in enumerate(step.graph.find_nodes(op="placeholder"))}
    markers = [n for n in step.graph.nodes if n.target is gradients]
    return [[number.get(leaf) for leaf in m.args[1]] for m in markers]


def regions_of(
    step: GraphModule, leaves: Sequence[Sequence[int | None]], numbers_apart: bool = False
) -> list[Region]:
    """The regions of a functional step, in the order of their gradients; ``leaves`` as :func:`leaf_inputs`
    found them. With ``numbers_apart`` what is computed of a region's numbers alone is not part of it. Raises
    :class:`StepError`."""
    nodes = list(step.graph.nodes)
    for number, node in enumerate(step.graph.find_nodes(op="placeholder")):
        node.meta["input"] = number
    after, enabled = _after_gradients(nodes), _grad_enabled(nodes)
    regions = [Region(n) for n in nodes if n.target is gradients]
    followed = [_differentiable(nodes, set(r.leaves), enabled) for r in regions]
    owner: dict[Node, int] = {}
    for number, region in enumerate(regions):
        carrying = _carrying(region, followed[number], owner)
        _refuse_lost_gradients(step, region, leaves[number], carrying)
        for node in carrying.difference(region.leaves):
            owner |= dict.fromkeys([node, *_results(node)], number)
    for number, region in enumerate(regions):
        seen: set[Node] = set(region.leaves)
        frontier = [region.loss]
        while frontier:
            node = frontier.pop()
            if node in seen or owner.get(node, number) != number or node.op in ("placeholder", "get_attr"):
                continue
            if node in after and node not in followed[number]:
                continue
            seen.add(node)
            owner |= dict.fromkeys([node, *_results(node)], number)
            frontier += node.all_input_nodes
    _absorb(nodes, owner, after, numbers_apart)
    for number, region in enumerate(regions):
        region.body = [n for n in nodes if owner.get(n) == number]
        _find_ends(region)
    return regions


def _results(node: Node) -> list[Node]:
    """The results of an operator that has several; they are never apart from it."""
    return [u for u in node.users if u.target is operator.getitem]


def _carrying(region: Region, followed: set[Node], owner: dict[Node, int]) -> set[Node]:
    """What the loss is differentiated through, with the leaves; ``owner`` has that of earlier regions."""
    found: set[Node] = set()
    leaves = set(region.leaves)
    frontier = [region.loss]
    while frontier:
        node = frontier.pop()
        if node in found or not (node in leaves or node in followed):
            continue
        found.add(node)
        if node in leaves:
            continue
        if node in owner:
            raise StepError(
                f"two losses of the step depend on '{node.name}' ({where(node)}), which is differentiated "
                "twice. Add the losses up and call backward once, or detach the value in one of them."
            )
        frontier += node.all_input_nodes
    return found


def _refuse_lost_gradients(
    step: GraphModule, region: Region, inputs: Sequence[int | None], carrying: set[Node]
) -> None:
    """Autograd has followed the loss to every leaf as it was then. The leaves here are as they are at the
    backward: what the loss has read of one before it was changed would be given no gradient."""
    placeholders = step.graph.find_nodes(op="placeholder")
    for leaf, number in zip(region.leaves, inputs, strict=True):
        former = None if number is None or placeholders[number] is leaf else placeholders[number]
        stale = next((n for n in carrying.difference(region.leaves) if former in n.all_input_nodes), None)
        if leaf not in carrying or stale is not None:
            raise StepError(
                f"backward ({where(region.marker)}) differentiates a loss for a parameter of shape "
                f"{tuple(leaf.meta['val'].shape)} that has been changed since the loss read it"
                f"{'' if stale is None else f' ({where(stale)})'}. Call backward before the parameter is "
                "changed (optimizer.step()), or compute the loss again."
            )


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
        if _is_statistic(node) or not _has_gradients(node):
            continue
        if any(n in found or n in leaves for n in node.all_input_nodes):
            found.add(node)
    return found


_STATISTICS = {
    _aten._native_batch_norm_legit_functional.default: 3,
    _aten._batch_norm_with_update_functional.default: 4,
}
"""Norms without writes, and from which result on they return running statistics."""


def _is_statistic(node: Node) -> bool:
    """Whether a node is a norm's new running statistic, which a norm writes without autograd."""
    if node.target is not operator.getitem:
        return False
    norm, number = node.args
    return number >= _STATISTICS.get(norm.target, sys.maxsize)  # type: ignore[operator, union-attr]


def _has_gradients(node: Node) -> bool:
    values = tree_leaves(node.meta.get("val"))
    return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)


def _absorb(nodes: Sequence[Node], owner: dict[Node, int], after: set[Node], numbers_apart: bool) -> None:
    """Give regions what is computed from their values alone: a metric, say, read after the backward."""
    for node in nodes:
        if node.op != "call_function" or node in owner or node in after or compat.sets_mode(node.target):
            continue
        inside = [n for n in node.all_input_nodes if n in owner]
        if numbers_apart and all(is_number(n.meta.get("val")) for n in inside):
            continue
        of = {owner[n] for n in inside}
        others = [n for n in node.all_input_nodes if n not in owner and n.op != "placeholder"]
        # What is drawn stays outside: a region would drop it where nothing reads it.
        if len(of) == 1 and not others and not compat.is_random(node.target):
            owner[node] = of.pop()


def is_number(value: Any) -> bool:
    """Whether a node's value is one number."""
    return not isinstance(value, torch.Tensor) or value.dim() == 0


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
    for number, node in enumerate(n for n in region.body if compat.is_random(n.target)):
        compat.note(node, _DRAW, number)
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


def updates_of(step: GraphModule, regions: Sequence[Region], results: Sequence[Any]) -> GraphModule:
    """What a step does outside of its regions to arrive at some of its ``results``."""
    inside = {n for r in regions for n in r.body}
    needed: set[Any] = set()
    frontier = list(results)
    while frontier:
        node = frontier.pop()
        if node not in needed:
            needed.add(node)
            frontier += node.all_input_nodes if node not in inside else ()
    graph, env = Graph(), {}
    constants: dict[str, Any] = {}
    for node in step.graph.nodes:
        if node in needed and node in inside:
            env[node] = graph.placeholder(node.name)
        elif node in needed and node.op == "get_attr":
            name = f"constant{len(constants)}"
            constants[name] = getattr(step, node.target)
            env[node] = graph.create_node("get_attr", name)
        elif node in needed:
            env[node] = graph.node_copy(node, env.__getitem__)
        if node in needed:
            env[node].meta = dict(node.meta)
    graph.output([env[n] for n in results])
    return GraphModule(constants, graph)


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


class _Differentiated(torch.fx.Interpreter):
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with compat.taken_apart_for_training(target):
            return super().call_function(target, args, kwargs)


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
    graph = compat.trace_joint(_Differentiated(program).run, primals, leaves, [tangent])
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
    """Copies the step's nodes in their order; of a forward, as much as what comes next needs."""

    def __init__(
        self, step: GraphModule, made: GraphModule, regions: Sequence[Region], parts: Sequence[Parts]
    ) -> None:
        self.step, self.made = step, made
        self.env: dict[Node, Any] = {}
        self.parts = parts
        self.inside = {n: i for i, r in enumerate(regions) for n in r.body}
        self.markers = {r.marker: i for i, r in enumerate(regions)}
        self.forwards = [_Forward(r, p.forward) for r, p in zip(regions, parts, strict=True)]
        self.constants = 0

    def add(self, node: Node) -> None:
        if compat.sets_mode(node.target) or compat.is_profiling(node.target):
            return
        if node in self.inside:
            forward = self.forwards[self.inside[node]]
            self._advance(forward, forward.draws.get(_draw(node), []))
            return
        for needed in node.all_input_nodes:
            self._need(needed)
        if node in self.markers:
            self._backward(node, self.markers[node])
        elif node.op == "call_function" and isinstance(node.args[0] if node.args else None, Node) and (
            node.args[0] in self.markers
        ):
            self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        elif node.op == "get_attr":
            self.env[node] = self._constant(self.step, node)
        else:
            self.env[node] = self.made.graph.node_copy(node, self.env.__getitem__)

    def _need(self, node: Node) -> None:
        """Have the value of a node of the step."""
        if node in self.inside and node not in self.env:
            forward = self.forwards[self.inside[node]]
            result = forward.results[node]
            self._advance(forward, [result])
            self.env[node] = forward.env[result]

    def _advance(self, forward: _Forward, wanted: Sequence[Node], to_the_end: bool = False) -> None:
        """Copy what ``wanted`` needs of a forward, and what stands before it and can be computed by now: all
        but what is drawn later in the step or reads what comes later."""
        needed = forward.missing(wanted)
        for node in needed & forward.sources.keys():
            self._need(forward.sources[node])
            forward.env[node] = self.env[forward.sources[node]]
        for node, source in forward.sources.items():
            if source in self.env:
                forward.env[node] = self.env[source]
        left = []
        count = sum(n in needed for n in forward.left)
        for i, node in enumerate(forward.left):
            if count == 0 and not to_the_end:
                left += forward.left[i:]
                break
            count -= node in needed
            ready = all(n in forward.env for n in node.all_input_nodes)
            if node in needed or (ready and _draw(node) is None):
                forward.env[node] = self._copy(forward.graph, node, forward.env)
            else:
                left.append(node)
        forward.left = left

    def _backward(self, marker: Node, number: int) -> None:
        forward, part = self.forwards[number], self.parts[number].backward
        self._advance(forward, forward.saved, to_the_end=True)
        loss = forward.region.loss.meta["val"]
        one = insert_full(self.made.graph, loss)
        saved = {n.name: forward.env[n] for n in forward.saved}
        placeholders = part.graph.find_nodes(op="placeholder")
        taken = {n.name for n in placeholders}
        # Random states go by other names where they are taken.
        others = iter([v for name, v in saved.items() if name not in taken])
        inputs = [one if compat.is_tangent(n) else saved.get(n.name) or next(others) for n in placeholders]
        self.env[marker] = self._inline(part, inputs)

    def _inline(self, part: GraphModule, inputs: Sequence[Node]) -> list[Any]:
        env: dict[Node, Any] = dict(zip(part.graph.find_nodes(op="placeholder"), inputs, strict=True))
        for node in part.graph.nodes:
            if node.op == "output":
                return [env[n] if isinstance(n, Node) else n for n in node.args[0]]
            if node not in env:
                env[node] = self._copy(part, node, env)
        raise AssertionError("a graph without an output")

    def _copy(self, part: GraphModule, node: Node, env: dict[Node, Any]) -> Node:
        if node.op == "get_attr":
            return self._constant(part, node)
        return self.made.graph.node_copy(node, env.__getitem__)

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


class _Forward:
    """A region's forward part while it is copied: ``left`` is what has not been, ``env`` what has become of
    the rest."""

    def __init__(self, region: Region, graph: GraphModule) -> None:
        self.region, self.graph = region, graph
        self.env: dict[Any, Any] = {}
        self.sources = dict(zip(graph.graph.find_nodes(op="placeholder"), region.inputs, strict=True))
        self.left = [n for n in graph.graph.nodes if n.op not in ("placeholder", "output")]
        returned: Any = output_of(graph).args[0]
        self.results = dict(zip(region.outputs, returned, strict=False))
        self.saved: list[Node] = list(returned[len(region.outputs) :])
        self.draws: dict[int | None, list[Node]] = {}
        for node in self.left:
            if _draw(node) is not None:
                self.draws.setdefault(_draw(node), []).append(node)

    def missing(self, wanted: Sequence[Node]) -> set[Node]:
        """What ``wanted`` needs and is not there yet."""
        found: set[Node] = set()
        frontier = list(wanted)
        while frontier:
            node = frontier.pop()
            if node not in found and node not in self.env:
                found.add(node)
                frontier += node.all_input_nodes
        return found


def _draw(node: Node) -> int | None:
    """The number of the region's draw that a node of its body, or of its forward part, makes."""
    return compat.notes(node).get(_DRAW) if compat.is_random(node.target) else None


_DRAW = "autodist_draw"


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


def keep_draws(step: GraphModule) -> None:
    """Have a step return something of each random draw that nothing reads, after all else: it would be
    dropped as dead code, and what is drawn next would be other numbers."""
    output = output_of(step)
    alive: set[Node] = set()
    for node in reversed(step.graph.nodes):
        if node is output or node in alive or compat.is_mutating(node.target):
            alive |= {node, *node.all_input_nodes}
    unread = [n for n in step.graph.nodes if compat.is_random(n.target) and n not in alive]
    with step.graph.inserting_before(output):
        kept = [insert(step.graph, _aten.new_empty.default, (_first_result(n), [0])) for n in unread]
    output.args = ((*output.args[0], *kept),)  # type: ignore[misc]
    step.recompile()


def _first_result(node: Node) -> Node:
    """A tensor that an operator returns."""
    if isinstance(node.meta["val"], torch.Tensor):
        return node
    return insert(node.graph, operator.getitem, (node, 0))


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
    "keep_draws",
    "leaf_inputs",
    "program_of",
    "regions_of",
    "returned_outputs",
    "updates_of",
    "write_back",
]
