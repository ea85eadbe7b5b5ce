"""Tiles: a program whose token-local regions are made piece by piece trains like the whole one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.nn import functional as F

import autodist
from autodist.passes.base import Context, Decision, Phase
from autodist.passes.tile import Tile
from autodist.prepare import prepared_job
from autodist.runtime import compat
from autodist.runtime.outputs import WithheldOutput, WithheldOutputError
from tests.models import CASES
from tests.parity import check_gradients
from tests.ranks import run_ranks
from tests.sequence import fresh

VOCAB, WIDTH = 97, 8


class Tiny(nn.Module):
    """An embedding, a mean over the sequence (a boundary), an MLP and a head."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.drop = drop

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + x.mean(1, keepdim=True)
        x = x + self.down(F.dropout(F.silu(self.up(x)), self.drop))
        return self.head(x)


def batch(rows: int, length: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows * length)
    ids = torch.randint(0, VOCAB, (rows, length), generator=draw)
    labels = torch.randint(0, VOCAB, (rows, length), generator=draw)
    labels[0, length // 3 :] = -100
    return ids, labels


def mean_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1).float(), labels.flatten())


class Tiled:
    """A backend that makes tiles and nothing else; ``decisions`` say which, ``graph`` is the last made."""

    def __init__(self, pieces: int, withhold: bool = False) -> None:
        self.tile = Tile(pieces, withhold)
        self.decisions, self.graph = list[Decision](), GraphModule({}, torch.fx.Graph())
        self.sizes: set[int] = set()

    def __call__(self, graph: GraphModule, inputs: list[Any]) -> Any:
        context = Context(Phase.CAPTURED, hardware=None)  # type: ignore[arg-type]
        self.graph = self.tile.apply(graph, context)
        self.decisions += context.decisions

        def look(part: GraphModule, _: Any) -> Any:
            made = (n.meta.get("val") for n in part.graph.nodes if n.op == "call_function")
            self.sizes.update(compat.size_hint(v.numel()) for v in made if isinstance(v, Tensor))
            return compat.boxed(part)

        return aot_autograd(fw_compiler=look, bw_compiler=look)(self.graph, inputs)


def same(model: nn.Module, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], pieces: int) -> Tiled:
    """Run ``function`` with and without tiles: the same loss, and every gradient."""
    torch._dynamo.reset()
    tiled, reference = Tiled(pieces), copy.deepcopy(model)
    results = []
    for one, run in ((reference, function), (model, torch.compile(function, backend=tiled, fullgraph=True))):
        torch.manual_seed(1)
        loss = run(one, *inputs)
        loss.backward()
        results.append(loss.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=0, equal_nan=True)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert q.grad is not None and p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7, equal_nan=True)
    return tiled


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(2, 19), st.sampled_from([2, 4, 8]))
def test_any_length_in_any_number_of_tiles(rows: int, length: int, pieces: int) -> None:
    tiled = same(Tiny(), mean_loss, batch(rows, length), pieces)
    assert tiled.decisions


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sum": lambda m, i, y: F.cross_entropy(m(i).transpose(1, 2), y, reduction="sum"),
    "weights": lambda m, i, y: F.cross_entropy(
        m(i).transpose(1, 2), y, weight=torch.linspace(0.5, 2, VOCAB), label_smoothing=0.1
    ),
    "by hand": lambda m, i, y: -m(i).log_softmax(-1).gather(2, y.clamp(min=0)[..., None])[y >= 0].mean(),
    "upstream": lambda m, i, y: 3 * mean_loss(m, i, y) ** 2 + m.head.weight.square().mean(),
    "shifted": lambda m, i, y: F.cross_entropy(m(i)[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    "labels padded": lambda m, i, y: F.cross_entropy(
        m(i).flatten(0, 1), F.pad(y, (0, 1), value=-100)[..., 1:].flatten()
    ),
    "of two heads": lambda m, i, y: mean_loss(m, i, y) + F.mse_loss(m(i).tanh(), torch.zeros(1, 1, VOCAB)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    same(Tiny(), LOSSES[name], batch(3, 13), 4)


def test_no_value_of_all_logits() -> None:
    ids, labels = batch(2, 64)
    tiled = same(Tiny(), mean_loss, (ids, labels), 8)
    assert any("in 8 tiles" in d.action for d in tiled.decisions)
    assert max(tiled.sizes) == max(ids.numel() * VOCAB // 8, VOCAB * WIDTH)


def test_text() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(40, 4))

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, self.weight).flatten(0, 1), labels.flatten())

    torch._dynamo.reset()
    tiled = Tiled(2)
    torch.compile(Head(), backend=tiled)(torch.ones(2, 6, 4), torch.ones(2, 6, dtype=torch.long))
    calls = [n for n in tiled.graph.graph.nodes if n.op == "call_function"]
    lines = (f"{n.name} = {getattr(n.target, '__name__', n.target)}{n.args}" for n in calls)
    assert_expected_inline("\n".join(lines).replace("l_self_parameters_", ""), """\
flatten = flatten.using_ints(l_labels_,)
reshape = reshape.default(l_x_, [2, 1, 6, 4])
split = split.Tensor(reshape, 3, 2)
getitem = getitem(split, 0)
getitem_1 = getitem(split, 1)
reshape_1 = reshape.default(getitem, [2, 3, 4])
reshape_2 = reshape.default(getitem_1, [2, 3, 4])
linear = linear.default(reshape_1, weight_)
reshape_3 = reshape.default(linear, [6, 40])
reshape_4 = reshape.default(flatten, [2, 6])
split_1 = split.Tensor(reshape_4, 3, 1)
getitem_2 = getitem(split_1, 0)
getitem_3 = getitem(split_1, 1)
reshape_5 = reshape.default(getitem_2, [6])
reshape_6 = reshape.default(getitem_3, [6])
cross_entropy_loss = cross_entropy_loss.default(reshape_3, reshape_5, None, 0)
to = to.dtype(cross_entropy_loss, torch.float32)
sum_1 = sum.default(to,)
linear_1 = linear.default(reshape_2, weight_)
reshape_7 = reshape.default(linear_1, [6, 40])
cross_entropy_loss_1 = cross_entropy_loss.default(reshape_7, reshape_6, None, 0)
to_1 = to.dtype(cross_entropy_loss_1, torch.float32)
sum_2 = sum.default(to_1,)
add = add.Tensor(sum_1, sum_2)
ne = ne.Scalar(reshape_5, -100)
to_3 = to.dtype(ne, torch.float32)
sum_4 = sum.default(to_3,)
ne_1 = ne.Scalar(reshape_6, -100)
to_5 = to.dtype(ne_1, torch.float32)
sum_6 = sum.default(to_5,)
add_1 = add.Tensor(sum_4, sum_6)
div_1 = div.Tensor(add, add_1)
to_11 = to.dtype(div_1, torch.float32)""")


def test_random_numbers_are_those_of_the_whole() -> None:
    same(Tiny(drop=0.3), mean_loss, batch(2, 16), 4)


def test_what_is_returned_is_made_whole() -> None:
    """Tiles do not help where the caller gets all logits."""

    def both(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(ids)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    torch._dynamo.reset()
    tiled, model = Tiled(4), Tiny()
    loss, logits = torch.compile(both, backend=tiled)(model, *batch(2, 12))
    wanted, all_logits = both(model, *batch(2, 12))
    torch.testing.assert_close((loss, logits), (wanted, all_logits))


class Returns(Tiny):
    """Like a Hugging Face model, returns its logits beside the loss."""

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(ids)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


@pytest.mark.parametrize("dynamic", [False, True])
def test_withheld_results_are_not_made(dynamic: bool) -> None:
    torch._dynamo.reset()
    tiled, model, reference = Tiled(8, withhold=True), Returns(), Returns()
    step = torch.compile(model, backend=tiled, dynamic=dynamic)
    for length in (64, 40) if dynamic else (64,):
        ids, labels = batch(2, length)
        (loss, logits), (wanted, _) = step(ids, labels), reference(ids, labels)
        assert logits.shape == (0, 2, length, VOCAB) and not logits.requires_grad
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
        for one in (loss, wanted):
            one.backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)
    assert any("withheld" in d.action for d in tiled.decisions)
    assert max(tiled.sizes) == max(2 * 64 * VOCAB // 8, VOCAB * WIDTH)


def test_what_is_not_withheld() -> None:
    """Nothing where no loss is returned, nor what others need, nor what is small."""
    ids, labels = batch(2, 64)
    cases: list[Callable[..., Any]] = [
        lambda m, i, y: (m(i), m.embed(i).mean(-1)),
        lambda m, i, y: (mean_loss(m, i, y), m.embed(i)),
        lambda m, i, y: (lambda x: (F.cross_entropy(x.flatten(0, 1), y.flatten()), x, x.sort(1)[0]))(m(i)),
    ]
    for function in cases:
        torch._dynamo.reset()
        tiled = Tiled(8, withhold=True)
        found = torch.compile(function, backend=tiled)(Tiny(), ids, labels)
        wanted = function(Tiny(), ids, labels)
        torch.testing.assert_close(found, wanted)
        assert not any("withheld" in d.action for d in tiled.decisions)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "t5", "gemma2", "bert"])
def test_models(name: str) -> None:
    model = CASES[name].build().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (3, 14), generator=draw)
    labels = torch.where(torch.rand(ids.shape, generator=draw) < 0.3, -100, ids)
    torch._dynamo.reset()
    tiled, reference = Tiled(4), copy.deepcopy(model)
    step = torch.compile(lambda m, i, y: m(input_ids=i, labels=y).loss, backend=tiled)
    for one, run in ((reference, lambda m, i, y: m(input_ids=i, labels=y).loss), (model, step)):
        run(one, ids, labels).backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm() + 1e-8, name
    assert tiled.decisions


# --- within a memory plan ---------------------------------------------------------------------------


def planned(options: dict[str, Any], door: int, returns: bool = False) -> None:
    """Under a bound that all logits do not fit in, the loss is made in tiles, and trains the same; logits
    that are returned are withheld."""
    fresh()
    ids, labels = batch(4, 96)
    groups = dist.get_world_size() // options.get("sp", 1)
    mine = slice(None) if groups == 1 else slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    labels[:] = torch.where(labels < 0, 1, labels)  # as many in either half: the mean is of their means
    model, reference = (Returns(), Returns()) if returns else (Tiny(), Tiny())
    function = Returns.__call__ if returns else mean_loss
    loss_of(function(reference, ids, labels)).backward()
    held = 4 * sum(p.nbytes for p in model.parameters()) + 2 * ids.nbytes
    logits = 4 * ids[mine].numel() * VOCAB // options.get("sp", 1)
    plan = {"lowering": "eager", "memory": held + int(1.5 * logits), **options}
    autodist.prepare(model, plan)
    if door == 1:
        compiled = torch.compile(model if returns else mean_loss, backend="autodist", options=plan)
        found = compiled(*([] if returns else [model]), ids[mine], labels[mine])
        loss_of(found).backward()
    else:
        found = autodist.train_step(plan=plan)(gradients_of)(model, ids[mine], labels[mine])
    check_gradients(model, reference)
    if returns:
        assert isinstance(found[1], WithheldOutput) and found[1].shape == (*ids[mine].shape, VOCAB)
        reason = "on the ranks" if "sp" in options else "raise 'memory'"
        with pytest.raises(WithheldOutputError, match=reason):
            found[1].argmax(-1)
    job = prepared_job(model)
    assert job is not None
    made = [d.action for r in job.reports[-1].records for d in r.decisions if r.name == Tile.name]
    assert made and all("tiles" in action or action == "withheld" for action in made)


def loss_of(results: Any) -> Tensor:
    return results[0] if isinstance(results, tuple) else results


def gradients_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Any:
    results = model(ids, labels) if isinstance(model, Returns) else mean_loss(model, ids, labels)
    loss_of(results).backward()
    return results


@pytest.mark.parametrize("door", [1, 2])
@pytest.mark.parametrize("options", [{"zero": 3}, {"zero": 1}, {"sp": 2}], ids=str)
def test_with_shards_and_sequences(options: dict[str, Any], door: int) -> None:
    run_ranks(planned, 2, options, door)


@pytest.mark.parametrize(("options", "door"), [({"zero": 3}, 1), ({"zero": 2}, 2), ({"sp": 2}, 1)], ids=str)
def test_withheld_with_shards_and_sequences(options: dict[str, Any], door: int) -> None:
    run_ranks(planned, 2, options, door, True)


def test_lengths_that_vary() -> None:
    torch._dynamo.reset()
    tiled, model = Tiled(4), Tiny()
    step = torch.compile(mean_loss, backend=tiled, dynamic=True)
    for length in (12, 17, 9):
        ids, labels = batch(2, length)
        torch.testing.assert_close(step(model, ids, labels), mean_loss(model, ids, labels))
