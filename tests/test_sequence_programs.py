"""Programs around sequence parallelism: packed sequences, selective checkpoints, the order of exchanges."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import autodist
from autodist.dry_run import dry_run, token_batch
from autodist.passes.analysis.cost import collective_kind, is_collective_start, is_wait
from autodist.plan import Plan
from autodist.prepare import prepared_job
from tests.models import CASES, VOCAB, Case, Output, causal_batch
from tests.parity import check_gradients
from tests.ranks import run_ranks
from tests.sequence import fresh, gathers, reference_losses, train

SP2 = {"lowering": "eager", "sp": 2}


# --- several documents in one row, told apart by their positions -----------------------------------


def _packed(g: torch.Generator) -> dict[str, Any]:
    batch = causal_batch(g)
    rows, length = batch["input_ids"].shape
    position = torch.cat([torch.arange(7), torch.arange(length - 7)])
    return {**batch, "position_ids": position.expand(rows, length).contiguous()}


def packed() -> list[str]:
    case = CASES["llama"]
    model, _ = train(Case(case.build, _packed), SP2, steps=2, tolerance=1e-5)
    return gathers(model)


def test_packed_sequences() -> None:
    for found in run_ranks(packed, 2):
        assert not [line for line in found if line.startswith("gathered")]


# --- a checkpoint that says what to keep -----------------------------------------------------------


class Selective(nn.Module):
    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 8)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, VOCAB)
        kept = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default] if keep else []
        self.contexts = functools.partial(create_selective_checkpoint_contexts, kept)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(torch.sin(x))).exp()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Output:
        x = self.table(input_ids)
        x = checkpoint(self.block, x, use_reentrant=False, context_fn=self.contexts)
        logits = self.head(x)
        return Output(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def products(keep: bool) -> int:
    model, _ = train(Case(lambda: Selective(keep), causal_batch), SP2, steps=2, tolerance=1e-5)
    job = prepared_job(model)
    assert job is not None
    removed = [r for r in job.reports[-1].records if r.name == "partition"]
    return sum(r.added.get("aten.addmm", 0) + r.added.get("aten.mm", 0) for r in removed)


def test_a_selective_checkpoint_is_honoured() -> None:
    """What the policy keeps is not computed again; without it the product is."""
    assert all(n == 0 for n in run_ranks(products, 2, True))
    assert all(n == 1 for n in run_ranks(products, 2, False))


# --- exchanges around attention --------------------------------------------------------------------


def test_exchanges_start_early_and_are_waited_for_late(tmp_path: Path) -> None:
    job = dry_run(CASES["llama"].build, lambda: token_batch(2, 16), Plan(sp=2), 2, tmp_path)
    nodes = list(job.reports[0].parts["forward"].graph.nodes)
    attention = [i for i, n in enumerate(nodes) if "attention" in str(n.target)]
    starts = [i for i, n in enumerate(nodes) if is_collective_start(n) and collective_kind(n) == "all_to_all"]
    waits = {n.args[0]: i for i, n in enumerate(nodes) if is_wait(n)}
    assert len(attention) == 2 and len(starts) == 8
    before = [i for i in starts if i < attention[0]]
    assert len(before) == 3
    # All of q, k and v are on their way before the first of them is waited for, and each left when ready.
    assert before[-1] < min(waits[nodes[i]] for i in before)
    assert any("mul" in str(n.target) for n in nodes[before[0] : before[-1]])


# --- programs that are easily got wrong ------------------------------------------------------------


class Base(nn.Module):
    """An embedding, a layer and a head; what lies between is the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 8)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, VOCAB)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def extra(self, x: torch.Tensor) -> torch.Tensor | float:
        return 0.0

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Output:
        x = self.between(self.mix(self.table(input_ids)))
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        return Output(loss + self.extra(x))


class RootOfWhatIsLeft(Base):
    """The last position is zero, where a square root has no finite gradient, and is cut off."""

    def extra(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        x = x * (torch.arange(length) < length - 1)[None, :, None]
        return x[:, :-1].square().sum(-1).sqrt().mean()


class MaskedRows(Base):
    """Rows that attend to nothing, with dropout so rare that it never happens."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        length = x.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & (torch.arange(length) > 2)
        y = nn.functional.scaled_dot_product_attention(heads, heads, heads, seen, dropout_p=1e-9)
        return x + y.transpose(1, 2).flatten(2)


class OneAttendingHead(Base):
    """Attention without heads: the batch, of odd size, is what its products have in common."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x + (x @ x.transpose(1, 2)).softmax(-1) @ x


class AcrossTheToken(Base):
    """Attention inside a token: the sequence is a batch to it."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.unflatten(-1, (4, 2))
        return x + nn.functional.scaled_dot_product_attention(parts, parts, parts).flatten(2)


@torch.library.custom_op("autodist_tests::silu", mutates_args=())
def _centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(1, keepdim=True)


@_centred.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_centred.register_autograd(lambda ctx, grad: grad - grad.mean(1, keepdim=True))


class OwnOperator(Base):
    """An operator that mixes positions, and has the name of one that does not."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return _centred(x)


class ByFrequency(Base):
    """An embedding whose gradient is scaled by how often a token occurs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 8, scale_grad_by_freq=True)


class GroupsThatDoNotDivide(Base):
    """Six heads of queries, three of keys, on two ranks."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        queries = x.repeat(1, 1, 3).unflatten(-1, (6, 4)).transpose(1, 2)
        keys = x.repeat(1, 1, 2)[..., :12].unflatten(-1, (3, 4)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(queries, keys, keys, enable_gqa=True)
        return x + y.transpose(1, 2).flatten(2)[..., :8]


class ClassTargets(Base):
    """One-hot targets, weighted by token and by class."""

    def extra(self, x: torch.Tensor) -> torch.Tensor:
        targets = nn.functional.one_hot(x.detach().argmax(-1), 8).float()
        weight, rarity = targets.sum(-1, keepdim=True) + 0.5, torch.linspace(0.5, 2, 8)
        return nn.functional.binary_cross_entropy_with_logits(x, targets, weight, pos_weight=rarity)


def _odd(g: torch.Generator) -> dict[str, Any]:
    ids = torch.randint(0, VOCAB, (3, 13), generator=g)
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


def easily_wrong() -> dict[str, list[str]]:
    found = {}
    for build in (
        RootOfWhatIsLeft, MaskedRows, OneAttendingHead, AcrossTheToken, OwnOperator, ClassTargets,
        ByFrequency, GroupsThatDoNotDivide,
    ):  # fmt: skip
        model, _ = train(Case(build, _odd), SP2, steps=1, tolerance=2e-5)
        found[build.__name__] = [g for g in gathers(model) if g.startswith("gathered")]
    return found


def test_programs_that_are_easily_got_wrong() -> None:
    for found in run_ranks(easily_wrong, 2):
        gathering = {name for name, gathered in found.items() if gathered}
        assert gathering <= {"OwnOperator", "GroupsThatDoNotDivide"} and "OwnOperator" in gathering


def one_hot_without_sequences() -> None:
    train(Case(ClassTargets, _odd), {"lowering": "eager", "sp": 1}, steps=1)


def test_assertions_in_a_program() -> None:
    """``one_hot`` asserts something of its input: a call without a value."""
    run_ranks(one_hot_without_sequences, 2)


class Drawing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        mask = (torch.rand_like(x) > 0.5).float()
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.saved_tensors[0]


class OwnDropout(Base):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return Drawing.apply(x)


class Hooked(Base):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        x.register_hook(lambda grad: grad * 2)
        return x


class Strided(Base):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.as_strided(x.shape, x.stride()) * 2


class OtherDropout(Base):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.alpha_dropout(x, 0.5, self.training)


def refused() -> list[str]:
    messages = []
    for build in (OwnDropout, Hooked, Strided, OtherDropout):
        torch._dynamo.reset()
        compiled = torch.compile(build(), backend="autodist", options=SP2)
        try:
            compiled(**_odd(torch.Generator().manual_seed(0)))
        except Exception as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_right_is_refused() -> None:
    for own, hook, strided, other in run_ranks(refused, 2):
        assert "a torch.autograd.Function that draws" in own and "test_sequence_programs.py" in own
        assert "is a hook" in hook
        assert "reads memory by strides" in strided
        assert "draws random numbers for a value that has a gradient" in other


# --- gradients of the user's own -------------------------------------------------------------------


class Gate(torch.autograd.Function):
    """x * sigmoid(x), with twice the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(x)
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        x, gate = ctx.saved_tensors
        return grad * (gate + x * gate * (1 - gate)) * 2


class Summed(torch.autograd.Function):
    """Sums along the sequence, two results, and gradients that are clipped, so not linear."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, factor: float) -> Any:
        y = torch.tanh(x * weight)
        ctx.save_for_backward(x, weight, y)
        ctx.factor = factor
        return y.cumsum(1) * factor, y.flip(0)

    @staticmethod
    def backward(ctx: Any, first: torch.Tensor, second: torch.Tensor) -> Any:
        x, weight, y = ctx.saved_tensors
        grad = (first.clamp(-0.01, 0.01) * ctx.factor).flip(1).cumsum(1).flip(1) + second.flip(0)
        grad = grad * (1 - y * y)
        return grad * weight, (grad * x).sum((0, 1)).clamp(-0.05, 0.05), None


class Pushed(torch.autograd.Function):
    """A gradient where none arrives: on padding it would be one too many."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad + 0.01


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.clamp(-0.01, 0.01)


class OwnGate(Base):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: Gate.apply(x).sin(), Gate.apply(x), use_reentrant=False)


class OwnSums(Base):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        first, second = Summed.apply(x, self.mix.weight[0], 1.5)
        return x + first + second


class OwnPush(Base):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return Pushed.apply(x)


class OwnClip(Base):
    """Of a weight's whole gradient, not of each rank's part."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x * Clipped.apply(self.mix.weight[0])


def own_gradients() -> dict[str, set[str]]:
    found = {}
    for build in (OwnGate, OwnSums, OwnPush, OwnClip):
        model, _ = train(Case(build, _odd), SP2, steps=2, tolerance=2e-5)
        found[build.__name__] = {g for g in gathers(model) if g.startswith("gathered")}
    return found


def test_gradients_of_the_users_own() -> None:
    """Pointwise functions run on pieces; others, and those with gradients out of nothing, on whole values."""
    for found in run_ranks(own_gradients, 2):
        assert {name: len(gathered) for name, gathered in found.items()} == {
            "OwnGate": 0, "OwnSums": 1, "OwnPush": 1, "OwnClip": 0,
        }  # fmt: skip


# --- operators on pieces ---------------------------------------------------------------------------


class ByLetters(Base):
    """Attention, and projections by a weight of three dimensions, as einsum."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.mix.weight.view(2, 4, 8)
        heads = torch.einsum("bld,hed->blhe", x, weight)
        scores = torch.einsum("bqhd,bkhd->bhqk", heads, heads).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores, heads)
        energy = torch.einsum("bld,bld->bd", x, x)[:, None].tanh()
        return torch.einsum("blhe,hed->bld", mixed, weight) + energy


class Indexed(Base):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
        parts = x.unflatten(-1, (2, 4))[:, :, torch.tensor([1, 0]), torch.tensor([2, 0])]
        apart = x.unflatten(-1, (2, 4))[torch.tensor([0, 2]), :, torch.tensor([1, 0])]
        sorted_ = x.argsort(-1)
        x = x[:, :, order] + x.index_select(-1, order) + parts.sum(-1, keepdim=True)
        return x + torch.take_along_dim(x, sorted_, -1) + x.take_along_dim(sorted_[..., :1], 2) + apart.mean()


class Spread(Base):
    def extra(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 3
        named = x.var(1).sum() + x.var(1, keepdim=True, correction=0).mean() + x.std(-1).mean()
        return named + x.std((0, 1), unbiased=False).sum() + x.var().sqrt()


class Divergence(Base):
    def extra(self, x: torch.Tensor) -> torch.Tensor:
        mine, other = x.log_softmax(-1), x.flip(-1).softmax(-1)
        named = functools.partial(nn.functional.kl_div, mine, other)
        each = nn.functional.kl_div(mine, other.log(), log_target=True, reduction="none")
        return named(reduction="batchmean") + named(reduction="sum") + each.square().mean()


class LikeIt(Base):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x) * 1e-9 + torch.randn_like(x[..., :1]) * 1e-9


class MergedHeads(Base):
    """Attention of which batch and heads are one dimension, with something added to its scores."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        heads = x.view(rows, length, 2, 4).transpose(1, 2).reshape(rows * 2, length, 4)
        bias = (torch.arange(length) * 0.1).expand(rows * 2, 1, length)
        scores = torch.baddbmm(bias, heads, heads.transpose(1, 2), beta=0.5, alpha=0.7)
        scores = scores.view(rows, 2, length, length).softmax(-1).view(rows * 2, length, length)
        mixed = torch.bmm(scores, heads).view(rows, 2, length, 4)
        return x + mixed.transpose(1, 2).reshape(rows, length, width)


def on_pieces() -> list[str]:
    found = []
    rows = itertools.count(3)  # another number of them at each step: then the number is a symbol

    def more_rows(g: torch.Generator) -> dict[str, Any]:
        ids = torch.randint(0, VOCAB, (next(rows), 13), generator=g)
        return {"input_ids": ids, "labels": ids.roll(-1, 1)}

    for build in (ByLetters, Indexed, Spread, Divergence, LikeIt):
        model, _ = train(Case(build, _odd), SP2, steps=1, tolerance=2e-5)
        found += gathers(model)
    model, _ = train(Case(MergedHeads, more_rows), SP2, steps=3, tolerance=2e-5)
    return [*found, *gathers(model)]


def test_operators_that_run_on_pieces() -> None:
    for found in run_ranks(on_pieces, 2):
        assert not [line for line in found if line.startswith("gathered")]


class RandomOrder(Base):
    """Random choices by probabilities that a sequence holds: drawn from all of it."""

    def extra(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bernoulli(x.detach().sigmoid()).mean() * 1e-9


def drawn() -> list[str]:
    model, _ = train(Case(RandomOrder, _odd), SP2, steps=1, tolerance=2e-5)
    return [g for g in gathers(model) if g.startswith("gathered")]


def test_what_draws_is_counted() -> None:
    for found in run_ranks(drawn, 2):
        assert len(found) == 1 and "bernoulli" in found[0]


# --- lengths that differ, from step to step and from group to group ---------------------------------


class Mixing(Base):
    """Causal attention, by the operator or written out, and the mean of the sequence added to each token."""

    def __init__(self, written: bool = False) -> None:
        super().__init__()
        self.written = written
        self.out = nn.Linear(8, 8)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        if self.written:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            y = (heads @ heads.mT).masked_fill(later, -1e4).softmax(-1) @ heads
        else:
            y = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.out(x.mean(1))[:, None].tanh()


class Shortened(Mixing):
    """Adds up sequences of one length: those that have lost their end, and those that never had it.

    With ``late``, the latter are looked up when there are such as have lost their end.
    """

    def __init__(self, late: bool) -> None:
        super().__init__(written=True)
        self.late = late

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Output:
        early = self.table(input_ids[:, 1:])
        x = self.mix(self.table(input_ids))[:, :-1]
        y = self.between(x) + x + (self.table(input_ids[:, 1:]) if self.late else early)
        loss = nn.functional.cross_entropy(self.head(y).flatten(0, 1), labels[:, 1:].flatten())
        return Output(loss + x[:, -1:].square().sum())


def _of_length(length: int, seed: int) -> dict[str, Any]:
    ids = torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.roll(1, 0)}


def lengths(build: Callable[[], nn.Module], steps: Sequence[tuple[int, ...]]) -> list[str]:
    """Steps on batches of these lengths, a number for each group; what was gathered."""
    fresh()
    model = build()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autodist", options=SP2)
    for step, sizes in enumerate(steps):
        batches = [_of_length(size, 10 * step + group) for group, size in enumerate(sizes)]
        wanted = reference_losses(reference, batches)[dist.get_rank() // 2]
        loss = compiled(**batches[dist.get_rank() // 2]).loss
        loss.backward()
        assert abs(loss.item() - wanted) < 1e-5 * wanted, f"step {step}: loss {loss} for {wanted}"
        check_gradients(model, reference, 1e-5)
        for m in (model, reference):
            m.zero_grad()
    return [g for g in gathers(model) if g.startswith("gathered")]


@pytest.mark.parametrize("written", [False, True])
def test_one_group_has_a_sequence_of_one_position(written: bool) -> None:
    steps = [(13, 1), (1, 12), (9, 1)]
    for found in run_ranks(lengths, 4, functools.partial(Mixing, written), steps):
        assert not found


@pytest.mark.parametrize("late", [False, True])
def test_sequences_that_lose_their_end(late: bool) -> None:
    """What was cut up before is gathered to be added, whatever the length; what comes later is cut alike."""
    for found in run_ranks(lengths, 4, functools.partial(Shortened, late), [(12, 9), (9, 12), (2, 13)]):
        assert len(set(found)) == (not late)


def test_sequences_that_become_as_short_as_there_are_ranks() -> None:
    run_ranks(lengths, 2, Mixing, [(12,), (9,), (2,), (3,), (1,), (5,)])


# --- verify ----------------------------------------------------------------------------------------


def verified() -> bool:
    torch.manual_seed(0)
    model = CASES["llama"].build()
    compiled = torch.compile(model, backend="autodist", options=SP2)
    batch = CASES["llama"].batch(torch.Generator().manual_seed(dist.get_rank() // 2))
    return autodist.verify(compiled, batch).passed


def test_verify_on_two_groups() -> None:
    assert all(run_ranks(verified, 4))
