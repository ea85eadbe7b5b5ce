"""Sequences split over ranks give what one process gives: the loss, every gradient, the parameters.

Each check trains a model under ``sp`` beside the same model on one process (:mod:`tests.sequence`). Lengths
are mostly odd, so that the last rank's piece is shorter than the others; labels are ignored unevenly.
The eager lowering runs the same passes as Inductor, which is tested once.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.fx import Node
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autodist.prepare import prepared_job
from autodist.runtime import axis
from autodist.runtime.outputs import DifferentBatchError, WithheldOutput, WithheldOutputError
from tests.models import CASES, VOCAB, Case, Output, causal_batch, masked_batch
from tests.parity import check_gradients, error, full
from tests.ranks import run_ranks
from tests.sequence import fresh, gathers, reference_losses, train
from tests.test_training import artifacts, refusal

SP2 = {"lowering": "eager", "sp": 2}
SP4 = {"lowering": "eager", "sp": 4}
TIGHT = 1e-5


# --- the operators of an axis ----------------------------------------------------------------------


def world() -> str:
    return dist.group.WORLD.group_name


def held(outer: int, length: int, rank: int) -> tuple[tuple[int, int, int], Tensor, Tensor]:
    """A place (outer, length, chunk); the indices ``rank`` holds of it; which of those are no padding."""
    chunk = -(-length // dist.get_world_size())
    wanted = rank * chunk + torch.arange(chunk)
    index = torch.arange(outer)[:, None] * length + wanted.clamp(max=length - 1)
    return (outer, length, chunk), index.flatten(), (wanted < length).expand(outer, chunk).flatten()


def same(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and torch.allclose(a, b, atol=1e-6), (a, b)


def summed(x: Tensor) -> Tensor:
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def one_dimension(outer: int, length: int) -> None:
    """slice, part, gather, unpart, valid and last of dimension 1.

    The loss is (sin(x) * weights).sum() of the whole; on pieces, each rank's loss is its part.
    """
    (place, index, real), g = held(outer, length, dist.get_rank()), world()
    draw = torch.Generator().manual_seed(length)
    whole = torch.randn(3, outer * length, 5, generator=draw)
    weights = torch.randn(3, outer * length, 5, generator=draw)
    wanted, mine = whole.cos() * weights, whole.index_select(1, index)
    mask = real[:, None].float()

    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_()

    def loss_of_a_piece(y: Tensor) -> Tensor:
        same(y, mine)
        return (y.sin() * weights.index_select(1, index) * mask).sum()

    x = leaf(whole)
    loss_of_a_piece(axis.slice_(x, 1, *place, True, g)).backward()
    same(x.grad, wanted)
    x = leaf(whole)
    loss_of_a_piece(axis.part(x, 1, *place, g)).backward()
    elsewhere = torch.ones(outer * length, dtype=torch.bool).index_fill(0, index[real], False)
    assert not x.grad[:, elsewhere].any(), "a gradient of what other ranks hold"
    same(summed(x.grad), wanted)
    x = leaf(mine)
    y = axis.gather(x, 1, *place, g)
    same(y, whole)
    (y.sin() * weights).sum().backward()
    same(x.grad, wanted.index_select(1, index) * mask)
    x = leaf(mine)
    y = axis.unpart(x, 1, *place, g)
    same(summed(y), whole)
    (axis.reduce(y, g).sin() * weights).sum().backward()
    same(x.grad, wanted.index_select(1, index) * mask)
    assert torch.equal(axis.valid(mine, *place, g), real)
    if outer == 1:
        same(axis.last(mine, 1, *place, g), whole[:, -1:])


def two_dimensions(first: tuple[int, int], second: tuple[int, int]) -> None:
    """exchange, from dimension 1 to 2 and from 2 to 1."""
    draw, rank = torch.Generator().manual_seed(first[1]), dist.get_rank()
    shape = (3, first[0] * first[1], second[0] * second[1])
    whole, weights = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    ends = [(1, *held(*first, rank)), (2, *held(*second, rank))]
    for (dim, place, index, real), (to, to_place, to_index, to_real) in (ends, ends[::-1]):
        x = whole.index_select(dim, index).requires_grad_()
        y = axis.exchange(x, to, *to_place, dim, *place, True, world())
        same(y, whole.index_select(to, to_index))
        mask, to_mask = (m.float().reshape([-1] + [1] * (2 - d)) for m, d in ((real, dim), (to_real, to)))
        (y.sin() * weights.index_select(to, to_index) * to_mask).sum().backward()
        same(x.grad, (whole.cos() * weights).index_select(dim, index) * mask)


def without_a_dimension() -> None:
    """reduce, vary, settle, agreed."""
    rank, ranks, g = dist.get_rank(), dist.get_world_size(), world()
    parts = torch.randn(ranks, 4, 3, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    x = parts[rank].clone().requires_grad_()
    y = axis.reduce(x, g)
    same(y, parts.sum(0))
    (y.sin() * weights).sum().backward()
    same(x.grad, parts.sum(0).cos() * weights)
    x = weights.clone().requires_grad_()
    (axis.vary(x, g) * parts[rank]).sum().backward()  # the loss is the sum over ranks
    same(x.grad, parts.sum(0))
    x = weights.clone().requires_grad_()
    axis.settle(x, g).sin().sum().backward()
    same(x.grad, weights.cos() / ranks)
    same(axis.agreed(parts[rank], g), parts[0])
    assert axis.agreed(torch.tensor([rank == 0]), g).item()


def declarations() -> None:
    """Fake kernels say what the eager ones do, of strides too; nothing aliases or changes its input."""
    g, place = world(), (1, 2, 7, -(-7 // dist.get_world_size()))
    whole = torch.randn(14, 3, 5).transpose(0, 1).requires_grad_()
    piece = whole.detach()[:, : 2 * place[3]].requires_grad_()
    last = (2, 1, 5, -(-5 // dist.get_world_size()))
    for operator, args in (
        (axis.slice_, (whole, *place, True, g)),
        (axis.part, (whole, *place, g)),
        (axis.gather, (piece, *place, g)),
        (axis.unpart, (piece, *place, g)),
        (axis.exchange, (piece, *last, *place, True, g)),
        (axis.reduce, (piece, g)),
        (axis.vary, (piece, g)),
        (axis.settle, (piece, g)),
    ):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator, args, test_utils=checks)


def axis_operators() -> None:
    for outer in (1, 2):
        for length in (6, 7, 4, 2):  # even, uneven, and with ranks that hold nothing but padding
            one_dimension(outer, length)
            two_dimensions((outer, length), (3 - outer, 5))
    without_a_dimension()
    declarations()


@pytest.mark.parametrize("ranks", [2, 3])
def test_axis_operators(ranks: int) -> None:
    run_ranks(axis_operators, ranks)


# --- families --------------------------------------------------------------------------------------


def family(name: str) -> Case:
    """``name`` is a family, then perhaps ``eager`` attention, ``odd`` length, ``masked`` padding,
    ``translated`` (the decoder's sequence has another length than the encoder's), ``deep``.

    All but deep ones have one layer, which is what compiling them takes time for.
    """
    base, *ways = name.split()
    case = CASES[base]
    batch: Callable[..., dict[str, Any]] = case.batch
    if "masked" in ways:
        batch = functools.partial(without_cache, masked_batch)
    if "odd" in ways:
        batch = functools.partial(batch, length=13)
    if "translated" in ways:
        batch = functools.partial(translated, batch)

    def build() -> nn.Module:
        model = case.build()
        if "eager" in ways:
            model.set_attn_implementation("eager")
        return model if "deep" in ways else shallow(model)

    return replace(case, build=build, batch=batch)


def without_cache(batch: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {**batch(*args, **kwargs), "use_cache": False}


def translated(batch: Callable[..., dict[str, Any]], g: torch.Generator) -> dict[str, Any]:
    given = batch(g)
    return {**given, "labels": given["labels"][:, -9:].contiguous()}


def shallow(model: nn.Module) -> nn.Module:
    """``model`` with the first only of each list of two like layers."""
    for module in list(model.modules()):
        for name, layers in list(module.named_children()):
            if isinstance(layers, nn.ModuleList) and len(layers) == 2 and type(layers[0]) is type(layers[1]):
                setattr(module, name, layers[:1])
    return model


def families(names: Sequence[str], options: dict[str, Any], steps: int) -> dict[str, list[str]]:
    """What each family gathered, after parity. Prepared models are captured once, not twice."""
    found = {}
    for name in names:
        model, _ = train(family(name), options, steps=steps, tolerance=TIGHT, explicit=True)
        found[name] = fallbacks(model)
    return found


# Whatever is not attention, a loss or local to a token has its sequences gathered: convolutions, batch
# norms, recurrences, ViT's head, which takes the first token, the sort by which Mixtral finds its experts'
# tokens, and the logits of GPT-2, which logs a warning (a graph break) before it computes the loss.
GATHERING = {"vit", "resnet", "odds", "mixtral", "gpt2"}


def check_families(names: Sequence[str], ranks: int, options: dict[str, Any], steps: int = 2) -> None:
    for found in run_ranks(families, ranks, names, options, steps):
        for name, gathered in found.items():
            assert name.split()[0] in GATHERING or not gathered, (name, gathered)


@pytest.mark.parametrize(
    "names",
    [
        ("llama odd deep", "llama_tied masked", "llama_1kv odd", "qwen3 odd"),
        ("mixtral odd", "gpt2 odd masked", "gpt2 eager"),
        ("bert odd", "roberta odd", "t5 odd translated"),
        ("neox odd", "opt odd masked", "gemma2 odd", "gemma3 odd masked deep"),
        ("vit", "resnet", "odds"),
    ],
    ids="-".join,
)
def test_families_on_two_ranks(names: tuple[str, ...]) -> None:
    check_families(names, 2, SP2)


@pytest.mark.parametrize(
    "names",
    [
        ("llama odd eager", "llama_1kv", "t5 eager translated", "gemma3 odd"),
        pytest.param(("qwen3", "bert odd", "gpt2 odd", "vit"), marks=pytest.mark.thorough),
    ],
    ids="-".join,
)
def test_families_on_four_ranks(names: tuple[str, ...]) -> None:
    check_families(names, 4, SP4, steps=1)


@pytest.mark.parametrize(
    "names",
    [
        ("qwen3 odd masked", "bert odd eager", "llama", "t5 odd"),
        pytest.param(("roberta", "neox odd", "opt", "gemma2 odd"), marks=pytest.mark.thorough),
    ],
    ids="-".join,
)
def test_two_groups_of_two_ranks(names: tuple[str, ...]) -> None:
    check_families(names, 4, SP2, steps=1)


def test_inductor() -> None:
    check_families(("llama odd masked",), 2, {"sp": 2})


# --- small models ----------------------------------------------------------------------------------


def tokens(g: torch.Generator, length: int = 13) -> dict[str, Any]:
    """Ids, and labels of which each row ignores another number."""
    batch = causal_batch(g, length)
    return {"input_ids": batch["input_ids"], "labels": batch["labels"]}


class Attention(nn.Module):
    """Causal self-attention; ``written`` is it as two products and a softmax."""

    def __init__(self, width: int = 8, heads: int = 4, written: bool = False) -> None:
        super().__init__()
        self.heads, self.written = heads, written
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        split = self.qkv(x).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        if self.written:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            mixed = scores.masked_fill(later, -1e4).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width))


class Small(nn.Module):
    """One layer of attention and a loss."""

    def __init__(self, heads: int = 4, written: bool = False, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.attend = Attention(width, heads, written)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 12)
        self.down = nn.Linear(12, width)
        self.head = nn.Linear(width, VOCAB, bias=False)

    def body(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm(x))
        return x + self.down(torch.tanh(self.up(x)))

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        return Output(self.loss(self.body(self.embed(input_ids)), labels))


def small(build: Callable[..., Any], *args: Any, batch: Callable[..., Any] = tokens, **kwargs: Any) -> Case:
    return Case(functools.partial(build, *args, **kwargs), batch)


def fallbacks(model: nn.Module) -> list[str]:
    """What was gathered for want of a rule, or to be returned."""
    return [line for line in gathers(model) if line.startswith("gathered")]


def job_reports(model: nn.Module) -> list[Any]:
    job = prepared_job(model)
    assert job is not None
    return job.reports


# --- weights and activations used in whole and in pieces -------------------------------------------


class Regions(Small):
    """Weights beside pieces and beside whole values: a linear used on tokens and on their mean, a tied head,
    a norm of a weight in the loss, a frozen one; and a whole activation (the mean) added to pieces."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.up.weight.requires_grad_(False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        x = self.body(self.embed(input_ids))
        pooled = self.attend.out(x.mean(1))
        x = self.attend.out(x) + pooled[:, None]
        logits = x @ self.embed.weight.T
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(loss + self.attend.out.weight.pow(2).sum() + pooled.tanh().sum())


def regions() -> None:
    train(small(Regions), {"lowering": "eager", "sp": dist.get_world_size()}, tolerance=TIGHT)


def test_values_used_whole_and_in_pieces() -> None:
    for ranks in (2, 4):
        run_ranks(regions, ranks)


def broken(name: str) -> str:
    """How parity fails when an operator passes its gradient on unchanged."""
    right = getattr(axis, name)
    setattr(axis, name, lambda x, group: x.clone())
    try:
        train(small(Regions), SP2, steps=1)
    except AssertionError as failure:
        return str(failure)
    finally:
        setattr(axis, name, right)
    return "parity all the same"


@pytest.mark.parametrize("name", ["vary", "settle"])
def test_parity_needs_it(name: str) -> None:
    for message in run_ranks(broken, 2, name):
        assert message.startswith("gradient of"), message


# --- losses ----------------------------------------------------------------------------------------

Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def nothing_ignored(labels: Tensor) -> Tensor:
    return labels.clamp(min=0)


def entropy(**options: Any) -> Loss:
    return lambda m, x, logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def each(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def by_sequence(m: Any, x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    valid = (labels != -100).float()
    return ((each(logits, labels) * valid).sum(1) / valid.sum(1)).mean()


def hugging_face(m: Any, x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.float().view(-1, VOCAB), shifted.view(-1))


def shifted(m: Any, x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def of_a_distribution(m: Any, x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), logits.detach().flip(-1).softmax(-1).flatten(0, 1))


def nll(reduction: str) -> Loss:
    return lambda m, x, logits, labels: F.nll_loss(
        logits.log_softmax(-1).flatten(0, 1), labels.flatten(), weight=m.weights, reduction=reduction
    ).mean() / (labels.numel() if reduction == "sum" else 1)


def distance(function: Callable[..., Tensor], **options: Any) -> Loss:
    def loss(m: Any, x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        target = nothing_ignored(labels)[..., None] / VOCAB
        return function(x.sigmoid(), target.expand(x.shape), **options).mean()

    return loss


LOSSES: dict[str, Loss] = {
    "mean": entropy(),
    "sum": lambda m, x, logits, labels: entropy(reduction="sum")(m, x, logits, labels) / labels.numel(),
    "none": lambda m, x, logits, labels: (each(logits, labels) * torch.arange(labels.shape[1])).mean() / 10,
    "ignored index": lambda m, x, logits, labels: entropy(ignore_index=7)(
        m, x, logits, nothing_ignored(labels)
    ),
    "label smoothing": entropy(label_smoothing=0.2),
    "class weights": lambda m, x, logits, labels: entropy(weight=m.weights)(m, x, logits, labels),
    "all of these": lambda m, x, logits, labels: entropy(
        weight=m.weights, label_smoothing=0.2, ignore_index=7
    )(m, x, logits, nothing_ignored(labels)),
    "classes second": lambda m, x, logits, labels: F.cross_entropy(logits.transpose(1, 2), labels),
    "shifted": shifted,
    "shifted as Hugging Face does": hugging_face,
    "by sequence": by_sequence,
    "a distribution": of_a_distribution,
    "nll mean": nll("mean"),
    "nll sum": nll("sum"),
    "nll none": nll("none"),
    "sums": lambda m, x, logits, labels: (x.abs() * (labels > 0)[..., None]).sum() / (labels > 0).sum(),
    "means": lambda m, x, logits, labels: x.square().mean((0, 1)).sum() + x.mean(-1).tanh().mean(),
    "logsumexp": lambda m, x, logits, labels: logits.logsumexp(-1).square().mean(),
    "largest": lambda m, x, logits, labels: logits.amax() + x.max(1).values.mean(),
    "kl": lambda m, x, logits, labels: F.kl_div(
        logits.log_softmax(-1), logits.detach().square().softmax(-1), reduction="batchmean"
    ),
    "mse mean": distance(F.mse_loss),
    "mse sum": lambda m, x, logits, labels: distance(F.mse_loss, reduction="sum")(m, x, logits, labels) / 100,
    "mse none": distance(F.mse_loss, reduction="none"),
    "l1": distance(F.l1_loss),
    "smooth l1": distance(F.smooth_l1_loss, beta=0.1),
    "huber": distance(F.huber_loss, delta=0.1),
    "binary": distance(F.binary_cross_entropy),
    "binary from logits": lambda m, x, logits, labels: distance(
        F.binary_cross_entropy_with_logits, pos_weight=m.weights[:8], weight=m.weights[1:9]
    )(m, x, logits, labels),
}


class WithLosses(Small):
    """The sum of several losses, each about one in size."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.losses = [LOSSES[name] for name in names]
        self.register_buffer("weights", torch.rand(VOCAB) + 0.5)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(x)
        return sum((loss(self, x, logits, labels) for loss in self.losses), torch.zeros(()))


def first_half_ignored(g: torch.Generator) -> dict[str, Any]:
    """The first of two ranks has no label that counts."""
    batch = tokens(g)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :8] = -100
    return batch


def second_half_ignored(g: torch.Generator) -> dict[str, Any]:
    batch = tokens(g)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 6:] = -100
    return batch


def losses(names: Sequence[str]) -> None:
    """Several at a time."""
    for i in range(0, len(names), 7):
        some = names[i : i + 7]
        try:
            train(small(WithLosses, *some), SP2, steps=1, tolerance=TIGHT)
        except Exception as failure:
            raise AssertionError(f"losses {some}") from failure


def test_losses() -> None:
    run_ranks(losses, 2, list(LOSSES))


def nothing_to_learn_on_a_rank() -> None:
    names = ("mean", "shifted as Hugging Face does", "class weights", "nll mean", "by sequence")
    for batch in (first_half_ignored, second_half_ignored):
        train(small(WithLosses, *names, batch=batch), SP2, steps=1, tolerance=TIGHT)


def counted_batch(g: torch.Generator) -> dict[str, Any]:
    return {**causal_batch(g, 13), "num_items_in_batch": torch.tensor(17)}


def items_in_batch() -> None:
    train(replace(CASES["llama"], batch=counted_batch), SP2, steps=1, tolerance=TIGHT)


def test_counts_are_combined() -> None:
    run_ranks(nothing_to_learn_on_a_rank, 2)
    run_ranks(items_in_batch, 2)


# --- composition -----------------------------------------------------------------------------------


def zero_stages() -> None:
    for zero in range(3):  # the third stage is everywhere else
        train(small(Regions), {**SP2, "zero": zero}, steps=2, tolerance=TIGHT)


def test_zero_stages() -> None:
    run_ranks(zero_stages, 4)


def mixed_precision() -> None:
    """Against the same model under autocast: sums are rounded to bf16 in another order."""
    case = family("llama odd")
    model, compiled, reference, batch = sharded_and_not(case, precision="bf16")
    in_fp32 = reference(**batch(0)).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        (wanted,) = reference_losses(reference, [batch(0)])
    loss = compiled(**batch(0)).loss
    loss.backward()
    assert abs(loss.item() - wanted) < 2e-3 * wanted and loss.item() != in_fp32
    check_gradients(model, reference, 3e-2)


def test_mixed_precision() -> None:
    run_ranks(mixed_precision, 2)


class Checkpointed(Small):
    """Two of three layers are checkpointed, one inside of another."""

    def twice(self, x: Tensor) -> Tensor:
        return self.body(checkpoint(self.body, x, use_reentrant=False))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        x = self.body(self.embed(input_ids))
        return Output(self.loss(checkpoint(self.twice, x, use_reentrant=False), labels))


class NotCheckpointed(Checkpointed):
    def twice(self, x: Tensor) -> Tensor:
        return self.body(self.body(x))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        return Output(self.loss(self.twice(self.body(self.embed(input_ids))), labels))


def calls(model: nn.Module, part: str, operator: str) -> int:
    """How often the ``part`` of the last graph calls an operator."""
    nodes = job_reports(model)[-1].parts[part].graph.nodes
    return sum(operator in str(n.target) for n in nodes if n.op == "call_function")


def checkpointing() -> None:
    layers_again = []
    for build in (NotCheckpointed, Checkpointed):
        with artifacts():
            model, _ = train(small(build, written=True), SP2, steps=2, tolerance=TIGHT)
        layers_again.append(calls(model, "backward", "addmm.default"))
    assert layers_again[0] == 0 < layers_again[1], "a checkpoint's linear layers are computed again"
    llama = family("llama odd")

    def build() -> nn.Module:
        model = llama.build()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    train(replace(llama, build=build), SP2, steps=1, tolerance=TIGHT)


def test_activation_checkpointing() -> None:
    run_ranks(checkpointing, 2)


class Breaks(Small):
    """Captured in two programs, with Python's arithmetic on an activation between them."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        x = self.body(self.embed(input_ids))
        torch._dynamo.graph_break()
        return Output(self.loss(self.body(x * 1.5), labels))


class ReadsBetween(Small):
    """A weight used in the eager moment between two programs."""

    @torch.compiler.disable
    def between(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        x = self.between(self.body(self.embed(input_ids)))
        return Output(self.loss(self.body(x), labels))


def graph_breaks() -> None:
    for build in (Breaks, ReadsBetween):
        model, _ = train(small(build), SP2, steps=2, tolerance=TIGHT)
        assert len(job_reports(model)) > 1


def test_graph_breaks() -> None:
    run_ranks(graph_breaks, 4)


def sharded_and_not(
    case: Case, **options: Any
) -> tuple[nn.Module, nn.Module, nn.Module, Callable[..., dict[str, Any]]]:
    """A model, the same compiled, an unsharded copy, and what makes a batch from a number."""
    fresh()
    model = case.build().train()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autodist", options={**SP2, **options})
    return model, compiled, reference, lambda n, *a: case.batch(torch.Generator().manual_seed(n), *a)


def accumulation_and_evaluation() -> None:
    model, compiled, reference, batch = sharded_and_not(small(Small))
    for step in range(3):
        compiled(**batch(step)).loss.backward()
        reference(**batch(step)).loss.backward()
    check_gradients(model, reference, TIGHT)
    norm, wanted = (nn.utils.clip_grad_norm_(m.parameters(), 0.3) for m in (model, reference))
    assert wanted > 0.3 and error(norm, wanted) < TIGHT
    check_gradients(model, reference, TIGHT)
    model.eval(), reference.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found, wanted = compiled(**batch(7)).loss, reference(**batch(7)).loss
        assert not found.requires_grad and abs(found - wanted) < TIGHT
    model.train(), reference.train()
    for m in (compiled, reference):
        m(**batch(8)).loss.backward()
    check_gradients(model, reference, TIGHT)


def test_accumulation_and_evaluation() -> None:
    run_ranks(accumulation_and_evaluation, 2)


def lengths() -> int:
    ranks = dist.get_world_size()
    model, compiled, reference, _ = sharded_and_not(small(Regions, heads=6, width=12), sp=ranks)
    for step, length in enumerate((12, 9, 13, 16, 7, 10, 4)):  # of 4, the last rank has none
        batch = tokens(torch.Generator().manual_seed(step), length)
        wanted = reference(**batch).loss
        wanted.backward()
        loss = compiled(**batch).loss
        loss.backward()
        assert abs(loss - wanted) < TIGHT * wanted
        check_gradients(model, reference, TIGHT)
        for m in (model, reference):
            m.zero_grad()
    return len(job_reports(model))


def test_lengths_change_without_compiling_again() -> None:
    assert run_ranks(lengths, 3) == [2] * 3


def embeddings_for_ids() -> None:
    case = family("llama odd")
    model, compiled, reference, batch = sharded_and_not(case)
    given = batch(0)
    width = model.config.hidden_size
    embeddings = torch.randn(*given.pop("input_ids").shape, width, generator=torch.Generator().manual_seed(5))
    mine, whole = (embeddings.clone().requires_grad_() for _ in range(2))
    compiled(inputs_embeds=mine, **given).loss.backward()
    reference(inputs_embeds=whole, **given).loss.backward()
    check_gradients(model, reference, TIGHT)
    assert error(mine.grad, whole.grad) < TIGHT
    assert not fallbacks(model)


def test_embeddings_for_ids() -> None:
    run_ranks(embeddings_for_ids, 2)


class Writes(Small):
    """Changes activations in place, and buffers: running means, a count, and one row of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.ones(3, 8))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        x = self.batch_norm(torch.tanh(self.body(self.embed(input_ids))).mT).mT
        self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        self.count += (labels != -100).sum()
        self.table[1] = x.detach()[0].amax(0)
        z = torch.tanh(x)
        x += z
        z = x * 2
        z[:, 3:5] *= 2
        z[..., 0].add_(1)
        x = x - self.mean + z * self.table[1]
        x.masked_fill_((labels < 0)[..., None], 0.5)
        return Output(self.loss(x, labels) + self.count * 1e-3)


def writes() -> None:
    model, compiled, reference, batch = sharded_and_not(small(Writes))
    for step in range(3):
        wanted = reference(**batch(step)).loss
        wanted.backward()
        loss = compiled(**batch(step)).loss
        loss.backward()
        assert abs(loss - wanted) < TIGHT * wanted
        check_gradients(model, reference, TIGHT)
        expected = dict(reference.named_buffers())
        for name, found in model.named_buffers():
            assert torch.allclose(found, expected[name], rtol=TIGHT, atol=1e-6), name


def test_writes_into_activations_and_buffers() -> None:
    run_ranks(writes, 2)


def lengths_of_groups() -> None:
    """Groups of ranks compile, and communicate, for the lengths of their own batches."""
    model, compiled, reference, _ = sharded_and_not(small(Regions))
    group = dist.get_rank() // 2
    for step in range(3):
        sizes = (13, 9 + step)
        batches = [tokens(torch.Generator().manual_seed(g + 10 * step), size) for g, size in enumerate(sizes)]
        losses = reference_losses(reference, batches)
        loss = compiled(**batches[group]).loss
        loss.backward()
        assert abs(loss.item() - losses[group]) < TIGHT * losses[group]
        check_gradients(model, reference, TIGHT)
        for m in (model, reference):
            m.zero_grad()


def test_lengths_differ_between_groups() -> None:
    run_ranks(lengths_of_groups, 4)


# --- what is returned ------------------------------------------------------------------------------


@dataclass
class Results:
    loss: Tensor
    logits: Tensor


class ReturnsLogits(Small):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Results:  # type: ignore[override]
        x = self.body(self.embed(input_ids))
        return Results(self.loss(x, labels), self.head(x))


def withheld() -> str:
    _, compiled, _, batch = sharded_and_not(small(ReturnsLogits))
    for step in range(2):
        found = compiled(**batch(step))
        found.loss.backward()
        assert isinstance(found.logits, WithheldOutput)
        assert found.logits.shape == (2, 13, VOCAB) and found.logits.dtype is torch.float32
    for use in (lambda x: x.sum(), lambda x: x + 1, lambda x: x[0], lambda x: x.tolist(), torch.argmax):
        message = refusal(WithheldOutputError, functools.partial(use, found.logits))
    return message


def logits() -> None:
    """Logits that are gathered or sharded are right, and so are gradients of what is computed from them."""
    for outputs in ("gathered", "sharded"):
        model, compiled, reference, batch = sharded_and_not(small(ReturnsLogits), outputs=outputs)
        for step in range(3):
            given = {k: v[:, : 13 - step] for k, v in batch(step).items()}
            found, wanted = compiled(**given).logits, reference(**given).logits
            assert isinstance(found, DTensor) == (outputs == "sharded")
            assert found.shape == wanted.shape
            assert error(full(found), wanted) < TIGHT
            for x in (found, wanted):
                full(x.square().mean()).backward()
            check_gradients(model, reference, TIGHT)
            if isinstance(found, DTensor):
                length = 13 - step
                first = -(-length // 2)
                assert found.to_local().shape[1] == (length - first if dist.get_rank() else first)


def test_outputs() -> None:
    for message in run_ranks(withheld, 2):
        assert "this output of shape (2, 13, 67) lies in pieces" in message
        assert 'set outputs="gathered" or outputs="sharded"' in message
    run_ranks(logits, 2)


# --- refusals --------------------------------------------------------------------------------------


def indivisible(written: bool) -> str:
    _, compiled, _, batch = sharded_and_not(small(Small, heads=6, width=12, written=written), sp=4)
    return refusal(Exception, lambda: compiled(**batch(0)))


@pytest.mark.parametrize("written", [False, True])
def test_heads_that_do_not_divide(written: bool) -> None:
    for message in run_ranks(indivisible, 4, written):
        assert "6 heads cannot be shared out over sp=4 ranks" in message
        assert "Legal values of sp for this model are 1, 2, 3, 6." in message
        assert "at node '" in message and "test_sequence.py" in message


class Cumulative(Small):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x.cumsum(1))


def refusals() -> dict[str, str]:
    def message(case: Case, **options: Any) -> str:
        _, compiled, _, batch = sharded_and_not(case, **options)
        return refusal(Exception, lambda: compiled(**batch(0)))

    return {
        "sp": message(small(Small), sp=3),
        "dp": message(small(Small), dp=2),
        "strict": message(small(Cumulative), strict=True),
    }


def different_batches() -> list[str]:
    found = []
    for number, length in ((dist.get_rank(), 13), (0, 13 - dist.get_rank())):
        _, compiled, _, batch = sharded_and_not(small(Small))
        given = batch(number, length)
        found.append(refusal(DifferentBatchError, lambda given=given, compiled=compiled: compiled(**given)))
    return found


def without_gathers() -> None:
    train(small(Small), {**SP2, "strict": True}, steps=1, tolerance=TIGHT)
    model, _ = train(small(Cumulative), SP2, steps=1, tolerance=TIGHT)
    assert any("cumsum" in line and "test_sequence.py" in line for line in fallbacks(model))


def test_refusals() -> None:
    for found in run_ranks(refusals, 2):
        assert "plan field 'sp' is 3, which does not divide the 2 ranks" in found["sp"]
        assert "use one of 1, 2" in found["sp"]
        assert "plan field 'dp' is 2, but 2 ranks are running with sp=2" in found["dp"]
        assert "cumsum" in found["strict"] and "strict=True forbids" in found["strict"]
        assert "test_sequence.py" in found["strict"] and "node '" in found["strict"]
    for message in itertools.chain(*run_ranks(different_batches, 2)):
        assert "ranks [0, 1] share their batch" in message and "rank // (sp * pp)" in message
    run_ranks(without_gathers, 2)


# --- cost ------------------------------------------------------------------------------------------


def exchanged(model: nn.Module, part: str) -> list[int]:
    """Elements that each all-to-all of a part takes."""
    nodes = job_reports(model)[-1].parts[part].graph.nodes
    starts = [n for n in nodes if "all_to_all_single" in str(n.target)]
    return sorted(n.args[0].meta["val"].numel() for n in starts if isinstance(n.args[0], Node))


def lowered(model: nn.Module) -> dict[str, int]:
    """How often a step has each operator of an axis."""
    records = [r for r in job_reports(model)[-1].records if r.name == "lower"]
    total: Counter[str] = sum((Counter(r.removed) for r in records), Counter())
    return {k.removeprefix("autodist."): n for k, n in total.items()}


def volumes(name: str, length: int) -> dict[str, Any]:
    case = family(name)
    with artifacts():
        model, compiled, _, _ = sharded_and_not(case, sp=dist.get_world_size())
        compiled(**causal_batch(torch.Generator().manual_seed(0), length)).loss.backward()
    found: dict[str, Any] = {part: exchanged(model, part) for part in ("forward", "backward")}
    return found | {"operators": lowered(model)}


@pytest.mark.parametrize(("name", "length"), [("llama", 12), ("llama_1kv eager", 13)])
def test_only_the_exchanges_of_ulysses(name: str, length: int) -> None:
    """Four exchanges an attention and pass: queries and results whole, keys and values with their real heads.

    With fewer key heads than ranks, each rank needs one.
    """
    ranks, rows, layers, heads, size = 2, 2, 2, 4, 8
    key_heads = 2
    tokens_here = rows * -(-length // ranks)
    # Back from heads, the rows are as many as there are positions, shared out with the heads.
    per_layer = [tokens_here * key_heads * size] * 2 + [tokens_here * heads * size]
    result = rows * (heads // ranks) * ranks * -(-length // ranks) * size
    wanted = sorted([*per_layer, result] * layers)
    for found in run_ranks(volumes, ranks, f"{name} deep", length):
        assert found["forward"] == wanted
        assert len(found["backward"]) == len(wanted) and sum(found["backward"]) == sum(wanted)
        operators = found["operators"]
        assert operators["exchange"] == 2 * len(wanted)
        assert operators["reduce"] == 2, "a sum and a count of the loss"
        assert "gather" not in operators, "sequences were gathered"


# --- generated programs ----------------------------------------------------------------------------


def in_heads(x: Tensor) -> Tensor:
    rows, length, width = x.shape
    flat = x.view(rows, length, 6, width // 6).flip(2).permute(0, 2, 1, 3).reshape(rows * 6, length, -1)
    return flat.view(rows, 6, length, -1).transpose(1, 2).flatten(2)


def in_blocks(x: Tensor) -> Tensor:
    rows, length, width = x.shape
    if length % 2:
        return x
    mean = x.view(rows, length // 2, 2, width).mean(2, keepdim=True)
    return x - mean.expand(-1, -1, 2, -1).reshape(x.shape)


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = m.attend(x).abs().mean() + F.linear(x.mean(1), m.mix.weight).abs().max()
    return m.attend(x) / (1 + scale)


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3] *= 2
    y += 1
    y[..., 1].mul_(x[..., 0])
    return y


def keys_repeated(x: Tensor, tiled: bool) -> Tensor:
    """Attention in which 6 heads of queries share 3 of keys, in blocks or in turn."""
    rows, length, width = x.shape
    q = x.view(rows, length, 6, width // 6).transpose(1, 2)
    k = x[..., : width // 2].reshape(rows, length, 3, width // 6).transpose(1, 2)
    if tiled:
        k = k[:, None].expand(-1, 2, -1, -1, -1).reshape(q.shape)
    else:
        k = k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape)
    return F.scaled_dot_product_attention(q, k, k.tanh()).transpose(1, 2).reshape(x.shape)


def square_of_keys(x: Tensor) -> Tensor:
    """As many repetitions as heads: those in blocks and those in turn have the same shapes."""
    rows, length, _ = x.shape
    k = x[..., :6].reshape(rows, length, 6, 1).transpose(1, 2)
    k = k[:, None].expand(-1, 6, -1, -1, -1).reshape(rows, 36, length, 1)
    q = torch.cat([x, x.cos(), x.square()], -1).reshape(rows, length, 36, 1).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, k, k * 2).transpose(1, 2).reshape(rows, length, 36)
    return mixed[..., :12] + mixed[..., 12:24] - mixed[..., 24:]


def rotated(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[1])[:, None] * 0.3
    return x * angle.cos() + torch.cat([-x[..., 6:], x[..., :6]], -1) * angle.sin()


def weight_in_whole(m: Any, x: Tensor) -> Tensor:
    table = m.mix.weight.T + x.mean((0, 1))[:, None]
    return x @ table + m.mix.weight.T.reshape(-1).sum() * 0.01 + table.reshape(-1)[:12]


def whole_transposed(m: Any, x: Tensor) -> Tensor:
    square = (x.transpose(1, 2) @ x).tanh()  # whole
    return (square.transpose(1, 2)[:, None] * x[..., None]).reshape(*x.shape[:2], -1)[..., :12]


def in_products(x: Tensor, added: bool) -> Tensor:
    """Attention on (rows and heads, positions, size)."""
    rows, length, _ = x.shape
    q = x.view(rows, length, 6, 2).transpose(1, 2).reshape(rows * 6, length, 2)
    scores = torch.bmm(q, q.transpose(1, 2))
    if added:
        scores = torch.baddbmm(scores, q, q.mT, beta=0.5, alpha=0.1)
    mixed = torch.bmm(scores.softmax(-1), q)
    return mixed.view(rows, 6, length, 2).transpose(1, 2).reshape(x.shape)


def masked_by_itself(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (6, 2)).transpose(1, 2)
    mask = (x.mean(-1) > x.mean((1, 2))[:, None])[:, None, None]
    mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(-2).masked_fill(mask[:, 0, 0, :, None], 0.1)


def biased_attention(m: Any, x: Tensor) -> Tensor:
    """A bias of heads from a weight and of positions from activations."""
    heads = x.unflatten(-1, (6, 2)).transpose(1, 2)
    bias = m.mix.weight.mean(1)[:6, None, None] + x.mean(-1)[:, None, None]
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias).transpose(1, 2).flatten(-2)


def onto_others(m: Any, x: Tensor) -> Tensor:
    """Queries of all positions, keys of the first ones."""
    q = x.unflatten(-1, (6, 2)).transpose(1, 2)
    k = m.mix(x[:, : x.shape[1] // 2 + 1]).unflatten(-1, (6, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(-2)


def weighed(m: Any, x: Tensor) -> Tensor:
    mixed, weights = m.torchs(x, x, x)
    return mixed + weights @ x


def complex_rotation(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[1])[:, None] * torch.arange(6) * 0.1
    turned = torch.view_as_complex(x.reshape(*x.shape[:2], 6, 2)) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(2)


def recurrent(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros_like(x[:, 0])
    for place in (0, 3, -1):
        state = torch.tanh(m.mix(state) + x[:, place])
    return x + state[:, None]


Step = Callable[[Any, Tensor], Tensor]
STEPS: dict[str, Step] = {
    "linear": lambda m, x: x + m.mix(x),
    "norm": lambda m, x: m.norm(x),
    "attention": lambda m, x: x + m.attend(x),
    "written attention": lambda m, x: x + m.spell(x),
    "flattened": lambda m, x: m.mix(x.flatten(0, 1)).view_as(x),
    "heads": lambda m, x: in_heads(x),
    "blocks": lambda m, x: in_blocks(x),
    "centred": lambda m, x: x - x.mean(1, keepdim=True),
    "scaled by a sum": lambda m, x: x * x.sum((1, 2), keepdim=True).tanh(),
    "pooled": lambda m, x: x + m.mix(x.mean(1))[:, None],
    "linear attention": lambda m, x: x @ (x.transpose(1, 2) @ x / x.shape[1]).tanh(),
    "softmax over positions": lambda m, x: x * x.softmax(1) * x.shape[1],
    "cumulated": lambda m, x: x.cumsum(1) / x.shape[1],
    "cumulated in a token": lambda m, x: x.cumsum(-1),
    "first token": lambda m, x: x + x[:, :1],
    "first token expanded": lambda m, x: x[:, :1].expand(-1, x.shape[1], -1) * x,
    "last token": lambda m, x: x - x[:, -1].unsqueeze(1),
    "one longer": lambda m, x: torch.cat([x, x[:, :1] * 2], 1),
    "one shorter": lambda m, x: x[:, :-1] if x.shape[1] > 4 else x,
    "one later": lambda m, x: F.pad(x[:, :-1], (0, 0, 1, 0)) + x,
    "without the first": lambda m, x: x[:, 1:] if x.shape[1] > 4 else x,
    "rotated": lambda m, x: rotated(x),
    "gated": lambda m, x: torch.cat([x.chunk(2, -1)[0].sigmoid() * x[..., 6:], *x.split(3, -1)[2:]], -1),
    "largest": lambda m, x: x - x.amax(1, keepdim=True) + x.max(-1, keepdim=True).values,
    "sorted": lambda m, x: x.sort(-1).values + x.topk(3, -1).values.sum(-1, keepdim=True),
    "gathered": lambda m, x: x.gather(2, x.argsort(2)) + x[..., [1] * 12],
    "stacked": lambda m, x: torch.stack([x, x.square()], 1).sum(1) + torch.stack([x, -x * 0.3], -1).mean(-1),
    "pairs of positions": lambda m, x: (x[:, :, None] * x[:, None]).mean(2),
    "einsum": lambda m, x: torch.einsum("bsw,btw,btv->bsv", x, x, x) / x.shape[1],
    "deviation": lambda m, x: x / (1 + x.std(1, keepdim=True)) + x.var(-1, keepdim=True),
    "convolution": lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2),
    "a weight in whole": weight_in_whole,
    "whole and transposed": whole_transposed,
    "without gradient": without_gradient,
    "in place": lambda m, x: in_place(x),
    "keys in blocks": lambda m, x: keys_repeated(x, tiled=False),
    "keys in turn": lambda m, x: keys_repeated(x, tiled=True),
    "square of keys": lambda m, x: square_of_keys(x),
    "rolled": lambda m, x: x.roll(1, 1) + x.repeat_interleave(2, 1)[:, : x.shape[1]],
    "narrowed": lambda m, x: torch.where(x.narrow(1, 0, x.shape[1]) > 0, x, x.new_zeros(1)),
    "movedim": lambda m, x: x.movedim(1, 0).unflatten(-1, (3, 4)).flatten(-2).swapaxes(0, 1),
    "torch's attention": lambda m, x: m.torchs(x, x, x, need_weights=False)[0],
    "torch's attention and its weights": weighed,
    "products": lambda m, x: in_products(x, added=False),
    "added products": lambda m, x: in_products(x, added=True),
    "masked by itself": lambda m, x: masked_by_itself(x),
    "biased attention": biased_attention,
    "onto others": onto_others,
    "one head": lambda m, x: F.scaled_dot_product_attention(x, x, x),
    "positions first": lambda m, x: (m.mix(x.transpose(0, 1)) - x.permute(1, 0, 2).mean(0)).transpose(0, 1),
    "repeated": lambda m, x: x.repeat(1, 1, 2)[..., 3:15],
    "groups": lambda m, x: F.group_norm(x.transpose(1, 2), 3).transpose(1, 2),
    "best positions": lambda m, x: x + x.topk(2, 1).values.sum(1, keepdim=True),
    "scattered": lambda m, x: torch.zeros_like(x).scatter(2, x.argsort(2), x),
    "maximum": lambda m, x: torch.maximum(x, x.mean(1, keepdim=True)) + torch.max(x, x.flip(1)),
    "windows": lambda m, x: F.pad(x.unfold(1, 3, 1).mean(-1), (0, 0, 1, 1)),
    "dot": lambda m, x: x * (x.flatten() @ x.flatten()).tanh(),
    "norms": lambda m, x: x / (x.norm(dim=(1, 2), keepdim=True) + torch.linalg.vector_norm(x)),
    "normalized": lambda m, x: F.normalize(x, dim=1) + F.normalize(x, dim=-1),
    "cosine": lambda m, x: F.cosine_similarity(x, x.roll(1, 2), dim=-1)[..., None] * x,
    "products of all": lambda m, x: x.cos().prod(-1, keepdim=True) * x.cos().prod(1, keepdim=True),
    "halves of positions": lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "splits of positions": lambda m, x: torch.cat([s * (i + 1) for i, s in enumerate(x.split(2, 1))], 1),
    "complex rotation": lambda m, x: complex_rotation(x),
    "reversed": lambda m, x: x[:, torch.arange(x.shape[1]).flip(0)] + x[:, ::2].mean(1, keepdim=True),
    "recurrent": recurrent,
    "glu": lambda m, x: torch.cat([F.glu(x), x[..., :6]], -1) + F.prelu(x.mT, m.norm.weight * 0.3).mT,
    "distances": lambda m, x: (-torch.cdist(x, x)).softmax(-1) @ x,
    "clamped": lambda m, x: torch.addcmul(x, x, m.norm.weight).clamp(x.mean(1, keepdim=True)),
    "tril": lambda m, x: (x @ x.mT).tril() @ x / x.shape[1],
}  # fmt: skip


class Generated(nn.Module):
    """Steps on an activation of (rows, positions, 12), between an embedding and a loss."""

    def __init__(self, steps: Sequence[str], ends_in_entropy: bool) -> None:
        super().__init__()
        self.steps, self.ends_in_entropy = steps, ends_in_entropy
        self.embed = nn.Embedding(VOCAB, 12)
        self.attend, self.spell = Attention(12, 6), Attention(12, 6, written=True)
        self.mix, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.torchs = nn.MultiheadAttention(12, 6, batch_first=True)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        x = self.embed(input_ids)
        for step in self.steps:
            x = torch.tanh(STEPS[step](self, x))
        if self.ends_in_entropy:
            scores = x @ self.embed.weight.T
            labels = F.pad(labels, (0, 20), value=3)[:, : x.shape[1]]
            return Output(F.cross_entropy(scores.flatten(0, 1), labels.flatten()))
        return Output((x * torch.arange(12).cos()).square().mean() + self.mix.weight.square().mean())


def generated(recipes: list[tuple[list[str], int, int, bool]]) -> None:
    for steps, rows, length, entropy in recipes:
        batch = functools.partial(generated_batch, rows, length)
        options = {"lowering": "eager", "sp": dist.get_world_size()}
        try:
            train(small(Generated, steps, entropy, batch=batch), options, steps=1, tolerance=1e-4)
        except Exception as failure:
            raise AssertionError(f"{steps} on {rows} x {length}, {entropy=}") from failure


def generated_batch(rows: int, length: int, g: torch.Generator) -> dict[str, Any]:
    ids = torch.randint(0, VOCAB, (rows, length), generator=g)
    labels = torch.where(torch.rand(rows, length, generator=g) < 0.3, -100, ids)
    return {"input_ids": ids, "labels": labels}


def test_every_step() -> None:
    names = list(STEPS)
    recipes = [(names[i : i + 9], 2, 11 + i % 2, i % 4 == 0) for i in range(0, len(names), 9)]
    run_ranks(generated, 3, recipes)


RECIPE = st.tuples(
    st.lists(st.sampled_from(list(STEPS)), min_size=2, max_size=6),
    st.integers(1, 3),
    st.integers(5, 14),
    st.booleans(),
)


@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # a smaller example is not worth minutes: the failure names the recipe
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.lists(RECIPE, min_size=3, max_size=3), st.sampled_from([2, 3]))
def test_generated_programs(recipes: list[Any], ranks: int) -> None:
    run_ranks(generated, ranks, recipes)
