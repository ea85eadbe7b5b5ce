"""Each pass: the text of a small graph before and after, and the same results when both are run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from autodist.passes.analysis.hardware import hardware
from autodist.passes.base import Context, Pass, PassError, Phase, Record, check_order, run_passes
from autodist.passes.bucket import Bucket
from autodist.passes.lower import Lower
from autodist.passes.overlap import Overlap
from autodist.passes.zero import MergeReads, NarrowGathers
from autodist.runtime import compat, dialect
from tests.ranks import run_ranks

F32, BF16 = torch.float32, torch.bfloat16
ROWS = 5  # uneven on two ranks: chunks of 3 and 2


def context(phase: Phase, group: str) -> Context:
    return Context(phase, hardware("cpu"), group_sizes={group: 2})


def group() -> str:
    return dist.group.WORLD.group_name


def shard(seed: int, columns: int = 4) -> torch.Tensor:
    whole = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(seed))
    return whole[:3] if dist.get_rank() == 0 else whole[3:]


def text(graph: GraphModule) -> str:
    """The graph, one short line a node; the group's name as 'dp'."""
    lines = []
    for node in graph.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_short(node.args[0])}")
        elif node.op == "call_function":
            target = getattr(node.target, "__name__", str(node.target)).split(".")[0]
            args = ", ".join("dp" if a == group() else _short(a) for a in node.args)
            lines.append(f"{_short(node)} = {target}({args})")
    return "\n".join(lines)


def _short(argument: Any) -> str:
    text = re.sub(r"torch\.|_default|_into_tensor|_tensor|_scatter(?=_coal)", "", str(argument))
    return text.replace("convert_element_type", "convert")


def read_twice(a: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    g = group()
    y = x @ dialect.unshard(a, ROWS, 2, F32, g)
    z = y @ dialect.unshard(a, ROWS, 2, F32, g).t()
    one = dialect.reduce_grad(y.t() @ z, 2, F32, g)
    two = dialect.reduce_grad(z.t()[:4] @ z, 2, F32, g)
    return [z, one + two]


def cast(a: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    whole = dialect.unshard(a, ROWS, 2, F32, group())
    narrow = torch.ops.prims.convert_element_type.default(whole, BF16)
    return [x.to(BF16) @ narrow]


def layers(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    g = group()
    for weight in (a, b, c):
        x = torch.relu(x @ dialect.unshard(weight, ROWS, 2, F32, g)) @ torch.ones(4, ROWS)
    return [x]


def gradients(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    g = group()
    one = x.t() @ y
    first = dialect.reduce_grad(one, 2, F32, g)
    second = dialect.reduce_grad((one * 2).sin(), 2, F32, g)
    third = dialect.average_grad(one.sum(), 2, F32, g)
    return [first, second, third]


PROGRAMS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[torch.Tensor, ...]], list[Pass], Phase]] = {
    "merge_reads": (read_twice, lambda: (shard(0), torch.randn(4, ROWS)), [MergeReads()], Phase.JOINT),
    "narrow_gathers": (cast, lambda: (shard(0), torch.randn(4, ROWS)), [NarrowGathers()], Phase.JOINT),
    "bucket": (
        layers,
        lambda: (shard(0), shard(1), shard(2), torch.randn(4, ROWS)),
        [Bucket(limit=170)],
        Phase.FORWARD_PART,
    ),
    "lower": (
        layers,
        lambda: (shard(0), shard(1), shard(2), torch.randn(4, ROWS)),
        [Bucket(limit=170), Lower()],
        Phase.FORWARD_PART,
    ),
    "overlap": (
        layers,
        lambda: (shard(0), shard(1), shard(2), torch.randn(4, ROWS)),
        [Lower(), Overlap(in_flight=100)],
        Phase.FORWARD_PART,
    ),
    "reductions": (
        gradients,
        lambda: (torch.randn(3, ROWS), torch.randn(3, 4)),
        [Bucket(), Lower(), Overlap()],
        Phase.BACKWARD_PART,
    ),
}


def before_and_after(name: str) -> tuple[str, str]:
    """Run a program as traced and after each of its passes; the texts around the last one."""
    program, make, passes, phase = PROGRAMS[name]
    torch.manual_seed(dist.get_rank())
    inputs = make()
    graph = make_fx(program, tracing_mode="fake")(*inputs)
    wanted = graph(*inputs)
    provided: list[Pass] = []
    for step in passes:
        before = text(graph)
        graph = step.apply(graph, context(phase, group()))
        graph.graph.lint()
        graph.recompile()
        provided.append(step)
        for got, want in zip(graph(*inputs), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    return before, text(graph)


def all_programs() -> dict[str, tuple[str, str]]:
    return {name: before_and_after(name) for name in PROGRAMS}


@pytest.fixture(scope="module")
def texts() -> dict[str, tuple[str, str]]:
    """The first rank's texts; that every rank ran every graph with equal results is checked on the way."""
    return run_ranks(all_programs, 2)[0]


def test_merge_reads(texts: dict[str, tuple[str, str]]) -> None:
    assert_expected_inline("\n--\n".join(texts["merge_reads"]), """\
unshard = unshard(a_1, 5, 2, float32, dp)
mm = mm(x_1, unshard)
unshard_1 = unshard(a_1, 5, 2, float32, dp)
t = t(unshard_1)
mm_1 = mm(mm, t)
t_1 = t(mm)
mm_2 = mm(t_1, mm_1)
reduce_grad = reduce_grad(mm_2, 2, float32, dp)
t_2 = t(mm_1)
slice_1 = slice(t_2, 0, 0, 4)
mm_3 = mm(slice_1, mm_1)
reduce_grad_1 = reduce_grad(mm_3, 2, float32, dp)
add = add(reduce_grad, reduce_grad_1)
return [mm_1, add]
--
unshard = unshard(a_1, 5, 2, float32, dp)
mm = mm(x_1, unshard)
t = t(unshard)
mm_1 = mm(mm, t)
t_1 = t(mm)
mm_2 = mm(t_1, mm_1)
t_2 = t(mm_1)
slice_1 = slice(t_2, 0, 0, 4)
mm_3 = mm(slice_1, mm_1)
add = add(mm_2, mm_3)
reduce_grad = reduce_grad(add, 2, float32, dp)
return [mm_1, reduce_grad]""")


def test_narrow_gathers(texts: dict[str, tuple[str, str]]) -> None:
    assert_expected_inline("\n--\n".join(texts["narrow_gathers"]), """\
unshard = unshard(a_1, 5, 2, float32, dp)
convert = convert_element_type(unshard, bfloat16)
_to_copy = _to_copy(x_1)
mm = mm(_to_copy, convert)
return [mm]
--
unshard = unshard(a_1, 5, 2, bfloat16, dp)
_to_copy = _to_copy(x_1)
mm = mm(_to_copy, unshard)
return [mm]""")


def test_bucket(texts: dict[str, tuple[str, str]]) -> None:
    assert_expected_inline("\n--\n".join(texts["bucket"]), """\
unshard = unshard(a_1, 5, 2, float32, dp)
mm = mm(x_1, unshard)
relu = relu(mm)
ones = ones([4, 5])
mm_1 = mm(relu, ones)
unshard_1 = unshard(b_1, 5, 2, float32, dp)
mm_2 = mm(mm_1, unshard_1)
relu_1 = relu(mm_2)
ones_1 = ones([4, 5])
mm_3 = mm(relu_1, ones_1)
unshard_2 = unshard(c_1, 5, 2, float32, dp)
mm_4 = mm(mm_3, unshard_2)
relu_2 = relu(mm_4)
ones_2 = ones([4, 5])
mm_5 = mm(relu_2, ones_2)
return [mm_5]
--
unshard_bucket = unshard_bucket([a_1, b_1], [5, 5], float32, dp)
getitem = getitem(unshard_bucket, 0)
getitem_1 = getitem(unshard_bucket, 1)
mm = mm(x_1, getitem)
relu = relu(mm)
ones = ones([4, 5])
mm_1 = mm(relu, ones)
mm_2 = mm(mm_1, getitem_1)
relu_1 = relu(mm_2)
ones_1 = ones([4, 5])
mm_3 = mm(relu_1, ones_1)
unshard_2 = unshard(c_1, 5, 2, float32, dp)
mm_4 = mm(mm_3, unshard_2)
relu_2 = relu(mm_4)
ones_2 = ones([4, 5])
mm_5 = mm(relu_2, ones_2)
return [mm_5]""")


def test_lower(texts: dict[str, tuple[str, str]]) -> None:
    assert_expected_inline("\n--\n".join(texts["lower"]), """\
unshard_bucket = unshard_bucket([a_1, b_1], [5, 5], float32, dp)
getitem = getitem(unshard_bucket, 0)
getitem_1 = getitem(unshard_bucket, 1)
mm = mm(x_1, getitem)
relu = relu(mm)
ones = ones([4, 5])
mm_1 = mm(relu, ones)
mm_2 = mm(mm_1, getitem_1)
relu_1 = relu(mm_2)
ones_1 = ones([4, 5])
mm_3 = mm(relu_1, ones_1)
unshard_2 = unshard(c_1, 5, 2, float32, dp)
mm_4 = mm(mm_3, unshard_2)
relu_2 = relu(mm_4)
ones_2 = ones([4, 5])
mm_5 = mm(relu_2, ones_2)
return [mm_5]
--
all_gather_coalesced = all_gather_into_tensor_coalesced([a_1, b_1], 2, dp)
getitem_2 = getitem(all_gather_coalesced, 0)
getitem_3 = getitem(all_gather_coalesced, 1)
wait = wait_tensor(getitem_2)
slice = slice(wait, 0, 0, 5)
wait_1 = wait_tensor(getitem_3)
slice_1 = slice(wait_1, 0, 0, 5)
mm = mm(x_1, slice)
relu = relu(mm)
ones = ones([4, 5])
mm_1 = mm(relu, ones)
mm_2 = mm(mm_1, slice_1)
relu_1 = relu(mm_2)
ones_1 = ones([4, 5])
mm_3 = mm(relu_1, ones_1)
all_gather = all_gather_into_tensor(c_1, 2, dp)
wait_2 = wait_tensor(all_gather)
slice_2 = slice(wait_2, 0, 0, 5)
mm_4 = mm(mm_3, slice_2)
relu_2 = relu(mm_4)
ones_2 = ones([4, 5])
mm_5 = mm(relu_2, ones_2)
return [mm_5]""")


def test_overlap(texts: dict[str, tuple[str, str]]) -> None:
    assert_expected_inline("\n--\n".join(texts["overlap"]), """\
all_gather = all_gather_into_tensor(a_1, 2, dp)
wait = wait_tensor(all_gather)
slice = slice(wait, 0, 0, 5)
mm = mm(x_1, slice)
relu = relu(mm)
ones = ones([4, 5])
mm_1 = mm(relu, ones)
all_gather_1 = all_gather_into_tensor(b_1, 2, dp)
wait_1 = wait_tensor(all_gather_1)
slice_1 = slice(wait_1, 0, 0, 5)
mm_2 = mm(mm_1, slice_1)
relu_1 = relu(mm_2)
ones_1 = ones([4, 5])
mm_3 = mm(relu_1, ones_1)
all_gather_2 = all_gather_into_tensor(c_1, 2, dp)
wait_2 = wait_tensor(all_gather_2)
slice_2 = slice(wait_2, 0, 0, 5)
mm_4 = mm(mm_3, slice_2)
relu_2 = relu(mm_4)
ones_2 = ones([4, 5])
mm_5 = mm(relu_2, ones_2)
return [mm_5]
--
all_gather = all_gather_into_tensor(a_1, 2, dp)
all_gather_1 = all_gather_into_tensor(b_1, 2, dp)
wait = wait_tensor(all_gather)
slice = slice(wait, 0, 0, 5)
mm = mm(x_1, slice)
relu = relu(mm)
ones = ones([4, 5])
mm_1 = mm(relu, ones)
all_gather_2 = all_gather_into_tensor(c_1, 2, dp)
wait_1 = wait_tensor(all_gather_1)
slice_1 = slice(wait_1, 0, 0, 5)
mm_2 = mm(mm_1, slice_1)
relu_1 = relu(mm_2)
ones_1 = ones([4, 5])
mm_3 = mm(relu_1, ones_1)
wait_2 = wait_tensor(all_gather_2)
slice_2 = slice(wait_2, 0, 0, 5)
mm_4 = mm(mm_3, slice_2)
relu_2 = relu(mm_4)
ones_2 = ones([4, 5])
mm_5 = mm(relu_2, ones_2)
return [mm_5]""")


def test_reductions(texts: dict[str, tuple[str, str]]) -> None:
    assert_expected_inline("\n--\n".join(texts["reductions"]), """\
t = t(x_1)
mm = mm(t, y_1)
mul = mul(mm, 2)
sin = sin(mul)
constant_pad_nd = constant_pad_nd(mm, [0, 0, 0, 1], 0)
constant_pad_nd_1 = constant_pad_nd(sin, [0, 0, 0, 1], 0)
reduce_scatter_coalesced = reduce_scatter_tensor_coalesced([constant_pad_nd, constant_pad_nd_1], avg, 2, dp)
getitem_2 = getitem(reduce_scatter_coalesced, 0)
getitem_3 = getitem(reduce_scatter_coalesced, 1)
wait = wait_tensor(getitem_2)
wait_1 = wait_tensor(getitem_3)
sum_1 = sum(mm)
all_reduce = all_reduce(sum_1, avg, dp)
wait_2 = wait_tensor(all_reduce)
return [wait, wait_1, wait_2]
--
t = t(x_1)
mm = mm(t, y_1)
mul = mul(mm, 2)
sin = sin(mul)
constant_pad_nd = constant_pad_nd(mm, [0, 0, 0, 1], 0)
constant_pad_nd_1 = constant_pad_nd(sin, [0, 0, 0, 1], 0)
reduce_scatter_coalesced = reduce_scatter_tensor_coalesced([constant_pad_nd, constant_pad_nd_1], avg, 2, dp)
getitem_2 = getitem(reduce_scatter_coalesced, 0)
getitem_3 = getitem(reduce_scatter_coalesced, 1)
sum_1 = sum(mm)
all_reduce = all_reduce(sum_1, avg, dp)
wait = wait_tensor(getitem_2)
wait_1 = wait_tensor(getitem_3)
wait_2 = wait_tensor(all_reduce)
return [wait, wait_1, wait_2]""")


# --- the runner ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DropsOutput(Pass):
    """A pass that breaks its contract."""

    name: ClassVar[str] = "drops_output"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.JOINT,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        output = graph.graph.find_nodes(op="output")[0]
        output.args = ([],)
        return graph


def small_graph() -> GraphModule:
    return make_fx(lambda x: [torch.relu(x) + 1], tracing_mode="fake")(torch.ones(2))


def test_the_runner_refuses_a_changed_interface() -> None:
    with pytest.raises(PassError, match="changed the graph's interface"):
        run_passes(small_graph(), [DropsOutput()], context(Phase.JOINT, "g"), [])


def test_the_runner_refuses_a_wrong_order() -> None:
    check_order([Lower(), Overlap()])
    with pytest.raises(PassError, match=r"'overlap' requires \['collectives'\]"):
        check_order([Overlap(), Lower()])


def test_records() -> None:
    records: list[Record] = []
    run_passes(small_graph(), [MergeReads(), Lower()], context(Phase.JOINT, "g"), records, True)
    assert [r.name for r in records] == ["merge_reads"]  # lower is for partitioned graphs
    before, after = records[0].before, records[0].after
    assert before is not None and after is not None
    assert "relu" in before.full and "relu" in after.folded


# --- order through Inductor ------------------------------------------------------------------------


def order_in_code() -> tuple[list[str], list[str], float]:
    """The collectives and matmuls of a scheduled graph, and those of the code Inductor makes of it."""
    from autodist.compiler import KEEP_ORDER

    torch.manual_seed(0)
    inputs = (shard(0), shard(1), shard(2), torch.randn(4, ROWS))
    graph = make_fx(layers, tracing_mode="fake")(*inputs)
    wanted = graph(*inputs)[0]
    for step in (Lower(), Overlap(in_flight=100)):
        graph = step.apply(graph, context(Phase.FORWARD_PART, group()))
    graph.recompile()
    kinds = {"all_gather_into_tensor": "gather", "wait_tensor": "wait", "mm": "mm"}
    planned = [kinds[n.target.__name__.split(".")[0]] for n in graph.graph.nodes
               if n.op == "call_function" and n.target.__name__.split(".")[0] in kinds]  # fmt: skip

    def compiled() -> torch.Tensor:
        with torch.no_grad():
            return compat.compile_fx(graph, list(inputs), config_patches=KEEP_ORDER)(*inputs)[0]

    got, code = run_and_get_code(compiled)
    body = code[0][code[0].index("def call(") :]
    calls = r"\b(all_gather_into_tensor|wait_tensor|extern_kernels\.mm)(?:\.default)?\("
    found = re.findall(calls, body)
    return planned, [kinds[f.split(".")[-1]] for f in found], (got - wanted).abs().max().item()


def test_the_schedule_survives_inductor() -> None:
    for planned, found, error in run_ranks(order_in_code, 2):
        assert planned[:3] == ["gather", "gather", "wait"]  # the second gather is issued ahead of its use
        assert found == planned
        assert error < 1e-5


# --- writes into weights ---------------------------------------------------------------------------


class Writes(torch.nn.Module):
    def __init__(self, view: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 4))
        self.view = view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            (self.weight.t() if self.view else self.weight).clamp_(-1, 1)
        return (x @ self.weight).sum()


def writing_models() -> list[str]:
    messages = []
    for view in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(Writes(view), backend="autodist", options={"lowering": "eager"})
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
            compiled(torch.ones(2, 4))
        messages.append(str(caught.value))
    return messages


def test_a_write_into_a_weight_is_refused() -> None:
    for messages in run_ranks(writing_models, 2):
        for message in messages:
            assert "(clamp_) writes into a weight" in message and "test_passes.py" in message
