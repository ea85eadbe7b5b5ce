"""The program of one microbatch: added up over all of them it is the whole batch's, or it is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autodist.passes.analysis.microbatches import Microbatch, microbatch
from autodist.passes.analysis.placement import PlacementError
from autodist.passes.capture import core_of

ROWS, LENGTH, WIDTH, CLASSES = 7, 5, 8, 9


class Tokens(nn.Module):
    """Attention over sequences of tokens, and logits for each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.places = nn.Embedding(CLASSES, WIDTH), nn.Embedding(16, WIDTH)
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        if positions is None:
            positions = torch.arange(ids.shape[1])[None]
        x = x + self.places(positions)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        heads = self.mix(x).unflatten(2, (2, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        return self.head(out.transpose(1, 2).flatten(2) + x)[:, 1:]


def ids(rows: int = ROWS, length: int = LENGTH) -> Tensor:
    return torch.randint(CLASSES, (rows, length), generator=torch.Generator().manual_seed(1))


def labels(rows: int = ROWS, length: int = LENGTH) -> Tensor:
    """Rows have ever fewer labels, the first two none."""
    found = ids(rows, length).roll(-1, 1)
    for row in range(rows):
        found[row, row:] = -100 if row < 2 else found[row, row:]
        found[row, : 2 * (row < 2) * length] = -100
        found[row, length - row % 3 :] = -100
    return found


def cross_entropy(logits: Tensor, wanted: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), **options)


def per_sample(model: Tokens, x: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(model(x).transpose(1, 2), y.clamp(min=0), reduction="none")
    return each.mean(1).mean()


def penalised(model: Tokens, x: Tensor, y: Tensor) -> Tensor:
    penalty = model.head.weight.square().sum() + model.mix.bias.abs().sum()
    return cross_entropy(model(x), y) * 2 + 0.1 * penalty + 3


def masked(model: Tokens, x: Tensor, y: Tensor) -> Tensor:
    keep = (y != -100).to(torch.float32)
    each = F.cross_entropy(model(x).transpose(1, 2), y.clamp(min=0), reduction="none")
    return (each * keep).sum() / keep.sum().clamp(min=1)


def standardised(model: Tokens, x: Tensor, y: Tensor) -> Tensor:
    """By statistics of the batch's own inputs, which are known before the first microbatch."""
    y = y.float()
    return (model(x) * ((y - y.mean(0)) / (y.std(0) + 1))[..., None]).mean()


def two_terms(model: Tokens, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    return torch.stack([cross_entropy(logits, y), logits.square().mean() - 1]).sum()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mean": lambda m, x, y: cross_entropy(m(x), y),
    "sum": lambda m, x, y: cross_entropy(m(x), y, reduction="sum"),
    "items": lambda m, x, y: cross_entropy(m(x), y, reduction="sum") / (y != -100).sum(),
    "weighted": lambda m, x, y: cross_entropy(m(x), y, weight=torch.arange(1.0, CLASSES + 1)),
    "smoothed": lambda m, x, y: cross_entropy(m(x), y, label_smoothing=0.2),
    "squares": lambda m, x, y: F.mse_loss(m(x), F.one_hot(y.clamp(min=0), CLASSES).float()),
    "huber sum": lambda m, x, y: F.huber_loss(m(x), torch.zeros(CLASSES).expand(*x.shape, -1),
    reduction="sum"),
    "per sample": per_sample,
    "penalised": penalised,
    "masked": masked,
    "two terms": two_terms,
    "own places": lambda m, x, y: cross_entropy(m(x, torch.arange(LENGTH).expand(len(x), -1).flip(1)), y),
    "mask": lambda m, x, y: cross_entropy(
        m(x, None, F.pad(x, (1, 0), value=1)[:, None, None] > 0), y
    ),
    "from one": lambda m, x, y: 1 - m(x).tanh().mean(),
    "standardised": standardised,
    "roll": lambda m, x, y: cross_entropy(m(x.roll(1, 1).cumsum(1) % CLASSES), y),
}


def in_microbatches(
    function: Callable[..., Any], model: nn.Module, batch: Sequence[Tensor], count: int
) -> tuple[Tensor, dict[str, Tensor], Microbatch]:
    """Loss and gradients, added up over microbatches."""
    torch._dynamo.reset()
    made: list[Microbatch] = []

    def backend(graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        core = core_of(graph)
        own = {n.name: i for i, n in enumerate(graph.graph.find_nodes(op="placeholder"))}
        places = [own[n.name] for n in core.inputs]
        names = core.graph.graph.find_nodes(op="placeholder")
        weights = {n.name for n, p in zip(names, places, strict=True) if isinstance(inputs[p], nn.Parameter)}
        found = microbatch(core.graph, core.fakes, weights, count, "")
        if found.late is not None and found.results[0].kind == "late":  # it cannot be differentiated
            raise PlacementError(found.late.why)
        made.append(found)

        def run(*arguments: Any) -> tuple[Any, ...]:
            return tuple(combined(found, [arguments[p] for p in places]))

        return run

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    loss = compiled(model, *batch)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients, made[0]


def combined(found: Microbatch, values: Sequence[Any]) -> list[Any]:
    pieces = {i: found.pieces(values[i]) for i in found.batched}
    seed, met = torch.zeros(1, dtype=torch.int64), list[Tensor]()

    def given(number: int, m: int) -> Any:
        if number < 0:
            return (seed, torch.tensor(m * found.rows))[number + 2]
        return pieces[number][m] if number in pieces else values[number]

    for request in found.prologue:
        parts = [
            request.graph(*(given(i, m) for i in request.inputs), *(met[e] for e in request.earlier))
            for m in range(found.count)
        ]
        met.append(request.meet(parts))
    every = [
        found.graph(*(given(i, m) for i in range(len(values))), *met, seed, torch.tensor(m * found.rows))
        for m in range(found.count)
    ]
    own = [r.combined([e[i] for e in every]) for i, r in enumerate(found.results)]
    return found.finished(own)


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    """Also in microbatches that do not divide the batch, and in as many as it has rows."""
    model, batch = Tokens(), (ids(), labels())
    wanted = LOSSES[name](model, *batch)
    wanted.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for count in (3, 4, 7):
        loss, gradients, found = in_microbatches(LOSSES[name], model, batch, count)
        assert found.count > 1 and found.results[0].kind == "sum"
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=1e-6)
        assert gradients.keys() == expected.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


def test_metrics_of_whole_sums() -> None:
    """What is not linear in a sum is made once, after the last microbatch, if it is no part of the loss."""

    def measured(model: Tokens, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        logits = model(x)
        loss = cross_entropy(logits, y)
        spread = logits.square().mean().sqrt() / (loss + model.cls.square().sum()) + (y != -100).sum()
        return loss, loss.detach().exp(), loss > 2, spread, (logits.argmax(-1) == y).float().mean().round()

    model, batch = Tokens(), (ids(), labels())
    wanted = measured(model, *batch)
    gradients = torch.autograd.grad(wanted[0], list(model.parameters()))
    outputs: list[Any] = []

    def loss_of(model: Tokens, x: Tensor, y: Tensor) -> Tensor:
        outputs[:] = measured(model, x, y)
        return outputs[0]

    for count in (3, 7):
        _, found, made = in_microbatches(loss_of, model, batch, count)
        kinds = [r.kind for r in made.results]
        assert kinds.count("late") == 4 and kinds[0] == "sum"
        torch.testing.assert_close(tuple(outputs), wanted)
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_an_axis_that_is_as_long_as_the_batch() -> None:
    """Which dimension is the batch's follows from the inputs' first sizes, whatever other sizes there are."""
    model = Tokens()
    square = ids(ROWS, ROWS), labels(ROWS, ROWS)
    for count in (2, 3):
        wanted = cross_entropy(model(square[0]), square[1])
        loss, _, _ = in_microbatches(LOSSES["mean"], model, square, count)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)


def test_one_microbatch_is_the_program() -> None:
    model, batch = Tokens(), (ids(1), labels(3)[2:])
    loss, _, found = in_microbatches(LOSSES["mean"], model, batch, 4)
    assert found.count == 1 and not found.prologue
    torch.testing.assert_close(loss, cross_entropy(model(batch[0]), batch[1]))


def test_a_sum_that_counts_in_every_microbatch_is_wrong() -> None:
    """What the tests above would notice."""
    model, batch = Tokens(), (ids(), labels())
    wanted = cross_entropy(model(batch[0]), batch[1])
    parts = zip(*(t.split(2) for t in batch), strict=True)
    mean = torch.stack([cross_entropy(model(x), y) for x, y in parts])
    assert not torch.isclose(mean.nan_to_num().mean(), wanted, rtol=1e-2)


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "product": (lambda m, x, y: m(x).mean() * m(x).square().mean(), r"aten\.mul.*not linear"),
    "root": (lambda m, x, y: m(x).square().mean().sqrt(), r"aten\.sqrt.*not linear"),
    "largest": (lambda m, x, y: m(x).amax(), "mixes"),
    "statistic": (lambda m, x, y: (m(x) - m(x).mean((0, 1))).square().mean(), "not linear|mixes"),
    "along the batch": (lambda m, x, y: m(x).softmax(0).square().mean(), "mixes"),
    "sum beside rows": (lambda m, x, y: (m(x).mean() + y).float().mean(), "not linear"),
    "sum times rows": (lambda m, x, y: (m(x).mean((0, 1)) * F.one_hot(x, CLASSES)).mean(), "not linear"),
    "centred": (lambda m, x, y: ((m(x) - m(x).mean(0)) * y[..., None]).mean(), "not linear"),
    "rows beside late": (
        lambda m, x, y: (m(x).square().mean().detach().sqrt() * m(x)).mean(), "not linear"
    ),
    "noise": (lambda m, x, y: (m(x) + torch.randn(ROWS, LENGTH, CLASSES)).square().mean(), "random"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_rows_is_refused(name: str) -> None:
    function, pattern = REFUSED[name]
    with pytest.raises(Exception) as raised:
        in_microbatches(function, Tokens(), (ids(), labels()), 3)
    cause = getattr(raised.value, "inner_exception", raised.value)
    assert isinstance(cause, PlacementError), cause
    assert re.search(pattern, str(cause), re.DOTALL) and "microbatches" in str(cause), cause
    assert "test_microbatches.py" in str(cause)  # the user's line


def test_batch_norm_is_refused_by_name() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x)).square().mean()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    with pytest.raises(Exception) as raised:
        in_microbatches(loss, Normed(), (torch.randn(8, 4),), 4)
    cause = getattr(raised.value, "inner_exception", raised.value)
    assert isinstance(cause, PlacementError) and "batch_norm" in str(cause)


