"""Repeated structure: the layers of a model, found in its graph.

Two nodes are *alike* when they do the same to values of the same types: operator, constants, and
the types of arguments and result. A *run* is a stretch of nodes in which each is alike the one
``period`` places before it, so that it reads as copies of its first ``period`` nodes. A run is a
*repeat* when its copies are wired alike too: where node ``i`` reads ``a``, the node one copy
earlier reads ``b`` with

    b + period = a                        a value of the same copy, or of one as far back
    b and a before the run                a value shared by the copies, or each copy's own (a weight)
    b before the run, a in its first copy what the copies hand on, and what the first starts from

Names play no part, so layers are found in any model, and not found where only names are alike.

Periods are guessed from the distances at which stretches of 1, 2, 4, ... nodes occur again, then
checked; the repeat that folds away most nodes is taken, and what is left of it, right of it and
inside one copy is searched in turn.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node

from autodist.runtime.compat import OpOverload, tree_flatten

# Folding replaces lines by a heading: below this many saved it makes nothing clearer.
_MIN_SAVED = 4
_GUESSES = 8  # periods tried for each length of stretch
_SHOWN = 8  # of a list in a folded text


@dataclass(frozen=True)
class Repeat:
    """``count`` copies of ``period`` places from ``start``; ``body`` is the first, folded too."""

    start: int
    period: int
    count: int
    body: tuple[int | Repeat, ...]


def fold(
    keys: Sequence[Hashable], reads: Sequence[Sequence[int]] | None = None
) -> tuple[int | Repeat, ...]:
    """The places of a sequence in order, repeated stretches as :class:`Repeat`.

    Places with equal ``keys`` are alike; ``reads`` are the places each one depends on, as many for
    places that are alike. Without it only keys count.
    """
    return _Folder(keys, reads or [()] * len(keys)).fold(0, len(keys))


def fold_graph(graph: GraphModule) -> tuple[int | Repeat, ...]:
    """The positions of a graph's nodes, folded."""
    position = {node: i for i, node in enumerate(graph.graph.nodes)}
    keys = [_kind(node, graph) for node in position]
    return fold(keys, [[position[a] for a in _arguments(node)] for node in position])


# --- finding repeats -----------------------------------------------------------------------------


class _Folder:
    def __init__(self, keys: Sequence[Hashable], reads: Sequence[Sequence[int]]) -> None:
        kinds: dict[Hashable, int] = {}
        self.alike = np.array([kinds.setdefault(key, len(kinds)) for key in keys])
        self.reads = reads

    def fold(self, low: int, high: int) -> tuple[int | Repeat, ...]:
        found = self._best(low, high)
        if found is None:
            return tuple(range(low, high))
        start, period, count = found
        end = start + period * count
        repeat = Repeat(start, period, count, self.fold(start, start + period))
        return (*self.fold(low, start), repeat, *self.fold(end, high))

    def _best(self, low: int, high: int) -> tuple[int, int, int] | None:
        """(start, period, count) of the repeat in ``low:high`` that folds away most places."""
        best, saved = None, _MIN_SAVED - 1
        alike = self.alike[low:high]
        runs = [
            (e - s - p, p, s + low, e + low) for p in _periods(alike) for s, e in _runs(alike, p)
        ]
        # Most promising first, and of two equally good ones the shorter period.
        for promise, period, start, end in sorted(runs, key=lambda r: (-r[0], r[1])):
            if promise <= saved:
                break
            for first, last in self._wired(start, end, period):
                count = (last - first) // period
                if (count - 1) * period > saved:
                    best, saved = (first, period, count), (count - 1) * period
        return best

    def _wired(self, start: int, end: int, period: int) -> Iterator[tuple[int, int]]:
        """The parts of a run whose copies are wired alike."""
        for i in range(start + period, end):
            pairs = zip(self.reads[i], self.reads[i - period], strict=True)
            if not all(b + period == a if b >= start else a < start + period for a, b in pairs):
                yield start, i
                start = i - period + 1
        yield start, end


def _periods(alike: np.ndarray) -> set[int]:
    """Distances at which stretches occur again; for each length those seen most often."""
    found: set[int] = set()
    stretch, length = alike, 1
    while len(stretch) > 1:
        order = np.argsort(stretch, kind="stable")
        again = stretch[order[1:]] == stretch[order[:-1]]
        seen = np.bincount(np.diff(order)[again])
        found.update(int(d) for d in np.argsort(seen)[-_GUESSES:] if seen[d])
        if not again.any() or len(stretch) <= length:
            break
        pairs = stretch[:-length] * (int(stretch.max()) + 1) + stretch[length:]
        stretch = np.unique(pairs, return_inverse=True)[1]
        length *= 2
    return found


def _runs(alike: np.ndarray, period: int) -> Iterator[tuple[int, int]]:
    """Maximal stretches of two periods or more in which each is alike the one a period before."""
    same = np.concatenate([[False], alike[period:] == alike[:-period], [False]])
    edges = np.flatnonzero(same[1:] != same[:-1])
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop - start >= period:
            yield int(start), int(stop) + period


def _arguments(node: Node) -> list[Node]:
    """The nodes among a node's arguments, in order; each as often as it occurs."""
    return [leaf for leaf in tree_flatten((node.args, node.kwargs))[0] if isinstance(leaf, Node)]


def _kind(node: Node, graph: GraphModule) -> Hashable:
    """What alike nodes have in common."""
    if node.op == "get_attr":
        held = operator.attrgetter(node.target)(graph)  # type: ignore[arg-type]
        if isinstance(held, GraphModule):
            return node.op, tuple(_kind(n, held) for n in held.graph.nodes)
        return node.op, node_type(node)
    if node.target is operator.getitem:  # Items are alike, whichever they are.
        return node.op, node.target, node_type(node.args[0]), node_type(node)  # type: ignore[arg-type]
    leaves, structure = tree_flatten((node.args, node.kwargs))
    given = tuple(node_type(a) if isinstance(a, Node) else repr(a) for a in leaves)
    target = node.target if node.op not in ("placeholder", "output") else ""
    return node.op, target, str(structure), given, node_type(node)


# --- texts ---------------------------------------------------------------------------------------


def graph_text(graph: GraphModule, note: Callable[[Node], str] = lambda node: "") -> str:
    """One line a node: position, name, type, operator and arguments, and what ``note`` says of it.

    Where the source line changes that the nodes come from, a comment says so.
    """
    lines, source = [], ""
    for position, node in enumerate(graph.graph.nodes):
        before, source = source, _source_line(node) or source
        if source != before:
            lines.append(f"{'':8}# {source}")
        lines.append(_line(position, node, "", note(node)))
    return "\n".join(lines) + "\n"


def folded_text(graph: GraphModule, note: Callable[[Node], str] = lambda node: "") -> str:
    """:func:`graph_text` with each repeat shown once.

    Inside a repeat names are those of the first copy, and numbers in which the copies' notes
    differ are ``*``.
    """
    nodes = list(graph.graph.nodes)
    return "\n".join(_lines(fold_graph(graph), nodes, [0], "", note)) + "\n"


def common_text(texts: Sequence[str]) -> str:
    """One text for several: ``*`` for numbers in which they differ, the first if more differs."""
    parts = [re.split(r"(\d+)", text) for text in dict.fromkeys(texts)]
    if len({len(p) for p in parts}) != 1:
        return f"{texts[0]}, ..."
    columns = [set(column) for column in zip(*parts, strict=True)]
    if any(len(c) > 1 for c in columns[::2]):
        return f"{texts[0]}, ..."
    return "".join(next(iter(c)) if len(c) == 1 else "*" for c in columns)


def operator_name(node: Node) -> str:
    """The operator a node calls: ``aten.mm``, ``aten.add.Tensor``, ``getitem``."""
    if isinstance(node.target, OpOverload):
        return str(node.target).removesuffix(".default")
    return node.target if isinstance(node.target, str) else node.target.__name__


def node_type(node: Node, shown: int | None = None) -> str:
    """The type of a node's value: ``float32[4, 8]``, several in brackets; empty when not known.

    ``shown`` bounds how many are written out.
    """
    return _type(node.meta.get("val", node.meta.get("example_value")), shown)


def _type(value: Any, shown: int | None) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (list, tuple)):
        return f"({_list([_type(v, shown) for v in value], shown)})"
    return "" if value is None else type(value).__name__


def _list(items: Sequence[str], shown: int | None) -> str:
    if shown is None or len(items) <= shown:
        return ", ".join(items)
    return f"{', '.join(items[:shown])}, and {len(items) - shown} more"


def _lines(
    items: Sequence[int | Repeat],
    nodes: Sequence[Node],
    offsets: Sequence[int],
    indent: str,
    note: Callable[[Node], str],
) -> Iterator[str]:
    """``offsets``: where the copies of these items stand, relative to the one that is shown."""
    for item in items:
        if isinstance(item, Repeat):
            last = item.start + item.period * item.count - 1
            yield f"{'':8}{indent}x {item.count}: nodes {item.start} to {last}, {item.period} each"
            copies = [o + i * item.period for i in range(item.count) for o in offsets]
            yield from _lines(item.body, nodes, copies, indent + "  ", note)
        else:
            noted = common_text([note(nodes[item + o]) for o in offsets])
            yield _line(item, nodes[item], indent, noted, _SHOWN)


def _line(position: int, node: Node, indent: str, note: str, shown: int | None = None) -> str:
    tail = f"  # {note}" if note else ""
    return f"{position:6}  {indent}{_statement(node, shown)}{tail}"


def _statement(node: Node, shown: int | None) -> str:
    if node.op == "output":
        return f"return {_text(node.args[0], shown)}"
    kind = node_type(node, shown)
    name = f"{node.name}: {kind}" if kind else node.name
    if node.op == "placeholder":
        return name
    if node.op == "get_attr":
        return f"{name} = self.{node.target}"
    arguments = [_text(a, shown) for a in node.args]
    arguments += [f"{k}={_text(v, shown)}" for k, v in node.kwargs.items()]
    return f"{name} = {operator_name(node)}({', '.join(arguments)})"


def _text(argument: Any, shown: int | None) -> str:
    if isinstance(argument, (list, tuple)):
        return f"[{_list([_text(a, shown) for a in argument], shown)}]"
    if isinstance(argument, Node):
        return argument.name
    return repr(argument).removeprefix("torch.")


def _source_line(node: Node) -> str:
    """The innermost source line in a node's stack trace, with its code."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    # Newer Pythons underline what failed in a line of its own.
    return ": ".join([line for line in lines if line.strip("^~ ")][-2:])
