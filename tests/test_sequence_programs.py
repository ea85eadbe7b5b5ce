"""Programs around sequence parallelism: packed sequences, selective checkpoints, the order of exchanges."""

from __future__ import annotations

import functools
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
from tests.ranks import run_ranks
from tests.sequence import gathers, train

SP2 = {"lowering": "eager", "sp": 2}


# --- families of models ----------------------------------------------------------------------------


def families(names: tuple[str, ...], sp: int) -> dict[str, float]:
    """The largest error of the loss; gradients and parameters are held to 1e-5 too."""
    options = {"lowering": "eager", "sp": sp}
    return {n: train(CASES[n], options, steps=2, tolerance=1e-5, explicit=n == "odds")[1] for n in names}


@pytest.mark.parametrize(
    "names",
    [("llama", "llama_tied", "qwen3"), ("gpt2", "bert", "t5"), ("mixtral", "vit", "odds")],
    ids="-".join,
)
def test_families_on_two_ranks(names: tuple[str, ...]) -> None:
    run_ranks(families, 2, names, 2)


@pytest.mark.parametrize("sp", [2, 4])
def test_families_on_four_ranks(sp: int) -> None:
    run_ranks(families, 4, ("llama", "t5", "vit"), sp, seconds=400)


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


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return -grad


class OwnBackward(Base):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return Reversed.apply(x)


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
    for build in (OwnBackward, Hooked, Strided, OtherDropout):
        torch._dynamo.reset()
        compiled = torch.compile(build(), backend="autodist", options=SP2)
        try:
            compiled(**_odd(torch.Generator().manual_seed(0)))
        except Exception as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_right_is_refused() -> None:
    for own, hook, strided, other in run_ranks(refused, 2):
        assert "is a torch.autograd.Function" in own and "test_sequence_programs.py" in own
        assert "a hook or the like" in hook
        assert "reads memory by strides" in strided
        assert "draws random numbers for a value that has a gradient" in other


# --- verify ----------------------------------------------------------------------------------------


def verified() -> bool:
    torch.manual_seed(0)
    model = CASES["llama"].build()
    compiled = torch.compile(model, backend="autodist", options=SP2)
    batch = CASES["llama"].batch(torch.Generator().manual_seed(dist.get_rank() // 2))
    return autodist.verify(compiled, batch).passed


def test_verify_on_two_groups() -> None:
    assert all(run_ranks(verified, 4))
