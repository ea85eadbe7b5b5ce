"""A captured training step does what the same function does on one process, undecorated.

Losses to 1e-5 and parameters to 1e-4, relative, in fp32. Ranks get different batches; the reference is the
mean over them. The eager lowering runs the same passes as Inductor, which is tested once.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import os
import random
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import autodist
from autodist.runtime import compat
from autodist.runtime.agreement import DisagreementError
from autodist.runtime.outputs import WithheldOutput
from autodist.runtime.parameters import MixedReadError
from autodist.step_capture import program_inputs
from autodist.step_changes import Snapshot
from autodist.step_guards import Surroundings, step_roots
from autodist.step_state import State, roots_of
from tests.allocations import peak_bytes
from tests.models import CASES, VOCAB
from tests.parity import full
from tests.ranks import RankFailed, run_ranks
from tests.sequence import fresh
from tests.test_training import refusal

EAGER: dict[str, Any] = {"lowering": "eager"}
thorough = pytest.mark.thorough
Batch = dict[str, Any]


class Net(nn.Module):
    """A small convnet: batch norms, their buffers, and odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1, bias=False)  # before a norm its gradient is noise
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(F.gelu(self.norm(self.conv(x))).mean((2, 3))), y)


def net_batch(g: torch.Generator) -> Batch:
    return {"x": torch.randn(6, 2, 4, 4, generator=g), "y": torch.randint(0, 3, (6,), generator=g)}


class Mlp(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 9), nn.Linear(9, 7, bias=False)
        self.dropout = nn.Dropout(dropout)

    def body(self, x: Tensor) -> Tensor:
        return x + self.down(self.dropout(F.gelu(self.up(x))))

    def forward(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.body(self.body(x)), x.flip(-1))


def mlp_batch(g: torch.Generator, rows: int = 5) -> Batch:
    return {"x": torch.randn(rows, 7, generator=g)}


def one_layer() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 20, "vocab_size": VOCAB, "max_position_embeddings": 32}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


Maker = tuple[Callable[[], nn.Module], Callable[..., Batch]]
MODELS: dict[str, Maker] = {
    "net": (Net, net_batch),
    "mlp": (Mlp, mlp_batch),
    "llama": (CASES["llama"].build, CASES["llama"].batch),
    "layer": (one_layer, CASES["llama"].batch),
}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**batch)
    return output if isinstance(output, Tensor) else output.loss  # type: ignore[no-any-return]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[Tensor, Tensor]:
    loss = loss_of(model, batch)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), norm


Optimizer = Callable[[Any], torch.optim.Optimizer]


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, **options)


OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW": adamw,
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "AdamW fused": lambda p: adamw(p, fused=True),
    "AdamW one by one": lambda p: adamw(p, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    # Without a correction of its start the first step is of ten times lr, also where a gradient is rounding.
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
}


def train(
    model_name: str, make: Optimizer, function: Callable[..., Any], options: dict[str, Any], steps: int = 10
) -> tuple[nn.Module, Any]:
    """Train captured and on one process, side by side; the model and the captured step."""
    fresh()
    build, batch_of = MODELS[model_name]
    model = build().train()
    reference = copy.deepcopy(model)
    autodist.prepare(model, options)
    optimizer, reference_optimizer = make(model.parameters()), make(reference.parameters())
    step = autodist.train_step(plan=options)(function)
    sp = options.get("sp", 1)
    groups, group = dist.get_world_size() // sp, dist.get_rank() // sp
    for number in range(steps):
        batches = [batch_of(torch.Generator().manual_seed(100 * number + g)) for g in range(groups)]
        losses = reference_step(reference, reference_optimizer, batches, function)
        found = step(model, optimizer, batches[group])
        loss = found[0] if isinstance(found, tuple) else found
        assert abs(loss.item() - losses[group]) <= 1e-5 * abs(losses[group]), (number, loss, losses)
    check(model, reference, buffers=groups == 1)
    return model, step


def reference_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], function: Callable[..., Any]
) -> list[float]:
    """One step on the mean of the batches' losses."""
    losses = []
    for batch in batches:
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        loss = loss_of(model, batch)
        (loss / len(batches)).backward()
        losses.append(loss.item())
        if batch is not batches[-1]:
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    if function is clipped:
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()
    optimizer.zero_grad()
    return losses


def check(model: nn.Module, reference: nn.Module, tolerance: float = 1e-4, buffers: bool = True) -> None:
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        found = full(parameter.detach())
        error = (found - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-3)
        assert error < tolerance, f"parameter {name}: {error}"
    for name, buffer in model.named_buffers() if buffers else ():
        expected = dict(reference.named_buffers())[name]
        assert torch.allclose(buffer.double(), expected.double(), rtol=1e-4, atol=1e-6), f"buffer {name}"


# --- optimizers ------------------------------------------------------------------------------------


def optimizers(names: Sequence[str], model: str) -> None:
    """Ten steps each. From its sixth on RAdam takes the difference of two numbers near 2000, which torch's
    ``capturable`` form has in fp32 and its eager form in Python's numbers: they part by 1e-3."""
    for name in names:
        try:
            _, step = train(model, OPTIMIZERS[name], plain, EAGER, steps=5 if name == "RAdam" else 10)
        except Exception as failure:
            raise AssertionError(f"{name} on {model}") from failure
        assert len(step.programs) == 1, name


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=thorough), pytest.param(4, marks=thorough)])
@pytest.mark.parametrize("model", ["net", pytest.param("layer", marks=thorough)])
def test_optimizers(model: str, ranks: int) -> None:
    run_ranks(optimizers, ranks, list(OPTIMIZERS), model, seconds=900)


class Even(nn.Module):
    """Matrices with as many rows on each of two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 8, bias=False), nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.down(F.gelu(self.up(x))), x[:, 1:].flip(-1))


def muon(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, lr=1e-3)


def with_numbers() -> None:
    """Optimizers that ask for the learning rate's number: it is a constant of the program.

    Muon computes in bfloat16, in another order where a matrix lies on two ranks; it is compared with what it
    does there eagerly. Of Rprop torch cannot do that."""
    ranks = dist.get_world_size()
    for make in (muon,) if ranks > 1 else (muon, torch.optim.Rprop):
        fresh()
        model, reference = Even(), Even()
        reference.load_state_dict(model.state_dict())
        for m in (model, reference):
            autodist.prepare(m, EAGER)
        step = autodist.train_step(plan=EAGER)(plain)
        optimizers = [make(m.parameters()) for m in (model, reference)]
        for number in range(6):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 1e-3 if number < 4 else 2e-3
            batch = {"x": x_of(number)}
            loss = step(model, optimizers[0], batch)
            assert abs(loss - plain(reference, optimizers[1], batch)) < 1e-5
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(full(a.detach()), full(b.detach()), rtol=1e-3, atol=1e-4)
        assert len(step.programs) == 2, make
    if ranks > 1:
        model = Even()
        autodist.prepare(model, EAGER)
        rprop = torch.optim.Rprop(model.parameters())
        with pytest.raises(autodist.StepError, match=r"Rprop.step cannot be captured: .*sharding strategy"):
            autodist.train_step(plan=EAGER)(plain)(model, rprop, {"x": x_of(0)})


@pytest.mark.parametrize("ranks", [1, 2])
def test_optimizers_that_ask_for_the_rate(ranks: int) -> None:
    run_ranks(with_numbers, ranks)


def ten_steps(name: str, options: dict[str, Any]) -> None:
    train(name, adamw, clipped, options)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("model", ["net", "llama"])
def test_ten_steps(model: str, ranks: int) -> None:
    run_ranks(ten_steps, ranks, model, EAGER)


def test_inductor() -> None:
    run_ranks(ten_steps, 2, "llama", {})


# --- what a step may do ----------------------------------------------------------------------------


def side_by_side(
    build: Callable[[], nn.Module],
    make: Callable[[nn.Module], tuple[Any, ...]],
    function: Callable[..., Any],
    batches: Sequence[tuple[Any, ...]],
    options: dict[str, Any] = EAGER,
    between: Callable[[nn.Module], object] = lambda model: None,
) -> tuple[Any, Any]:
    """Run a step captured and as it is on the same batches, and ``between`` two calls what one does with the
    captured one's model; what both returned last, and the step."""
    fresh()
    model = build().train()
    reference = copy.deepcopy(model)
    autodist.prepare(model, options)
    step = autodist.train_step(plan=options)(function)
    mine, theirs = make(model), make(reference)
    found = wanted = None
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        found = step(model, *mine, *batch)
        torch.manual_seed(number)
        wanted = function(reference, *theirs, *batch)
        for a, b in zip(compat_leaves(found), compat_leaves(wanted), strict=True):
            if isinstance(a, Tensor):
                torch.testing.assert_close(full(a.detach()), b.detach(), rtol=1e-4, atol=1e-5)
            else:
                assert a == b
        between(model)
    check(model, reference)
    return found, step


def compat_leaves(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def with_sgd(model: nn.Module) -> tuple[Any, ...]:
    return (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),)


def with_schedule(model: nn.Module) -> tuple[Any, ...]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))


def x_of(number: int, rows: int = 4) -> Tensor:
    return torch.randn(rows, 7, generator=torch.Generator().manual_seed(number))


def scheduled(model: nn.Module, optimizer: Any, scheduler: Any, x: Tensor) -> tuple[Tensor, list[Any]]:
    loss = model(x)
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return loss.detach(), []


def in_a_loop(model: nn.Module, optimizer: Any, parts: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for x in parts:
        loss = model(x) / len(parts)
        loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_value_(model.parameters(), 0.05)
    optimizer.step()
    optimizer.zero_grad()
    return total


def by_flag(model: nn.Module, optimizer: Any, x: Tensor, last: bool) -> dict[str, Any]:
    loss = model(x)
    loss.backward()
    if last:
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": loss.detach(), "last": last}


def with_average(model: nn.Module, optimizer: Any, average: list[Tensor], x: Tensor) -> Tensor:
    loss = plain(model, optimizer, {"x": x})
    with torch.no_grad():
        for a, p in zip(average, model.parameters(), strict=True):
            a.lerp_(p, 0.1)
    return loss


def checkpointed(model: Any, optimizer: Any, x: Tensor) -> Tensor:
    y = checkpoint(model.body, checkpoint(model.body, x, use_reentrant=False), use_reentrant=False)
    loss = F.mse_loss(y, x.flip(-1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return loss.detach()


def in_groups(model: nn.Module) -> tuple[Any, ...]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups: list[Any] = [{"params": decayed, "weight_decay": 0.2}, {"params": others, "lr": 1e-3}]
    return (torch.optim.AdamW(groups, lr=1e-2),)


def two_losses(model: Any, optimizer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step after another, and a metric computed when both are done."""
    first = model(x)
    first.backward()
    optimizer.step()
    optimizer.zero_grad()
    y = model.body(x)
    second = y.square().mean() + 0.1 * model.up.weight.square().sum()
    second.backward()
    optimizer.step()
    optimizer.zero_grad()
    return first.detach(), second.detach(), (y > 0).float().mean()


def averages(model: nn.Module) -> tuple[Any, ...]:
    """An optimizer, and copies of the parameters."""
    return *with_sgd(model), [p.detach().clone() for p in model.parameters()]


def possibilities() -> None:
    same = [(x_of(0),)] * 3
    some = [(x_of(n),) for n in range(4)]
    side_by_side(Mlp, with_schedule, scheduled, same)
    side_by_side(Mlp, with_sgd, in_a_loop, [([x_of(n), x_of(n + 9)],) for n in range(3)])
    flags = [(x_of(0), n % 3 == 2) for n in range(9)]
    _, step = side_by_side(Mlp, with_sgd, by_flag, flags)
    # Without gradients and with, before the optimizer has state and after; and the one that steps.
    assert len(step.programs) == 5
    side_by_side(Mlp, averages, with_average, same)
    side_by_side(Mlp, with_sgd, checkpointed, same)
    side_by_side(Mlp, in_groups, lambda m, o, x: plain(m, o, {"x": x}), same)
    side_by_side(Mlp, with_sgd, two_losses, same)
    if dist.get_world_size() == 1:  # each rank draws its own numbers
        side_by_side(lambda: Mlp(0.3), with_sgd, checkpointed, some)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_step_may_do(ranks: int) -> None:
    run_ranks(possibilities, ranks)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(7, 5, batch_first=True, bidirectional=True), nn.Linear(10, 7)  # type: ignore

    def forward(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.head(self.rnn(x)[0]), x)


def recurrent() -> None:
    """They keep lists of their weights, and notes of which those were, and renew both where they run eagerly.
    """
    x = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    for kind in (nn.GRU, nn.LSTM):
        build = functools.partial(Recurrent, kind)
        _, step = side_by_side(
            build, with_sgd, lambda m, o, x: plain(m, o, {"x": x}), [(x,)] * 3, between=lambda m: m(x)
        )
        assert len(step.programs) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_recurrent_networks(ranks: int) -> None:
    run_ranks(recurrent, ranks)


class Pair(nn.Module):
    """Two networks that are trained by losses of their own, with batch norms if asked for."""

    def __init__(self, norms: bool = False) -> None:
        super().__init__()

        def part(outputs: int) -> nn.Module:
            middle = nn.BatchNorm1d(9) if norms else nn.GELU()
            return nn.Sequential(nn.Linear(7, 9, bias=False), middle, nn.Tanh(), nn.Linear(9, outputs))

        self.a, self.b = part(7), part(1)


def one_each(model: Any) -> tuple[Any, ...]:
    return torch.optim.SGD(model.a.parameters(), lr=0.1), torch.optim.SGD(model.b.parameters(), lr=0.1)


def descend(loss: Tensor, optimizer: Any) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def adversarial(model: Any, oa: Any, ob: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """One forward of the first network, detached for the second's loss."""
    made = model.a(x.flip(-1))
    other = descend(F.softplus(model.b(made.detach())).mean() + F.softplus(-model.b(x)).mean(), ob)
    return other, descend(F.softplus(-model.b(made)).mean(), oa)


def critic(model: Any, oa: Any, ob: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The second network's error, detached, weighs the first's loss, which comes first."""
    error = x.sum(-1) - model.b(x).squeeze(-1)
    actor = descend(-(model.a(x).log_softmax(-1)[:, 0] * error.detach()).mean(), oa)
    return actor, descend(error.square().mean(), ob)


def probed(model: Any, oa: Any, ob: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    made = model.a(x)
    probe = descend(model.b(made.detach()).square().mean(), ob)
    return probe, descend(F.mse_loss(made, x.flip(-1)), oa)


def shared_without_gradients(model: Any, oa: Any, ob: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    made = model.a(x)
    with torch.no_grad():
        target = made.mean(-1, keepdim=True) * 2
    return descend((model.b(x) - target).square().mean(), ob), descend(made.square().mean(), oa)


def weighted_by_another(model: Any, oa: Any, ob: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = model.a(x).square().mean(), model.b(x).square().mean()
    return descend(second * first.detach(), ob), descend(first, oa)


def detached_target(model: Any, oa: Any, ob: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both losses are for one network, and share a forward that one of them takes as it is."""
    made = model.a(x)
    first = (model.a[0].weight.sum() * 0.1 - made.detach().mean()).square()
    first.backward()
    second = made.square().mean()
    second.backward()
    oa.step()
    oa.zero_grad()
    return first.detach(), second.detach()


def regions() -> None:
    batches = [(x_of(n, 6),) for n in range(3)]
    several = (adversarial, critic, probed, shared_without_gradients, weighted_by_another, detached_target)
    for function in several:
        side_by_side(Pair, one_each, function, batches)
    side_by_side(lambda: Pair(norms=True), one_each, probed, batches)
    side_by_side(lambda: Pair(norms=True), one_each, adversarial, batches)


def accumulated(model: nn.Module, optimizer: Any, batch: Batch) -> Tensor:
    """A forward with running statistics for each half of a batch."""
    total = torch.zeros(())
    for half in (0, 1):
        loss = model(**{k: v[3 * half : 3 * half + 3] for k, v in batch.items()}) / 2
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return total


def test_losses_that_share_values() -> None:
    run_ranks(regions, 1)


def random_steps(model: Any, optimizer: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Draws that nothing reads, losses differentiated in the other order, and draws beside the forwards."""
    torch.rand(3)
    first = model(x + torch.empty_like(x).normal_(std=0.1))
    F.dropout(model.up(x), 0.5)
    second = model(x) + F.rrelu(model.up(x), training=True).mean() + F.gumbel_softmax(model.up(x)).std()
    torch.randperm(5)
    second.backward()
    first.backward()
    model.up.bias.grad.add_(torch.randn(9) * 0.1)
    optimizer.step()
    optimizer.zero_grad()
    return first.detach(), second.detach(), torch.rand(2)


def given_a_generator(model: Any, optimizer: Any, generator: torch.Generator, x: Tensor) -> Tensor:
    return plain(model, optimizer, {"x": x + torch.randn(x.shape, generator=generator)})


def draws_as_written() -> None:
    batches = [(x_of(n),) for n in range(3)]
    side_by_side(lambda: Mlp(0.5), with_sgd, random_steps, batches)
    generator = torch.Generator
    side_by_side(Mlp, lambda m: (*with_sgd(m), generator()), given_a_generator, batches)


def test_random_numbers_are_those_of_the_function() -> None:
    run_ranks(draws_as_written, 1)


def penalised(model: Any, optimizer: Any, anchors: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Penalties of the parameters themselves: their squares, their distance to a copy, a vector of all."""
    squares = sum(p.square().sum() for p in model.parameters())
    pairs = zip(model.parameters(), anchors, strict=True)
    distances = sum(((p - a).square() * a.abs()).sum() for p, a in pairs)
    gram = (model.down.weight @ next(p for p in model.parameters() if p.dim() > 1).T.mT).mean()
    size = nn.utils.parameters_to_vector(model.parameters()).abs().sum()
    loss = model(x) + 0.1 * squares + 0.2 * distances + 0.1 * gram + 0.01 * size
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    for a, p in zip(anchors, model.parameters(), strict=True):
        a.mul_(0.9).add_(p.detach(), alpha=0.1)
    return loss.detach(), norm


def penalties() -> None:
    for options in ({}, {"zero": 1, "sp": 2}):
        batches = [(x_of(n, 8).view(2, 4, 7),) for n in range(2)]
        side_by_side(Mlp, averages, penalised, batches, {**EAGER, **options})


def test_penalties_of_parameters() -> None:
    run_ranks(penalties, 2)


def regions_of_ranks() -> None:
    """The same batch on every rank: what one process does."""
    batches = [(x_of(n, 6),) for n in range(2)]
    side_by_side(Pair, one_each, adversarial, batches)
    side_by_side(lambda: Pair(norms=True), one_each, critic, batches)
    batch = net_batch(torch.Generator().manual_seed(0))
    side_by_side(Net, lambda m: (torch.optim.SGD(m.parameters(), lr=0.1),), accumulated, [(batch,)] * 2)


def test_losses_that_share_values_on_ranks() -> None:
    run_ranks(regions_of_ranks, 2)


def clipping(pick: Callable[..., Any]) -> Callable[..., Callable[[Tensor], Any]]:
    """Makes a step that clips the gradients of the parameters that ``pick`` finds in its closure."""

    def make(model: nn.Module, optimizer: Any) -> Callable[[Tensor], Any]:
        listed, named = list(model.parameters()), dict(model.named_parameters())
        nested, chosen = (listed, {"by name": [named]}), listed[0]

        def step(x: Tensor) -> tuple[Tensor, Tensor]:
            loss = model(x)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(pick(listed, named, nested, chosen), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach(), norm

        return step

    return make


def data_average(model: nn.Module, optimizer: Any, average: list[Tensor], x: Tensor) -> Tensor:
    loss = model(x)
    loss.backward()
    for p in model.parameters():
        p.grad.data.mul_(0.5)  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()
    for a, p in zip(average, model.parameters(), strict=True):
        a.data.mul_(0.9).add_(p.data, alpha=0.1)
    return loss.detach()


def freezes_a_while(model: Any, optimizer: Any, x: Tensor) -> Tensor:
    model.down.requires_grad_(False)
    loss = model(x)
    loss.backward()
    model.down.requires_grad_(True)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def in_a_set(model: nn.Module, optimizer: Any, parameters: set[Any], x: Tensor) -> Tensor:
    loss = model(x)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 0.1)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def with_set(model: nn.Module) -> tuple[Any, ...]:
    return *with_sgd(model), set(model.parameters())


def one_after_another(first: Any, second: Any, optimizer: Any, x: Tensor) -> None:
    second(first(x)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def reached() -> None:
    """Parameters in lists of a step's closure are its models' own; so are those that two models share.

    Those in a set too, but its order is another on each rank, and ranks notice.
    """
    picks: list[Callable[..., Any]] = [
        lambda listed, named, nested, chosen: listed,
        lambda listed, named, nested, chosen: named.values(),
        lambda listed, named, nested, chosen: nested[1]["by name"][0].values(),
        lambda listed, named, nested, chosen: [chosen],
    ]
    for pick in picks:
        fresh()
        model = Mlp()
        reference = copy.deepcopy(model)
        autodist.prepare(model, EAGER)
        step = autodist.train_step(plan=EAGER)(clipping(pick)(model, *with_sgd(model)))
        wanted = clipping(pick)(reference, *with_sgd(reference))
        for number in range(2):
            for a, b in zip(step(x_of(number)), wanted(x_of(number)), strict=True):
                torch.testing.assert_close(full(a), b.detach())
        check(model, reference)
    fresh()
    pairs = []
    for _ in range(2):
        first, second = nn.Linear(7, 7), nn.Linear(7, 7)
        second.weight = first.weight
        pairs.append((first, second, torch.optim.SGD([*first.parameters(), second.bias], lr=0.1)))
    for module, other in zip(pairs[0][:2], pairs[1][:2], strict=True):
        other.load_state_dict(module.state_dict())
    shared = autodist.train_step(plan=EAGER)(one_after_another)
    for number in range(3):
        shared(*pairs[0], x_of(number)), one_after_another(*pairs[1], x_of(number))
    check(pairs[0][0], pairs[1][0]), check(pairs[0][1], pairs[1][1])
    if dist.get_world_size() == 1:
        side_by_side(Mlp, with_set, in_a_set, [(x_of(n),) for n in range(2)])
    else:  # each rank would go through it in an order of its own
        with pytest.raises(autodist.StepError, match="'parameters' holds sharded parameters in a set"):
            side_by_side(Mlp, with_set, in_a_set, [(x_of(0),)])
    side_by_side(Mlp, averages, data_average, [(x_of(n),) for n in range(3)])
    side_by_side(Mlp, with_sgd, freezes_a_while, [(x_of(n),) for n in range(3)])


@pytest.mark.parametrize("ranks", [1, 2])
def test_parameters_reached_in_other_ways(ranks: int) -> None:
    run_ranks(reached, ranks)


def clamps(model: Any, optimizer: Any, x: Tensor) -> None:
    model(x).backward()
    with torch.no_grad():
        model.up.weight.clamp_(-0.1, 0.1)


def sets_a_row(model: Any, optimizer: Any, x: Tensor) -> None:
    model(x).backward()
    model.up.weight.data[0] = 0


def clears_a_gradient(model: Any, optimizer: Any, x: Tensor) -> None:
    model(x).backward()
    if model.up.weight.grad is not None:
        model.up.weight.grad.zero_()


def attributes() -> None:
    """A weight read as an attribute is the weight on one rank; on several, what would be lost is refused."""
    functions = {
        clamps: "writes into the weight 'up.weight'",
        sets_a_row: "writes into the weight 'up.weight'",
        clears_a_gradient: "uses the gradient of a weight that it reads as its module's attribute",
    }
    for function, wanted in functions.items():
        if dist.get_world_size() == 1:
            side_by_side(Mlp, with_sgd, function, [(x_of(0),)] * 2)
            continue
        model = Mlp()
        step = autodist.train_step(plan=EAGER)(function)
        message = refusal(autodist.StepError, lambda s=step, m=model: s(m, *with_sgd(m), x_of(0)))
        assert wanted in message and "test_train_step.py" in message and "named_parameters()" in message
    if dist.get_world_size() > 1:
        model = Mlp()
        given = (model, *with_sgd(model), [p.detach() for p in model.parameters()], x_of(0))
        with pytest.raises(autodist.StepError, match=r"shares memory with 'up\.weight', which is sharded"):
            autodist.train_step(plan=EAGER)(with_average)(*given)


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_as_attributes(ranks: int) -> None:
    run_ranks(attributes, ranks)


def doubles(model: Any, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    x.mul_(2)
    loss = F.mse_loss(model.body(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


class SharedBuffers(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(7))
        self.register_buffer("other", self.one.view(7))

    def forward(self, x: Tensor) -> Tensor:
        self.one.mul_(2)
        return super().forward(x * self.other)


def memory() -> None:
    """One tensor twice is one tensor; two that share memory are refused where one is written."""
    fresh()
    model, reference = Mlp(), Mlp()
    reference.load_state_dict(model.state_dict())
    step = autodist.train_step(plan=EAGER)(doubles)
    mine, theirs = with_sgd(model), with_sgd(reference)
    for number in range(3):
        x, y = x_of(number), x_of(number)
        torch.testing.assert_close(step(model, *mine, x, x), doubles(reference, *theirs, y, y))
        assert torch.equal(x, y)
    check(model, reference)
    step(model, *mine, x_of(0), x_of(1))  # as the program before, but for what it was given twice
    rows = x_of(0, 5)
    shared = "writes into memory that two of its tensors share"
    assert shared in refusal(autodist.StepError, lambda: step(model, *mine, rows[1:], rows[:-1]))
    reads = autodist.train_step(plan=EAGER)(lambda m, o, x, y: plain(m, o, {"x": x + y}))
    reads(model, *mine, rows[1:], rows[:-1])

    flat = torch.zeros(9 * 7 * 2)
    parts = flat.view(2, -1)
    model.up.weight.grad, model.down.weight.grad = parts[0].view(9, 7), parts[1].view(7, 9)
    views = [p.detach() for p in model.parameters()]
    other = SharedBuffers()
    for given in ((other, *with_sgd(other), {"x": rows}), (model, *mine, {"x": rows})):
        plainly = autodist.train_step(plan=EAGER)(plain)
        assert shared in refusal(autodist.StepError, lambda s=plainly, g=given: s(*g))
    model.zero_grad()
    averaged = autodist.train_step(plan=EAGER)(with_average)
    assert shared in refusal(autodist.StepError, lambda: averaged(model, *mine, views, rows))


def test_memory_that_is_shared() -> None:
    run_ranks(memory, 1)


class Trainer:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Mlp()
        autodist.prepare(self.model, EAGER)
        self.optimizer, self.scheduler = with_schedule(self.model)
        self.parameters, self.losses = list(self.model.parameters()), [0.0]

    @autodist.train_step(plan=EAGER)
    def step(self, x: Tensor) -> tuple[Tensor, float]:
        loss = self.model(x)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()
        rate = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.detach(), rate

    @autodist.train_step(plan=EAGER)
    def logs(self, x: Tensor) -> None:
        self.losses.append(self.model(x).detach())


def methods() -> None:
    """Decorated methods are steps of their instances; rates that they return are numbers."""
    fresh()
    trainer, other = Trainer(), Trainer()
    assert trainer.step.verify(x_of(0)).passed  # type: ignore[attr-defined]
    for number in range(3):
        loss, rate = trainer.step(x_of(number))
        wanted, wanted_rate = Trainer.step.function(other, x_of(number))  # type: ignore[attr-defined]
        torch.testing.assert_close(loss, wanted)
        assert type(rate) is float and rate == wanted_rate
    assert trainer.step is trainer.step and trainer.step is not other.step
    assert len(trainer.step.programs) == 1  # type: ignore[attr-defined]
    assert "the list 'self.losses'" in refusal(autodist.StepError, lambda: trainer.logs(x_of(0)))
    assert trainer.losses == [0.0]
    if dist.get_world_size() == 1:
        copied = copy.deepcopy(trainer)
        copied.step(x_of(3))
        assert copied.step is not trainer.step and copied.scheduler.last_epoch == 4
        assert trainer.scheduler.last_epoch == 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_methods(ranks: int) -> None:
    run_ranks(methods, ranks)


# --- composition -----------------------------------------------------------------------------------


def compositions(zeros: Sequence[int], sequences: Sequence[dict[str, Any]]) -> None:
    for zero in zeros:
        train("mlp", OPTIMIZERS["SGD momentum"], clipped, {**EAGER, "zero": zero}, steps=3)
    for options in sequences:
        _, step = train("llama", adamw, clipped, {**EAGER, **options}, steps=3)
        assert any(r.name == "sequence_parallel" for r in step.job.reports[-1].records)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=thorough)])
def test_composition(ranks: int) -> None:
    """Stages of ZeRO, sequence parallelism, one group of ranks and two."""
    sequences = [{"sp": 2}, {"sp": 2, "zero": 1}, {"sp": ranks, "zero": 2}]
    run_ranks(compositions, ranks, (0, 1, 2), sequences)


def test_two_groups_of_two_ranks() -> None:
    run_ranks(compositions, 4, (), [{"sp": 2, "zero": 1}])


def mixed(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def precisions() -> None:
    fresh()
    reference = Mlp()
    model = copy.deepcopy(reference)
    by_plan = copy.deepcopy(reference)
    step = autodist.train_step(plan=EAGER)(mixed)
    planned = autodist.train_step(plan={**EAGER, "precision": "bf16"})(plain)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (reference, model, by_plan)]
    for number in range(3):
        x = x_of(number)
        wanted = mixed(reference, optimizers[0], x)
        for loss in (step(model, optimizers[1], x), planned(by_plan, optimizers[2], {"x": x})):
            assert abs(loss - wanted) < 1e-2 * wanted
    # Sums of bf16 products are rounded in another order.
    check(model, reference, 1e-2)
    check(by_plan, reference, 1e-2)


def test_precision() -> None:
    run_ranks(precisions, 2)


def outputs() -> None:
    """Logits that stay in pieces are withheld; a metric computed from them is right."""

    def function(model: nn.Module, optimizer: Any, batch: Batch) -> dict[str, Any]:
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        hits = (output.logits.argmax(-1) == batch["labels"]).float().mean()
        return {"loss": output.loss.detach(), "hits": hits, "logits": output.logits}

    fresh()
    build, batch_of = MODELS["llama"]
    model = build().train()
    reference = copy.deepcopy(model)
    batch = batch_of(torch.Generator().manual_seed(3))
    wanted = function(reference, adamw(reference.parameters()), batch)
    step = autodist.train_step(plan={**EAGER, "sp": 2})(function)
    found = step(model, adamw(model.parameters()), batch)
    assert isinstance(found["logits"], WithheldOutput)
    assert found["logits"].shape == wanted["logits"].shape
    assert torch.allclose(found["hits"], wanted["hits"]) and torch.allclose(found["loss"], wanted["loss"])


def test_outputs_in_pieces() -> None:
    run_ranks(outputs, 2)


# --- sizes and settings that change ----------------------------------------------------------------


def changes() -> None:
    """New sizes make one more program, learning rates none, other settings one each."""
    fresh()
    model = Mlp()
    reference = copy.deepcopy(model)
    step = autodist.train_step(plan=EAGER)(plain)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, reference)]

    def same(rows: int, programs: int) -> None:
        x = x_of(rows, rows)
        loss, wanted = step(model, optimizers[0], {"x": x}), plain(reference, optimizers[1], {"x": x})
        assert abs(loss - wanted) < 1e-5 * wanted
        check(model, reference)
        assert len(step.programs) == programs, (rows, programs, len(step.programs))

    same(4, 0)  # makes the optimizer's state
    same(4, 1)
    for rows in (6, 9, 5, 12):
        same(rows, 2)
    for o in optimizers:
        o.param_groups[0]["lr"] = 0.02
    same(4, 2)
    for o in optimizers:
        o.param_groups[0]["momentum"] = 0.5
    same(4, 3)
    same(9, 4 if len(step.programs) == 4 else 3)
    model.eval(), reference.eval()
    same(9, len(step.programs) + 1)
    step = autodist.train_step(plan=EAGER)(by_flag)
    step(model, optimizers[0], x_of(0), last=False)
    gradients = [weakref.ref(p.grad) for p in model.parameters()]
    step(model, optimizers[0], x_of(0), last=True)
    assert not any(g() for g in gradients), "gradients that a step has set to None are not kept"


def scaled(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    return plain(model, optimizer, {"x": x * Around.scale})


def surroundings() -> None:
    """A program is made for the values around the function; a learning rate may be a tensor."""
    fresh()
    model = Mlp()
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-2)) for m in (model, reference)]
    step = autodist.train_step(plan=EAGER)(scaled)
    for scale in (1.0, 1.0, 2.0, 1.0, 2.0):
        Around.scale = scale
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"].mul_(0.9)
        found, wanted = step(model, optimizers[0], x_of(0)), scaled(reference, optimizers[1], x_of(0))
        assert abs(found - wanted) < 1e-5 * wanted
    check(model, reference)
    assert len(step.programs) == 2


def test_what_stands_around_a_step() -> None:
    run_ranks(surroundings, 1)


def test_what_changes_makes_few_programs() -> None:
    run_ranks(changes, 2)


def part_ways(model: nn.Module, optimizer: Any, x: Tensor, decay: float) -> Tensor:
    """What it does to gradients depends on a number, and needs no collective."""
    loss = model(x)
    loss.backward()
    for p in model.parameters():
        p.grad.add_(p.detach(), alpha=decay)  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def other_programs() -> None:
    """Ranks that do other things to parameters notice, when the program is made or when it runs."""
    rank = dist.get_rank()

    def begin(function: Callable[..., Any]) -> Callable[..., Any]:
        fresh()
        model = Mlp()
        options = {**EAGER, "timeout": 60}
        autodist.prepare(model, options)
        step = autodist.train_step(plan=options)(function)
        return functools.partial(step, model, adamw(model.parameters()), x_of(rank, 4 + rank))

    step = begin(by_flag)
    for last in (True, True, True):
        step(last)
    train = step.func  # type: ignore[attr-defined]
    assert len(train.job.agreed) == 1, "one program, whatever the batch: nothing to compare in a run"
    for last in (False, False, True, False):  # without gradients and with: each program is made
        step(last)
    before = [p.to_local().clone() for p in step.args[0].parameters()]  # type: ignore[attr-defined]
    with pytest.raises(MixedReadError, match="runs the step of graph"):
        step(rank == 0)
    now = [p.to_local() for p in step.args[0].parameters()]  # type: ignore[attr-defined]
    assert all(map(torch.equal, before, now))
    with pytest.raises(DisagreementError, match=r"what is done to parameters"):
        begin(part_ways)(0.1 * rank)


def test_ranks_that_run_other_programs_notice() -> None:
    run_ranks(other_programs, 2)


def another_on_one_rank() -> None:
    fresh()
    model = Mlp()
    autodist.prepare(model, EAGER)
    step = autodist.train_step(plan=EAGER)(part_ways)
    optimizer = adamw(model.parameters())
    for scale in (1.0, 1.0):
        step(model, optimizer, x_of(0), scale)
    if dist.get_rank() == 1:
        with pytest.raises(DisagreementError, match="rank 1 has made it, and rank 0 runs the step of"):
            step(model, optimizer, x_of(0), 2.0)
        os._exit(1)  # as a program does that does not catch it
    step(model, optimizer, x_of(0), 1.0)


def test_a_program_made_on_one_rank_alone() -> None:
    """The other runs the one that there is, and waits for it; both end long before their timeout."""
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_ranks(another_on_one_rank, 2)
    waiting, made = str(caught.value).split("rank 1:\n")
    assert made == "the process died"
    assert "PeerError" in waiting and "rank 1 stopped in compiling graph 2" in waiting
    assert time.monotonic() - start < 200


def by_length(model: nn.Module, optimizer: Any, x: Tensor) -> tuple[Tensor, int, int]:
    loss = model(x) * len(x) + sum(row.sum() for row in x) * 0.01
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), int(x.shape[0]), len(x.split(3))


def by_layout(model: nn.Module, optimizer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    loss = plain(model, optimizer, {"x": x})
    return loss, x.view(-1) if x.is_contiguous() else x.t().reshape(-1)


def sizes_and_layouts() -> None:
    """A size that Python has used as a number holds for that number; so does an order of dimensions."""
    side_by_side(Mlp, with_sgd, by_length, [(x_of(n, n),) for n in (4, 4, 5, 6, 5, 8, 6)])
    turned = [(torch.randn(7, n).t(),) for n in (4, 5, 6)]
    straight = [(x_of(n, n),) for n in (4, 4, 5, 8)]
    apart = [(torch.randn(8, 14)[::2, ::2],)]
    _, step = side_by_side(Mlp, with_sgd, by_layout, [*straight, *turned, *apart, *turned, *straight])
    assert len(step.programs) == 4, "four rows, other numbers of rows, turned, with gaps"


def test_what_batches_look_like() -> None:
    run_ranks(sizes_and_layouts, 1)


class Settings:
    scale = 1.0


class Changing(Mlp):
    """Reads what a program must be made for."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.act = F.gelu
        self.many = [0.01] * 70
        self.cfg = Settings()
        self.cfg.inner = Settings()  # type: ignore[attr-defined]
        self.register_buffer("shift", torch.zeros(7))

    def body(self, x: Tensor) -> Tensor:
        inner = self.cfg.inner.scale  # type: ignore[attr-defined]
        scale = sum(self.many) * self.cfg.scale * inner * self.factor * getattr(self, "new", 1.0)
        return x + self.down(self.act(self.up(x))) * scale + self.shift.to(x.dtype)


class Running(nn.Linear):
    """Makes its buffer anew in each forward."""

    def __init__(self) -> None:
        super().__init__(7, 7)
        self.register_buffer("mean", torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.mean(0) * 0.1
        return super().forward(x - self.mean).square().mean()


def old_mean(model: Any, optimizer: Any, x: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    mean = model.mean
    loss = plain(model, optimizer, {"x": x})
    return loss, mean if given is None else given


def doubled(module: Any, args: Any, output: Any) -> Any:
    return output * 2


def with_hook(model: Any) -> None:
    model.hook = model.up.register_forward_hook(doubled)


def tied(model: Any) -> None:
    model.down = nn.Linear(9, 7, bias=False).requires_grad_(False)
    with torch.no_grad():
        model.down.weight.fill_(0.1)


CHANGES: list[Callable[[Any], Any]] = [
    with_hook,
    lambda m: (m.hook.remove(), delattr(m, "hook")),
    lambda m: setattr(m, "act", torch.tanh),
    lambda m: setattr(m, "act", nn.Tanh()),
    lambda m: setattr(m, "act", nn.Sequential(m.act, nn.ReLU())),
    lambda m: setattr(m, "new", 2.0),
    lambda m: delattr(m, "new"),
    lambda m: m.many.__setitem__(3, 0.5),
    lambda m: setattr(m.cfg, "scale", 0.5),
    lambda m: setattr(m.cfg.inner, "scale", 3.0),
    lambda m: setattr(m, "cfg", copy.deepcopy(m.cfg)),
    lambda m: setattr(Changing, "factor", 2.0),
    lambda m: setattr(m, "shift", torch.ones(1, 7, dtype=torch.float64)),
    tied,
    lambda m: setattr(m, "forward", lambda x: m.body(x).square().mean()),
]


def structure() -> None:
    """A change in modules makes another program; none does not."""
    fresh()
    Changing.factor = 1.0
    model = Changing()
    reference = copy.deepcopy(model)
    step = autodist.train_step(plan=EAGER)(plain)
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, reference))

    def same(what: Any = None) -> None:
        found, wanted = step(model, mine, {"x": x_of(0)}), plain(reference, theirs, {"x": x_of(0)})
        assert abs(found - wanted) < 1e-5 * wanted, (what, found, wanted)
        check(model, reference)

    same(), same(), same()
    assert len(step.programs) == 1
    for number, change in enumerate(CHANGES):
        for m in (model, reference):
            change(m)
        same(number)
    made = len(step.programs)
    same()
    assert len(step.programs) == made
    assert step._changed == "an argument.forward", "what a warning of many programs names"
    running = Running()
    optimizer, step = with_sgd(running)[0], autodist.train_step(plan=EAGER)(plain)
    states = [step(running, optimizer, {"x": x_of(n)}) is None or step._state for n in range(5)]
    assert states[2] is states[4], "a buffer that each run makes anew is the state's"
    step, kept = autodist.train_step(plan=EAGER)(old_mean), []
    for given in (None, None, running.mean, None):
        before = running.mean
        kept.append((before, step(running, optimizer, x_of(0), None if given is None else before)[1]))
    assert all(found is before for before, found in kept), "a buffer that is returned is the one before"
    assert len(step.programs) == 2, "given one of the state's tensors or not"


def test_modules_that_change() -> None:
    run_ranks(structure, 1)


def moves_to_first_group(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop())


def turns_around(optimizer: Any) -> None:
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["params"].reverse()


class Slows(torch.optim.Optimizer):
    """Divides by an attribute of its own, which its step may change."""

    def __init__(self, parameters: Any, growth: int = 0) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.k, self.growth = 1, growth

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.k += self.growth
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * group["lr"] / self.k)


def halves(optimizer: Any, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad.mul_(0.5)


def optimizers_that_change() -> None:
    """Members and order of groups, an optimizer's attributes and hooks are what a program is made for."""

    def same(make: Callable[[nn.Module], tuple[Any, ...]], changes: Sequence[Callable[[Any], Any]]) -> Any:
        fresh()
        model = Mlp()
        reference = copy.deepcopy(model)
        step = autodist.train_step(plan=EAGER)(plain)
        (mine,), (theirs,) = make(model), make(reference)
        for change in (None, None, *changes, None):
            for optimizer in (mine, theirs) if change else ():
                change(optimizer)  # type: ignore[misc]
            found, wanted = step(model, mine, {"x": x_of(0)}), plain(reference, theirs, {"x": x_of(0)})
            assert abs(found - wanted) < 1e-5 * wanted, change
            check(model, reference)
        return step, model, mine

    same(in_groups, [moves_to_first_group, turns_around, lambda o: o.param_groups[1]["params"].pop()])
    same(lambda m: (Slows(m.parameters()),), [lambda o: setattr(o, "k", 3)])
    step, model, optimizer = same(with_sgd, [lambda o: o.register_step_pre_hook(halves)])
    model.up.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(autodist.StepError, match=r"'up.weight' has a gradient hook"):
        step(model, optimizer, {"x": x_of(0)})
    with pytest.raises(autodist.StepError, match=r"changes 'an argument.k'"):
        autodist.train_step(plan=EAGER)(plain)(model := Mlp(), Slows(model.parameters(), 1), {"x": x_of(0)})


def test_optimizers_that_change() -> None:
    run_ranks(optimizers_that_change, 1)


TABLE = {"power": 2.0, "many": [1.0] * 100, "other": object(), "inner": Settings()}


def helper(value: Tensor, extra: list[float] = [1.0]) -> Tensor:  # noqa: B006
    return value * TABLE["power"] * TABLE["many"][99] * TABLE["inner"].scale * extra[0]  # type: ignore


def around(
    model: nn.Module, optimizer: Any, x: Tensor, part: Any, scale: Any, factors: Any
) -> tuple[Tensor, Tensor]:
    y = helper(x[part]) * scale(2.0) * float(factors[0])
    return plain(model, optimizer, {"x": y}), model.up(x)  # type: ignore[operator]


def surroundings_deep() -> None:
    """Helpers' globals and defaults, closures of arguments, arrays, ranges and settings of torch."""
    factor, array = [1.0], numpy.ones(2)
    fresh()
    model = Mlp()
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, reference)]
    step = autodist.train_step(plan=EAGER)(around)

    def same(new: bool) -> None:
        before = len(step.programs)
        rest = (x_of(0), slice(0, 3), lambda v: v * factor[0], array)
        found, wanted = step(model, optimizers[0], *rest), around(reference, optimizers[1], *rest)
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            close = {"rtol": 1e-4, "atol": 1e-5} if a.dtype is torch.float32 else {"rtol": 0.02, "atol": 0.01}
            torch.testing.assert_close(a, b, **close)
        assert (len(step.programs) > before) == new

    same(True), same(False)
    changes: list[Callable[[], Any]] = [
        lambda: TABLE.update(power=0.5),
        lambda: TABLE["many"].__setitem__(99, 1.5),  # type: ignore[attr-defined]
        lambda: setattr(TABLE["inner"], "scale", 0.7),
        lambda: helper.__defaults__[0].__setitem__(0, 1.3),  # type: ignore[index]
        lambda: factor.__setitem__(0, 0.5),
        lambda: array.__setitem__(0, 0.5),
    ]
    for change in changes:
        change()
        same(True)
    with torch.autocast("cpu", torch.bfloat16):
        same(True)
    same(False)
    for no_gradients in (torch.no_grad(), torch.inference_mode()):
        with no_gradients, pytest.raises(autodist.StepError, match="no gradients are recorded"):
            same(False)
    rest = (slice(0, 3), lambda v: v, array)
    with pytest.raises(autodist.StepError, match="requires a gradient"):
        step(model, optimizers[0], x_of(0).requires_grad_(), *rest)
    with pytest.raises(autodist.StepError, match=r"is an array of 9000 elements.*torch\.from_numpy"):
        step(model, optimizers[0], x_of(0), *rest[:2], numpy.ones(9000))
    before = len(step.programs)
    for number in (2, 2, 3):
        step(model, optimizers[0], x_of(0), *rest[:2], (numpy.float32(number),))
    assert len(step.programs) == before + 2, "a number of numpy's is a value"


def test_a_set_put_back_is_the_same() -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in range(300)]
    owned = set(parameters)
    owned.difference_update(parameters[20:])  # has an order that a set made anew has not

    def function() -> Any:
        return owned

    before = Surroundings(step_roots(function, []))
    snapshot = Snapshot({}, [function])
    snapshot.stand_in({id(p): p.detach() for p in parameters})
    assert not any(p in owned for p in parameters)
    snapshot.restore()
    assert before.difference(Surroundings(step_roots(function, []))) is None


def test_what_stands_around_helpers() -> None:
    run_ranks(surroundings_deep, 1)


# --- checkpoints -----------------------------------------------------------------------------------


def resumed() -> None:
    """Saved in the middle of an accumulation and loaded, a run goes on as if nothing had been."""

    def begin() -> tuple[Any, Any, Any]:
        fresh()
        model = Mlp()
        autodist.prepare(model, EAGER)
        optimizer = adamw(model.parameters())
        return autodist.train_step(plan=EAGER)(by_flag), model, optimizer

    def run(run_: tuple[Any, Any, Any], numbers: Sequence[int]) -> list[float]:
        step, model, optimizer = run_
        seed = 10 * dist.get_rank()
        return [step(model, optimizer, x_of(n + seed), n % 3 == 2)["loss"].item() for n in numbers]

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    assert folder[0] is not None
    path = Path(folder[0]) / "run"
    first = begin()
    run(first, range(4))
    autodist.save(path, first[1], first[2])
    wanted = run(first, range(4, 9))
    again = begin()
    autodist.load(path, again[1], again[2])
    assert run(again, range(4, 9)) == wanted
    for a, b in zip(first[1].parameters(), again[1].parameters(), strict=True):
        assert torch.equal(full(a.detach()), full(b.detach()))


def test_a_resumed_run_is_the_same_run() -> None:
    run_ranks(resumed, 2)


# --- refusals --------------------------------------------------------------------------------------

def branches(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    loss = model(x)
    if loss > 0:
        loss.backward()
    return loss


def takes_a_number(model: nn.Module, optimizer: Any, x: Tensor) -> float:
    loss = model(x)
    loss.backward()
    return loss.item()


def prints(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    print(model(x))


def hooks(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    y = model(x)
    y.register_hook(lambda g: g * 2)


class Counts(Mlp):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x) * self.calls


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def own_gradient(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    Double.apply(model(x)).backward()


def twice(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    loss = model(x)
    loss.backward(retain_graph=True)
    (loss * 2).backward()


def after_its_step(model: Any, optimizer: Any, x: Tensor) -> None:
    first, second = model(x), model.up.weight.sum()
    first.backward()
    optimizer.step()
    second.backward()


def engine(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    torch.autograd.grad(model(x), list(model.parameters()))


class Held:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


def in_an_object(model: nn.Module, optimizer: Any, x: Tensor) -> Held:
    return Held(model(x))


def scaler(model: nn.Module, optimizer: Any, x: Tensor, scaler: Any) -> None:
    scaler.scale(model(x)).backward()


def sets_rate(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    model(x).backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.5


def sets_momentum(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    model(x).backward()
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.5


def draws(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    model(x * random.random()).backward()


class Around:
    """Stands around a step."""

    scale, calls = 1.0, 0


FIXED = torch.ones(7)


GENERATOR = torch.Generator()


def seeds(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    torch.manual_seed(7)
    model(x + torch.randn_like(x)).backward()


def forks(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    with torch.random.fork_rng():
        noise = torch.randn_like(x)
    model(x + noise).backward()


def seeds_its_own(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    model(x).backward()
    GENERATOR.manual_seed(3)


def counts(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    model(x).backward()
    Around.calls += 1


def uses_a_global_tensor(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    model(x * FIXED).backward()


def early_schedule(model: nn.Module, optimizer: Any, scheduler: Any, x: Tensor) -> None:
    model(x).backward()
    scheduler.step()
    optimizer.step()


class Scaled(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(7)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


def other_backward(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    torch.autograd.backward([model(x)])
    optimizer.step()


def catches(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    loss = model(x)
    with contextlib.suppress(Exception):
        loss.item()
    loss.backward()


def reduces(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    loss = model(x).detach().clone()
    dist.all_reduce(loss)
    return loss


LOG: list[Any] = []
NUMBERS = itertools.count()


class Filled(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = x.mean(0)
        return super().forward(x)


class Ticks(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.held = Held(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.held.loss = super().forward(x)
        return self.held.loss


def keeps(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    LOG.append(model(x).detach())


def names(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    global LAST
    LAST = model(x)


def freezes(model: Any, optimizer: Any, x: Tensor) -> None:
    model.up.bias.requires_grad_(False) if dist.get_world_size() == 1 else model.requires_grad_(False)


def replaces_a_parameter(model: Any, optimizer: Any, x: Tensor) -> None:
    model.down.weight = nn.Parameter(torch.zeros(7, 9))


def replaces_a_module(model: Any, optimizer: Any, x: Tensor) -> None:
    model.dropout = nn.Identity()


def adds_a_hook(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    model.register_forward_hook(print)


def formats(model: nn.Module, optimizer: Any, x: Tensor) -> str:
    return f"loss {model(x)}"


def formats_shortly(model: nn.Module, optimizer: Any, x: Tensor) -> str:
    return format(model(x), ".3f")


def sets_data(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    for p in model.parameters():
        p.data = p.data.clamp(-1, 1)


def takes_next(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    model(x * next(NUMBERS)).backward()


REFUSED: dict[str, tuple[Callable[..., Any], Callable[[], nn.Module], list[str]]] = {
    "branch": (branches, Mlp, ["needs the value of a tensor", "test_train_step.py", "torch.where"]),
    "item": (takes_a_number, Mlp, ["needs the value of a tensor", "test_train_step.py"]),
    "print": (prints, Mlp, ["prints a tensor", "test_train_step.py"]),
    "hook": (hooks, Mlp, ["registers a hook", "test_train_step.py"]),
    "counter": (lambda m, o, x: m(x).backward(), Counts, ["changes 'calls', a Python value of a Counts"]),
    "own gradient": (own_gradient, Mlp, ["Double", "torch.library.custom_op"]),
    "twice": (twice, Mlp, ["differentiated twice", "Add the losses up", "test_train_step.py"]),
    "late": (after_its_step, Mlp, ["changed since the loss read it", "test_train_step.py"]),
    "grad": (engine, Mlp, ["torch.autograd.grad", "test_train_step.py"]),
    "rate": (sets_rate, Mlp, ["changes 'lr' of a parameter group", "scheduler"]),
    "momentum": (sets_momentum, Mlp, ["changes 'momentum' of a parameter group"]),
    "random": (draws, Mlp, ["Python's or numpy's generator"]),
    "seed": (seeds, Mlp, ["seeds one of torch's random generators", "test_train_step.py"]),
    "fork": (forks, Mlp, ["puts its state back", "test_train_step.py"]),
    "own generator": (seeds_its_own, Mlp, ["seeds one of", "in its last lines"]),
    "outside": (counts, Mlp, ["changes 'Around.calls'"]),
    "global tensor": (uses_a_global_tensor, Mlp, ["not given", "test_train_step.py", "'FIXED'", "argument"]),
    "plain tensor": (lambda m, o, x: m(x), Scaled, ["'scale', an attribute of a Scaled", "register_buffer"]),
    "backward": (other_backward, Mlp, ["torch.autograd.backward", "loss.backward()"]),
    "caught": (catches, Mlp, ["needs the value of a tensor", "in catches"]),
    "numpy": (lambda m, o, x: m(x).detach().numpy(), Mlp, ["makes an array", "test_train_step.py"]),
    "collective": (reduces, Mlp, ["collective of torch.distributed", "test_train_step.py"]),
    "list": (keeps, Mlp, ["changes element 0 of the list 'LOG'", "return what is new"]),
    "global": (names, Mlp, ["changes 'LAST'"]),
    "buffer": (lambda m, o, x: m(x), Filled, ["changes 'mean', a buffer of a Filled that is None"]),
    "held": (lambda m, o, x: m(x), Ticks, ["changes 'm.held.loss'"]),
    "frozen": (freezes, Mlp, ["sets requires_grad of 'up.", "set it back"]),
    "parameter": (replaces_a_parameter, Mlp, ["replaces or deletes 'down.weight'", "copy_"]),
    "module": (replaces_a_module, Mlp, ["changes 'dropout' in the modules of a Mlp"]),
    "module hook": (adds_a_hook, Mlp, ["in the forward hooks of a Mlp"]),
    "f-string": (formats, Mlp, ["formats a tensor", "test_train_step.py"]),
    "format": (formats_shortly, Mlp, ["formats a tensor", "test_train_step.py"]),
    "data": (sets_data, Mlp, ["sets .data of a tensor", "copy_", "test_train_step.py"]),
    "iterator": (takes_next, Mlp, ["takes from 'NUMBERS', an iterator"]),
    "object": (in_an_object, Mlp, ["returns a Held that holds tensors"]),
}


def refusals(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        fresh()
        function, build, _ = REFUSED[name]
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = autodist.train_step(plan=EAGER)(function)
        state = torch.get_rng_state()
        found[name] = refusal(autodist.StepError, lambda step=step, m=model, o=optimizer: step(m, o, x_of(0)))
        assert all(p.grad is None for p in model.parameters()), "nothing was done"
        assert torch.equal(torch.get_rng_state(), state)
        left = [*model.parameters(), *model._buffers.values(), *LOG, globals().get("LAST")]
        assert not any(isinstance(x, compat.FakeTensor) for x in left), "nothing was left behind"
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_refusals(ranks: int) -> None:
    for found in run_ranks(refusals, ranks, list(REFUSED)):
        for name, (_, _, wanted) in REFUSED.items():
            for part in wanted:
                assert part in found[name], (name, found[name])


def _changing(change: Callable[[Batch], Any]) -> Callable[..., None]:
    def step(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        model(batch["x"]).backward()
        change(batch)

    return step


def _reading(late: Callable[[Any], Any]) -> Callable[..., Any]:
    def step(model: nn.Module, optimizer: Any, scheduler: Any, x: Tensor) -> Any:
        model(x).backward()
        scheduler.step()
        return late(optimizer.param_groups[0]["lr"])

    return step


def refused_arguments() -> None:
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = autodist.train_step(plan=EAGER)(scaler)
    with pytest.raises(autodist.StepError, match=r"GradScaler.*bf16"):
        step(model, optimizer, x_of(0), torch.amp.GradScaler("cpu"))
    with pytest.raises(autodist.StepError, match="steps after the scheduler has"):
        early = autodist.train_step(plan=EAGER)(early_schedule)
        early(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1), x_of(0))
    with pytest.raises(autodist.StepError, match="requires a gradient"):
        autodist.train_step(plan=EAGER)(plain)(model, optimizer, {"x": x_of(0).requires_grad_()})
    changes = {"x": x_of(0), "seen": 0}
    for change, what in (
        (lambda batch: batch.pop("x"), "'x' of the dict 'batch'"),
        (lambda batch: batch.update(seen=1), "'seen' of the dict 'batch'"),
    ):
        changing = autodist.train_step(plan=EAGER)(_changing(change))
        with pytest.raises(autodist.StepError, match=f"the step changes {what}"):
            changing(model, optimizer, changes)
    with pytest.raises(autodist.StepError, match="takes from 'batch', an iterator"):
        autodist.train_step(plan=EAGER)(plain)(model, optimizer, iter([x_of(0)]))
    for late, line in ((lambda lr: lr, "among its results"), (lambda lr: lr * 2, "test_train_step.py")):
        with pytest.raises(autodist.StepError, match=f"read after the scheduler's step: .*{line}"):
            autodist.train_step(plan=EAGER)(_reading(late))(model, *with_schedule(model), x_of(0))
    with torch.inference_mode():
        made = x_of(0) * 2
    for x, why in ((torch.empty(0, 7), "is an empty tensor"), (made, "made under torch.inference_mode")):
        with pytest.raises(autodist.StepError, match=why):
            autodist.train_step(plan=EAGER)(plain)(model, optimizer, {"x": x})
    with pytest.raises(autodist.StepError, match=r"'batch\.loss'.*Pass it by itself"):
        held = autodist.train_step(plan=EAGER)(lambda model, optimizer, batch: model(batch.loss))
        held(model, optimizer, Held(x_of(0)))
    with pytest.raises(autodist.StepError, match="calls a SGD that it neither is given nor names"):
        hidden = autodist.train_step(plan=EAGER)(lambda m, o, x: plain(m, o.loss, {"x": x}))
        hidden(model, Held(optimizer), x_of(0))  # type: ignore[arg-type]
    compiled: Any = torch.compile(autodist.train_step(plan=EAGER)(plain), backend="eager")
    assert compiled(model, optimizer, {"x": x_of(0)}) > 0


class Own(torch.optim.Optimizer):
    """Counts in Python, keeps a tensor as an attribute, or state that is no parameter's."""

    def __init__(self, parameters: Any, way: str) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.way, self.factor = way, torch.ones(())

    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if self.way == "count":
                self.state[p]["step"] = self.state[p].get("step", 0) + 1
            elif self.way == "common":
                self.state["common"]["mean"] = p.grad.mean()
            else:
                p.grad.mul_(self.factor)


COIN = random.Random(3)


def flips_a_coin(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    return plain(model, optimizer, {"x": x.flip(0) if COIN.random() < 0.5 else x})


def counts_elsewhere(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    return plain(model, optimizer, {"x": x * next(HOLDER.numbers)})


class Holder:
    def __init__(self) -> None:
        self.numbers, self.random = itertools.count(1), numpy.random.RandomState(1)

    def mixes(self, model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        return plain(model, optimizer, {"x": x * self.random.beta(1.0, 1.0)})


HOLDER = Holder()


def returns_an_iterator(model: nn.Module, optimizer: Any, x: Tensor) -> Any:
    return zip([plain(model, optimizer, {"x": x})], [1], strict=True)


def returns_a_set(model: nn.Module, optimizer: Any, x: Tensor) -> Any:
    return plain(model, optimizer, {"x": x}), set()


def refused_python() -> None:
    """What Python would do in each call, and a program does once."""
    holder = Holder()
    for function, why in (
        (flips_a_coin, "draws numbers"),
        (holder.mixes, "draws numbers"),
        (counts_elsewhere, "takes from an iterator"),
        (returns_an_iterator, "returns a zip"),
        (returns_a_set, "returns a set"),
    ):
        fresh()
        model = Mlp()
        with pytest.raises(autodist.StepError, match=why):
            autodist.train_step(plan=EAGER)(function)(model, *with_sgd(model), x_of(0))

    def yields(x: Tensor) -> Any:
        yield x

    async def waits(x: Tensor) -> Any:
        return x

    for later in (yields, waits):
        with pytest.raises(autodist.StepError, match="is a generator or a coroutine"):
            autodist.train_step(later)


def test_refused_python() -> None:
    run_ranks(refused_python, 1)


def logs(model: nn.Module, x: Tensor, row: Tensor) -> None:
    """A logger catches what is raised while it makes its text."""
    loss = model(x)
    logging.StreamHandler().handle(logging.LogRecord("tests", 0, "", 0, "loss %s", (loss,), None))
    loss.backward()


def maps(model: Any, x: Tensor, row: Tensor) -> None:
    torch.func.vmap(lambda part: model.up(part))(x).sum().backward()


def indexes(model: nn.Module, x: Tensor, row: Tensor) -> None:
    (model(x) + x[row].sum()).backward()


def slices(model: nn.Module, x: Tensor, row: Tensor) -> None:
    model(x[:row]).backward()


def compares(model: nn.Module, x: Tensor, row: Tensor) -> None:
    (model(x) * (2 if row > 3 else 1)).backward()


def averages_with_torch(models: Sequence[nn.Module], x: Tensor, row: Tensor) -> None:
    models[0](x).backward()
    models[1].update_parameters(models[0])  # type: ignore[operator]


def test_refused_values() -> None:
    """Of integers torch keeps the values with its fake tensors, if it is let."""
    model = Mlp()
    for function, what in (
        (logs, "prints a tensor"),
        (maps, r"transform of torch.func \(vmap"),
        (indexes, "needs the value of a tensor"),
        (slices, "needs the value of a tensor"),
        (compares, "needs the value of a tensor"),
        (averages_with_torch, "AveragedModel, which looks at how often"),
    ):
        given: Any = (model, AveragedModel(model)) if function is averages_with_torch else model
        with pytest.raises(autodist.StepError, match=rf"{what}.*test_train_step.py"):
            autodist.train_step(plan=EAGER)(function)(given, x_of(0), torch.tensor(2))


FACTORS = {4: 0.5, 5: 2.0, 6: 3.0}


def looks_up(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    loss = model(x) * FACTORS[x.shape[0]] * float(numpy.sqrt(x.shape[0]))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def test_sizes_that_python_needs() -> None:
    """Where a symbol cannot stand, a number does, and each size has a program."""
    _, step = side_by_side(Mlp, with_sgd, looks_up, [(x_of(n, n),) for n in (4, 4, 5, 6, 5)])
    assert len(step.programs) == 3


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_models(in_place: bool) -> None:
    """A model that has been compiled is captured as what it was made of."""

    def build() -> nn.Module:
        model: Any = Mlp()
        if not in_place:
            return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]
        model.compile(backend="aot_eager")
        return model

    side_by_side(build, with_sgd, lambda m, o, x: plain(m, o, {"x": x}), [(x_of(n),) for n in range(3)])


def looks_on_one_rank(model: nn.Module, optimizer: Any, batch: Batch) -> Tensor:
    loss = plain(model, optimizer, batch)
    if dist.get_rank() == 1:
        loss.item()
    return loss


def refused_on_one_rank() -> tuple[str, float]:
    fresh()
    model = Mlp()
    autodist.prepare(model, EAGER)
    start = time.monotonic()
    with pytest.raises((autodist.StepError, autodist.MissingRanksError)) as caught:
        autodist.train_step(plan=EAGER)(looks_on_one_rank)(model, *with_sgd(model), {"x": x_of(0)})
    return str(caught.value), time.monotonic() - start


def test_a_refusal_on_one_rank_ends_all() -> None:
    (waited, seconds), (refused, _) = run_ranks(refused_on_one_rank, 2)
    assert "Rank 1 failed: StepError" in waited and refused in waited
    assert seconds < 60


def with_its_size(model: nn.Module, optimizer: Any, batch: Batch) -> Any:
    x = batch["x"]
    return plain(model, optimizer, batch), x.shape[0], x.numel() / 7


def returned_sizes() -> None:
    """A size that is returned is a number, the one of this call."""
    fresh()
    model = Mlp()
    reference = copy.deepcopy(model)
    step = autodist.train_step(plan=EAGER)(with_its_size)
    (mine,), (theirs,) = with_sgd(model), with_sgd(reference)
    for rows in (8, 5, 3, 5, 8, 2):
        batch = mlp_batch(torch.Generator().manual_seed(rows), rows)
        loss, size, elements = step(model, mine, batch)
        wanted = with_its_size(reference, theirs, batch)
        assert (type(size), size, elements) == (int, rows, float(rows))
        assert abs(loss - wanted[0]) < 1e-5
    check(model, reference)


def test_returned_sizes() -> None:
    run_ranks(returned_sizes, 1)


class Config:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def weighed(model: nn.Module, optimizer: Any, batch: Batch, config: Any) -> Tensor:
    return plain(model, optimizer, {"x": batch["x"] * config.train.loss.aux.weight})


def deep_settings() -> None:
    fresh()
    model = Mlp()
    reference = copy.deepcopy(model)
    step = autodist.train_step(plan=EAGER)(weighed)
    (mine,), (theirs,) = with_sgd(model), with_sgd(reference)
    config = Config(train=Config(loss=Config(aux=Config(weight=1.0))))
    for number in range(4):
        config.train.loss.aux.weight = 1.0 + number // 2
        batch = {"x": x_of(0)}
        found, wanted = step(model, mine, batch, config), weighed(reference, theirs, batch, config)
        assert abs(found - wanted) < 1e-5 * wanted, number


def test_deep_settings() -> None:
    run_ranks(deep_settings, 1)


class Attending(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.dropout = dropout

    def body(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        return x + self.out(F.gelu(found.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False).square().mean()  # type: ignore[no-any-return]


def checkpointed_attention(dropout: float) -> None:
    fresh()
    model = Attending(dropout)
    reference = copy.deepcopy(model)
    step = autodist.train_step(plan=EAGER)(plain)
    (mine,), (theirs,) = with_sgd(model), with_sgd(reference)
    for number in range(3):
        batch = {"x": torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(number))}
        losses = []
        for run, one, optimizer in ((step, model, mine), (plain, reference, theirs)):
            torch.manual_seed(number)
            losses.append(run(one, optimizer, batch))
        assert abs(losses[0] - losses[1]) < 1e-5, number
    check(model, reference)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_attention(dropout: float) -> None:
    run_ranks(checkpointed_attention, 1, dropout)


def a_rate_that_is_a_tensor() -> None:
    """With a scheduler, which keeps another tensor in the group."""
    fresh()
    model = Mlp()
    reference = copy.deepcopy(model)
    step = autodist.train_step(plan=EAGER)(plain)
    found = []
    for one, run in ((model, step), (reference, plain)):
        optimizer = torch.optim.SGD(one.parameters(), lr=torch.tensor(0.1))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for number in range(3):
            found.append(float(run(one, optimizer, {"x": x_of(number)})))
            scheduler.step()
    assert all(abs(a - b) < 1e-5 for a, b in zip(found[:3], found[3:], strict=True))
    check(model, reference)


def test_a_rate_that_is_a_tensor() -> None:
    run_ranks(a_rate_that_is_a_tensor, 1)


def refused_optimizers() -> None:
    """Each with its reason."""
    values = r"needs the value of a tensor, of which there is none yet \(File .*optim"
    reasons: list[tuple[Callable[[Any], Any], str]] = [
        (torch.optim.Adafactor, f"Adafactor.step cannot be captured: it {values}"),
        (torch.optim.LBFGS, "LBFGS.step cannot be captured: .*closure"),
        (torch.optim.SparseAdam, "SparseAdam.step cannot be captured: .*dense gradients"),
        (lambda p: adamw(p, differentiable=True), "AdamW was made with differentiable=True"),
        (lambda p: Own(p, "count"), "Own keeps 'step' in its state as a int and changes it"),
        (lambda p: Own(p, "common"), r"Own keeps state that belongs to no parameter \(state\['common'\]\)"),
        (lambda p: Own(p, "attribute"), "'factor', an attribute of Own"),
    ]
    for make, reason in reasons:
        fresh()
        model = Mlp()
        with pytest.raises(autodist.StepError, match=reason):
            autodist.train_step(plan=EAGER)(plain)(model, make(model.parameters()), {"x": x_of(0)})


def test_refused_optimizers() -> None:
    run_ranks(refused_optimizers, 1)


def test_refused_arguments() -> None:
    run_ranks(refused_arguments, 1)


# --- verify ----------------------------------------------------------------------------------------


def verified() -> None:
    fresh()
    build, batch_of = MODELS["net"]
    model = build()
    optimizer = adamw(model.parameters())
    step = autodist.train_step(plan=EAGER)(clipped)
    batch = batch_of(torch.Generator().manual_seed(dist.get_rank()))
    assert step.verify(model, optimizer, batch).passed
    assert not optimizer.state and all(p.grad is None for p in model.parameters())
    step(model, optimizer, batch)
    before = [full(p.detach()).clone() for p in model.parameters()]
    report = step.verify(model, optimizer, batch)
    assert report.passed and {r.kind for r in report.rows} >= {"result", "parameter", "buffer", "exp_avg"}
    assert all(torch.equal(full(p.detach()), b) for p, b in zip(model.parameters(), before, strict=True))
    program = step.programs[-1]
    right = program.compiled
    program.compiled = lambda *inputs: right(*inputs[:-1], (inputs[-1] + 1) % 3)  # other labels
    report = step.verify(model, optimizer, batch)
    assert not report.passed and "FAILED" in str(report)


def test_verify() -> None:
    run_ranks(verified, 2)


def all_at_once(
    first: nn.Module, second: nn.Module, optimizer: Any, average: list[Tensor], batch: Batch
) -> None:
    batch["x"].mul_(2)
    (first(batch["x"]) + second(batch["x"])).backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for a, p in zip(average, second.parameters(), strict=True):
            a.lerp_(p, 0.1)


def verified_apart() -> None:
    """Models with the same names, tensors among the arguments and changes of these are all told apart."""
    fresh()
    first, second, batch = Mlp(), Mlp(), {"x": x_of(0)}
    for model in (first, second):
        autodist.prepare(model, EAGER)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1, momentum=0.9)
    average = [p.detach().clone() for p in second.parameters()]
    arguments = (first, second, optimizer, average, batch)
    step = autodist.train_step(plan=EAGER)(all_at_once)
    before = [full(x).clone() for x in (*average, *second.parameters())]
    report = step.verify(*arguments)
    assert report.passed, report
    rows = {(r.kind, r.name) for r in report.rows}
    assert {("parameter", "up.weight"), ("parameter", "up.weight (2)"), ("argument", "3")} <= rows
    assert torch.equal(batch["x"], x_of(0))
    assert all(map(torch.equal, map(full, (*average, *second.parameters())), before))
    step(*arguments)
    step(*arguments)
    right = step.programs[-1].compiled
    # Parameters of the first model, of the second, the average: not written, by number of the input.
    inputs = program_inputs(State.of(roots_of(all_at_once, arguments)), [*average, batch["x"]])
    for forgotten in (0, 3, len(inputs) - 3):

        def run(*given: Any, forgotten: int = forgotten) -> Any:
            kept = given[forgotten].clone()
            results = right(*given)
            given[forgotten].copy_(kept)
            return results

        step.programs[-1].compiled = run
        assert not step.verify(*arguments).passed


def test_verify_tells_tensors_apart() -> None:
    run_ranks(verified_apart, 1)


# --- memory ----------------------------------------------------------------------------------------


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(768, 768, bias=False) for _ in range(48)))


def squares(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def peaks(door: int) -> tuple[int, int, int]:
    """Bytes above parameters at the worst moment of a step, through the backend (1) or captured (2): at the
    allocator, and as the scheduled graphs have it, with what collectives hold on to. And those of the shards.
    """
    fresh()
    x, model = torch.randn(8, 768), wide()
    autodist.prepare(model, EAGER)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="autodist", options=EAGER)
    step: Any = functools.partial(squares, compiled, optimizer)
    if door == 2:
        step = functools.partial(autodist.train_step(plan=EAGER)(squares), model, optimizer)
    step(x), step(x)
    with peak_bytes() as allocations:
        step(x)
    job = next(model.parameters())._autodist_job
    shards = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
    predicted = max(t.peak_bytes for t in job.reports[-1].timelines.values())
    return allocations.peak, predicted - shards, shards


def test_gradients_die_in_their_turn() -> None:
    """Without clipping a few gradients are there at a time; through the backend, in the end, all of them.

    The few, and the weights gathered ahead of their use, are a fixed number of bytes, a quarter of the
    shards'. The ranks are not there: the threads that move data for real let go of it when they next run, so
    that what is alive is theirs to say. Without them each measurement is the program's own, to the byte.
    """
    with compat.fake_ranks(2):
        measured, predicted, shards = zip(*map(peaks, (1, 2)), strict=True)
    assert measured[1] < measured[0] - 0.7 * shards[0], (measured, shards)
    assert predicted[1] < predicted[0] - 0.7 * shards[0], (predicted, shards)
