"""Dialect to collectives: each operator becomes a start and a wait, and what shapes demand around them.

    unshard(shard)      ->  cast, pad to equal chunks, all_gather start, wait, cut the padding off
    reduce_grad(grad)   ->  cast, pad, reduce_scatter start, wait, divide, cut
    replica(param)      ->  the parameter itself, cast when asked
    average_grad(grad)  ->  cast, all_reduce start, wait, divide

A start returns at once; ``wait_tensor`` stands where the result is needed. They stand next to each other
here; pulling them apart is the scheduler's work. What is divided and padded is ordinary ATen, for Inductor
to fuse. After this pass no dialect operator is left.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from autodist.passes.base import Context, Pass, Phase
from autodist.passes.graph import insert, replace, value
from autodist.runtime import axis, compat, dialect

_aten, _prims, _comm = torch.ops.aten, torch.ops.prims, torch.ops._c10d_functional


@dataclass(frozen=True)
class Lower(Pass):
    """Replace every dialect operator by functional collectives."""

    name: ClassVar[str] = "lower"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.FORWARD_PART, Phase.BACKWARD_PART, Phase.STEP)
    provides: ClassVar[frozenset[str]] = frozenset({"collectives"})

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        for node in list(graph.graph.nodes):
            rule = _RULES.get(node.target) or (_inline if node.target in axis.MEANING else None)
            if rule is not None:
                with graph.graph.inserting_before(node):
                    rule(graph.graph, node)
        return graph


def _lower_unshard(graph: Graph, node: Node) -> None:
    shard, rows, _, dtype, group = node.args
    replace(node, _gather(graph, [shard], [rows], dtype, group, node)[0])


def _lower_unshard_bucket(graph: Graph, node: Node) -> None:
    shards, rows, dtype, group = node.args
    _replace_items(node, _gather(graph, shards, rows, dtype, group, node))


def _gather(
    graph: Graph, shards: Any, rows: Any, dtype: Any, group: Any, like: Node
) -> list[Node]:
    size = compat.group_size(group)
    padded = [
        _pad(graph, _cast(graph, s, dtype, like), dialect.chunk_rows(r, size), like)
        for s, r in zip(shards, rows, strict=True)
    ]
    if len(padded) == 1:
        started = [insert(graph, _comm.all_gather_into_tensor.default, (padded[0], size, group), like)]
    else:
        args = (padded, size, group)
        bucket = insert(graph, _comm.all_gather_into_tensor_coalesced.default, args, like)
        started = _items(graph, bucket, len(padded), like)
    return [_cut(graph, _wait(graph, t, like), r, like) for t, r in zip(started, rows, strict=True)]


def _lower_reduce_grad(graph: Graph, node: Node) -> None:
    grad, divisor, dtype, group = node.args
    replace(node, _reduce(graph, [grad], divisor, dtype, group, node)[0])


def _lower_reduce_bucket(graph: Graph, node: Node) -> None:
    grads, divisor, dtype, group = node.args
    _replace_items(node, _reduce(graph, grads, divisor, dtype, group, node))


def _reduce(
    graph: Graph, grads: Any, divisor: Any, dtype: Any, group: Any, like: Node
) -> list[Node]:
    size, rank = compat.group_size(group), compat.group_rank(group)
    rows = [int(value(g).shape[0]) for g in grads]
    padded = [
        _pad(graph, _cast(graph, g, dtype, like), dialect.chunk_rows(r, size) * size, like)
        for g, r in zip(grads, rows, strict=True)
    ]
    op = dialect.reduce_op(divisor, size)
    if len(padded) == 1:
        args = (padded[0], op, size, group)
        started = [insert(graph, _comm.reduce_scatter_tensor.default, args, like)]
    else:
        bucket_args = (padded, op, size, group)
        bucket = insert(graph, _comm.reduce_scatter_tensor_coalesced.default, bucket_args, like)
        started = _items(graph, bucket, len(padded), like)
    done = [_divide(graph, _wait(graph, t, like), divisor, size, like) for t in started]
    return [
        _cut(graph, t, dialect.local_rows(r, size, rank), like)
        for t, r in zip(done, rows, strict=True)
    ]


def _lower_replica(graph: Graph, node: Node) -> None:
    param, _, dtype, _ = node.args
    replace(node, _cast(graph, param, dtype, node))  # type: ignore[arg-type]


def _lower_average_grad(graph: Graph, node: Node) -> None:
    grad, divisor, dtype, group = node.args
    replace(node, _average(graph, [grad], divisor, dtype, group, node)[0])


def _lower_average_bucket(graph: Graph, node: Node) -> None:
    grads, divisor, dtype, group = node.args
    _replace_items(node, _average(graph, grads, divisor, dtype, group, node))


def _average(
    graph: Graph, grads: Any, divisor: Any, dtype: Any, group: Any, like: Node
) -> list[Node]:
    size = compat.group_size(group)
    op = dialect.reduce_op(divisor, size)
    dense = [_contiguous(graph, _cast(graph, g, dtype, like), like) for g in grads]
    if len(dense) == 1:
        started = [insert(graph, _comm.all_reduce.default, (dense[0], op, group), like)]
    else:
        bucket = insert(graph, _comm.all_reduce_coalesced.default, (dense, op, group), like)
        started = _items(graph, bucket, len(dense), like)
    return [_divide(graph, _wait(graph, t, like), divisor, size, like) for t in started]


_RULES = {
    dialect.unshard: _lower_unshard,
    dialect.unshard_bucket: _lower_unshard_bucket,
    dialect.reduce_grad: _lower_reduce_grad,
    dialect.reduce_bucket: _lower_reduce_bucket,
    dialect.replica: _lower_replica,
    dialect.average_grad: _lower_average_grad,
    dialect.average_bucket: _lower_average_bucket,
}


def _inline(graph: Graph, node: Node) -> None:
    """An operator of an axis becomes what it means: views and copies around a collective."""
    given = [a for a in node.args if isinstance(a, Node)]

    def meaning(*values: Any) -> Any:
        found = dict(zip(given, values, strict=True))
        return axis.MEANING[node.target](*(found[a] if isinstance(a, Node) else a for a in node.args))

    body = compat.trace_plain(meaning, [value(n) for n in given])
    own = dict(zip(body.graph.find_nodes(op="placeholder"), given, strict=True))
    result = graph.graph_copy(body.graph, own)
    replace(node, result)  # type: ignore[arg-type]


# --- the pieces ------------------------------------------------------------------------------------


def _cast(graph: Graph, node: Node, dtype: torch.dtype, like: Node) -> Node:
    if value(node).dtype is dtype:
        return node
    return insert(graph, _prims.convert_element_type.default, (node, dtype), like)


def _contiguous(graph: Graph, node: Node, like: Node) -> Node:
    # A collective sends memory, not strides: the copy is explicit, so that every backend sees it.
    if value(node).is_contiguous():
        return node
    copy = insert(graph, _aten.clone.default, (node,), like)
    copy.kwargs = {"memory_format": torch.contiguous_format}
    copy.meta["val"] = value(node).contiguous()
    return copy


def _pad(graph: Graph, node: Node, rows: int, like: Node) -> Node:
    missing = rows - int(value(node).shape[0])
    if missing == 0:
        return _contiguous(graph, node, like)
    pads = [0] * (2 * value(node).ndim - 1) + [missing]
    padded = insert(graph, _aten.constant_pad_nd.default, (node, pads, 0), like)
    return _contiguous(graph, padded, like)


def _cut(graph: Graph, node: Node, rows: int, like: Node) -> Node:
    if int(value(node).shape[0]) == rows:
        return node
    return insert(graph, _aten.slice.Tensor, (node, 0, 0, rows), like)


def _divide(graph: Graph, node: Node, divisor: int, size: int, like: Node) -> Node:
    if divisor in (size, 1):
        return node
    return insert(graph, _aten.div.Scalar, (node, divisor), like)


def _wait(graph: Graph, node: Node, like: Node) -> Node:
    return insert(graph, _comm.wait_tensor.default, (node,), like)


def _items(graph: Graph, bucket: Node, count: int, like: Node) -> list[Node]:
    return [insert(graph, operator.getitem, (bucket, i), like) for i in range(count)]


def _replace_items(node: Node, parts: Sequence[Node]) -> None:
    for user in list(node.users):
        assert user.target is operator.getitem
        replace(user, parts[user.args[1]])  # type: ignore[index]
    node.graph.erase_node(node)
