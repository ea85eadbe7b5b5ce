"""One place's share of a training step: a program for each interval between barriers.

:mod:`autodist.passes.step_places` says where the nodes of a step run, and between which barriers. Of
those at a place, a program has what the place's outputs, runs and exchanges need; what its writes do to the
step's inputs stands at the end of the last one, as all of the step reads its inputs as they were given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from autodist.passes.graph import insert, source
from autodist.passes.regions import keep_draws, write_back
from autodist.passes.step_places import Exchange, Reading, StepPlaces

_aten = torch.ops.aten


@dataclass(frozen=True)
class StepPart:
    """The program of one interval: it takes and gives the values of readings. None where nothing runs."""

    graph: GraphModule | None
    takes: tuple[Reading, ...]
    gives: tuple[Reading, ...]


def step_parts(
    found: StepPlaces, place: int, wanted: Sequence[Reading], written: Mapping[Node, Reading]
) -> list[StepPart]:
    """The programs of ``place``. ``wanted`` are readings that the step returns or a run takes there;
    ``written`` the new values of its inputs."""
    needed = _needed(found, place, [*wanted, *written.values()])
    last = len(found.barriers)
    nodes: list[list[Node]] = [[] for _ in range(last + 1)]
    for node in found.step.graph.nodes:
        if node in needed:
            nodes[found.interval[node]].append(node)
    sent = {n for b in found.barriers if isinstance(b, Exchange) for n in b.values if _sends(found, n, place)}
    kept = sent | {n for n, exchanged in wanted if not exchanged}
    kept |= {n for n, exchanged in written.values() if not exchanged and found.interval.get(n) != last}
    return [_part(found, i, nodes, kept, written if i == last else {}) for i in range(last + 1)]


def _sends(found: StepPlaces, node: Node, place: int) -> bool:
    return min(found.places[node]) == place


def _needed(found: StepPlaces, place: int, wanted: Sequence[Reading]) -> set[Node]:
    """The nodes that ``place`` runs."""
    frontier = [n for n, exchanged in wanted if not exchanged]
    for barrier in found.barriers:
        if isinstance(barrier, Exchange):
            frontier += [n for n in barrier.values if _sends(found, n, place)]
    needed: set[Node] = set()
    while frontier:
        node = frontier.pop()
        if node in found.interval and node not in needed:
            needed.add(node)
            frontier += [n for n, exchanged in found.readings[node] if not exchanged]
    return needed


def _part(
    found: StepPlaces,
    interval: int,
    nodes: Sequence[Sequence[Node]],
    kept: set[Node],
    written: Mapping[Node, Reading],
) -> StepPart:
    mine = nodes[interval]
    own = set(mine)
    ahead = (r for other in nodes[interval + 1 :] for node in other for r in found.readings[node])
    later = {n for n, exchanged in ahead if not exchanged}
    readings = [r for node in mine for r in found.readings[node]]
    readings += [*((n, False) for n in written), *written.values()]
    outside = [r for r in dict.fromkeys(readings) if r[1] or r[0] not in own]
    takes = tuple(r for r in outside if r[0].op != "get_attr")
    gives = tuple((n, False) for n in mine if n in kept or n in later)
    if not mine and not written:
        return StepPart(None, (), ())
    graph, env = Graph(), dict[Reading, Node]()
    for node, exchanged in takes:
        made = env[node, exchanged] = graph.placeholder(f"{node.name}_sent" if exchanged else node.name)
        made.meta = {k: v for k, v in node.meta.items() if k in ("val", "stack_trace")}
    for reading in outside:
        if reading[0].op == "get_attr":
            env[reading] = graph.node_copy(reading[0])
    for node in mine:
        read = dict(found.readings[node])
        env[node, False] = graph.node_copy(node, lambda n, read=read: env[n, read[n]])  # type: ignore[misc]
    results = [env[r] if r[0] not in later else _own(env[r]) for r in gives]
    graph.output((*results, *(env[r] for r in written.values())))
    program = GraphModule(found.step, graph)
    if written:
        write_back(program, [takes.index((n, False)) for n in written])
    keep_draws(program)
    return StepPart(program, takes, gives)


def _own(node: Node) -> Node:
    """``node``, or a copy of it where it lies in the memory of an input, which the last program may write."""
    if source(node).op == "call_function":
        return node
    return insert(node.graph, _aten.clone.default, (node,), like=node)


__all__ = ["StepPart", "step_parts"]
