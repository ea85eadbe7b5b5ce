"""Refuse programs that write into a weight.

What a program reads of a sharded parameter is a gathered copy: writing into it would change the copy and
leave the parameter as it was, silently. Found on the captured program, where in-place operators still bear
torch's trailing underscore; a program may write into anything else.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from autodist.passes.base import Context, Pass, Phase
from autodist.passes.graph import where
from autodist.runtime.parameters import unshard

_IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift,
    operator.irshift, operator.setitem,
}  # fmt: skip
_VIEWS = {
    "view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "narrow", "select",
    "flatten", "unflatten", "movedim", "swapaxes", "detach", "getattr", "getitem", "chunk", "split",
    "unbind", "T", "mT", "data",
}  # fmt: skip


class WeightWriteError(ValueError):
    """A captured program writes into a sharded weight."""


@dataclass(frozen=True)
class RefuseWeightWrites(Pass):
    """Raise :class:`WeightWriteError` where the program writes into a weight or a view of one."""

    name: ClassVar[str] = "refuse_weight_writes"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.CAPTURED,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        weights: set[Node] = set()
        for node in graph.graph.nodes:
            base = next(iter(node.args), None)
            if node.target is unshard:
                weights.add(node)
            elif isinstance(base, Node) and base in weights:
                if _writes(node):
                    raise WeightWriteError(
                        f"'{node.name}' ({_name(node)}) writes into a weight: {where(node)}. A sharded "
                        "weight is read as a copy, so the write would be lost. Compute a new tensor "
                        "from it, or keep the value in a buffer."
                    )
                if _name(node) in _VIEWS:
                    weights.add(node)
        return graph


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _writes(node: Node) -> bool:
    name = _name(node)
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return in_place or node.target in _IN_PLACE_OPERATORS
