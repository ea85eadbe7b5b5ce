"""How long a node takes, and how long a collective.

A kernel is bound by arithmetic or by memory, and costs a launch besides:

    seconds(node) = max(FLOPs / rate(type), bytes read and written / memory bandwidth) + launch

Views and tuple items cost nothing. When fused (:mod:`autodist.passes.analysis.fusion`) values that
are not stored cost nothing either, and what they would have read is read by their readers. FLOPs
are counted for matrix products, convolutions and attention (causal attention as if it were not);
everything else is bound by memory.

Collectives follow the ring model. The payload ``b`` is the whole tensor: what a gather makes, what
a reduction starts from. With ``n`` ranks on ``m`` nodes, each of them moves
``(n - 1) / n`` of it:

    seconds = (n - m) * link latency + (m - 1) * network latency + b * (n - 1) / n / bandwidth

because a piece makes ``n - 1`` hops, ``m - 1`` of them between nodes. An all-reduce is a
reduce-scatter and an all-gather: twice that. Inside a node the bandwidth is the link's. Between
nodes every device of a node sends through its own network card, for different rings, so the
bandwidth is the smaller of the link's and of all the node's cards together; a group is taken to
fill its nodes. Ranks that arrive late, and other traffic on the same wires, are not in the model.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Container, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.fx import Graph, Node

from autodist.passes.analysis.fusion import fuse, is_pointwise, is_view, tensors
from autodist.passes.analysis.hardware import Hardware
from autodist.passes.graph import example, tensor_bytes
from autodist.runtime import compat, dialect
from autodist.runtime.compat import tree_leaves, tree_map

_aten, _comm = torch.ops.aten, torch.ops._c10d_functional

# --- collectives ----------------------------------------------------------------------------------

_STARTS = {
    _comm.all_gather_into_tensor.default: "all_gather",
    _comm.all_gather_into_tensor_coalesced.default: "all_gather",
    _comm.reduce_scatter_tensor.default: "reduce_scatter",
    _comm.reduce_scatter_tensor_coalesced.default: "reduce_scatter",
    _comm.all_reduce.default: "all_reduce",
    _comm.all_reduce_coalesced.default: "all_reduce",
    _comm.all_to_all_single.default: "all_to_all",
}
_DIALECT = {
    dialect.unshard: "all_gather",
    dialect.unshard_bucket: "all_gather",
    dialect.reduce_grad: "reduce_scatter",
    dialect.reduce_bucket: "reduce_scatter",
    dialect.average_grad: "all_reduce",
    dialect.average_bucket: "all_reduce",
}
_KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
_MIN_BUCKET, _MAX_BUCKET = 2**20, 2**28
_LATENCY_SHARE = 0.1


def is_collective_start(node: Node) -> bool:
    """Whether a node starts a collective and returns at once; the wait makes its result valid."""
    return node.target in _STARTS


def is_wait(node: Node) -> bool:
    return node.target is _comm.wait_tensor.default


def is_blocking_collective(node: Node) -> bool:
    """Whether a node communicates and returns when that is done, as the dialect's operators do."""
    return node.target in _DIALECT


def collective_kind(node: Node) -> str:
    """``all_gather``, ``reduce_scatter``, ``all_reduce`` or ``all_to_all``."""
    return (_STARTS | _DIALECT)[node.target]  # type: ignore[index]


def collective_group(node: Node) -> str:
    """The name of the process group a collective or dialect operator works in."""
    return node.args[-1]  # type: ignore[return-value]


def collective_bytes(node: Node) -> int:
    """Bytes of a collective's whole tensors: those gathered, or those given to be reduced or
    exchanged.

    For a dialect operator, in the type that travels.
    """
    if collective_kind(node) in ("all_gather", "all_reduce"):
        return sum(map(tensor_bytes, tensors(node)))
    given = [t for n in tree_leaves(node.args[0]) for t in tensors(n)]
    if node.target in _DIALECT:
        width = node.args[-2].itemsize  # type: ignore[union-attr]
        return sum(tensor_bytes(t) // t.element_size() * width for t in given)
    return sum(map(tensor_bytes, given))


def collective_seconds(bytes_total: float, num_ranks: int, hardware: Hardware, kind: str) -> float:
    """Time of one collective over ``num_ranks`` ranks with a payload of ``bytes_total`` bytes.

    Raises :class:`ValueError` for a ``kind`` that is none of the four.
    """
    if kind not in _KINDS:
        raise ValueError(f"there is no collective of kind {kind!r}; use one of {', '.join(_KINDS)}")
    if num_ranks <= 1:
        return 0.0
    moved = bytes_total * (num_ranks - 1) / num_ranks
    once = _latency(num_ranks, hardware) + moved / _bandwidth(num_ranks, hardware)
    return 2 * once if kind == "all_reduce" else once


def transfer_seconds(num_bytes: float, messages: float, hardware: Hardware, between_nodes: bool) -> float:
    """Time for which so many messages, of ``num_bytes`` bytes together, occupy the two devices that exchange
    them; they arrive :func:`transfer_delay` later."""
    bandwidth = hardware.network_bandwidth if between_nodes else hardware.link_bandwidth
    return messages * hardware.launch + num_bytes / bandwidth


def transfer_delay(hardware: Hardware, between_nodes: bool) -> float:
    return hardware.network_latency if between_nodes else hardware.link_latency


def bucket_bytes(num_ranks: int, hardware: Hardware) -> int:
    """The smallest payload with latency at most a tenth of the time; from 1 MiB to 256 MiB."""
    if num_ranks <= 1:
        return _MIN_BUCKET
    transfer = _latency(num_ranks, hardware) * (1 / _LATENCY_SHARE - 1)
    wanted = transfer * _bandwidth(num_ranks, hardware) * num_ranks / (num_ranks - 1)
    return min(max(math.ceil(wanted), _MIN_BUCKET), _MAX_BUCKET)


def _num_nodes(num_ranks: int, hardware: Hardware) -> int:
    return -(-num_ranks // hardware.ranks_per_node)


def _latency(num_ranks: int, hardware: Hardware) -> float:
    nodes = _num_nodes(num_ranks, hardware)
    return (num_ranks - nodes) * hardware.link_latency + (nodes - 1) * hardware.network_latency


def _bandwidth(num_ranks: int, hardware: Hardware) -> float:
    if _num_nodes(num_ranks, hardware) == 1:
        return hardware.link_bandwidth
    return min(hardware.link_bandwidth, hardware.network_bandwidth * hardware.ranks_per_node)


# --- compute --------------------------------------------------------------------------------------

# Operators whose FLOPs are 2 x elements of the result x the last size of this argument.
_PRODUCTS = {
    _aten.linear: 0,
    _aten.matmul: 0,
    _aten.mv: 0,
    _aten.dot: 0,
    _aten.vdot: 0,
    _aten.addmv: 1,
}


class _Attention(Enum):
    """Matrix products over queries x keys, of widths (key, value); the backward computes the scores
    again.
    """

    FORWARD = (1, 1)
    BACKWARD = (3, 2)


# Attention operators: direction, and which argument is the query (key and value follow).
_ATTENTION = {
    _aten.scaled_dot_product_attention: (_Attention.FORWARD, 0),
    _aten._scaled_dot_product_attention_math: (_Attention.FORWARD, 0),
    _aten._scaled_dot_product_flash_attention: (_Attention.FORWARD, 0),
    _aten._scaled_dot_product_flash_attention_for_cpu: (_Attention.FORWARD, 0),
    _aten._scaled_dot_product_efficient_attention: (_Attention.FORWARD, 0),
    _aten._scaled_dot_product_cudnn_attention: (_Attention.FORWARD, 0),
    _aten._scaled_dot_product_fused_attention_overrideable: (_Attention.FORWARD, 0),
    torch.ops.higher_order.flex_attention: (_Attention.FORWARD, 0),
    _aten._scaled_dot_product_flash_attention_backward: (_Attention.BACKWARD, 1),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (_Attention.BACKWARD, 1),
    _aten._scaled_dot_product_efficient_attention_backward: (_Attention.BACKWARD, 1),
    _aten._scaled_dot_product_cudnn_attention_backward: (_Attention.BACKWARD, 1),
    _aten._scaled_dot_product_fused_attention_overrideable_backward: (_Attention.BACKWARD, 1),
    torch.ops.higher_order.flex_attention_backward: (_Attention.BACKWARD, 0),
}


@dataclass(frozen=True)
class Work:
    """What a kernel does: ``flops`` at ``rate`` a second, bytes ``moved``, and seconds for whatever else."""

    flops: int = 0
    moved: float = 0.0
    rate: float = math.inf
    fixed: float = 0.0

    def seconds(self, hardware: Hardware) -> float:
        return max(self.flops / self.rate, self.moved / hardware.memory_bandwidth) + self.fixed


def node_seconds(node: Node, hardware: Hardware) -> float:
    """Time of one node run on its own, unfused. Communication is not in it, only its launch."""
    return node_work(node, hardware).seconds(hardware)


def node_work(node: Node, hardware: Hardware) -> Work:
    """What :func:`node_seconds` is the time of."""
    return _kernel_work(node, node.all_input_nodes, hardware) if _computes(node) else Work()


def graph_seconds(graph: Graph, hardware: Hardware, *, fused: bool) -> dict[Node, float]:
    """Time of every node; ``fused`` as Inductor would run the graph, otherwise node by node."""
    if not fused:
        return {n: node_seconds(n, hardware) for n in graph.nodes}
    fusion = fuse(graph)
    runs = (n for n in graph.nodes if n in fusion.stored and _computes(n))
    seconds = {n: _kernel_work(n, fusion.sources[n], hardware).seconds(hardware) for n in runs}
    return {n: seconds.get(n, 0.0) for n in graph.nodes}


def gradient_seconds(
    graph: Graph, hardware: Hardware, followed: Container[Node], *, fused: bool
) -> dict[Node, float]:
    """Time of every node's part of the backward, foretold from a forward graph.

    ``followed`` are the nodes that the loss is differentiated through. A node's backward reads the gradient
    of what the node made and all that it read, and writes a gradient for each operand that is followed; a
    product is multiplied anew for each of these. What is fused in the forward is fused in the backward.
    """
    fusion = fuse(graph) if fused else None
    seconds = dict.fromkeys(graph.nodes, 0.0)
    for node in graph.nodes:
        runs = _computes(node) and (fusion is None or node in fusion.stored)
        if runs and node in followed:
            sources = node.all_input_nodes if fusion is None else fusion.sources[node]
            seconds[node] = _backward_seconds(node, sources, hardware, followed)
    return seconds


def _backward_seconds(
    node: Node, sources: Iterable[Node], hardware: Hardware, followed: Container[Node]
) -> float:
    if is_collective_start(node) or is_blocking_collective(node):
        return hardware.launch
    wanted = [t for n in sources if n in followed for t in tensors(n)]
    written = sum(map(tensor_bytes, wanted))
    moved = written + _moved_bytes(node, sources)
    if getattr(node.target, "overloadpacket", node.target) in _ATTENTION:
        products = sum(_Attention.BACKWARD.value) / sum(_Attention.FORWARD.value)
    else:
        products = min(2, sum(n in followed for n in node.all_input_nodes))
    computed = products * flops(node) / hardware.flops_of(_operand_type(node))
    return max(computed, moved / hardware.memory_bandwidth) + max(1, len(wanted)) * hardware.launch


def flops(node: Node) -> int:
    """Floating-point operations of a product, a convolution or attention; 0 for other nodes."""
    target = getattr(node.target, "overloadpacket", node.target)
    if target in _ATTENTION:
        return _attention_flops(node, *_ATTENTION[target])
    if target in _PRODUCTS:
        operand = example(node.args[_PRODUCTS[target]])
        return 2 * math.prod(_size(tensors(node)[0])) * compat.size_hint(operand.shape[-1])
    formula = compat.flop_formula(node.target)
    if formula is None:
        return 0
    args, kwargs, result = _sizes((example(node.args), example(node.kwargs), node.meta["val"]))
    return int(formula(*args, **kwargs, out_val=result))


def is_attention(node: Node) -> bool:
    return getattr(node.target, "overloadpacket", node.target) in _ATTENTION


def _attention_flops(node: Node, direction: _Attention, first: int) -> int:
    query, key, value = (_size(example(a)) for a in node.args[first : first + 3])
    key_products, value_products = direction.value
    width = key_products * key[-1] + value_products * value[-1]
    return 2 * math.prod(query[:-1]) * key[-2] * width


def _computes(node: Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    return bool(tensors(node)) and not is_view(node) and not is_wait(node)


def _kernel_work(node: Node, sources: Iterable[Node], hardware: Hardware) -> Work:
    if is_collective_start(node) or is_blocking_collective(node):
        return Work(fixed=hardware.launch)
    rate = hardware.flops_of(_operand_type(node))
    return Work(flops(node), _moved_bytes(node, sources), rate, hardware.launch)


def _operand_type(node: Node) -> torch.dtype:
    operands = [t for n in node.all_input_nodes for t in tensors(n)] or tensors(node)
    return operands[0].dtype


def _moved_bytes(node: Node, sources: Iterable[Node]) -> int:
    """Bytes written and read. A pointwise node reads one element of a source for each it makes."""
    written = sum(map(_touched_bytes, tensors(node)))
    read = [t for source in sources for t in tensors(source)]
    if not is_pointwise(node):
        return written + sum(map(_touched_bytes, read))
    count = math.prod(_size(tensors(node)[0]))
    return written + sum(min(_touched_bytes(t), count * t.element_size()) for t in read)


def _touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes of memory behind a tensor's elements: an expanded tensor's are few."""
    return min(tensor_bytes(tensor), compat.size_hint(tensor.untyped_storage().nbytes()))


def _sizes(values: Any) -> Any:
    return tree_map(lambda v: torch.Size(_size(v)) if isinstance(v, torch.Tensor) else v, values)


def _size(tensor: torch.Tensor) -> list[int]:
    return [compat.size_hint(s) for s in tensor.shape]
