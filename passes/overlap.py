"""When collectives start and when they are waited for: an order of the graph, nothing else.

Terms. The *use* of a gather is the first node that computes with one of its weights. Gathers are numbered
in the order of their uses, reductions in the order in which their gradients are ready. Node ``n`` of the
graph as it comes in is compute; only collectives, their waits, and the views, casts and pads around them
move:

    start of gather i      before the use of gather i - distance(i)
    wait of a gather       before the first node that uses that weight
    start of reduction j   where it becomes ready (unmoved)
    wait of reduction j    before the start of reduction j + 2 (j + 1 when they are large), or at the end
    start of an exchange   where what it sends has been computed
    wait of an exchange    before the first node that computes with what it brings

``distance(i)`` is the smallest that hides the gather behind the compute between the two uses, by the cost
model, while the weights gathered ahead stay below ``in_flight`` bytes. Distances are the first rank's,
because the order of collectives must be the same on every rank and compute times depend on the batch.
At most two reductions are in flight, and only one when two exceed two buckets: whole gradients die early.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from autodist.passes.analysis.cost import (
    bucket_bytes,
    collective_bytes,
    collective_group,
    collective_seconds,
    graph_seconds,
    is_collective_start,
    is_wait,
)
from autodist.passes.base import Context, Pass, Phase
from autodist.passes.graph import first_use, is_copy, is_view, output_of, positions
from autodist.runtime import compat

# Ranks of what stands before one compute node, in this order; the node itself comes last.
_FINISH, _START, _WAIT, _COMPUTE = range(4)
_REDUCTIONS_IN_FLIGHT = 2

_comm = torch.ops._c10d_functional
_GATHERS = (
    _comm.all_gather_into_tensor.default,
    _comm.all_gather_into_tensor_coalesced.default,
)
_REDUCTIONS = (
    _comm.reduce_scatter_tensor.default,
    _comm.reduce_scatter_tensor_coalesced.default,
    _comm.all_reduce.default,
    _comm.all_reduce_coalesced.default,
)


@dataclass(frozen=True)
class Collective:
    """A start, the waits for its results, and what only prepares its input or views its output."""

    start: Node
    before: tuple[Node, ...]
    waits: tuple[Node, ...]


@dataclass(frozen=True)
class Overlap(Pass):
    """``in_flight`` bounds the bytes gathered ahead of use; None means four buckets."""

    in_flight: int | None = None
    name: ClassVar[str] = "overlap"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.FORWARD_PART, Phase.BACKWARD_PART, Phase.STEP)
    requires: ClassVar[frozenset[str]] = frozenset({"collectives"})

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        order = positions(graph.graph)
        found = [_collective(n, order) for n in graph.graph.nodes if is_collective_start(n)]
        inputs = _input_only(graph)
        gathers = [c for c in found if c.start.target in _GATHERS and c.start in inputs]
        gathers.sort(key=lambda c: _use(c, order))
        reductions = [c for c in found if c.start.target in _REDUCTIONS]
        end = order[output_of(graph)]
        place: dict[Node, tuple[int, int]] = {}
        distances = self._distances(graph, gathers, order, context)
        for i, (gather, distance) in enumerate(zip(gathers, distances, strict=True)):
            anchor = _use(gathers[i - distance], order) if distance <= i else -1
            place |= dict.fromkeys((*gather.before, gather.start, *_items(gather)), (anchor, _START))
            for wait in gather.waits:
                use = first_use(wait, order)
                place |= dict.fromkeys(_with_views(wait, order, use), (use, _WAIT))
            context.decide(
                gather.start.name,
                f"issued {distance} gathers ahead",
                f"{collective_bytes(gather.start) / 2**20:.1f} MiB; the compute it hides behind",
            )
        for j, reduction in enumerate(reductions):
            later = reductions[j + self._lag(reductions, j, context) :][:1]
            until = order[later[0].start] if later else end
            for wait in reduction.waits:
                when, after = _turn(wait, until, order, place)
                place |= dict.fromkeys(after, (when, _FINISH))
        moving = {*gathers, *reductions}
        for exchange in (c for c in found if c not in moving):
            _spread(exchange, order, place)
        _reorder(graph, order, place)
        return graph

    def _lag(self, reductions: Sequence[Collective], j: int, context: Context) -> int:
        """How many reductions later the ``j``-th is waited for: one when two are too large together."""
        together = sum(collective_bytes(r.start) for r in reductions[j : j + 2])
        ranks = context.group_sizes[collective_group(reductions[j].start)]
        fits = together <= 2 * bucket_bytes(ranks, context.hardware)
        return _REDUCTIONS_IN_FLIGHT if fits else 1

    def _distances(
        self, graph: GraphModule, gathers: Sequence[Collective], order: dict[Node, int], context: Context
    ) -> list[int]:
        """How many uses ahead each gather starts: enough to hide it, few enough to fit."""
        if not gathers:
            return []
        seconds = graph_seconds(graph.graph, context.hardware, fused=context.fused)
        elapsed = [0.0, *accumulate(seconds[n] for n in graph.graph.nodes)]
        uses = [_use(g, order) for g in gathers]
        sizes = [collective_bytes(g.start) for g in gathers]
        groups = [context.group_sizes[g.start.args[-1]] for g in gathers]
        chosen = []
        for i, use in enumerate(uses):
            bound = self.in_flight or 4 * bucket_bytes(groups[i], context.hardware)
            needed = collective_seconds(sizes[i], groups[i], context.hardware, "all_gather")
            # The latest time at which starting still hides it, as a position, then as a distance.
            latest = bisect.bisect_right(elapsed, elapsed[use] - needed) - 1
            wanted = max(i - bisect.bisect_right(uses, latest, 0, i) + 1, 1)
            chosen.append(max(1, _fitting(sizes, i, min(wanted, i), bound)))
        # A gather starts no earlier than the one before it: the order of collectives is the order of uses.
        for i in range(1, len(chosen)):
            chosen[i] = min(chosen[i], chosen[i - 1] + 1)
        label = f"when {len(sizes)} gathers of {sum(sizes)} bytes start in the {context.phase.value}"
        return list(json.loads(context.agree(label, lambda: json.dumps(chosen))))


def _fitting(sizes: Sequence[int], last: int, wanted: int, bound: int) -> int:
    """How many of ``wanted`` sizes, from ``last`` backwards, stay below ``bound`` together."""
    total = 0
    for count in range(wanted):
        total += sizes[last - count]
        if total > bound:
            return count
    return wanted


def _collective(start: Node, order: dict[Node, int]) -> Collective:
    items = list(start.users) if not any(is_wait(u) for u in start.users) else []
    waits = [u for n in (items or [start]) for u in n.users if is_wait(u)]
    before: list[Node] = []
    frontier = list(start.all_input_nodes)
    while frontier:
        node = frontier.pop()
        if node.op == "call_function" and len(node.users) == 1 and _prepares(node):
            before.append(node)
            frontier += node.all_input_nodes
    return Collective(
        start, tuple(sorted(before, key=order.__getitem__)), tuple(sorted(waits, key=order.__getitem__))
    )


def _items(collective: Collective) -> tuple[Node, ...]:
    """The getitems between a coalesced start and its waits."""
    return tuple(u for u in collective.start.users if not is_wait(u))


def _prepares(node: Node) -> bool:
    return is_view(node) or is_copy(node) or node.target is torch.ops.aten.constant_pad_nd.default


def _use(collective: Collective, order: dict[Node, int]) -> int:
    return min((first_use(w, order) for w in collective.waits), default=order[collective.start])


def _input_only(graph: GraphModule) -> set[Node]:
    """Nodes that depend on the graph's inputs through views, casts and collectives alone.

    In a backward part a gathered weight depends on its shard, a reduction on tangents through compute.
    """
    found: set[Node] = set()
    for node in graph.graph.nodes:
        moves = node.op == "placeholder" or _prepares(node) or is_collective_start(node)
        if moves and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _with_views(wait: Node, order: dict[Node, int], until: int) -> list[Node]:
    """``wait`` and the views of its result that stand before ``until``."""
    found = [wait]
    for user in wait.users:
        if is_view(user) and order[user] < until:
            found += _with_views(user, order, until)
    return found


def _spread(exchange: Collective, order: dict[Node, int], place: dict[Node, tuple[int, int]]) -> None:
    """Start an exchange of activations when it is ready, wait for it when it is needed."""
    sends = (exchange.start, *exchange.before)
    inputs = {n for s in sends for n in s.all_input_nodes if n not in sends}
    moved = [place[n] for n in inputs if n in place]
    ready = max((order[n] for n in inputs if n not in place), default=-1)
    anchor = max([(ready + 1, _START), *moved])
    place |= dict.fromkeys((*exchange.before, exchange.start, *_items(exchange)), anchor)
    for wait in exchange.waits:
        only = [wait]
        for node in only:
            # One that also needs a size may have to wait for it.
            moves = [u for u in node.users if u not in only and (is_view(u) or is_copy(u))]
            only += [u for u in moves if len(u.all_input_nodes) == 1]
        uses = [order[u] for n in only for u in n.users if u not in only]
        place |= dict.fromkeys(only, (min(uses, default=len(order)), _WAIT))


def _turn(
    wait: Node, until: int, order: dict[Node, int], place: dict[Node, tuple[int, int]]
) -> tuple[int, list[Node]]:
    """When to wait for a reduction, ``until`` at the latest, and what then follows at once.

    What follows is all that can be computed from the result and what is there by then: the views and casts
    that a backward returns, or in a whole step the parameter's update, with the write.
    """

    def position(node: Node) -> tuple[int, int]:
        return place.get(node, (order[node], _COMPUTE))

    while True:
        found = dict.fromkeys([wait])
        frontier = [wait]
        while frontier:
            for user in frontier.pop(0).users:
                # In place already: it has its turn with another reduction.
                if user.op == "output" or user in found or user in place or is_collective_start(user):
                    continue
                if not all(n in found or position(n) <= (until, _FINISH) for n in user.all_input_nodes):
                    continue
                if compat.is_mutating(user.target) and _read_from(user.args[0], until, order, found):
                    continue
                found[user] = None
                frontier.append(user)
        outside = [position(u)[0] for n in found for u in n.users if u not in found and u.op != "output"]
        first = min(outside, default=until)
        if first >= until:
            return until, sorted(found, key=order.__getitem__)
        until = first


def _read_from(node: Any, until: int, order: dict[Node, int], found: Container[Node]) -> bool:
    """Whether ``node``'s memory is read at ``until`` or later, other than by ``found``."""
    return any(
        (order[u] >= until and not compat.is_mutating(u.target) and u not in found)
        or (is_view(u) and _read_from(u, until, order, found))
        for u in node.users
    )


def _reorder(graph: GraphModule, order: dict[Node, int], place: dict[Node, tuple[int, int]]) -> None:
    body: Iterable[Node] = [n for n in graph.graph.nodes if n.op not in ("placeholder", "output")]

    def key(node: Node) -> tuple[int, int, int]:
        return (*place.get(node, (order[node], _COMPUTE)), order[node])

    end = output_of(graph)
    for node in sorted(body, key=key):
        end.prepend(node)
