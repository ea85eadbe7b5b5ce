"""What Inductor will fuse, guessed from the graph.

Terms. A *view* shows the memory of its input. A *fusible* node becomes part of a generated loop: it
is *pointwise* (its elements are computed one by one from elements of its inputs), a reduction, or a
scatter. All else (matrix products, attention, collectives, operators nobody knows) is a *call*. A
*reader* of a value is a node that computes with it, directly or through views.

A value is *stored*, that is, has memory, unless

1. it is pointwise,
2. its readers are all fusible, the graph's output not among them, and
3. it reads few stored values: at most 8, and at most 4 when it has several readers.

What is not stored is computed anew inside each reader, so what it reads is needed until then. These
are Inductor's own rules and thresholds. Not foreseen is that two stored values may share one loop,
where the one read only by the other is never written.

A stored pointwise value may *take over* the memory of a stored value that it reads at its own
position and nowhere else; a graph's inputs are left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.fx import Graph, Node

from autodist.runtime import compat
from autodist.runtime.compat import tree_leaves

_aten, _prims = torch.ops.aten, torch.ops.prims
_MAX_READS, _MAX_READS_SHARED = 8, 4

# Pointwise operators that torch does not tag as such: some copy, others read elsewhere or nothing.
_COPIES = {_aten._to_copy, _aten.copy, _aten.lift_fresh_copy}
_INDEXING = {
    _aten._unsafe_index,
    _aten._unsafe_masked_index,
    _aten.arange,
    _aten.constant_pad_nd,
    _aten.embedding,
    _aten.flip,
    _aten.full,
    _aten.full_like,
    _aten.gather,
    _aten.index,
    _aten.index_select,
    _aten.ones_like,
    _aten.repeat,
    _aten.roll,
    _aten.scalar_tensor,
    _aten.select_scatter,
    _aten.slice_scatter,
    _aten.tril,
    _aten.triu,
    _aten.zeros_like,
    _prims.inductor_lookup_seed,
    _prims.inductor_random,
    _prims.iota,
}
_SCATTERS = {
    _aten._unsafe_masked_index_put_accumulate,
    _aten.cat,
    _aten.index_put,
    _aten.scatter,
    _aten.scatter_add,
    _aten.scatter_reduce,
}
_POINTWISE = _COPIES | _INDEXING
_SAME_POSITIONS = {
    _aten.view,
    _aten._unsafe_view,
    _aten.reshape,
    _aten.unsqueeze,
    _aten.squeeze,
    _aten.alias,
}


@dataclass(frozen=True)
class Fusion:
    """``stored``: nodes whose values have memory of their own, inputs included.

    ``sources`` gives for every node the stored values that computing it reads; ``takes_over`` for
    stored pointwise nodes those whose memory they may continue to use.
    """

    stored: frozenset[Node]
    sources: Mapping[Node, frozenset[Node]]
    takes_over: Mapping[Node, frozenset[Node]]


def fuse(graph: Graph) -> Fusion:
    """Guess which values of ``graph`` Inductor will store."""
    keys = cache(storages)
    views = {n for n in graph.nodes if is_view(n, keys)}
    pointwise = {n for n in graph.nodes if is_pointwise(n)}
    fusible = pointwise | {n for n in graph.nodes if _reduces(n)}
    stored: set[Node] = set()
    # What reading a node's value reads: of stored values at one's own position, and elsewhere.
    aligned: dict[Node, frozenset[Node]] = {}
    shifted: dict[Node, frozenset[Node]] = {}
    sources: dict[Node, frozenset[Node]] = {}
    takes_over: dict[Node, frozenset[Node]] = {}
    for node in graph.nodes:
        here = _union(aligned[n] for n in node.all_input_nodes)
        there = _union(shifted[n] for n in node.all_input_nodes)
        if not _keeps_positions(node, pointwise):
            here, there = frozenset(), here | there
        sources[node] = here | there
        if not tensors(node):
            aligned[node] = shifted[node] = frozenset()
            continue
        if node in views or (node in pointwise and _is_inlined(node, len(sources[node]), views, fusible)):
            aligned[node], shifted[node] = here, there
            continue
        stored.add(node)
        aligned[node], shifted[node] = frozenset({node}), frozenset()
        if node in pointwise:
            takes_over[node] = frozenset(n for n in here - there if n.op == "call_function")
    return Fusion(frozenset(stored), sources, takes_over)


def storages(node: Node) -> list[int]:
    """Keys of the storages that a node's value lies in."""
    return [compat.storage_key(t) for t in tensors(node)]


def is_view(node: Node, keys: Callable[[Node], list[int]] = storages) -> bool:
    """Whether a node only shows memory that one of its inputs has; ``keys`` are those of their storages."""
    if node.op != "call_function" or compat.is_mutating(node.target):
        return False
    if node.target is operator.getitem or _packet(node) in _SAME_POSITIONS:
        return True
    own = keys(node)
    if not own:
        return False
    inputs = {key for n in node.all_input_nodes for key in keys(n)}
    return inputs.issuperset(own)


def is_pointwise(node: Node) -> bool:
    """Whether each element of a node's value comes from one element of each input, or none."""
    if node.op != "call_function" or compat.is_mutating(node.target):
        return False
    return torch.Tag.pointwise in _tags(node) or _packet(node) in _POINTWISE


def tensors(node: Node) -> list[torch.Tensor]:
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):  # nearly always, and many times for each node of a large graph
        return [val]
    return [t for t in tree_leaves(val) if isinstance(t, torch.Tensor)]


def _is_inlined(node: Node, num_reads: int, views: set[Node], fusible: set[Node]) -> bool:
    if num_reads > _MAX_READS:
        return False
    readers = dict.fromkeys(_readers(node, views))
    if len(readers) > 1 and num_reads > _MAX_READS_SHARED:
        return False
    return fusible.issuperset(readers)


def _readers(node: Node, views: set[Node]) -> Iterator[Node]:
    for user in node.users:
        if user in views:
            yield from _readers(user, views)
        else:
            yield user


def is_fusible(node: Node) -> bool:
    return is_pointwise(node) or _reduces(node)


def _reduces(node: Node) -> bool:
    reduces = torch.Tag.reduction in _tags(node) or _packet(node) in _SCATTERS
    return node.op == "call_function" and reduces


def _keeps_positions(node: Node, pointwise: set[Node]) -> bool:
    """Whether element ``i`` of the value is computed from elements ``i`` of the inputs."""
    packet = _packet(node)
    if packet in _SAME_POSITIONS or packet in _COPIES:
        return True
    return packet not in _INDEXING and node in pointwise


def _packet(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _tags(node: Node) -> Any:
    return getattr(node.target, "tags", ())


def _union(sets: Iterator[frozenset[Node]]) -> frozenset[Node]:
    return frozenset().union(*sets)
