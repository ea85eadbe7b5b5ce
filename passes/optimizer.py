"""A step's optimizer, taken apart so that each parameter can be stepped in its turn.

What an optimizer does in lists of tensors it does to each parameter alone; only learning rates, step counts
and the like are shared:

    SplitForeach    _foreach_mul(ps, c)           ->  mul(p, c) for each p
    DropAliases     alias(p)                      ->  p: what autograd sees apart is one value
    HoistScalars    step count, bias corrections  ->  the front of the graph, before any parameter's turn

Kernels are not the worse for it: the compiler fuses what is done to one parameter into one kernel, where a
list would be walked once for each operator. Then a parameter's update depends on its gradient, its state and
numbers that are there from the start, so it can be placed where the gradient's reduction ends.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from autodist.passes.base import Context, Pass, PassError, Phase
from autodist.passes.graph import insert, replace, where
from autodist.runtime import compat
from autodist.runtime.compat import tree_leaves

_aten = torch.ops.aten
_PREFIX = "_foreach_"
_NAMES = {"norm": _aten.linalg_vector_norm, "max": _aten.amax, "zero": _aten.zeros_like}
_BOUNDS = {"maximum": _aten.clamp_min, "minimum": _aten.clamp_max}
"""Operators on single tensors that take no number, and those that do."""
_VALUED = ("addcmul", "addcdiv")
"""Operators on single tensors whose last argument goes by name."""


@dataclass(frozen=True)
class SplitForeach(Pass):
    """One operator for each tensor, in place of an operator on lists."""

    name: ClassVar[str] = "split_foreach"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.STEP_CAPTURED,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        for node in list(graph.graph.nodes):
            if compat.operator_base(node.target).startswith(_PREFIX):
                self._split(graph, node)
        return graph

    def _split(self, graph: GraphModule, node: Node) -> None:
        name = compat.operator_base(node.target).removeprefix(_PREFIX)
        packet = _NAMES.get(name) or getattr(_aten, name, None)
        if packet is None:
            raise PassError(f"'{node.name}' ({where(node)}) works on lists in a way that is not known here")
        count = next(len(a) for a in node.args if isinstance(a, (list, tuple)))
        parts = []
        with graph.graph.inserting_before(node):
            for i in range(count):
                args: tuple[Any, ...] = tuple(_item(a, i, count) for a in node.args)
                kwargs = {k: _item(v, i, count) for k, v in node.kwargs.items()}
                if name in _BOUNDS and not isinstance(args[1], Node):
                    packet = _BOUNDS[name]
                if name in _VALUED and len(args) == 4:
                    kwargs = {"value": args[-1]}
                    args = args[:-1]
                target = compat.overload_for(packet, args, kwargs)
                parts.append(insert(graph.graph, target, args, like=node, kwargs=kwargs))
        for user in list(node.users):
            assert user.target is operator.getitem
            replace(user, parts[user.args[1]])  # type: ignore[index]
        graph.graph.erase_node(node)


def _item(argument: Any, i: int, count: int) -> Any:
    """What the ``i``-th of ``count`` tensors gets of an argument: its element of a list, or all of it."""
    if isinstance(argument, (list, tuple)) and len(argument) == count:
        return argument[i]
    return argument


@dataclass(frozen=True)
class DropAliases(Pass):
    """Read values themselves, not under another name."""

    name: ClassVar[str] = "drop_aliases"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.STEP,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        for node in list(graph.graph.nodes):
            returned = any(u.op == "output" for u in node.users)
            if node.target in (_aten.alias.default, _aten.detach.default) and not returned:
                replace(node, node.args[0])  # type: ignore[arg-type]
        return graph


@dataclass(frozen=True)
class HoistScalars(Pass):
    """Compute numbers that depend on inputs alone first."""

    name: ClassVar[str] = "hoist_scalars"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.STEP,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        first = next(n for n in graph.graph.nodes if n.op not in ("placeholder", "get_attr"))
        early: set[Node] = set(graph.graph.find_nodes(op="placeholder"))
        for node in list(graph.graph.nodes):
            if node.op == "get_attr":
                early.add(node)
                first.prepend(node)
            elif node.op == "call_function" and _is_number(node) and early.issuperset(node.all_input_nodes):
                early.add(node)
                if node is first:
                    first = first.next
                else:
                    first.prepend(node)
        return graph


def _is_number(node: Node) -> bool:
    if compat.is_mutating(node.target) or compat.is_random(node.target):
        return False
    values = [v for v in tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    given = [n.meta.get("val") for n in node.all_input_nodes]
    return bool(values) and all(v.dim() == 0 for v in [*values, *(g for g in given if _is_tensor(g))])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
