"""ZeRO on the joint graph: one read per parameter, narrow types on the wire.

After capture every *read* of a parameter is an ``unshard`` (or ``replica``) of its own and every read has
its own reduction in the backward. Two passes put this in order; where the gathers stand in time is decided
after partitioning.

    MergeReads       unshard(p) ... unshard(p)            ->  unshard(p)
                     reduce_grad(a) + reduce_grad(b)      ->  reduce_grad(a + b)
    NarrowGathers    to_bf16(unshard(p))                  ->  unshard(p, dtype=bf16)

Both are exact: a reduction is linear, and a cast commutes with a gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from autodist.passes.base import Context, Pass, Phase
from autodist.passes.graph import insert, parameter_of, positions, replace, source
from autodist.runtime import dialect

READS = (dialect.unshard, dialect.replica)
REDUCTIONS = (dialect.reduce_grad, dialect.average_grad)
_CASTS = (torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default)


@dataclass(frozen=True)
class MergeReads(Pass):
    """One gather and one reduction per parameter, however often the program reads it."""

    name: ClassVar[str] = "merge_reads"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.JOINT,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        reads: dict[tuple[object, ...], Node] = {}
        for node in list(graph.graph.nodes):
            if node.target not in READS:
                continue
            parameter = source(node.args[0])
            key = (node.target, parameter, *node.args[1:])
            first = reads.setdefault(key, node)
            if first is not node:
                replace(node, first)
                name = parameter_of(parameter, context.parameters)
                context.decide(name, "read once", "the program reads this parameter several times")
        _merge_reductions(graph)
        graph.graph.eliminate_dead_code()
        return graph


def _merge_reductions(graph: GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.target is not torch.ops.aten.add.Tensor or node.kwargs or len(node.args) != 2:
            continue
        parts = [source(a) if isinstance(a, Node) else None for a in node.args]
        a, b = parts
        if a is None or b is None or a is b or a.target not in REDUCTIONS or a.target is not b.target:
            continue
        if a.args[1:] != b.args[1:] or a.args[0].meta["val"].shape != b.args[0].meta["val"].shape:
            continue
        if any(len(n.users) != 1 for n in (a, b)):
            continue
        with graph.graph.inserting_before(node):
            whole = insert(graph.graph, torch.ops.aten.add.Tensor, (a.args[0], b.args[0]), like=node)
            reduced = insert(graph.graph, a.target, (whole, *a.args[1:]), like=a)
        replace(node, reduced)


@dataclass(frozen=True)
class NarrowGathers(Pass):
    """Gather in the type the program uses: a narrowing cast moves from the weight to the shard."""

    name: ClassVar[str] = "narrow_gathers"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.JOINT,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        order = positions(graph.graph)
        for node in list(graph.graph.nodes):
            if node.target is not dialect.unshard or not node.users:
                continue
            dtype = _common_cast(node)
            if dtype is None:
                continue
            shard, rows, divisor, _, group = node.args
            casts = sorted(node.users, key=order.__getitem__)
            with graph.graph.inserting_before(node):
                args = (shard, rows, divisor, dtype, group)
                narrow = insert(graph.graph, dialect.unshard, args, like=node)
            for cast in casts:
                replace(cast, narrow)
            graph.graph.erase_node(node)
            name = parameter_of(source(shard), context.parameters)
            context.decide(name, f"gathered as {dtype}", "every use casts it to this narrower type")
        return graph


def _common_cast(node: Node) -> torch.dtype | None:
    """The one narrower type every user of ``node`` casts it to, if that is all they do."""
    types = {u.meta["val"].dtype if u.target in _CASTS else None for u in node.users}
    if len(types) != 1 or (dtype := next(iter(types))) is None:
        return None
    return dtype if dtype.itemsize < node.meta["val"].dtype.itemsize else None
