"""From a captured program to a functional ATen graph and back.

Placement passes want the forward program in ATen operators as a person's program called them (attention,
cross-entropy and linear layers whole, *before* autograd takes them apart), without writes, and without
DTensors. So a captured program is cut in two:

    reads    placeholders, and ``unshard(parameter)`` once for each parameter
    core     everything else: a function of the other placeholders and of the weights read

The core is traced on the program's own fake values, functionalised, and given to the pass, which returns the
core it wants; that is put back behind the reads. Bodies of activation checkpoints are inlined and their
nodes tagged as torch tags them, so that the partitioner recomputes what the user asked to be recomputed. A
``torch.autograd.Function``, which tracing would take apart and lose the backward of, becomes an operator.
What a program writes into its inputs (buffers) is written by the new program too, at its end.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from autodist.passes.analysis.placement import PlacementError
from autodist.passes.graph import is_copy, output_of, where, writers
from autodist.runtime import compat, dialect
from autodist.runtime.compat import tree_leaves
from autodist.runtime.parameters import unshard

_aten = torch.ops.aten

RETURNED = "autodist_returned"
"""Where a graph's meta says which outputs go to the user alone; where it does not, Dynamo knows."""


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

    def parameters(self, positions: Container[int]) -> frozenset[str]:
        """Names of the placeholders that are weights, or the captured program's parameters.

        ``positions`` are those of its inputs that are parameters without saying so.
        """
        given = self.inputs[0].graph.find_nodes(op="placeholder") if self.inputs else []
        at = {n: i for i, n in enumerate(given)}
        mine = zip(self.inputs, self.graph.graph.find_nodes(op="placeholder"), self.fakes, strict=True)
        known = (p.name for n, p, x in mine if at.get(n) in positions or isinstance(x, torch.nn.Parameter))
        return self.weights.union(known)

    def places(self, captured: GraphModule) -> tuple[int, ...]:
        """Where among the inputs of ``captured``, whose core this is, each of the core's comes from."""
        own = {n.name: i for i, n in enumerate(captured.graph.find_nodes(op="placeholder"))}
        sources = (n if n.op == "placeholder" else n.args[0] for n in self.inputs)
        return tuple(own[s.name] for s in sources)  # type: ignore[union-attr]

    def trace(self, function: Callable[..., Any]) -> GraphModule:
        """Trace ``function``, called with the core's inputs, to ATen before autograd."""
        return _trace(function, self.fakes)


def core_of(captured: GraphModule) -> Core:
    """The core of a captured program."""
    inline, policies = _inlined(captured)
    reads: dict[Node, Node] = {}
    for node in list(inline.graph.nodes):
        if node.target in _READS:
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
            _refuse_parameters(node, skip.difference(env))
            env[node] = body.node_copy(node, env.__getitem__)
    module = GraphModule(inline, body)
    fakes = tuple(_fake(n) for n in inputs)
    outputs = len(tree_leaves(output_of(module).args[0]))
    graph, written = functional(_aten_graph(module, fakes), fakes)
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


def _refuse_parameters(node: Node, sharded: set[Node]) -> None:
    """Raise for a node that computes with a sharded parameter itself, not with what reading it gives."""
    taken = next((n for n in node.all_input_nodes if n in sharded), None)
    if taken is not None:
        raise PlacementError(
            f"'{node.name}' ({where(node)}) computes with the sharded parameter '{taken.name}' itself, as "
            "model.parameters() gives it. Here a program reads weights through their modules: write "
            "layer.weight, say, for each layer."
        )


def rebuilt(captured: GraphModule, core: Core, new: GraphModule, divisor: int | None = None) -> GraphModule:
    """The captured program with ``new`` for its core; weights' gradients are divided by ``divisor``, or as
    before."""
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
        shard = env[node.args[0].name]  # type: ignore[union-attr]
        place = _READS[node.target]
        rest = node.args[1:]
        if divisor is not None:
            rest = (*node.args[1:place], divisor, *node.args[place + 1 :])
        read = graph.call_function(node.target, (shard, *rest))  # type: ignore[arg-type]
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


def returned_to_user(captured: GraphModule, outputs: int) -> Collection[int]:
    """Which of a captured program's outputs go to whoever called the compiled model, and nowhere else."""
    known: Collection[int] | None = captured.meta.get(RETURNED)
    if known is not None:
        return known
    return range(outputs) if compat.returns_to_user() else ()


# --- pieces ----------------------------------------------------------------------------------------


_READS = {unshard: 1, dialect.unshard: 2, dialect.replica: 1}
"""What reads a weight, and which of its arguments says by how much gradients are divided.

Dynamo captures the function, of a DTensor; a captured step has the operators, of a shard.
"""


def _sharded(graph: GraphModule) -> set[Node]:
    """Placeholders that are read through ``unshard`` only."""
    found = graph.graph.find_nodes(op="placeholder")
    read = {n.args[0] for n in graph.graph.nodes if n.target in _READS}
    return {n for n in found if n in read or isinstance(n.meta.get("example_value"), DTensor)}


def _fake(node: Node) -> Any:
    """A fresh fake for an input of the core: what the captured program's own example is."""
    value = node.meta["example_value" if "example_value" in node.meta else "val"]
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
                target = _own_operator(module, node)
                if target is None:
                    raise PlacementError(
                        f"'{node.name}' ({where(node)}) is a hook, a torch.autograd.Function that draws, "
                        "writes or keeps constants, or the like: what it does to gradients is not known to "
                        "be right on pieces of sequences, and sequence parallelism does not carry it over. "
                        "Write it in operators that autograd knows, or as a torch.library.custom_op."
                    )
                made_call = made.call_function(target, tuple(env[a] for a in node.args[2:]))
                made_call.meta = {**node.meta, **tags}
                for user in node.users:
                    env[user] = made_call
                    if compat.result_count(target) > 1:
                        env[user] = made.call_function(operator.getitem, (made_call, user.args[1]))
                continue
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
            is_body = node.op == "get_attr" and all(_has_bodies(u.target) for u in node.users)
            if node in env or is_body:
                continue
            env[node] = made.node_copy(node, env.__getitem__)
            env[node].meta = {**node.meta, **(tags if node.op == "call_function" else {})}
            compat.copy_source(node, env[node])
        raise AssertionError("a graph without an output")

    made.output(copy(graph, {}, {}))
    return GraphModule(graph, made), policies


def _has_bodies(target: Any) -> bool:
    return compat.is_checkpoint(target) or compat.is_custom_gradient(target)


def _bind_results(call: Node, returned: Any, env: dict[Node, Node]) -> None:
    """A checkpoint returns a tuple, taken apart by getitem."""
    for user in call.users:
        env[user] = returned[user.args[1]]


def _trace(function: Callable[..., Any], fakes: Sequence[Any]) -> GraphModule:
    return compat.trace_before_autograd(function, fakes)


def functional(graph: GraphModule, fakes: Sequence[Any]) -> tuple[GraphModule, tuple[int, ...]]:
    """An ATen graph without writes, and which inputs it wrote: it returns their new values at its end."""
    if not any(compat.written_arguments(n) for n in graph.graph.nodes):
        return graph, ()
    written = _written_inputs(graph)
    function = compat.functionalized(Interpreter(graph).run, written)
    return _trace(function, fakes), written


def _aten_graph(module: GraphModule, fakes: Sequence[Any]) -> GraphModule:
    def flat(*args: Any) -> list[Any]:
        return tree_leaves(Interpreter(module).run(*args))

    return _trace(flat, fakes)


def _written_inputs(graph: GraphModule) -> tuple[int, ...]:
    """Positions of placeholders that the graph writes into, directly or through views."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    written = writers(graph, placeholders)
    return tuple(i for i, n in enumerate(placeholders) if n in written)


# --- gradients of the user's own -------------------------------------------------------------------

_FUNCTIONS = torch.library.Library("autodist_functions", "FRAGMENT")


def _own_operator(module: GraphModule, call: Node) -> Any:
    """``call``, a captured ``torch.autograd.Function``, as an operator with its forward and its backward.

    The operator returns what the function does, then the intermediate results that its backward reads. None
    for what is no such function, and for one that draws random numbers, writes its inputs or has constants.
    """
    if set(call.kwargs) != {"saved_for_backward_idx", "non_differentiable_idx"}:
        return None
    forward, backward = (getattr(module, str(a.target)) for a in call.args[:2])  # type: ignore[union-attr]
    outs, saved = output_of(forward).args[0]  # type: ignore[misc]
    inputs = forward.graph.find_nodes(op="placeholder")
    extra = [n for n in dict.fromkeys(saved) if n not in (*inputs, *outs)]
    given, made, kept = ([_example(n) for n in nodes] for nodes in (call.args[2:], (*outs, *extra), saved))
    plain = all(isinstance(v, (Tensor, torch.SymInt)) for v in given)
    if not plain or not all(isinstance(v, Tensor) for v in made) or len(set(outs)) < len(outs):
        return None
    graphs = (
        compat.trace_plain(lambda *a: tree_leaves(Interpreter(forward).run(*a)), given),
        compat.trace_plain(lambda *a: list(Interpreter(backward).run(*a)), [*made[: len(outs)], *kept]),
    )
    if any(_written_inputs(g) or _draws(g) or g.graph.find_nodes(op="get_attr") for g in graphs):
        return None
    types = zip(tree_leaves(output_of(graphs[0]).args[0]), outs, strict=False)
    if any(n.meta["val"].dtype != _example(out).dtype for n, out in types):  # they follow an autocast
        return None
    shown = [(v.shape, v.dtype) if isinstance(v, Tensor) else "size" for v in (*given, *made)]
    text = f"{forward.code}{backward.code}{call.kwargs}{shown}"
    name = f"function_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not hasattr(torch.ops.autodist_functions, name):
        shapes = {str(v.shape) for v in (*given, *made) if isinstance(v, Tensor)}
        local = len(shapes) == 1 and all(map(_is_pointwise, graphs)) and _keeps_zeros(graphs[1], len(outs))
        constant = frozenset(call.kwargs["non_differentiable_idx"])  # type: ignore[arg-type]
        _define(name, local, given, forward, backward, (inputs, outs, extra, saved), constant)
    return getattr(torch.ops.autodist_functions, name).default


def _draws(graph: GraphModule) -> bool:
    return any(compat.is_random(n.target) for n in graph.graph.nodes)


def _example(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, Node) else None


def _is_pointwise(graph: GraphModule) -> bool:
    calls = (n for n in graph.graph.nodes if n.op == "call_function")
    return all(torch.Tag.pointwise in getattr(n.target, "tags", ()) or is_copy(n) for n in calls)


def _keeps_zeros(backward: GraphModule, cotangents: int) -> bool:
    """Whether gradients are certainly zero where cotangents are: on padding they must be."""
    zero = set(backward.graph.find_nodes(op="placeholder")[:cotangents])
    for node in backward.graph.nodes:
        operands = node.args[:2]
        if node.target is _aten.mul.Tensor:
            holds = any(a in zero for a in operands if isinstance(a, Node))
        elif node.target in (_aten.add.Tensor, _aten.sub.Tensor):
            holds = all(isinstance(a, Node) and a in zero for a in operands)
        else:
            linear = is_copy(node) or node.target in (_aten.neg.default, _aten.div.Tensor)
            holds = linear and operands[0] in zero
        zero |= {node} if holds else set()
    return all(n is None or n in zero for n in output_of(backward).args[0])  # type: ignore[union-attr]


def _define(
    name: str,
    local: bool,
    given: Sequence[Any],
    forward: GraphModule,
    backward: GraphModule,
    roles: Any,
    constant: frozenset[int],
) -> None:
    """Register the operator; what is ``local`` is tagged pointwise, and runs on pieces like any that is.

    ``constant`` are the places of results that have no gradient.
    """
    operands, outs, extra, saved = roles
    count = len(outs) + len(extra)
    graph, copied = Graph(), dict[Node, Node]()
    graph.graph_copy(forward.graph, copied)
    graph.output([copied[n] for n in (*outs, *extra)])
    body = GraphModule(forward, graph)
    kinds = ("Tensor" if isinstance(v, Tensor) else "SymInt" for v in given)
    arguments = ", ".join(f"{kind} x{i}" for i, kind in enumerate(kinds))
    results = ", ".join(["Tensor"] * count)
    tags = (torch.Tag.pointwise,) if local else ()
    _FUNCTIONS.define(f"{name}({arguments}) -> {results if count == 1 else f'({results})'}", tags=tags)

    @compat.not_alone
    def run(*args: Any) -> Any:
        with torch.no_grad():
            results = Interpreter(body).run(*args)
        held = {compat.storage_key(a) for a in args if isinstance(a, Tensor)}
        fresh = []
        for result in results:  # an operator's results share no memory with its operands, nor one another
            fresh.append(result.clone() if compat.storage_key(result) in held else result)
            held.add(compat.storage_key(fresh[-1]))
        return fresh[0] if count == 1 else tuple(fresh)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values = dict(zip(operands, inputs, strict=True))
        values |= dict(zip((*outs, *extra), output if count > 1 else (output,), strict=True))
        kept = [values[n] for n in saved]
        ctx.places = [i for i, v in enumerate(kept) if isinstance(v, Tensor)]
        ctx.others = {i: v for i, v in enumerate(kept) if not isinstance(v, Tensor)}
        ctx.save_for_backward(*(kept[i] for i in ctx.places))
        ctx.results = [(v.shape, v.dtype, v.device) for v in (values[n] for n in outs)]

    def differentiate(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        kept = ctx.others | dict(zip(ctx.places, ctx.saved_tensors, strict=True))
        whole = [
            torch.zeros(shape, dtype=dtype, device=device) if g is None or i in constant else g
            for i, (g, (shape, dtype, device)) in enumerate(zip(cotangents, ctx.results, strict=False))
        ]
        with torch.no_grad():
            return tuple(Interpreter(backward).run(*whole, *(kept[i] for i in sorted(kept))))

    _FUNCTIONS.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autodist_functions::{name}", run, lib=_FUNCTIONS)
    torch.library.register_autograd(
        f"autodist_functions::{name}", differentiate, setup_context=remember, lib=_FUNCTIONS
    )
