"""The two parts of a joint graph, as they will be, for a plan that looks at many and takes one.

torch extracts parts with much bookkeeping for its own runtime: each is copied several times, and compiled to
Python. What a part holds at its peak takes one copy of each node, in the order in which it will run, which
:class:`~autodist.passes.analysis.replay.Replay` knows. Whoever takes a plan extracts its parts properly, and
compares their :func:`names` with the draft's.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from autodist.passes.analysis.replay import Replay
from autodist.passes.graph import output_of
from autodist.runtime import compat

Parts = tuple[GraphModule, GraphModule]


def drafted(joint: GraphModule, num_outputs: int, replay: Replay, kept: set[int]) -> Parts:
    """The parts between which the nodes numbered ``kept`` by ``replay`` are saved."""
    nodes, backward = replay.nodes, replay.backward(kept)
    outputs: Sequence[object] = output_of(joint).args[0]  # type: ignore[assignment]
    inputs = [n for n in nodes if n.op == "placeholder"]
    tangents = [n for n in inputs if compat.is_tangent(n)]
    own = [n for n in inputs if not compat.is_tangent(n)]
    crossing = {*own, *(nodes[i] for i in kept)}
    saved = [nodes[i] for i in backward if nodes[i] in crossing]
    forward = [nodes[i] for i in replay.forward(kept)]
    return (
        _program(joint, own, forward, [*outputs[:num_outputs], *saved]),
        _program(joint, [*saved, *tangents], [nodes[i] for i in backward], outputs[num_outputs:]),
    )


def _program(
    joint: GraphModule, inputs: Sequence[Node], nodes: Iterable[Node], outputs: Sequence[object]
) -> GraphModule:
    graph, env = Graph(), dict[Node, Node]()
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in nodes:
        if node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    for node in reversed(graph.find_nodes(op="call_function", target=operator.getitem)):
        node.all_input_nodes[0].append(node)
    graph.output(torch.fx.map_arg(tuple(outputs), env.__getitem__))
    return compat.lazy_module(joint, graph)


def names(parts: Parts) -> tuple[tuple[str, ...], ...]:
    """What parts compute, in order: parts with the same names are scheduled alike."""
    return tuple(tuple(n.name for n in p.graph.nodes if n.op == "call_function") for p in parts)


__all__ = ["drafted", "names"]
