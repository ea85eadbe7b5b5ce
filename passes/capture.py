"""From a captured program to a functional ATen graph and back.

Placement passes want the forward program in ATen operators as a person's program called them (attention,
cross-entropy and linear layers whole, *before* autograd takes them apart), without writes, and without
DTensors. So a captured program is cut in two:

    reads    placeholders, and ``unshard(parameter)`` once for each parameter
    core     everything else: a function of the other placeholders and of the weights read

The core is traced on the program's own fake values, functionalised, and given to the pass, which returns the
core it wants; that is put back behind the reads. Bodies of activation checkpoints are inlined and their
nodes tagged as torch tags them, so that the partitioner recomputes what the user asked to be recomputed.
What a program writes into its inputs (buffers) is written by the new program too, at its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from autodist.passes.analysis.placement import PlacementError
from autodist.passes.graph import output_of, where
from autodist.runtime import compat
from autodist.runtime.compat import tree_leaves
from autodist.runtime.parameters import unshard

_aten = torch.ops.aten


@dataclass(frozen=True)
class Core:
    """``graph`` is functional ATen; ``weights`` names those of its placeholders that are weights.

    ``inputs`` are the captured program's nodes behind its placeholders, in order. It returns the program's
    outputs, then the new values of the inputs at the positions ``written``. ``policies`` are those of
    selective checkpoints, by the number in their nodes' tags.
    """

    graph: GraphModule
    inputs: tuple[Node, ...]
    weights: frozenset[str]
    written: tuple[int, ...]
    fakes: tuple[Any, ...]
    outputs: int
    policies: Mapping[int, Any]

    def trace(self, function: Callable[..., Any]) -> GraphModule:
        """Trace ``function``, called with the core's inputs, to ATen before autograd."""
        return _trace(function, self.fakes)


def core_of(captured: GraphModule) -> Core:
    """The core of a captured program."""
    inline, policies = _inlined(captured)
    reads: dict[Node, Node] = {}
    for node in list(inline.graph.nodes):
        if node.target is unshard:
            first = reads.setdefault(node.args[0], node)
            if first is not node:
                node.replace_all_uses_with(first)
                inline.graph.erase_node(node)
    inputs = [n for n in inline.graph.nodes if n.op == "placeholder" and n not in _sharded(inline)]
    inputs += reads.values()
    body, env = Graph(), {}
    for node in inputs:
        env[node] = body.placeholder(node.name)
        env[node].meta = dict(node.meta)
    skip = {*inputs, *_sharded(inline)}
    for node in inline.graph.nodes:
        if node not in skip:
            env[node] = body.node_copy(node, env.__getitem__)
    module = GraphModule(inline, body)
    fakes = tuple(_fake(n) for n in inputs)
    outputs = len(tree_leaves(output_of(module).args[0]))
    graph, written = _functional(module, fakes)
    for node in graph.graph.nodes:
        if node.target is _aten.as_strided.default:
            raise PlacementError(
                f"'{node.name}' ({where(node)}) reads memory by strides (as_strided), which are others in a "
                "piece of a sequence. Use slices, views or unfold."
            )
    weights = frozenset(env[n].name for n in reads.values())
    placeholders = graph.graph.find_nodes(op="placeholder")
    names = {env[n].name: p.name for n, p in zip(inputs, placeholders, strict=True)}
    return Core(
        graph, tuple(inputs), frozenset(names[w] for w in weights), written, fakes, outputs, policies
    )


def rebuilt(captured: GraphModule, core: Core, new: GraphModule, divisor: int) -> GraphModule:
    """The captured program with ``new`` for its core; weights' gradients are divided by ``divisor``."""
    graph, env = Graph(), {}
    own = {n.name: n for n in captured.graph.find_nodes(op="placeholder")}
    for name, node in own.items():
        copy = graph.node_copy(node)
        compat.copy_source(node, copy)
        env[name] = copy
    mine: list[Node] = []
    for node in core.inputs:
        if node.op == "placeholder":
            mine.append(env[node.name])
            continue
        read = graph.call_function(unshard, (env[node.args[0].name], divisor))  # type: ignore[union-attr]
        read.meta = dict(node.meta)
        mine.append(read)
    taken = list(mine)
    for position in core.written:  # autograd may keep what a norm was given, and finds it overwritten
        taken[position] = graph.call_function(_aten.clone.default, (mine[position],))
        taken[position].meta = compat.saved_tags()
    mapped = dict(zip(new.graph.find_nodes(op="placeholder"), taken, strict=True))
    returned = graph.graph_copy(new.graph, mapped)
    results = list(returned)  # type: ignore[arg-type]
    for position, value in zip(core.written, results[core.outputs :], strict=True):
        # The functional forms of norms say that running statistics have gradients; buffers take none.
        plain = graph.call_function(_aten.detach.default, (value,))
        graph.call_function(_aten.copy_.default, (mine[position], plain))
    graph.output(tuple(results[: core.outputs]))
    made = GraphModule(new, graph)
    for key in list(made._buffers):  # literals that tracing lifted: not buffers that have a source
        object.__setattr__(made, key, made._buffers.pop(key))
    made.meta.update(captured.meta)
    compat.copy_sources(captured, made)
    return made


# --- pieces ----------------------------------------------------------------------------------------


def _sharded(graph: GraphModule) -> set[Node]:
    found = graph.graph.find_nodes(op="placeholder")
    return {n for n in found if isinstance(n.meta.get("example_value"), DTensor)}


def _fake(node: Node) -> Any:
    """A fresh fake for an input of the core: what the captured program's own example is."""
    value = node.meta["example_value"]
    if node.op == "placeholder":
        return value
    whole = value.detach()
    parameter = node.args[0].meta["example_value"]  # type: ignore[union-attr]
    return whole.requires_grad_(parameter.requires_grad)


def _inlined(graph: GraphModule) -> tuple[GraphModule, dict[int, Any]]:
    """``graph`` with the bodies of activation checkpoints in place of the calls, and their policies."""
    policies: dict[int, Any] = {}
    number = itertools.count(1)
    made = Graph()

    def copy(module: GraphModule, env: dict[Node, Node], tags: Mapping[str, Any]) -> Any:
        for node in module.graph.nodes:
            if node.op == "placeholder" and node in env:
                continue
            if node.op == "output":
                return torch.fx.map_arg(node.args[0], env.__getitem__)
            if compat.is_custom_gradient(node.target):
                raise PlacementError(
                    f"'{node.name}' ({where(node)}) is a torch.autograd.Function, a hook or the like: what "
                    "it does to gradients is not known to be right on pieces of sequences, and sequence "
                    "parallelism does not carry it over. Write it in operators that autograd knows, or as "
                    "a torch.library.custom_op."
                )
            if compat.is_checkpoint(node.target):
                body = getattr(module, node.args[0].target)
                region, policy = next(number), compat.checkpoint_policy(body)
                if policy is not None:
                    policies[region] = policy
                inputs = [env[a] if isinstance(a, Node) else a for a in node.args[1:]]
                own = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
                returned = copy(body, own, compat.checkpoint_tags(region))
                _bind_results(node, returned, env)
                continue
            is_body = node.op == "get_attr" and all(compat.is_checkpoint(u.target) for u in node.users)
            if node in env or is_body:
                continue
            env[node] = made.node_copy(node, env.__getitem__)
            env[node].meta = {**node.meta, **(tags if node.op == "call_function" else {})}
            compat.copy_source(node, env[node])
        raise AssertionError("a graph without an output")

    made.output(copy(graph, {}, {}))
    return GraphModule(graph, made), policies


def _bind_results(call: Node, returned: Any, env: dict[Node, Node]) -> None:
    """A checkpoint returns a tuple, taken apart by getitem."""
    for user in call.users:
        env[user] = returned[user.args[1]]


def _trace(function: Callable[..., Any], fakes: Sequence[Any]) -> GraphModule:
    return compat.trace_before_autograd(function, fakes)


def _functional(module: GraphModule, fakes: Sequence[Any]) -> tuple[GraphModule, tuple[int, ...]]:
    """``module`` as a functional ATen graph, and which inputs it writes."""
    def flat(*args: Any) -> list[Any]:
        return tree_leaves(Interpreter(module).run(*args))

    graph = _trace(flat, fakes)
    if not any(compat.written_arguments(n) for n in graph.graph.nodes):
        return graph, ()
    written = _written_inputs(graph)
    function = compat.functionalized(Interpreter(graph).run, written)
    return _trace(function, fakes), written


def _written_inputs(graph: GraphModule) -> tuple[int, ...]:
    """Positions of placeholders that the graph writes into, directly or through views."""
    base: dict[Node, Node] = {}
    written: set[Node] = set()
    placeholders = graph.graph.find_nodes(op="placeholder")
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            base[node] = node
        elif node.op == "call_function" and node.args and isinstance(node.args[0], Node):
            written |= {base[a] for a in compat.written_arguments(node) if a in base}
            if compat.aliases_input(node.target) and node.args[0] in base:
                base[node] = base[node.args[0]]
    return tuple(i for i, n in enumerate(placeholders) if n in written)
