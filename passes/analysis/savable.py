"""The values of a joint graph that the backward may be given, and what each way to have them costs.

A node is *of the backward* when it depends on a tangent (or is marked as such), else of the forward. A
forward value that a node of the backward reads is *needed*; needed values and all that they are computed from
are the candidates. The graph's inputs, and sizes, are at hand for nothing.

What a choice costs, in seconds of the hardware table:

    save         write it in the forward, read it in the backward
    recompute    a product or attention: what it took; a fusible operator: to read, once more and as a part of
                 its reader's loop, what it is computed from; a view: nothing; a weight: the all-gather
    offload      a copy out and a copy back; where copies run beside the computation, the memory traffic

Never recomputed: random numbers (their seeds can be saved), communication (except the gathers of weights,
which are made for the backward anyway), operators that write, control flow, what a user's checkpoint policy
saves. Never saved: views and tuples (what they are taken from is), what a user's checkpoint recomputes.
Never offloaded: what is small, does not fill its memory, or has sizes that are symbols.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from autodist.passes.analysis.budget import Value
from autodist.passes.analysis.cost import (
    Work,
    collective_seconds,
    flops,
    is_blocking_collective,
    is_collective_start,
    is_wait,
    node_work,
)
from autodist.passes.analysis.fusion import is_fusible, is_view
from autodist.passes.analysis.hardware import Hardware
from autodist.passes.graph import num_bytes, output_of
from autodist.runtime import compat, dialect

READS = (dialect.unshard, dialect.replica)
SMALLEST = 1 << 16  # bytes worth a copy to the host
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


@dataclass(frozen=True)
class Rules:
    """``saved``: names of what torch's min-cut saves, which tells what checkpoints keep. ``keep_weights``:
    gathered weights are saved. ``offload``: copies to the host are possible. ``group_sizes``: ranks of each
    process group."""

    saved: frozenset[str]
    keep_weights: bool
    offload: bool
    group_sizes: dict[str, int]


@dataclass(frozen=True)
class Savable:
    """Candidates, inputs first: ``nodes`` of the joint graph, and for each its :class:`Value`.

    ``results`` are positions of those that the forward's own results are computed from; the others (the
    derivative of an activation at its input, say) are for the backward alone. ``again`` is the work that
    computing each a second time is, None where that is ruled out.
    """

    nodes: tuple[Node, ...]
    values: tuple[Value, ...]
    results: tuple[int, ...]
    again: tuple[Work | None, ...]


def savable(joint: GraphModule, num_outputs: int, rules: Rules, hardware: Hardware) -> Savable:
    """The candidates of a joint graph whose first ``num_outputs`` outputs are those of the forward."""
    backward = backward_nodes(joint)
    outputs: Sequence[Any] = output_of(joint).args[0]  # type: ignore[assignment]
    results = {n for n in outputs[num_outputs:] if isinstance(n, Node)}
    written = compat.mutated_inputs(output_of(joint), num_outputs)

    def is_candidate(node: Node) -> bool:
        if node in backward or is_number(node):
            return False
        return node.op == "call_function" or (node.op == "placeholder" and node.name in written)

    needed = {
        n
        for n in joint.graph.nodes
        if is_candidate(n) and (n in results or any(u in backward for u in n.users))
    }
    wanted = _sources(joint, needed, is_candidate)
    nodes = tuple(n for n in joint.graph.nodes if n in wanted)
    position = {n: i for i, n in enumerate(nodes)}
    values: list[Value] = []
    works: list[Work | None] = []
    possible: list[bool] = []
    for node in nodes:
        inputs = tuple(dict.fromkeys(position[u] for u in node.all_input_nodes if u in position))
        again, save = _recompute(node, rules, hardware), _save(node, rules, hardware)
        can = again is not None and all(possible[u] for u in inputs)
        if not can and math.isinf(save) and _has_memory(node):  # drawn inside of a checkpoint, say
            save = _write_and_read(node, hardware)
        works.append(again if can else None)
        seconds = again.seconds(hardware) if again is not None and can else math.inf
        possible.append(can or math.isfinite(save))
        is_tensor = isinstance(node.meta["val"], torch.Tensor)
        host = _offload(node, rules, hardware) if math.isfinite(save) else math.inf
        size = num_bytes(node) if is_tensor else 0
        values.append(Value(node.name, size, inputs, node in needed and is_tensor, seconds, save, host))
    forward = _sources(joint, {n for n in outputs[:num_outputs] if isinstance(n, Node)}, lambda node: True)
    own = tuple(i for i, n in enumerate(nodes) if n in forward)
    return Savable(nodes, tuple(values), own, tuple(works))


def _sources(joint: GraphModule, nodes: set[Node], among: Callable[[Node], bool]) -> set[Node]:
    """``nodes`` and all that they are computed from, as far as it is ``among`` those asked for."""
    found = set(nodes)
    for node in reversed(joint.graph.nodes):
        if node in found:
            found.update(filter(among, node.all_input_nodes))
    return found


def backward_nodes(joint: GraphModule) -> set[Node]:
    """The nodes that can only run in the backward."""
    found: set[Node] = set()
    for node in joint.graph.nodes:
        if node.op == "output":
            continue
        tangent = node.op == "placeholder" and compat.is_tangent(node)
        if tangent or compat.must_be_in_backward(node) or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def is_number(node: Node) -> bool:
    return isinstance(node.meta.get("val"), _NUMBERS)


def _recompute(node: Node, rules: Rules, hardware: Hardware) -> Work | None:
    if node.op == "placeholder" or compat.checkpoint_saves(node) or compat.must_be_in_forward(node):
        return None
    if node.target in READS:
        return None if rules.keep_weights else Work(fixed=_gather_seconds(node, rules, hardware))
    if node.target is operator.getitem or is_view(node):
        return Work()
    if _happens_once(node):
        return None
    if flops(node) or not is_fusible(node):
        return node_work(node, hardware)
    read = sum(num_bytes(n) for n in node.all_input_nodes if not is_fusible(n))
    return Work(moved=0.25 * (read + num_bytes(node)))


def _happens_once(node: Node) -> bool:
    target = node.target
    communicates = is_collective_start(node) or is_blocking_collective(node) or is_wait(node)
    return (
        communicates
        or compat.is_random(target)
        or compat.is_seed(target)
        or compat.is_mutating(target)
        or not isinstance(target, compat.OpOverload)
    )


def _gather_seconds(node: Node, rules: Rules, hardware: Hardware) -> float:
    if node.target is dialect.replica:
        return 0.0
    ranks = rules.group_sizes[node.args[-1]]  # type: ignore[index]
    return collective_seconds(num_bytes(node), ranks, hardware, "all_gather")


def _save(node: Node, rules: Rules, hardware: Hardware) -> float:
    if not _has_memory(node):
        return 0.0 if node.name in rules.saved else math.inf
    if compat.checkpoint_recomputes(node) and node.name not in rules.saved:
        return math.inf
    return _write_and_read(node, hardware)


def _has_memory(node: Node) -> bool:
    """Whether a node's value is one tensor with memory that it can be known by."""
    is_tensor = node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor)
    return is_tensor and (node.target is operator.getitem or not is_view(node))


def _write_and_read(node: Node, hardware: Hardware) -> float:
    return 2 * num_bytes(node) / hardware.memory_bandwidth


def _offload(node: Node, rules: Rules, hardware: Hardware) -> float:
    size = num_bytes(node)
    impossible = not rules.offload or size < SMALLEST or node.target in READS or not _has_memory(node)
    if impossible or compat.checkpoint_saves(node):
        return math.inf
    if not compat.is_dense(node.meta["val"]) or compat.is_symbolic(node.meta["val"]):
        return math.inf
    rate = hardware.memory_bandwidth if hardware.copies_overlap else hardware.host_bandwidth
    return 2 * size / rate + 2 * hardware.launch


__all__ = ["READS", "SMALLEST", "Rules", "Savable", "backward_nodes", "is_number", "savable"]
