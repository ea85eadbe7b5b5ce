"""Costs, lifetimes, timelines, emitted programs: against known answers and measurement."""

from __future__ import annotations

import gc
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from textwrap import dedent, indent
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from autodist.passes.analysis.cost import (
    bucket_bytes,
    collective_bytes,
    collective_seconds,
    flops,
    graph_seconds,
    is_collective_start,
    is_wait,
    node_seconds,
)
from autodist.passes.analysis.fusion import fuse
from autodist.passes.analysis.hardware import Hardware, detect, from_properties, hardware
from autodist.passes.analysis.liveness import Liveness, liveness
from autodist.passes.analysis.timeline import COMMUNICATION, COMPUTE, chrome_trace, simulate
from autodist.passes.analysis.wrapper import wrapper_peak
from autodist.runtime import compat, dialect
from tests.allocations import peak_bytes

aten, comm = torch.ops.aten, torch.ops._c10d_functional
MIB = 2**20

# 1000 FLOP/s, 100 B/s of memory, 1 s a launch; 10 B/s and 2 s between ranks of a node.
TOY = Hardware(
    name="toy",
    flops={torch.float32: 1000.0, torch.bfloat16: 4000.0},
    memory_bandwidth=100.0,
    memory=None,
    launch=1.0,
    link_bandwidth=10.0,
    link_latency=2.0,
    network_bandwidth=1.0,
    network_latency=20.0,
    ranks_per_node=4,
    host_bandwidth=5.0,
    host_memory=0,
)


def traced(function: Callable[..., Any], *inputs: Any, symbolic: bool = False) -> GraphModule:
    return make_fx(function, tracing_mode="symbolic" if symbolic else "fake")(*inputs)


def node_of(graph: GraphModule, target: Any) -> Node:
    return graph.graph.find_nodes(op="call_function", target=target)[0]


def floats(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


# --- hardware -------------------------------------------------------------------------------------


def test_hardware_names() -> None:
    for name in ("cpu", "a100-40g", "a100-80g", "h100-80g", "h200", "b200"):
        assert hardware(name).name == name
    with pytest.raises(ValueError, match=r"no hardware called 'h100'; use one of cpu, .*h100-80g"):
        hardware("h100")


def test_hardware_without_a_rate_for_a_type() -> None:
    h100 = hardware("h100-80g")
    assert h100.flops_of(torch.bfloat16) > 10 * h100.flops_of(torch.float32)
    assert h100.flops_of(torch.int64) == h100.flops_of(torch.float32)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GH200 480GB", "NVIDIA GH200 480GB"),
    ],
)
def test_detected_hardware(device: str, name: str) -> None:
    properties = SimpleNamespace(name=device, total_memory=123, multi_processor_count=132)
    found = from_properties(properties)
    assert (found.name, found.memory) == (name, 123)


def test_detect() -> None:
    assert detect(torch.device("cpu")).name == "cpu"
    with pytest.raises(ValueError, match="device 'meta' is neither cpu nor cuda"):
        detect(torch.device("meta"))


# --- cost of a node -------------------------------------------------------------------------------


def test_matrix_product_is_bound_by_arithmetic_or_by_memory() -> None:
    graph = traced(lambda a, b: a @ b, floats(8, 16), floats(16, 4))
    product = node_of(graph, aten.mm.default)
    moved = 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert flops(product) == 2 * 8 * 16 * 4
    assert node_seconds(product, TOY) == pytest.approx(moved / 100 + 1)
    assert node_seconds(product, replace(TOY, memory_bandwidth=1e9)) == pytest.approx(1024 / 1000 + 1)


def test_rate_depends_on_the_type() -> None:
    def seconds(dtype: torch.dtype) -> float:
        graph = traced(torch.mm, floats(8, 8, dtype=dtype), floats(8, 8, dtype=dtype))
        return node_seconds(node_of(graph, aten.mm.default), replace(TOY, memory_bandwidth=1e9))

    assert (seconds(torch.float32) - 1) / (seconds(torch.bfloat16) - 1) == pytest.approx(4)


def test_symbolic_sizes_count_at_their_hints() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        return torch.softmax(a @ b, -1).sum(0)

    inputs = floats(6, 8), floats(8, 10)
    fixed, symbolic = traced(function, *inputs), traced(function, *inputs, symbolic=True)
    assert isinstance(node_of(symbolic, aten.mm.default).meta["val"].shape[0], torch.SymInt)
    for fused in (False, True):
        costs = [sum(graph_seconds(g.graph, TOY, fused=fused).values()) for g in (fixed, symbolic)]
        assert costs[0] == pytest.approx(costs[1])
        assert liveness(fixed, fused=fused).peak == liveness(symbolic, fused=fused).peak


def test_views_items_and_inputs_cost_nothing() -> None:
    def function(a: Tensor) -> tuple[Tensor, ...]:
        first, second = a.t().view(2, 4, 4).unbind(0)
        return first[1:], second.expand(3, 4, 4)

    graph = traced(function, floats(4, 8).t().contiguous().t())
    assert {node_seconds(n, TOY) for n in graph.graph.nodes} == {0.0}


def test_bytes_are_those_of_memory_touched() -> None:
    expanded = traced(lambda a: a.expand(10, 5) + 1, floats(1, 5))
    assert node_seconds(node_of(expanded, aten.add.Tensor), TOY) == 4 * (50 + 5) / 100 + 1
    table = traced(lambda w, i: w[i] * 1, floats(1000, 5), torch.zeros(3, dtype=torch.long))
    assert node_seconds(node_of(table, aten.index.Tensor), TOY) == (4 * 2 * 15 + 8 * 3) / 100 + 1


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention(kv_heads: int) -> None:
    """The forward makes two products over queries and keys, the backward five."""
    query = floats(2, 4, 6, 8)
    key, value = floats(2, kv_heads, 10, 8), floats(2, kv_heads, 10, 8)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]

    def backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
        target = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return target(out, q, k, v, out, lse, 0.0, False)

    once = traced(forward, query, key, value)
    again = traced(backward, query, key, value, query, floats(2, 4, 6))
    product = 2 * 2 * 4 * 6 * 10 * 8
    assert [flops(n) for n in once.graph.nodes if flops(n)] == [2 * product]
    assert [flops(n) for n in again.graph.nodes if flops(n)] == [5 * product]


def test_flops_of_other_products() -> None:
    before_autograd = make_fx(
        lambda x, w, v: (torch.nn.functional.linear(x, w), x.matmul(w.t()), x @ v),
        tracing_mode="fake",
        pre_dispatch=True,
    )(floats(3, 5), floats(7, 5), floats(5))
    counted = [flops(n) for n in before_autograd.graph.nodes if flops(n)]
    assert counted == [2 * 3 * 5 * 7, 2 * 3 * 5 * 7, 2 * 3 * 5]
    convolved = traced(lambda x, w: torch.conv2d(x, w), floats(2, 3, 8, 8), floats(4, 3, 3, 3))
    assert flops(node_of(convolved, aten.convolution.default)) == 2 * (2 * 4 * 6 * 6) * (3 * 3 * 3)


def test_fused_chain_costs_one_kernel() -> None:
    graph = traced(lambda a: torch.relu(a + 1) * 2, floats(25))
    unfused = graph_seconds(graph.graph, TOY, fused=False)
    fused = graph_seconds(graph.graph, TOY, fused=True)
    assert sum(unfused.values()) == 3 * (200 / 100 + 1)
    assert sum(fused.values()) == fused[node_of(graph, aten.mul.Tensor)] == 200 / 100 + 1


# --- cost of collectives --------------------------------------------------------------------------


def test_collective_seconds() -> None:
    # 4 ranks on one node: 3 hops of 2 s, three quarters of 80 bytes at 10 B/s.
    assert collective_seconds(80, 4, TOY, "all_gather") == 3 * 2 + 6
    assert collective_seconds(80, 4, TOY, "reduce_scatter") == 3 * 2 + 6
    assert collective_seconds(80, 4, TOY, "all_to_all") == 3 * 2 + 6
    assert collective_seconds(80, 4, TOY, "all_reduce") == 2 * (3 * 2 + 6)
    # 8 ranks on two nodes: 6 hops inside, one between; four network cards of 1 B/s a node.
    assert collective_seconds(80, 8, TOY, "all_gather") == 6 * 2 + 20 + 70 / 4
    assert collective_seconds(80, 1, TOY, "all_gather") == 0
    with pytest.raises(ValueError, match="no collective of kind 'gather'; use one of all_gather"):
        collective_seconds(80, 4, TOY, "gather")


@pytest.mark.parametrize("num_ranks", [2, 8, 64])
@pytest.mark.parametrize("name", ["cpu", "a100-80g", "h100-80g"])
def test_bucket_bytes(name: str, num_ranks: int) -> None:
    machine = hardware(name)
    latency = collective_seconds(0, num_ranks, machine, "all_gather")
    size = bucket_bytes(num_ranks, machine)
    assert MIB <= size <= 256 * MIB
    if MIB < size < 256 * MIB:
        seconds = collective_seconds(size, num_ranks, machine, "all_gather")
        assert latency / seconds == pytest.approx(0.1, rel=1e-3)


def test_bucket_bytes_stay_in_bounds() -> None:
    assert bucket_bytes(1, TOY) == bucket_bytes(4, TOY) == MIB
    assert bucket_bytes(4, replace(TOY, link_latency=1e9)) == 256 * MIB


def collective_graph(*, through_list: bool = False) -> GraphModule:
    """Gather a doubled shard of 25 floats over 4 ranks while ones are added; return both sums."""

    def function(shard: Tensor) -> tuple[Tensor, Tensor]:
        sent = shard * 2
        if through_list:
            started = comm.all_gather_into_tensor_coalesced([sent], 4, "g")[0]
        else:
            started = comm.all_gather_into_tensor(sent, 4, "g")
        work = torch.ones(50) + 1
        return work.sum(), comm.wait_tensor(started).sum()

    return traced(function, floats(25))


def test_collectives_are_recognised() -> None:
    graph = collective_graph()
    starts = [n for n in graph.graph.nodes if is_collective_start(n)]
    assert [n.target for n in starts] == [comm.all_gather_into_tensor.default]
    assert [n.target for n in graph.graph.nodes if is_wait(n)] == [comm.wait_tensor.default]
    assert node_seconds(starts[0], TOY) == TOY.launch


def test_payload_is_the_whole_tensor() -> None:
    graph = torch.fx.Graph()
    whole, part = graph.placeholder("whole"), graph.placeholder("part")
    whole.meta["val"], part.meta["val"] = floats(8, 5), floats(2, 5)

    def payload(target: Any, *args: Any, val: Any) -> int:
        node = graph.call_function(target, args)
        node.meta["val"] = val
        return collective_bytes(node)

    big, small = floats(8, 5), floats(2, 5)
    gather, reduce = comm.all_gather_into_tensor, comm.reduce_scatter_tensor
    gathers = comm.all_gather_into_tensor_coalesced.default
    assert payload(gather.default, part, 4, "g", val=big) == 160
    assert payload(gathers, [part, part], 4, "g", val=[big, big]) == 320
    assert payload(reduce.default, whole, "sum", 4, "g", val=small) == 160
    assert payload(comm.all_reduce.default, whole, "sum", "g", val=big) == 160
    assert payload(comm.all_to_all_single.default, whole, [2], [2], "g", val=big) == 160
    half = torch.bfloat16
    assert payload(dialect.unshard, part, 8, 4, half, "g", val=big.to(half)) == 80
    assert payload(dialect.reduce_grad, whole, 4, half, "g", val=small.to(half)) == 80
    buckets = payload(dialect.reduce_bucket, [whole, whole], 4, half, "g", val=[small, small])
    assert buckets == 160
    assert payload(dialect.average_grad, whole, 4, half, "g", val=big.to(half)) == 80


# --- liveness -------------------------------------------------------------------------------------


def by_name(found: Liveness) -> dict[str, int]:
    return {n.name: live for n, live in found.live.items()}


def test_liveness_of_a_chain() -> None:
    graph = traced(lambda x: (x + 1).relu().sum(), floats(100))
    freed, kept = liveness(graph, free_inputs=True), liveness(graph, free_inputs=False)
    assert list(freed.live.values()) == [400, 800, 800, 404, 4]
    assert list(kept.live.values()) == [400, 800, 1200, 804, 404]
    assert (kept.peak, kept.peak_node.name, kept.held) == (1200, "relu", 404)
    assert [(b.name, b.num_bytes) for b in kept.top] == [("x_1", 400), ("add", 400), ("relu", 400)]
    assert (freed.peak, freed.peak_node.name, freed.held) == (800, "add", 4)


def test_liveness_of_aliases() -> None:
    """A view, an item of a tuple and an in-place result keep their base's memory, and add none."""

    def function(x: Tensor) -> Tensor:
        first, second = torch.split(x.clone(), 5)
        second = second.t().relu_()
        return second.sum() + first.sum()

    live = by_name(liveness(traced(function, floats(10, 10)), free_inputs=True))
    assert live["clone"] == 800
    assert live["relu_"] == live["getitem_1"] == live["split"] == 400
    assert (live["sum_1"], live["sum_2"], live["add"]) == (404, 408, 12)


def test_liveness_of_inputs_and_outputs() -> None:
    """An input that nothing reads stays to the end; what is returned stays beyond it."""

    def function(unread: Tensor, returned: Tensor, read: Tensor) -> tuple[Tensor, ...]:
        return (read + 1).relu(), returned

    graph = traced(function, floats(1), floats(10), floats(100))
    found = liveness(graph, free_inputs=True)
    assert by_name(found)["output"] == 4 + 40 + 400
    assert found.held == 40 + 400
    only_last = liveness(graph, free_inputs=lambda node: node.name.startswith("returned"))
    assert only_last.held == 4 + 40 + 400 + 400


def test_inputs_of_the_captured_function_are_kept_by_default() -> None:
    graphs = []

    def compiler(graph: GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return compat.boxed(graph)

    layer = torch.nn.Linear(10, 10, bias=False)
    backend = compat.aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    compiled = torch.compile(lambda x: layer(x).sin().sum(), backend=backend)
    compiled(torch.ones(10, 10, requires_grad=True)).backward()
    torch._dynamo.reset()
    forward, backward = graphs
    kept = {b.name for b in liveness(forward).top if b.dies == len(forward.graph.nodes)}
    assert {n.name for n in forward.graph.find_nodes(op="placeholder")} <= kept
    dies = {b.name: b.dies for b in liveness(backward, top=99).top}
    end = len(backward.graph.nodes)
    for node in backward.graph.find_nodes(op="placeholder"):
        if node.name in dies:
            assert (dies[node.name] == end) == node.name.startswith("primals")


@pytest.mark.parametrize("through_list", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_liveness_of_a_collective(fused: bool, through_list: bool) -> None:
    """What is sent lives until the wait, whose result is the start's buffer."""
    graph = collective_graph(through_list=through_list)
    live = by_name(liveness(graph, fused=fused, free_inputs=True))
    assert live["mul"] == 100 + 100
    start = "all_gather_into_tensor_coalesced" if through_list else "all_gather_into_tensor"
    assert live[start] == 100 + 400
    assert live["wait_tensor"] == 100 + 400 + 4
    assert live["sum_2"] == 400 + 8


def test_fused_values_have_no_memory() -> None:
    graph = traced(lambda x: ((x + 1).relu() * x).sum(), floats(100))
    found = liveness(graph, fused=True, free_inputs=True)
    assert by_name(found) == {
        "x_1": 400,
        "add": 400,
        "relu": 400,
        "mul": 400,
        "sum_1": 404,
        "output": 4,
    }


def test_what_a_fused_value_reads_lives_until_its_reader() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        inlined = torch.mm(x, w) + 1
        other = torch.mm(w, w).sum()
        return (inlined * 2).sum() + other

    live = by_name(liveness(traced(function, floats(10, 10), floats(10, 10)), fused=True))
    assert live["mm_1"] == 2 * 400 + 400
    assert live["sum_1"] == 400 + 400 + 4
    assert live["sum_2"] == 400 + 4 + 4


def test_items_of_a_tuple_die_apart() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        values, places = torch.sort(x)
        return values, places.sum()

    found = liveness(traced(function, floats(100)), fused=True, free_inputs=True)
    assert by_name(found)["sort"] == 400 + 400 + 800
    assert found.held == 400 + 8


def stored(function: Callable[..., Any], *inputs: Tensor) -> set[str]:
    graph = traced(function, *inputs)
    fusion = fuse(graph.graph)
    return {n.name for n in fusion.stored if n.op == "call_function"}


def test_what_is_stored() -> None:
    x, square = floats(10), floats(10, 10)
    # The result; nothing before it, through views or not.
    assert stored(lambda a: a.exp().view(2, 5).t() + 1, x) == {"add"}
    # Reductions, calls, and whatever a call reads.
    assert stored(lambda a: (a + 1).sum(0) * 2, square) == {"sum_1", "mul"}
    assert stored(lambda a: torch.mm(a + 1, a).relu() + 1, square) == {"add", "mm", "add_1"}
    # A value with several readers is computed in each of them, unless it reads much.
    shared = [floats(10) for _ in range(5)]
    assert stored(lambda a, *_: [(a + 1).exp(), (a + 1).sum()][0], *shared) == {"exp", "sum_1"}

    def two_readers(*values: Tensor) -> tuple[Tensor, Tensor]:
        total = sum(values[1:], values[0])
        return total.exp(), total.sum()

    assert stored(two_readers, *shared[:4]) == {"exp", "sum_1"}
    assert stored(two_readers, *shared) == {"add_3", "exp", "sum_1"}

    def one_reader(*values: Tensor) -> Tensor:
        return sum(values[1:], values[0]).exp()

    assert stored(one_reader, *(floats(10) for _ in range(8))) == {"exp"}
    assert stored(one_reader, *(floats(10) for _ in range(9))) == {"add_7", "exp"}


def test_a_stored_value_takes_over_memory_it_reads_in_place() -> None:
    def at_the_end(function: Callable[[Tensor], Any]) -> int:
        """Bytes alive when the last value is made, of matrices of 400 bytes."""
        found = liveness(traced(function, floats(10, 10)), fused=True, free_inputs=True)
        return list(found.live.values())[-2]

    assert at_the_end(lambda a: torch.mm(a, a).view(100).relu() + 1) == 400
    # Read at another position, of another size, returned too, or given: memory of its own.
    assert at_the_end(lambda a: torch.mm(a, a).roll(1, 0) + 1) == 800
    assert at_the_end(lambda a: torch.mm(a, a).double()) == 1200
    assert at_the_end(lambda a: next((b, b + 1) for b in [torch.mm(a, a)])) == 800
    assert at_the_end(lambda a: a + 1) == 800


# --- liveness against measurement -----------------------------------------------------------------


def test_measuring_allocations() -> None:
    with peak_bytes() as measured:
        kept = torch.empty(1000)
        torch.empty(500)
        del kept
        kept = torch.empty(10)
    assert (measured.peak, measured.held) == (4 * 1500, 40)
    with peak_bytes() as measured:
        del kept
    assert (measured.peak, measured.held) == (0, 0)


def grow(choose: random.Random, values: list[Tensor]) -> list[Tensor]:
    """One step of a random program on 16 x 16 matrices; its results."""
    a, b = choose.choices(values[-6:], k=2)
    match choose.randrange(8):
        case 0:
            return [torch.where(a > 0, a, b)]
        case 1:
            return [a + b]
        case 2:
            return [a.t()]
        case 3:
            return [a.relu().mul_(2)]
        case 4:
            return list(torch.cat([a, a]).split(16))
        case 5:
            return [a.sum(0, keepdim=True).expand(16, 16)]
        case 6:
            return [torch.max(a, 0)[0].expand(16, 16)]
        case _:
            return [a[choose.randrange(16)].clone().expand(16, 16)]


def random_graph(seed: int) -> GraphModule:
    choose = random.Random(seed)

    def function(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        values = [x, y, z]
        for _ in range(30):
            values += grow(choose, values)
        return values[-1], values[-4]

    graph = traced(function, *(floats(16, 16) for _ in range(3)))
    graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    graph.recompile()
    return graph


@pytest.mark.parametrize("seed", range(6))
def test_unfused_liveness_is_what_an_interpreter_allocates(seed: int) -> None:
    graph = random_graph(seed)
    predicted = liveness(graph, free_inputs=True)
    Interpreter(graph).boxed_run([torch.rand(16, 16) for _ in range(3)])
    with peak_bytes() as measured:
        result = Interpreter(graph).boxed_run([torch.rand(16, 16) for _ in range(3)])
    assert (measured.peak, measured.held) == (predicted.peak, predicted.held)
    del result
    arguments = [torch.rand(16, 16) for _ in range(3)]
    given = sum(a.nbytes for a in arguments)
    predicted = liveness(graph, free_inputs=False)
    with peak_bytes() as measured:
        result = graph(*arguments)
    assert (measured.peak, measured.held) == (predicted.peak - given, predicted.held - given)
    del result


@pytest.fixture
def one_rank() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield compat.mesh_group_name(init_device_mesh("cpu", (1,)))
    dist.destroy_process_group()


def test_what_is_sent_really_lives_until_the_wait(one_rank: str) -> None:
    def exchange(kind: str, x: Tensor) -> Tensor:
        sent = x * 2
        if kind == "exchange":
            started = comm.all_to_all_single(sent, [1000], [1000], one_rank)
        else:
            started = comm.all_reduce(sent, "sum", one_rank)
        del sent
        work = torch.ones(1000, 100) + torch.ones(1000, 100)
        return comm.wait_tensor(started).sum() + work.sum()

    x = torch.ones(1000, 250)
    for kind in ("exchange", "reduce"):
        graph = traced(partial(exchange, kind), x)
        predicted = liveness(graph, free_inputs=False)
        graph(x)
        with peak_bytes() as measured:
            graph(x)
        assert measured.peak == predicted.peak - x.nbytes


# --- timelines ------------------------------------------------------------------------------------


def test_timeline_of_an_overlapped_gather() -> None:
    graph = collective_graph()
    found = simulate(graph, TOY, {"g": 4}, fused=False)
    # mul: 1 + 2 s; start: 1 s; ones, add: 1 + 2 s, 1 + 4 s; sum: 1 + 2.04 s. The gather of 400
    # bytes takes 6 + 30 s from second 4, the other sum 1 + 4.04 s after it.
    compute = [(e.name, e.start, e.end) for e in found.events if e.stream == COMPUTE]
    assert compute == [
        ("mul", 0, pytest.approx(3)),
        ("all_gather_into_tensor", 3, pytest.approx(4)),
        ("ones", 4, pytest.approx(7)),
        ("add", 7, pytest.approx(12)),
        ("sum_1", 12, pytest.approx(15.04)),
        ("sum_2", 40, pytest.approx(45.04)),
    ]
    gathers = [(e.name, e.start, e.end, e.num_bytes) for e in found.events if e.stream == COMMUNICATION]
    assert gathers == [("all_gather_into_tensor", 4, 40, 400)]
    assert found.seconds == pytest.approx(45.04)
    assert found.exposed_seconds == pytest.approx(40 - 15.04)
    assert found.compute_seconds + found.exposed_seconds == pytest.approx(found.seconds)
    assert found.communication_seconds == 36
    assert found.peak_bytes == liveness(graph).peak


def test_collectives_queue_and_an_unfinished_one_counts() -> None:
    def function(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return comm.all_reduce(a, "sum", "one"), comm.all_reduce(b, "sum", "two")

    graph = traced(function, floats(10), floats(5))
    found = simulate(graph, TOY, lambda group: {"one": 2, "two": 4}[group])
    spans = [(e.start, e.end) for e in found.events if e.stream == COMMUNICATION]
    assert spans == [(1, 1 + 2 * (2 + 2)), (9, 9 + 2 * (6 + 1.5))]
    assert (found.seconds, found.compute_seconds, found.exposed_seconds) == (24, 2, 22)


def test_a_dialect_operator_blocks() -> None:
    graph = torch.fx.Graph()
    shard = graph.placeholder("shard")
    weight = graph.call_function(dialect.unshard, (shard, 8, 4, torch.float32, "g"))
    total = graph.call_function(aten.sum.default, (weight,))
    graph.output((total,))
    for node, value in ((shard, floats(2)), (weight, floats(8)), (total, torch.tensor(0.0))):
        node.meta["val"] = value
    found = simulate(GraphModule({}, graph), TOY, {"g": 4})
    assert found.exposed_seconds == collective_seconds(32, 4, TOY, "all_gather")
    assert found.compute_seconds == pytest.approx(1 + 1 + 36 / 100)


def test_waiting_for_an_item_of_a_bucket() -> None:
    found = simulate(collective_graph(through_list=True), TOY, {"g": 4}, fused=False)
    assert found.exposed_seconds == pytest.approx(40 - 15.04)


def test_chrome_trace() -> None:
    timeline = simulate(collective_graph(), TOY, {"g": 4})
    trace = chrome_trace({"forward": timeline, "backward": timeline}, "rank 3")
    events = json.loads(json.dumps(trace))["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {"rank 3", "phase", COMPUTE, COMMUNICATION}
    slices = [e for e in events if e["ph"] == "X"]
    assert {e["name"] for e in slices if e["tid"] == 0} == {"forward", "backward"}
    for track in (0, 1, 2):
        spans = [(e["ts"], e["ts"] + e["dur"]) for e in slices if e["tid"] == track]
        assert all(a[1] <= b[0] + 1e-3 for a, b in pairwise(spans))
        assert spans[-1][1] <= 2 * timeline.seconds * 1e6 + 1e-3
    assert max(e["args"]["bytes"] for e in events if e["ph"] == "C") == timeline.peak_bytes


# --- emitted programs -----------------------------------------------------------------------------

PROGRAM = """
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels
assert_size_stride = torch._C._dynamo.guards.assert_size_stride
empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu
reinterpret_tensor = torch._C._dynamo.guards._reinterpret_tensor
async_compile = AsyncCompile()
cpp_fused_0 = async_compile.cpp_pybinding(['float*'], 'void kernel() {}')
triton_poi_fused_0 = async_compile.triton('triton_poi_fused_0', 'def kernel(): pass')
from torch._C import _cuda_getCurrentRawStream as get_raw_stream
async_compile.wait(globals())
del async_compile

def call(args):
    INPUTS, = args
    args.clear()
BODY

def benchmark_compiled_module(times=10, repeat=10):
    from torch._dynamo.testing import rand_strided
    from torch._inductor.utils import print_performance
EXAMPLES
    fn = lambda: call([INPUTS])
    return print_performance(fn, times=times, repeat=repeat)

if __name__ == "__main__":
    raise AssertionError
"""


def program(body: str, **examples: str) -> str:
    """An emitted program around ``body``, with example inputs by name."""
    lines = "\n".join(f"    {name} = {value}" for name, value in examples.items())
    text = PROGRAM.replace("INPUTS", ", ".join(examples)).replace("EXAMPLES", lines)
    return text.replace("BODY", indent(dedent(body).strip(), "    "))


VECTOR = "rand_strided((100, ), (1, ), device='cpu', dtype=torch.float32)"


def test_program_with_reuse() -> None:
    code = program(
        """
        assert_size_stride(primals_1, (100, ), (1, ))
        buf0 = empty_strided_cpu((10, 10), (10, 1), torch.float32)
        cpp_fused_0(primals_1, buf0)
        del primals_1
        buf1 = reinterpret_tensor(buf0, (100, ), (1, ), 0); del buf0  # reuse
        buf2 = empty_strided_cpu((50, ), (1, ), torch.float64)
        extern_kernels.mm(buf1, buf2, out=buf2)
        del buf1
        buf3 = buf2; del buf2  # reuse
        buf4 = empty_strided_cpu((5, ), (1, ), torch.bfloat16)
        return (buf3, reinterpret_tensor(buf4, (1, ), (1, ), 0), )
        """,
        primals_1=VECTOR,
    )
    found = wrapper_peak(code, {})
    assert (found.peak, found.held) == (800, 410)
    assert found.statement == "buf2 = empty_strided_cpu((50, ), (1, ), torch.float64)"
    assert code.splitlines()[found.line - 1].strip() == found.statement
    with_input = wrapper_peak(code, {"primals_1": 1000})
    assert (with_input.peak, with_input.held) == (1400, 410)
    assert with_input.statement.startswith("buf0")


def test_program_with_library_calls() -> None:
    code = program(
        """
        buf0 = torch.ops.aten.cumsum.default(primals_1, dim=-1, dtype=torch.int64)
        buf1 = buf0
        assert_size_stride(buf1, (100, ), (1, ), 'torch.ops.aten.cumsum.default')
        del buf0
        buf2 = torch.ops.aten.max.dim(reinterpret_tensor(primals_1, (10, 10), (10, 1), 0), 0)
        buf3 = buf2[0]
        buf4 = buf2[1]
        del buf2
        del buf4
        buf5 = reinterpret_tensor(primals_1, (1, 1, 100), (100, 100, 1), 0)
        buf6 = reinterpret_tensor(buf3, (1, 1, 10), (10, 10, 1), 0)
        buf7 = extern_kernels.convolution(buf5, buf6, stride=(1,), padding=(0,), dilation=(1,),
            transposed=False, output_padding=(0,), groups=1, bias=None)
        return (buf1, buf3, )
        """,
        primals_1=VECTOR,
    )
    found = wrapper_peak(code, {})
    assert (found.peak, found.held) == (800 + 40 + 4 * 91, 800 + 40)


def test_program_with_a_collective() -> None:
    code = program(
        """
        collectives = torch.ops._c10d_functional
        buf0 = collectives.all_gather_into_tensor.default(primals_1, 4, 'g')
        buf1 = collectives.all_gather_into_tensor_coalesced.default([primals_1], 2, 'g')
        buf2 = buf1[0]
        del buf1
        torch.ops._c10d_functional.wait_tensor.default(buf0)
        del primals_1
        torch.ops._c10d_functional.wait_tensor.default(buf2)
        return (buf0, )
        """,
        primals_1=VECTOR,
    )
    found = wrapper_peak(code, {"primals_1": 400})
    assert (found.peak, found.held) == (400 + 1600 + 800, 1600)


def test_program_for_an_accelerator() -> None:
    """No such device is needed to follow it, and host memory does not count."""
    code = program(
        """
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            buf0 = empty_strided_cuda((100, ), (1, ), torch.float32)
            stream0 = get_raw_stream(0)
            triton_poi_fused_0.run(primals_1, buf0, 100, stream=stream0)
            del primals_1
            buf1 = empty_strided_cpu((1000, ), (1, ), torch.float32)
            buf2 = torch.ops.aten.cumsum.default(buf0, 0)
            del buf0
        return (buf2, )
        """,
        primals_1=VECTOR.replace("cpu", "cuda:0"),
    )
    found = wrapper_peak(code, {"primals_1": 400})
    assert (found.peak, found.held) == (800, 400)


SYMBOLIC = program(
    """
    s0 = primals_1
    assert_size_stride(primals_2, (s0, 2), (2, 1))
    buf0 = empty_strided_cpu((s0, 3*s0), (3*s0, 1), torch.float32)
    buf1 = torch.ops.aten.cumsum.default(primals_2, 0)
    return (buf0, buf1, )
    """,
    primals_1="4",
    primals_2="rand_strided((4, 2), (2, 1), device='cpu', dtype=torch.float32)",
)


def test_program_with_symbolic_sizes() -> None:
    assert wrapper_peak(SYMBOLIC, {}).peak == 4 * (4 * 12 + 4 * 2)
    assert wrapper_peak(SYMBOLIC, {}, {"s0": 10}).peak == 4 * (10 * 30 + 10 * 2)


def test_programs_that_cannot_be_followed() -> None:
    with pytest.raises(ValueError, match="not a program that Inductor emitted"):
        wrapper_peak("#include <torch/all.h>\nint main() {", {})
    with pytest.raises(ValueError, match="it has no function 'call'"):
        wrapper_peak("x = 1", {})
    unknown = program(
        """
        u0 = primals_1.item()
        buf0 = empty_strided_cpu((u0, ), (1, ), torch.float32)
        return (buf0, )
        """,
        primals_1="rand_strided((), (), device='cpu', dtype=torch.int64)",
    )
    with pytest.raises(ValueError, match=r"line \d+ of the emitted program .* needs a hint"):
        wrapper_peak(unknown, {})
    assert wrapper_peak(unknown, {}, {"u0": 25}).peak == 100


# --- emitted programs against measurement ---------------------------------------------------------


@pytest.fixture
def emitted() -> Any:
    """What Inductor emits, and the halves that it is given, while the test runs."""
    from torch._functorch import config as autograd_config
    from torch._inductor import config

    halves: list[GraphModule] = []

    class Partitioner(compat.CustomPartitionerFn):
        def __call__(self, graph: GraphModule, inputs: Any, **options: Any) -> Any:
            parts = compat.min_cut_rematerialization_partition(graph, inputs, **options)
            halves.extend(parts)
            return parts

        def uuid(self) -> None:
            return None

    torch._dynamo.reset()
    with (
        config.patch(fx_graph_cache=False, custom_partitioner_fn=Partitioner()),
        autograd_config.patch(enable_autograd_cache=False),
    ):
        yield halves
    torch._dynamo.reset()


def small_llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def input_bytes(graph: GraphModule) -> dict[Node, int]:
    inputs = graph.graph.find_nodes(op="placeholder")
    return {n: n.meta["val"].untyped_storage().nbytes() for n in inputs}


def test_peak_of_a_compiled_llama(emitted: list[GraphModule], record_property: Any) -> None:
    """The emitted programs tell the measured peak; the graphs, before Inductor, tell it nearly."""
    from torch._inductor.utils import run_and_get_code

    model = small_llama()
    ids = torch.randint(0, 1000, (2, 128))
    compiled = torch.compile(model, dynamic=False)

    def step() -> None:
        compiled(input_ids=ids, labels=ids).loss.backward()

    _, (forward_code, backward_code) = run_and_get_code(step)
    model.zero_grad(set_to_none=True)
    gc.collect()
    with peak_bytes() as measured:
        step()
    forward, backward = emitted
    owned = {n.name for n in forward.graph.find_nodes(op="placeholder")}
    passed = {n.name: b for n, b in input_bytes(backward).items() if n.name not in owned}
    first, second = wrapper_peak(forward_code, {}), wrapper_peak(backward_code, passed)
    assert max(first.peak, second.peak) == pytest.approx(measured.peak, abs=100)
    assert second.held == measured.held

    def error(fused: bool) -> float:
        """Relative error of what the graphs predict above their owned inputs."""
        peaks = []
        for graph in emitted:
            kept = sum(b for n, b in input_bytes(graph).items() if n.name in owned)
            peaks.append(liveness(graph, fused=fused).peak - kept)
        return max(peaks) / measured.peak - 1

    record_property("error of the fused estimate", error(fused=True))
    assert abs(error(fused=True)) < 0.02
    assert error(fused=False) > 0.1


def test_hints_against_a_run_at_another_size(emitted: list[GraphModule]) -> None:
    from torch._inductor.utils import run_and_get_code

    def function(x: Tensor) -> Tensor:
        return torch.cumsum(torch.mm(x, x.t()), 0) * 2

    compiled = torch.compile(function, dynamic=True)
    _, (code,) = run_and_get_code(compiled, torch.rand(20, 8))
    (symbol,) = set(re.findall(r"empty_strided_cpu\(\((s\d+), s\d+\)", code))
    x = torch.rand(50, 8)
    with peak_bytes() as measured:
        result = compiled(x)
    found = wrapper_peak(code, {}, {symbol: 50})
    assert (found.peak, found.held) == (measured.peak, measured.held)
    assert result.nbytes == found.held
