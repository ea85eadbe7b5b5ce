"""One joint graph becomes a forward part and a backward part, once.

What the backward needs of the forward is *saved*: returned by the forward part, taken by the backward
part. Which values to save is torch's min-cut; which *weights* to save is decided here, because a gathered
weight is not an activation: any rank can have it again for one all-gather.

    regathered   the backward part takes the shard (which exists anyway) and gathers again: ZeRO-3
    kept         the forward's gather is saved and serves both parts: ZeRO-1 and ZeRO-2

What is done under a memory bound is :mod:`autodist.passes.memory`'s, which begins with what min-cut saves.

Invariant (checked): no regathered weight, nor a view or cast of one, crosses from forward to backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from autodist.passes.base import Context
from autodist.passes.graph import (
    fill_values,
    is_copy,
    is_view,
    output_of,
    parameter_of,
    source,
    value,
)
from autodist.runtime import compat, dialect

_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)


@dataclass(frozen=True)
class SavedWeight:
    """A value the forward saved that is only a parameter, gathered, viewed or cast.

    ``value`` is the forward node, ``chain`` the nodes from the read (first) to ``value`` (last), ``shard``
    the forward part's input it all comes from.
    """

    value: Node
    chain: tuple[Node, ...]
    shard: Node

    @property
    def read(self) -> Node:
        return self.chain[0]


@dataclass(frozen=True)
class Partition:
    """Split a joint graph by min-cut; ``keep`` saves weights (ZeRO-1, ZeRO-2), else they are regathered."""

    keep: bool

    def split(
        self, joint: GraphModule, inputs: Sequence[Any], context: Context, **options: Any
    ) -> tuple[GraphModule, GraphModule]:
        """The forward and the backward part. ``options`` are torch's partitioner arguments."""
        forward, backward = min_cut(joint, inputs, **options)
        num_outputs = options["num_fwd_outputs"]
        saved = saved_weights(forward, num_outputs)
        reads = dict.fromkeys(s.read for s in saved if s.read.target is dialect.unshard)
        for read in reads:
            name = parameter_of(source(read.args[0]), context.parameters)  # type: ignore[arg-type]
            if self.keep:
                context.decide(name, "kept whole", "the plan's ZeRO stage keeps weights")
            else:
                context.decide(name, "regathered in backward", "no memory bound leaves room")
        wanted = [s for s in saved if not (self.keep and s.read in reads)]
        regather(forward, backward, wanted, num_outputs)
        return forward, backward


def min_cut(joint: GraphModule, inputs: Sequence[Any], **options: Any) -> tuple[GraphModule, GraphModule]:
    """The parts that torch's min-cut makes; ``joint`` is simplified on the way."""
    # Elementwise values that the backward reads once are made again there rather than saved, also
    # where that costs a kernel: memory is what sharding is for.
    with compat.functorch_patch(ban_recompute_materialized_backward=False):
        forward, backward = compat.min_cut_rematerialization_partition(joint, inputs, **options)
    for part in (forward, backward):
        fill_values(part)  # of random states, which torch's partitioner saves and restores
    _tensors_first(forward, backward, options["num_fwd_outputs"])
    return forward, backward


def saved_names(forward: GraphModule, num_outputs: int) -> frozenset[str]:
    """Names of the values that a forward part saves."""
    saved = output_of(forward).args[0][num_outputs:]  # type: ignore[index]
    return frozenset(n.name for n in saved)


def _tensors_first(forward: GraphModule, backward: GraphModule, num_outputs: int) -> None:
    """Order saved values as AOTAutograd reads them: tensors, opaque objects, sizes.

    The backward part takes sizes first. torch's partitioner puts the random states it saves behind opaque
    objects (the mesh of a DTensor is one).
    """

    def is_opaque(node: Any) -> bool:
        return isinstance(node, Node) and not isinstance(value(node), (torch.Tensor, *_NUMBERS))

    output = output_of(forward)
    outputs = list(output.args[0])  # type: ignore[arg-type]
    saved = outputs[num_outputs:]
    sizes = [n for n in saved if isinstance(value(n), _NUMBERS)]
    opaque = [n for n in saved if is_opaque(n)]
    others = {*sizes, *opaque}
    tensors = [n for n in saved if n not in others]
    output.args = ((*outputs[:num_outputs], *tensors, *opaque, *sizes),)
    taken = backward.graph.find_nodes(op="placeholder")[: len(saved)]
    for node in reversed([n for n in taken if is_opaque(n)]):
        if node is not taken[-1]:
            taken[-1].append(node)


def saved_weights(forward: GraphModule, num_outputs: int) -> list[SavedWeight]:
    """Saved values of the forward part that are nothing but a parameter, gathered, viewed or cast."""
    found = []
    for node in output_of(forward).args[0][num_outputs:]:  # type: ignore[index]
        chain = _weight_chain(node)
        if chain:
            shard = source(chain[0].args[0])
            if shard.op == "placeholder":
                found.append(SavedWeight(node, chain, shard))
    return found


def _weight_chain(node: Node) -> tuple[Node, ...]:
    chain = [node]
    while is_view(chain[0]) or is_copy(chain[0]):
        chain.insert(0, chain[0].args[0])  # type: ignore[arg-type]
    return tuple(chain) if chain[0].target in (dialect.unshard, dialect.replica) else ()


def regather(
    forward: GraphModule, backward: GraphModule, saved: Sequence[SavedWeight], num_outputs: int
) -> None:
    """Save the shard instead of each of ``saved``, and compute it again in the backward part."""
    taken = {n.name: n for n in backward.graph.find_nodes(op="placeholder")}
    output = output_of(forward)
    outputs: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    drop: set[int] = set()
    again: dict[Node, Node] = {}
    # A value is saved once; where it is also a result of the program, that is not its slot.
    slots = {outputs[i]: i for i in range(num_outputs, len(outputs))}
    front = next(n for n in backward.graph.nodes if n.op != "placeholder")
    for item in saved:
        slot = slots[item.value]
        old = taken.pop(item.value.name)
        if item.shard.name in taken:
            drop.add(slot)
        else:
            outputs[slot] = item.shard
            with backward.graph.inserting_before(old):
                new = backward.graph.placeholder(item.shard.name)
            new.meta = dict(item.shard.meta)
            taken[item.shard.name] = new
        copied, front = _copy_chain(backward, item, taken, again, front)
        old.replace_all_uses_with(copied)
        backward.graph.erase_node(old)
    output.args = (type(output.args[0])(v for i, v in enumerate(outputs) if i not in drop),)  # type: ignore[call-overload, union-attr]
    if "desc" in output.meta:
        output.meta["desc"] = [d for i, d in enumerate(output.meta["desc"]) if i not in drop]
    forward.graph.eliminate_dead_code()
    for graph in (forward, backward):
        graph.graph.lint()
        graph.recompile()
    _check_none_saved(backward, {item.value.name for item in saved})


def _copy_chain(
    backward: GraphModule,
    item: SavedWeight,
    taken: dict[str, Node],
    again: dict[Node, Node],
    front: Node,
) -> tuple[Node, Node]:
    """``item.chain`` before ``front`` in the backward part, and what now stands at the front.

    The chain reads the shard there; nodes already copied (``again``) are shared.
    """
    start = source(item.read.args[0])
    views: list[Node] = []
    node = item.read.args[0]
    while node is not start:
        views.insert(0, node)  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[union-attr, assignment]
    again[start] = taken[start.name]
    made: list[Node] = []
    for part in (*views, *item.chain):
        if part not in again:
            with backward.graph.inserting_before(front):
                again[part] = backward.graph.node_copy(part, again.__getitem__)
            made.append(again[part])
    return again[item.value], (made or [front])[0]


def _check_none_saved(backward: GraphModule, names: set[str]) -> None:
    left = names & {n.name for n in backward.graph.find_nodes(op="placeholder")}
    assert not left, f"gathered weights cross from forward to backward: {sorted(left)}"


