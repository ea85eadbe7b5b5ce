"""Small predicates and edits that several passes share."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from autodist.runtime import compat
from autodist.runtime.compat import tree_leaves, tree_map

_aten = torch.ops.aten

_LAYOUT = {
    _aten.view.default,
    _aten.reshape.default,
    _aten._unsafe_view.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.expand.default,
    _aten.unsqueeze.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.slice.Tensor,
    _aten.select.int,
}
_COPIES = {
    _aten._to_copy.default,
    _aten.clone.default,
    torch.ops.prims.convert_element_type.default,
}
"""Operators of one tensor that move or convert its elements and compute nothing."""


def positions(graph: Graph) -> dict[Node, int]:
    return {node: i for i, node in enumerate(graph.nodes)}


def is_view(node: Node) -> bool:
    """One input tensor, seen differently: no memory of its own."""
    return node.target in _LAYOUT


def is_copy(node: Node) -> bool:
    """One input tensor, copied or converted elementwise."""
    return node.target in _COPIES


def source(node: Node, through: Callable[[Node], bool] = is_view) -> Node:
    """Follow first arguments back while ``through`` holds; the node where it stops."""
    while through(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def fill_values(graph: GraphModule) -> None:
    """Evaluate the calls that torch left without a value."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            evaluate(node)


def value(node: Node) -> Any:
    return node.meta["val"]


def example(argument: Any) -> Any:
    """``argument`` with every node replaced by its value's metadata."""
    return tree_map(lambda a: a.meta["val"] if isinstance(a, Node) else a, argument)


def insert(
    graph: Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    like: Node | None = None,
    kwargs: dict[str, Any] | None = None,
) -> Node:
    """A new call at the graph's insertion point, its value computed from its arguments' metadata.

    ``like`` lends its stack trace and module stack, so that errors and pictures still point at the
    user's source line.
    """
    node = graph.call_function(target, args, kwargs)
    if like is not None:
        node.meta = {k: v for k, v in like.meta.items() if k in _INHERITED}
    evaluate(node)
    return node


def evaluate(node: Node) -> None:
    """Compute a call's value from its arguments' metadata, without data."""
    args, kwargs = example(node.args), example(node.kwargs)
    with compat.fake_mode_of(tree_leaves((args, kwargs))) or contextlib.nullcontext():
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


_INHERITED = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr", "autograd_backward")


def replace(old: Node, new: Node) -> None:
    """All uses of ``old`` become uses of ``new``; ``old`` goes."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def output_of(graph: GraphModule) -> Node:
    return graph.graph.find_nodes(op="output")[0]


def behind(nodes: Iterable[Any], stop: Container[Node] = ()) -> set[Node]:
    """``nodes``, those that are, and all that they are made from, as far as ``stop``, which is left out."""
    found: set[Node] = set()
    frontier = [n for n in nodes if isinstance(n, Node)]
    while frontier:
        node = frontier.pop()
        if node not in found and node not in stop:
            found.add(node)
            frontier += node.all_input_nodes
    return found


def part_of(whole: GraphModule, inputs: Iterable[Node], nodes: Container[Node], outputs: Any) -> GraphModule:
    """The program of ``nodes`` of ``whole``, given ``inputs``, which it takes in this order, placeholders or
    not; it returns ``outputs``."""
    graph, env = Graph(), dict[Node, Node]()
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in whole.graph.nodes:
        if node in nodes and node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(torch.fx.map_arg(outputs, env.__getitem__))
    return GraphModule(whole, graph)


def writers(graph: GraphModule, of: Iterable[Node]) -> dict[Node, Node]:
    """Nodes that the graph writes into, directly or through views, each with its first writer."""
    base = {node: node for node in of}
    found: dict[Node, Node] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or node in base:
            continue
        for argument in compat.written_arguments(node):
            if argument in base:
                found.setdefault(base[argument], node)
        first = next(iter(node.args), None)
        views = compat.aliases_input(node.target) or node.target is operator.getitem
        if views and isinstance(first, Node) and first in base:
            base[node] = base[first]
    return found


def first_use(node: Node, order: dict[Node, int]) -> int:
    """Position of the first reader that is not a view; the end of the graph when there is none."""
    uses = (first_use(u, order) if is_view(u) else order[u] for u in node.users)
    return min(uses, default=len(order))


def last_use(node: Node, order: dict[Node, int]) -> int:
    uses = (max(order[u], last_use(u, order) if is_view(u) else 0) for u in node.users)
    return max(uses, default=order[node])


def num_bytes(node: Node) -> int:
    """Bytes of a node's tensors; symbolic sizes count at their hints."""
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return tensor_bytes(val)
    return sum(tensor_bytes(t) for t in tree_leaves(val) if isinstance(t, torch.Tensor))


def tensor_bytes(tensor: torch.Tensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= compat.size_hint(size)
    return count * tensor.element_size()


def move_before(nodes: Iterable[Node], anchor: Node) -> None:
    for node in nodes:
        anchor.prepend(node)


def where(node: Node) -> str:
    """The user's source line a node comes from, for error messages."""
    return innermost(node.meta.get("stack_trace") or "")


def innermost(trace: str) -> str:
    """The last source line that a stack trace names."""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File")]
    return lines[-1] if lines else "source line unknown"


def parameter_of(node: Node, parameters: Any) -> str:
    """The name of the parameter a graph input stands for, or the input's own name."""
    index = compat.placeholder_index(node)
    return parameters.get(index, node.name) if index is not None else node.name
