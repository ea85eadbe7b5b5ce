"""Optimizer state on the host: copied to the device just before its parameter's update, and back after it.

    h          = input, on the host              m   = reload_wait(reload_start(h))
    m', p'     = update(h, p, gradient)          m', p' = update(m, p, gradient)
    h <- m'                                      store_wait(store_start(m', h), m', h)

What a step computes from such state is its *update*: for Adam the new moments and the new parameter. Updates
that have values in common are one. Nothing but writes and results follows from an update, so it can run as
soon as what it is given has been computed, and what it overwrites has been read for the last time; its
nodes are put there together, each write right after its value. Then no more state is on the device than
that of one update, or of two where copies run beside the computation: those of the next begin when this one
does, and what this one writes is waited for when the next has run. An update that communicates stays where it
is; its state is on the device from its first reader to its last.

State that a step makes (an optimizer's first) is handed out in host memory.

Seeds: ZeRO-Offload's placement of optimizer state (arXiv:2101.06840), with updates on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from autodist.passes.analysis.cost import is_blocking_collective, is_collective_start, is_wait
from autodist.passes.analysis.fusion import is_fusible, is_view
from autodist.passes.base import Context, Pass, Phase, size_text
from autodist.passes.graph import insert, num_bytes, output_of, positions
from autodist.runtime import compat, offload

_aten = torch.ops.aten


@dataclass(frozen=True)
class HostState(Pass):
    """Run the updates of a step's state in turn: of its ``inputs``, by position, and ``outputs``, which it
    makes. Of these ``on_host`` are on the host, and ``made_on_host`` are handed out there, within ``limit``
    bytes."""

    inputs: frozenset[int]
    outputs: frozenset[int]
    on_host: frozenset[int]
    made_on_host: frozenset[int]
    limit: int
    name: ClassVar[str] = "host_state"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.STEP,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        places = {compat.placeholder_index(n): n for n in graph.graph.find_nodes(op="placeholder")}
        results: list[Node] = list(output_of(graph).args[0])  # type: ignore[arg-type]
        state = [*(places[i] for i in sorted(self.inputs)), *(results[i] for i in sorted(self.outputs))]
        given = [places[i] for i in sorted(self.on_host)]
        made = [results[i] for i in sorted(self.made_on_host)]
        updates = [u for u in _updates(graph.graph, state) if not any(map(_communicates, u))]
        _move(graph.graph, updates)
        copies = _Copies(graph.graph, updates, context.hardware.copies_overlap)
        for host in given:
            copies.insert(host)
        for i in sorted(self.made_on_host):
            results[i] = _handed_out(graph.graph, results[i], self.limit)
        output_of(graph).args = (tuple(results),)
        if given or made:
            held, count = sum(map(num_bytes, [*given, *made])), len(given) + len(made)
            context.decide("program", "state on the host", f"{size_text(held)} of {count} tensors")
        return graph


def _communicates(node: Node) -> bool:
    return is_collective_start(node) or is_wait(node) or is_blocking_collective(node)


# --- updates -----------------------------------------------------------------------------------------


def _updates(graph: Graph, state: Iterable[Node]) -> list[list[Node]]:
    """The nodes of each update, in their order; updates in the order of their first nodes."""
    order = positions(graph)
    owner: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while owner[node] is not node:
            owner[node] = owner[owner[node]]
            node = owner[node]
        return node

    for first in state:
        owner.setdefault(first, first)
        frontier = [first]
        while frontier:
            node = frontier.pop()
            for user in node.users:
                if user.op == "output":
                    continue
                if user in owner:
                    owner[root(user)] = root(first)
                else:
                    owner[user] = root(first)
                    frontier.append(user)
    for node in reversed(graph.nodes):
        # What only one update reads is a part of it, if it is as cheap: weight decay, say.
        owners = {root(u) if u in owner else None for u in node.users}
        if node.op == "call_function" and node not in owner and len(owners) == 1 and is_fusible(node):
            mine = owners.pop()
            if mine is not None:
                owner[node] = mine
    found: dict[Node, list[Node]] = {}
    for node in sorted(owner, key=order.__getitem__):
        if node.op == "call_function":
            found.setdefault(root(node), []).append(node)
    return list(found.values())


def _move(graph: Graph, updates: list[list[Node]]) -> None:
    """Put each update where all that it needs is there, and what it overwrites is not read any more."""
    order = positions(graph)
    first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    anchors = []
    for update in updates:
        inside = set(update)
        before = {u for n in update for u in n.all_input_nodes} - inside
        before |= {r for n in update for r in _readers(_overwritten(n))} - inside
        before = {n for n in before if n.op == "call_function"}
        anchors.append(max(before, key=order.__getitem__, default=None))
    inside = {n for update in updates for n in update}
    while first in inside:
        first = first.next
    last: dict[Node | None, Node] = {}
    for update, anchor in zip(updates, anchors, strict=True):
        at = last.get(anchor, anchor)
        for node in _writes_early(update):
            if at is None:
                first.prepend(node)
            else:
                at.append(node)
            at = node
        assert at is not None
        last[anchor] = at


def _overwritten(node: Node) -> list[Node]:
    return list(compat.written_arguments(node)) if compat.is_mutating(node.target) else []


def _readers(nodes: Iterable[Node]) -> list[Node]:
    """What reads ``nodes``, or views of them."""
    found: list[Node] = []
    for user in (u for n in nodes for u in n.users):
        if user.op == "output":
            continue
        found.append(user)
        if is_view(user):
            found += _readers([user])
    return found


def _writes_early(update: list[Node]) -> list[Node]:
    """The update's nodes, each write as soon as its value is there and what it overwrites has been read."""
    place = {n: i for i, n in enumerate(update)}
    at: dict[Node, tuple[int, int]] = {n: (i, 0) for n, i in place.items()}
    for node in update:
        over = _overwritten(node)
        if over:
            needed = [*(n for n in node.all_input_nodes if n not in over), *_readers(over)]
            at[node] = (max(place[n] for n in needed if n in place and n is not node), 1)
    return sorted(update, key=at.__getitem__)


# --- copies ------------------------------------------------------------------------------------------


class _Copies:
    def __init__(self, graph: Graph, updates: list[list[Node]], beside: bool) -> None:
        self.graph, self.beside = graph, beside
        order = positions(graph)
        ends = [(min(u, key=order.__getitem__), max(u, key=order.__getitem__), u) for u in updates]
        ends.sort(key=lambda e: order[e[0]])
        self.of = {n: i for i, (_, _, update) in enumerate(ends) for n in update}
        self.first, self.last = [e[0] for e in ends], [e[1] for e in ends]

    def insert(self, host: Node) -> None:
        order, value = positions(self.graph), host.meta["val"]
        writes = [u for u in host.users if host in _overwritten(u)]
        readers = [u for u in host.users if u.op == "call_function" and u not in writes]
        host.meta["host"] = True
        with compat.fake_mode_of([value]) or contextlib.nullcontext():
            shape, stride = value.shape, value.stride()
            host.meta["val"] = torch.empty_strided(shape, stride, dtype=value.dtype, device="cpu")
        if readers:
            first = min(readers, key=order.__getitem__)
            layout = (list(value.shape), list(value.stride()), value.device)
            with self.graph.inserting_before(self._begin(first)):
                token = insert(self.graph, offload.reload_start, (host, *layout), first)
            with self.graph.inserting_before(first):
                back = insert(self.graph, offload.reload_wait, (token, host, *layout), first)
            for reader in readers:
                reader.replace_input_with(host, back)
        for write in writes:
            self._store(write, host)

    def _begin(self, first: Node) -> Node:
        """The node before which the copy to the device begins."""
        number = self.of.get(first)
        if not self.beside or number is None:
            return first
        return self.first[max(number - 1, 0)]

    def _store(self, write: Node, host: Node) -> None:
        value = write.args[1]
        with self.graph.inserting_before(write):
            token = insert(self.graph, offload.store_start, (value, host), write)
        number = self.of.get(write)
        until = write
        if self.beside and number is not None and number + 1 < len(self.last):
            until = self.last[number + 1]
        with self.graph.inserting_after(until):
            insert(self.graph, offload.store_wait, (token, value, host), write)
        for ends in (self.first, self.last):  # what stood at an end may go
            for i, node in enumerate(ends):
                if node is write:
                    ends[i] = token
        self.graph.erase_node(write)


def _handed_out(graph: Graph, node: Node, limit: int) -> Node:
    """A result's copy on the host, begun where the value is made and waited for after its last reader."""
    order, value = positions(graph), node.meta["val"]
    last = max((r for r in _readers([node])), key=order.__getitem__, default=node)
    with graph.inserting_after(node):
        token = insert(graph, offload.offload_start, (node, list(value.stride()), limit), node)
    with graph.inserting_after(token if last is node else last):
        host = insert(graph, offload.offload_wait, (token, node), node)
    with graph.inserting_after(host):
        args = (host, list(value.shape), list(value.stride()))
        return insert(graph, _aten.as_strided.default, args, node)


__all__ = ["HostState"]
