"""The passes of sequence parallelism on small programs, as text."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import CheckpointPolicy

from autodist.dry_run import dry_run
from autodist.passes.analysis.hardware import hardware
from autodist.passes.base import Context, Phase, run_passes
from autodist.passes.checkpoints import AskPolicies
from autodist.passes.sequence_parallel import Unmark
from autodist.plan import Plan
from autodist.runtime import axis, compat


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 24, bias=False)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(self.table(ids)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits = self.head(x.transpose(1, 2).flatten(2))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def sharded_text(tmp_path: Path) -> str:
    ids = torch.zeros(2, 7, dtype=torch.long)
    job = dry_run(Attention, lambda: (ids, ids), Plan(sp=2), 2, tmp_path)
    (record,) = [r for r in job.reports[0].records if r.name == "sequence_parallel"]
    assert record.after is not None
    lines = [line.strip() for line in record.after.full.splitlines()]
    calls = [re.sub(r"^\d+ +", "", line) for line in lines if line and not line.startswith("#")]
    return re.sub(r"l_self_modules_|_parameters_weight_|aten\.|autodist\.|, '0'|float32|int64|: bool", "",
                  "\n".join(c for c in calls if "(" in c or "return" in c))  # fmt: skip


def test_attention_and_its_loss(tmp_path: Path) -> None:
    # Seven positions on two ranks: pieces of four, one position of padding.
    assert_expected_inline(sharded_text(tmp_path), """\
unshard: [11, 8] = unshard(table, 1)
unshard_1: [24, 8] = unshard(mix, 1)
unshard_2: [11, 8] = unshard(head, 1)
slice_1: [2, 4] = slice(l_ids_, 1, 1, 7, 4, True)
embedding: [2, 4, 8] = embedding(unshard, slice_1)
linear: [2, 4, 24] = linear(embedding, unshard_1)
reshape: [2, 4, 3, 2, 4] = reshape(linear, [2, 4, 3, 2, 4])
permute: [3, 2, 2, 4, 4] = permute(reshape, [2, 0, 3, 1, 4])
unbind: ([2, 2, 4, 4], [2, 2, 4, 4], [2, 2, 4, 4]) = unbind.int(permute)
getitem: [2, 2, 4, 4] = getitem(unbind, 0)
getitem_1: [2, 2, 4, 4] = getitem(unbind, 1)
getitem_2: [2, 2, 4, 4] = getitem(unbind, 2)
exchange: [2, 1, 7, 4] = exchange(getitem, 1, 1, 2, 1, 2, 1, 7, 4, True)
exchange_1: [2, 1, 7, 4] = exchange(getitem_1, 1, 1, 2, 1, 2, 1, 7, 4, True)
exchange_2: [2, 1, 7, 4] = exchange(getitem_2, 1, 1, 2, 1, 2, 1, 7, 4, True)
scaled_dot_product_attention: [2, 1, 7, 4] = scaled_dot_product_attention(exchange, exchange_1, exchange_2, None, 0.0, True)
exchange_3: [2, 2, 4, 4] = exchange(scaled_dot_product_attention, 2, 1, 7, 4, 1, 1, 2, 1, True)
transpose: [2, 4, 2, 4] = transpose.int(exchange_3, 1, 2)
reshape_1: [2, 4, 8] = reshape(transpose, [2, 4, 8])
linear_1: [2, 4, 11] = linear(reshape_1, unshard_2)
valid[4] = valid(linear_1, 1, 6, 4)
reshape_2[4, 1] = reshape(valid, [-1, 1])
detach: [2, 4, 11] = detach(linear_1)
last: [2, 1, 11] = last(detach, 1, 1, 6, 4)
where: [2, 4, 11] = where.self(reshape_2, linear_1, last)
reshape_3: [8, 11] = reshape(where, [8, 11])
slice_2: [2, 6] = slice.Tensor(l_labels_, 1, 1, 9223372036854775807)
flatten: [12] = flatten.using_ints(slice_2)
slice_3: [8] = slice(flatten, 0, 2, 6, 4, True)
cross_entropy_loss: [8] = cross_entropy_loss(reshape_3, slice_3, None, 0)
to: [8] = to.dtype(cross_entropy_loss, )
valid_1[8] = valid(to, 2, 6, 4)
reshape_4[8] = reshape(valid_1, [-1])
where_1: [8] = where.ScalarOther(reshape_4, to, 0)
sum_1: [] = sum(where_1)
reduce: [] = reduce(sum_1)
ne[8] = ne.Scalar(slice_3, -100)
to_1: [8] = to.dtype(ne, )
valid_2[8] = valid(to_1, 2, 6, 4)
reshape_5[8] = reshape(valid_2, [-1])
where_2: [8] = where.ScalarOther(reshape_5, to_1, 0)
sum_2: [] = sum(where_2)
reduce_1: [] = reduce(sum_2)
div: [] = div.Tensor(reduce, reduce_1)
to_2: [] = to.dtype(div, )
return [to_2]""")  # noqa: E501


def test_unmark() -> None:
    """The markers are the identity in a joint graph."""
    graph = Graph()
    x = graph.placeholder("x")
    first = graph.call_function(axis.vary, (x, "sp"))
    second = graph.call_function(axis.settle, (first, "sp"))
    graph.output((graph.call_function(torch.ops.aten.sin.default, (second,)), second))
    value = torch.arange(3.0)
    for node in graph.nodes:
        node.meta["val"] = value
    before = GraphModule(nn.Module(), graph)
    expected = before(value)
    after = run_passes(before, [Unmark()], Context(Phase.JOINT, hardware("cpu")), [])
    assert [n.name for n in after.graph.nodes] == ["x", "sin_default", "output"]
    for got, wanted in zip(after(value), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_policies_are_asked_of_the_operators_that_run() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    product = graph.call_function(torch.ops.aten.mm.default, (x, x))
    other = graph.call_function(torch.ops.aten.sin.default, (product,))
    graph.output((other,))
    for node in graph.nodes:
        node.meta = {"val": torch.ones(2, 2), **compat.checkpoint_tags(3)}

    def policy(target: object, args: object, kwargs: object) -> CheckpointPolicy:
        wanted = target is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE

    made = GraphModule(nn.Module(), graph)
    run_passes(made, [AskPolicies({3: policy})], Context(Phase.JOINT, hardware("cpu")), [])
    assert product.meta["recompute"] is CheckpointPolicy.MUST_SAVE
    assert other.meta["recompute"] is CheckpointPolicy.PREFER_RECOMPUTE
