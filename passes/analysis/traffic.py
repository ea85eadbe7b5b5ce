"""What a scheduled graph sends, for which parameter, and how long what it receives stays.

    shard ──views, casts, pads──> gather ──> wait ──> use ... last use        (release)
    gradient ──> reduction ──> wait ──> divide, cut ──> result of the graph

Times are positions of nodes in the graph. A gathered weight's memory is free after its *release*,
the last node that reads it by any name; a weight that the graph returns has none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from autodist.passes.analysis.cost import (
    collective_bytes,
    collective_group,
    collective_kind,
    is_collective_start,
    is_wait,
)
from autodist.passes.graph import (
    first_use,
    is_copy,
    is_view,
    num_bytes,
    output_of,
    positions,
    source,
)
from autodist.runtime import compat


@dataclass(frozen=True)
class Payload:
    """One tensor of a collective: the weight gathered, or the gradient reduced, of ``parameter``.

    ``parameter`` is empty for other values. ``num_bytes`` are those received; ``release`` is None
    for what the graph returns.
    """

    parameter: str
    num_bytes: int
    wait: int
    use: int
    release: int | None


@dataclass(frozen=True)
class Collective:
    """``name`` of the node that starts it; ``num_bytes`` of whole tensors (see ``cost``)."""

    name: str
    kind: str
    num_bytes: int
    num_ranks: int
    start: int
    payloads: tuple[Payload, ...]


def collectives(
    graph: GraphModule, parameters: Mapping[int, str], group_sizes: Mapping[str, int]
) -> list[Collective]:
    """The collectives of a lowered graph in the order of their starts.

    ``parameters`` names the inputs, by position, that are parameters.
    """
    order = positions(graph.graph)
    gradients = _gradients(graph, parameters)
    found = []
    for node in graph.graph.nodes:
        if not is_collective_start(node):
            continue
        sent = _as_list(node.args[0])
        waits = _waits(node, len(sent))
        if collective_kind(node) == "all_gather":
            names = [_shard_name(tensor, parameters) for tensor in sent]
        else:
            names = [gradients.get(wait, "") for wait in waits]
        found.append(
            Collective(
                name=node.name,
                kind=collective_kind(node),
                num_bytes=collective_bytes(node),
                num_ranks=group_sizes[collective_group(node)],
                start=order[node],
                payloads=tuple(
                    Payload(name, num_bytes(w), order[w], first_use(w, order), _release(w, order))
                    for name, w in zip(names, waits, strict=True)
                ),
            )
        )
    return found


def _as_list(sent: object) -> Sequence[Node]:
    return sent if isinstance(sent, (list, tuple)) else [sent]  # type: ignore[list-item]


def _waits(start: Node, count: int) -> list[Node]:
    """The node at which each result is waited for, in the order of what was sent."""
    items = {u.args[1]: u for u in start.users if u.target is operator.getitem}
    results = [items.get(i, start) for i in range(count)]
    return [next((u for u in r.users if is_wait(u)), r) for r in results]


def _release(node: Node, order: dict[Node, int]) -> int | None:
    """Position of the last reader of a value's memory; None when the graph returns it."""
    last = order[node]
    for user in node.users:
        until = _release(user, order) if is_view(user) else order[user]
        if until is None or user.op == "output":
            return None
        last = max(last, until)
    return last


def _shard_name(sent: Node, parameters: Mapping[int, str]) -> str:
    """The parameter whose shard is sent; empty when it is something else."""
    shard = source(sent, through=_prepares)
    index = compat.placeholder_index(shard) if shard.op == "placeholder" else None
    return parameters.get(index, "") if index is not None else ""


def _prepares(node: Node) -> bool:
    return is_view(node) or is_copy(node) or node.target is torch.ops.aten.constant_pad_nd.default


def _gradients(graph: GraphModule, parameters: Mapping[int, str]) -> dict[Node, str]:
    """The waits from which the graph's results come that are gradients, with parameters' names."""
    output = output_of(graph)
    described = output.meta.get("desc") or ()
    found: dict[Node, str] = {}
    for result, descriptor in zip(_as_list(output.args[0]), described, strict=False):
        index = compat.gradient_index(descriptor)
        if isinstance(result, Node) and index is not None and index in parameters:
            found[source(result, through=_finishes)] = parameters[index]
    return found


_FINISHING: set[Callable[..., object]] = {torch.ops.aten.div.Scalar, torch.ops.aten.slice.Tensor}


def _finishes(node: Node) -> bool:
    return is_view(node) or is_copy(node) or node.target in _FINISHING
