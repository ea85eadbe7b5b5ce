"""Which memory is alive at each node of a graph.

Terms. A *buffer* is a storage: views, items of tuples and in-place results share their input's, and
a collective's wait returns the buffer its start made. A buffer is *born* at the node that makes it
and *dies* after the last node that reads it, by any name. At a node both its inputs and its outputs
are alive:

    live(node) = sum of the bytes of all buffers with born <= node <= dies

Graph inputs are alive from the start. Those which the caller keeps, constants, and what the graph
returns never die; inputs that nothing reads live to the end. What a collective sends lives until
its wait, except for an all-reduce, which works on a copy. What lies on the host has no bytes here,
and what is reloaded from there has memory from the start of the copy.

Two modes. Unfused, each node allocates its result: what an interpreter does. Fused, only values
that Inductor would store do, by the guess of :mod:`autodist.passes.analysis.fusion`; what an
unstored value reads lives until its readers have run, and a stored one may take over a buffer of
its size that dies there. Scratch memory inside kernels is in neither.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from autodist.passes.analysis.cost import collective_bytes, is_collective_start, is_wait
from autodist.passes.analysis.fusion import Fusion, fuse, storages, tensors
from autodist.passes.graph import tensor_bytes
from autodist.runtime import compat, offload
from autodist.runtime.compat import tree_leaves

_comm = torch.ops._c10d_functional
_WORKS_ON_COPY = {_comm.all_reduce.default, _comm.all_reduce_coalesced.default}


@dataclass(frozen=True)
class Buffer:
    """``name`` of the node that makes it; positions, in the graph, of birth and of the last use.

    ``dies`` is the number of nodes for a buffer that outlives the graph.
    """

    name: str
    num_bytes: int
    born: int
    dies: int


@dataclass(frozen=True)
class Liveness:
    """``live``: bytes alive at each node. ``peak``: the most, first reached at ``peak_node``.

    ``held``: bytes alive when the graph has returned, inputs that the caller keeps among them.
    ``top``: the largest buffers alive at the peak, largest first.
    """

    live: Mapping[Node, int]
    peak: int
    peak_node: Node
    held: int
    top: tuple[Buffer, ...]


def liveness(
    graph: GraphModule,
    *,
    fused: bool = False,
    free_inputs: bool | Callable[[Node], bool] | None = None,
    staged: bool = False,
    top: int = 10,
) -> Liveness:
    """Live bytes of a graph whose nodes carry fake values.

    ``free_inputs`` says of a placeholder (or of all) whether its buffer dies after its last use, as
    saved values do in a boxed call. By default these are the placeholders that are not inputs of
    the captured function: its caller holds those (parameters above all).
    """
    nodes = list(graph.graph.nodes)
    buffers = list(_buffers(graph.graph, fuse(graph.graph) if fused else None, _rule(free_inputs)))
    if staged:
        buffers += _staging(nodes)
    change = [0] * (len(nodes) + 2)
    for buffer in buffers:
        change[buffer.born] += buffer.num_bytes
        change[buffer.dies + 1] -= buffer.num_bytes
    live, total = {}, 0
    for position, node in enumerate(nodes):
        total += change[position]
        live[node] = total
    held = total + change[len(nodes)]
    peak_node = max(nodes, key=live.__getitem__)
    at = nodes.index(peak_node)
    alive = [b for b in buffers if b.born <= at <= b.dies and b.num_bytes]
    largest = sorted(alive, key=operator.attrgetter("num_bytes"), reverse=True)[:top]
    return Liveness(live, live[peak_node], peak_node, held, tuple(largest))


def is_on_host(node: Node) -> bool:
    """Whether a node's value lies in the host's memory: what has been offloaded."""
    return node.target is offload.offload_wait or bool(node.meta.get("host"))


def staging_bytes(node: Node) -> int:
    """What gloo allocates beside a collective's own tensors: it gathers into one flat buffer (and, for a
    list, sends from another), and reduces a copy of what it was given."""
    if node.target in _WORKS_ON_COPY:
        return 0
    staged = collective_bytes(node)
    if node.target is _comm.all_gather_into_tensor_coalesced.default:
        staged += sum(tensor_bytes(t) for n in node.all_input_nodes for t in tensors(n))
    return staged


def _staging(nodes: Sequence[Node]) -> list[Buffer]:
    position = {node: i for i, node in enumerate(nodes)}
    starts = [n for n in nodes if is_collective_start(n)]
    until = {n: max((position[w] for w in _waits(n)), default=position[n]) for n in starts}
    return [Buffer(f"{n.name} (staged)", staging_bytes(n), position[n], until[n]) for n in starts]


def _rule(free_inputs: bool | Callable[[Node], bool] | None) -> Callable[[Node], bool]:
    if free_inputs is None:
        return lambda node: compat.placeholder_index(node) is None
    return free_inputs if callable(free_inputs) else lambda node: bool(free_inputs)


def _buffers(graph: Graph, fusion: Fusion | None, frees: Callable[[Node], bool]) -> Iterator[Buffer]:
    position = {node: i for i, node in enumerate(graph.nodes)}
    same = shared_storages(graph)
    last = _last_reads(graph, position, fusion)
    made: dict[int, tuple[Node, int]] = {}
    dies: dict[int, int] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        until = last[node] if node.op != "placeholder" or frees(node) else len(position)
        until = len(position) if node.op == "get_attr" else until
        for tensor in tensors(node):
            key = same.get(compat.storage_key(tensor), compat.storage_key(tensor))
            if key not in made:
                size = compat.size_hint(tensor.untyped_storage().nbytes())
                stored = (fusion is None or node in fusion.stored) and not is_on_host(node)
                made[key] = (node, size if stored else 0)
            dies[key] = max(dies.get(key, 0), until)
    if fusion is not None:
        _take_over(fusion, made, dies, position)
    for key, (node, size) in made.items():
        start = node.args[0] if node.target is offload.reload_wait else node
        born = 0 if node.op in ("placeholder", "get_attr") else position[start]  # type: ignore[index]
        yield Buffer(node.name, size, born, dies[key])


def shared_storages(graph: Graph) -> dict[int, int]:
    """Storages that are one in reality though their fakes are two: the later's key to the
    earlier's.
    """
    same: dict[int, int] = {}
    for node in graph.nodes:
        if is_wait(node):
            original = tensors(node.args[0])
        elif node.target is operator.getitem:
            items = node.args[0].meta["val"][node.args[1]]
            original = [t for t in tree_leaves(items) if isinstance(t, torch.Tensor)]
        else:
            continue
        for mine, theirs in zip(storages(node), map(compat.storage_key, original), strict=True):
            if mine != theirs:
                same[mine] = same.get(theirs, theirs)
    return same


def _last_reads(graph: Graph, position: dict[Node, int], fusion: Fusion | None) -> dict[Node, int]:
    """The position after which nobody reads a node's value by this name; past the end if it is
    returned.

    Unstored values are read where their readers are.
    """
    end = len(position)
    last: dict[Node, int] = {}
    for node in reversed(graph.nodes):
        unread = end - 1 if node.op == "placeholder" else position[node]
        reads = (_read_at(u, position, fusion, last) for u in node.users)
        last[node] = max(reads, default=unread)
    for node in graph.nodes:
        if is_collective_start(node) and node.target not in _WORKS_ON_COPY:
            done = max((position[w] for w in _waits(node)), default=position[node])
            for sent in node.all_input_nodes:
                last[sent] = max(last[sent], done)
    return last


def _read_at(user: Node, position: dict[Node, int], fusion: Fusion | None, last: dict[Node, int]) -> int:
    if user.op == "output":
        return len(position)
    own_place = fusion is None or user in fusion.stored or user.target is operator.getitem
    return position[user] if own_place or not tensors(user) else last[user]


def _waits(start: Node) -> Iterator[Node]:
    for user in start.users:
        if is_wait(user):
            yield user
        elif user.target is operator.getitem:
            yield from _waits(user)


def _take_over(
    fusion: Fusion,
    made: dict[int, tuple[Node, int]],
    dies: dict[int, int],
    position: dict[Node, int],
) -> None:
    """End a buffer just before the node that continues in its memory."""
    key_of = {node: key for key, (node, _) in made.items()}
    for node, sources in fusion.takes_over.items():
        wanted = made[key_of[node]][1] if node in key_of else 0
        for source in sorted(sources, key=position.__getitem__):
            key = key_of.get(source)
            if key is not None and made[key][1] == wanted and dies[key] == position[node]:
                dies[key] -= 1
                break
