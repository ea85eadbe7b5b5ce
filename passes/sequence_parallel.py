"""Sequence parallelism: every rank of a group gets the whole batch and computes a part of each sequence.

    sharding begins   at token ids (embedding), or at the first token-local layer
    attention         sequence shards are exchanged for heads, and back (Ulysses, arXiv:2309.14509)
    losses            sums and counts are combined over the ranks
    sharding ends     at the outputs

All of it follows from the placement of values (:mod:`autodist.passes.analysis.placement`); this pass names
the axis, runs the propagation on the captured program's core and decides what becomes of sharded outputs:

    withheld   a large one is not gathered; the caller gets a stand-in that says so when used
    sharded    the caller gets a DTensor
    gathered   the caller gets the whole

Outputs of at most one number a token are always gathered, and so is what a graph break passes on. The ranks'
gradients of a weight are parts of one gradient: they are summed over the sequence axis and averaged over the
data-parallel one, by the reduction that ZeRO makes anyway.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from autodist.passes.analysis.placement import Axis, Gathered, Propagation, Value
from autodist.passes.base import Context, Pass, Phase
from autodist.passes.capture import core_of, rebuilt, returned_to_user
from autodist.passes.graph import replace, value
from autodist.runtime import axis, compat
from autodist.runtime.outputs import Kept

SHARDED_OUTPUTS = "autodist_sharded_outputs"
"""Where the pass leaves, on the graph's meta, the placement of the outputs that it did not gather."""

POLICIES = "autodist_checkpoint_policies"
"""Where it leaves the policies of selective checkpoints, whose bodies it has inlined."""


@dataclass(frozen=True)
class SequenceParallel(Pass):
    """Split sequences over the ``size`` ranks of ``group``; ``divisor`` is the number of such groups."""

    size: int
    group: str
    divisor: int
    outputs: str = "withheld"
    strict: bool = False
    name: ClassVar[str] = "sequence_parallel"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.CAPTURED,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        core = core_of(graph)
        where = Axis("sp", self.size, self.group)
        propagation = Propagation(core.graph, where, set(core.weights), self.strict)
        kept: dict[int, Kept] = {}
        to_user = returned_to_user(graph, core.outputs)
        given = graph.graph.find_nodes(op="placeholder")

        def run(*inputs: Any) -> list[Any]:
            results = propagation.run(*inputs)
            return [
                self._output(i, v, to_user, propagation, kept, given) if isinstance(v, Value) else v
                for i, v in enumerate(results)
            ]

        sharded = core.trace(run)
        sharded.graph.eliminate_dead_code()
        made = rebuilt(graph, core, sharded, self.divisor)
        made.meta[SHARDED_OUTPUTS], made.meta[POLICIES] = kept, core.policies
        self._explain(propagation, context)
        return made

    def _output(
        self,
        index: int,
        value: Value,
        to_user: Container[int],
        propagation: Propagation,
        kept: dict[int, Kept],
        inputs: Sequence[Node],
    ) -> Any:
        where = propagation.axis
        if not value.sharded:
            return where.whole(value)
        small = all(compat.known_equal(s, 1) for s in value.shape[value.shard.dim + 1 :])
        if index in to_user and not small and self.outputs != "gathered":
            if self.outputs == "withheld":
                kept[index] = Kept(value.shard.dim, _length(value.shape[value.shard.dim], inputs))
                return value.tensor.detach()
            length = _length(value.shard.length, inputs)
            # A DTensor's pieces are as long as torch would make them.
            if length is not None and value.shard.same(where.pieces(value.shard.dim, value.shard.length)):
                kept[index] = Kept(value.shard.dim, length)
                return value.tensor
        output = propagation.module.graph.find_nodes(op="output")[0]  # type: ignore[union-attr]
        size = value.tensor.element_size() * _count(value.shape)
        propagation.report.gathered.append(Gathered(output.name, f"output {index}", size, "returned"))
        return propagation.axis.whole(value)

    def _explain(self, propagation: Propagation, context: Context) -> None:
        report = propagation.report
        reason = f"{report.sharded} operators run on pieces of sequences"
        context.decide("program", f"sharded over sp={self.size}", reason)
        for gathered in report.gathered:
            context.decide(
                gathered.node, f"gathered for {gathered.operator}",
                f"{gathered.num_bytes / 2**20:.2f} MiB; it has no rule that keeps sequences apart: "
                f"{gathered.source}",
            )  # fmt: skip


def _length(length: Any, inputs: Sequence[Node]) -> int | tuple[int, int] | None:
    """A length as a number, or as the place to read it when the program runs: (input, dimension).

    None for a size that depends on an input's and is no input's.
    """
    if not isinstance(length, torch.SymInt):
        return int(length)
    for place, node in enumerate(inputs):
        example = node.meta.get("example_value")
        if isinstance(example, torch.Tensor):
            for dim, size in enumerate(example.shape):
                if compat.known_equal(size, length):
                    return place, dim
    return None


def _count(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= compat.size_hint(size)
    return total


@dataclass(frozen=True)
class Unmark(Pass):
    """Take ``vary`` and ``settle`` out of a joint graph: they have told autograd what they had to."""

    name: ClassVar[str] = "unmark"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.JOINT,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        for node in list(graph.graph.nodes):
            if node.target in (axis.vary, axis.settle):
                given = node.args[0]
                if all(map(compat.known_equal, value(node).stride(), value(given).stride())):
                    replace(node, given)
                else:  # it made an expanded value dense, and views may rely on that
                    node.target, node.args = torch.ops.aten.clone.default, (given,)
        return graph


