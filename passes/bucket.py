"""Merge small gathers and small reductions into buckets.

A collective costs ``latency + bytes / bandwidth``; below some size it is all latency. Gathers that are
used one after another, and reductions that become ready one after another, travel together:

    unshard(a), unshard(b)          ->  unshard_bucket([a, b])
    reduce_grad(x), reduce_grad(y)  ->  reduce_bucket([x, y])

A bucket is closed when it holds ``limit`` bytes: the size at which latency is a tenth of the time
(:func:`autodist.passes.analysis.cost.bucket_bytes`), because what a bigger bucket would save in latency it
costs in memory and in overlap. The choice depends on parameters and hardware only, never on the batch, so
ranks with batches of different sizes build the same buckets.

With ``reduce_at_end`` (ZeRO-1) all gradients stay whole until the backward ends and then travel together.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Graph, GraphModule, Node

from autodist.passes.analysis.cost import bucket_bytes
from autodist.passes.base import Context, Pass, Phase
from autodist.passes.graph import (
    first_use,
    insert,
    num_bytes,
    output_of,
    parameter_of,
    positions,
    replace,
    source,
)
from autodist.runtime import dialect

_BUCKET_OF = {
    dialect.reduce_grad: dialect.reduce_bucket,
    dialect.average_grad: dialect.average_bucket,
}


@dataclass(frozen=True)
class Bucket(Pass):
    """``limit`` bytes a bucket; None asks the cost model."""

    limit: int | None = None
    reduce_at_end: bool = False
    name: ClassVar[str] = "bucket"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.FORWARD_PART, Phase.BACKWARD_PART, Phase.STEP)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        order = positions(graph.graph)
        gathers = [n for n in graph.graph.nodes if n.target is dialect.unshard and _of_an_input(n)]
        gathers.sort(key=lambda n: first_use(n, order))
        for bucket in self._buckets(gathers, context, order):
            anchor = min(bucket, key=order.__getitem__)
            self._explain(bucket, "gathered", context)
            _merge_gathers(graph.graph, bucket, anchor)
        reductions = [n for n in graph.graph.nodes if n.target in _BUCKET_OF]
        for bucket in self._buckets(reductions, context, order):
            last = max(bucket, key=order.__getitem__)
            at_end = self.reduce_at_end and context.phase is not Phase.STEP
            anchor = output_of(graph) if at_end else last.next
            self._explain(bucket, "reduced", context)
            _merge_reductions(graph.graph, bucket, anchor, order, len(order) if at_end else order[last])
        return graph

    def _buckets(
        self, nodes: Sequence[Node], context: Context, order: dict[Node, int]
    ) -> list[list[Node]]:
        """Runs of ``nodes`` with one operator, type and group, each as large as its limit allows."""
        done: list[list[Node]] = []
        open_: dict[Any, list[Node]] = {}
        held: dict[Any, int] = {}
        used: dict[Any, int] = {}
        for node in nodes:
            key = (node.target, *node.args[-2:], node.args[-3])
            run, size = open_.setdefault(key, []), _payload(node)
            limit = self.limit or bucket_bytes(context.group_sizes[node.args[-1]], context.hardware)
            full = held.get(key, 0) + size > limit and not self._unbounded(node)
            # A result that is read before the next one is ready cannot wait for it.
            read = node.target in _BUCKET_OF and used.get(key, len(order)) < order[node]
            if run and (full or read):
                used.pop(key, None)
                done.append(run)
                run, held[key] = [], 0
                open_[key] = run
            run.append(node)
            if node.target in _BUCKET_OF:
                used[key] = min(used.get(key, len(order)), first_use(node, order))
            held[key] = held.get(key, 0) + size
        return [run for run in (*done, *open_.values()) if len(run) > 1]

    def _unbounded(self, node: Node) -> bool:
        return self.reduce_at_end and node.target in _BUCKET_OF

    def _explain(self, bucket: Sequence[Node], verb: str, context: Context) -> None:
        names = [parameter_of(source(n.args[0]), context.parameters) for n in bucket]
        size = sum(map(_payload, bucket)) / 2**20
        for name in names:
            context.decide(name, f"{verb} with {len(names) - 1} others", f"one bucket of {size:.1f} MiB")


def _payload(node: Node) -> int:
    """Bytes that a gather gives each rank, or that a reduction takes from each: those of the whole."""
    return num_bytes(node.args[0] if node.target in _BUCKET_OF else node)  # type: ignore[arg-type]


def _of_an_input(gather: Node) -> bool:
    """Whether what is gathered is there from the start; a step may also gather what it has just updated."""
    return source(gather.args[0]).op == "placeholder"  # type: ignore[arg-type]


def _merge_gathers(graph: Graph, bucket: Sequence[Node], anchor: Node) -> None:
    # A step may gather a weight for the end of its forward and for the start of its backward: then once.
    shards = list(dict.fromkeys(n.args[0] for n in bucket))
    rows = [next(n.args[1] for n in bucket if n.args[0] is s) for s in shards]
    *_, dtype, group = bucket[0].args
    # Shards are inputs or views of inputs: bring the views up to where the bucket stands.
    for shard in shards:
        _hoist(shard, anchor)  # type: ignore[arg-type]
    with graph.inserting_before(anchor):
        whole = insert(graph, dialect.unshard_bucket, (shards, rows, dtype, group), like=bucket[0])
        parts = [insert(graph, operator.getitem, (whole, i), like=bucket[0]) for i in range(len(shards))]
    for node in bucket:
        replace(node, parts[shards.index(node.args[0])])


def _hoist(node: Node, anchor: Node) -> None:
    if node.op != "placeholder":
        _hoist(node.args[0], anchor)  # type: ignore[arg-type]
        anchor.prepend(node)


def _merge_reductions(
    graph: Graph, bucket: Sequence[Node], anchor: Node, order: dict[Node, int], until: int
) -> None:
    _, divisor, dtype, group = bucket[0].args
    grads = [n.args[0] for n in bucket]
    with graph.inserting_before(anchor):
        target = _BUCKET_OF[bucket[0].target]  # type: ignore[index]
        whole = insert(graph, target, (grads, divisor, dtype, group), like=bucket[0])
        parts = [insert(graph, operator.getitem, (whole, i), like=n) for i, n in enumerate(bucket)]
    for node, part in zip(bucket, parts, strict=True):
        _sink_users(node, part, order, until)
        replace(node, part)


def _sink_users(node: Node, after: Node, order: dict[Node, int], until: int) -> None:
    """Move what reads ``node`` before ``until`` (views) behind ``after``, which will take its place."""
    for user in list(node.users):
        if order[user] < until:
            after.append(user)
            _sink_users(user, user, order, until)
