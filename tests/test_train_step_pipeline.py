"""Captured steps as pipelines, against the same function on one process with the whole batch.

Losses to 1e-5 and parameters to 1e-4, relative, in fp32. Several steps are tried in one group of ranks. The
function is the same on both sides: with several coordinates it is given the batch of its own, and the
reference those of all.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, distribute_tensor

import autodist
from autodist.runtime.outputs import DifferentBatchError
from autodist.runtime.stage_parameters import is_here, owners
from tests.models import VOCAB
from tests.parity import error
from tests.ranks import run_ranks
from tests.sequence import fresh
from tests.test_pipeline import batch, check
from tests.test_train_step import by_flag

EAGER: dict[str, Any] = {"lowering": "eager"}


def full_step(
    model: nn.Module, average: nn.Module, optimizer: Any, scheduler: Any, batches: Sequence[Any]
) -> dict[str, Tensor]:
    """Most of what steps do: a norm of all gradients, a schedule, an average, a metric of the loss."""
    loss = sum(model(**b).loss for b in batches) / len(batches)
    loss.backward()  # type: ignore[union-attr]
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            a.lerp_(p, 0.1)
    detached = loss.detach()  # type: ignore[union-attr]
    return {"loss": detached, "norm": norm, "perplexity": detached.exp()}


def llama(layers: int, tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "vocab_size": VOCAB, "max_position_embeddings": 32}
    heads = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).train()


def trained(layers: int, tied: bool, steps: int, options: dict[str, Any]) -> None:
    """Train a Llama captured and whole, side by side; each rank holds some of its parameters."""
    fresh()
    model = llama(layers, tied)
    average, reference, reference_average = (copy.deepcopy(model) for _ in range(3))
    step = autodist.train_step(plan={**EAGER, "pp": 2, **options})(full_step)
    sides: list[tuple[Any, ...]] = []
    for each in (model, reference):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2, eps=1e-4)
        sides.append((optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))))
    shared = step.plan.pp * step.plan.sp
    coordinate, coordinates = dist.get_rank() // shared, dist.get_world_size() // shared
    for number in range(steps):
        batches = [batch("llama", number, c, 3) for c in range(coordinates)]
        found = step(model, average, *sides[0], [batches[coordinate]])
        wanted = full_step(reference, reference_average, *sides[1], batches)
        loss = found["loss"].clone()
        dist.all_reduce(loss.div_(dist.get_world_size()))  # over coordinates
        assert error(loss, wanted["loss"]) < 1e-5, (number, loss, wanted["loss"])
        assert error(found["norm"], wanted["norm"]) < 1e-4
        assert error(found["perplexity"], found["loss"].exp()) < 1e-6
    assert len(step.programs) == 1
    report = step.verify(model, average, *sides[0], [batch("llama", steps, coordinate, 3)])
    assert report.passed, str(report)
    check(average, reference_average, "parameter", 1e-4)
    held = check(model, reference, "parameter", 1e-4)
    assert 0 < held < len(dict(reference.named_parameters()))


def on_two_ranks() -> None:
    trained(2, True, 5, {})
    trained(1, False, 5, {"schedule": "zero-bubble"})


@pytest.mark.distributed
def test_a_pipeline() -> None:
    run_ranks(on_two_ranks, 2, seconds=600)


# --- what a step may do ----------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers enough for two stages; the first may be frozen."""

    def __init__(self, frozen: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 7) for _ in range(6)])
        self.dropout = nn.Dropout(dropout)
        for layer in self.layers[:frozen]:  # type: ignore[union-attr]
            layer.requires_grad_(False)

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.dropout(layer(x).tanh())
        return x

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.body(x), x.flip(-1))


def x_of(number: int, rows: int = 6) -> Tensor:
    return torch.randn(rows, 7, generator=torch.Generator().manual_seed(number))


def side_by_side(
    build: Callable[[], nn.Module],
    make: Callable[[nn.Module], tuple[Any, ...]],
    function: Callable[..., Any],
    batches: Sequence[tuple[Any, ...]],
    programs: int = 1,
    **options: Any,
) -> nn.Module:
    """A step captured and as it is, on the same batches; the captured one's model."""
    fresh()
    torch.manual_seed(0)
    model = build().train()
    reference = copy.deepcopy(model)
    step = autodist.train_step(plan={**EAGER, "pp": 2, **options})(function)
    mine, theirs = make(model), make(reference)
    for number, given in enumerate(batches):
        found, wanted = step(model, *mine, *given), function(reference, *theirs, *given)
        for a, b in zip(_leaves(found), _leaves(wanted), strict=True):
            assert error(a, b) < 1e-4 if isinstance(a, Tensor) else a == b, (function, number, a, b)
    assert len(step.programs) == programs, (function, len(step.programs))
    check(model, reference, "parameter", 1e-4)
    check(model, reference, "gradient", 1e-4)
    return model


def _leaves(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def with_sgd(model: nn.Module) -> tuple[Any, ...]:
    return (torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9),)


def with_adam(model: nn.Module) -> tuple[Any, ...]:
    return (torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4),)


def plain(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    loss = model(x)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def in_a_loop(model: nn.Module, optimizer: Any, parts: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(())
    for x in parts:
        loss = model(x) / len(parts)
        loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    nn.utils.clip_grad_value_(model.parameters(), 0.02)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return total


def two_losses(model: Any, optimizer: Any, x: Tensor) -> tuple[Any, ...]:
    """One step after another, the second with weights that the first has changed, and what is returned of
    parameters and gradients."""
    first = model(x)
    first.backward()
    optimizer.step()
    optimizer.zero_grad()
    y = model.body(x)
    second = y.square().mean() + 0.1 * model.layers[0].weight.square().sum()
    second.backward()
    norms = [p.grad.norm() for p in model.parameters()]
    with torch.no_grad():
        largest = torch.stack([p.abs().max() for p in model.parameters()]).max()
    optimizer.step()
    optimizer.zero_grad()
    return first.detach(), second.detach(), (y > 0).float().mean(), norms, largest


def possibilities() -> None:
    some = [(x_of(n),) for n in range(4)]
    flags = [(x_of(0), n % 3 == 2) for n in range(8)]
    side_by_side(Net, with_sgd, by_flag, flags, programs=5)
    side_by_side(Net, with_adam, in_a_loop, [([x_of(n), x_of(n + 9)],) for n in range(3)])
    side_by_side(Net, with_adam, two_losses, some)
    side_by_side(lambda: Net(frozen=4), with_sgd, plain, [*some, (x_of(9, rows=5),)], programs=2)


def mean_of(model: nn.Module, optimizer: Any, batches: Sequence[Tensor]) -> Tensor:
    loss = sum(model(x) for x in batches) / len(batches)
    loss.backward()  # type: ignore[union-attr]
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach() * batches[0].shape[0]  # type: ignore[union-attr]


def replicas(zero: int, rows: Sequence[int]) -> int:
    """Two pipelines, the second with batches of so many ``rows``; how many programs there are here."""
    fresh()
    torch.manual_seed(0)
    model = Net()
    reference = copy.deepcopy(model)
    (optimizer,), (other,) = with_adam(model), with_adam(reference)
    step = autodist.train_step(plan={**EAGER, "pp": 2, "zero": zero})(mean_of)
    for number, size in enumerate(rows):
        batches = [x_of(number, 8), x_of(number + 50, size)]
        mine = [batches[dist.get_rank() // 2]]
        step(model, optimizer, mine)
        mean_of(reference, other, batches)
    assert step.verify(model, optimizer, mine).passed
    check(model, reference, "parameter", 1e-4)
    return len(step.programs)


def beside() -> tuple[int, int]:
    """A replica whose batch changes makes a program for it, and the other waits for nobody."""
    trained(1, True, 3, {"sp": 2, "zero": 3})
    return replicas(3, [8] * 5), replicas(1, [8, 8, 8, 5, 5])


@pytest.mark.distributed
def test_beside_data_and_sequence_parallelism() -> None:
    assert run_ranks(beside, 4, seconds=600) == [(1, 1), (1, 1), (1, 2), (1, 2)]


def other_microbatches() -> str:
    """The second pipeline's replica gets a shorter batch."""
    try:
        replicas(3, [8, 8, 5])
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return "ran"


@pytest.mark.distributed
def test_replicas_that_make_other_microbatches_are_stopped() -> None:
    for text in run_ranks(other_microbatches, 4):
        assert re.match(r"MixedReadError: .*of \[[85]\] microbatches", text), text


class Ends(nn.Module):
    """The first layer's weight is the last's too."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 7) for _ in range(6)])
        if tied:
            self.layers[5].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def owners_and_others(cuts: str) -> None:
    """One step, with models of other owners in turn; a group of all ranks can be made after it."""
    fresh()
    torch.manual_seed(0)
    models = [Ends(tied=False), Ends()]
    step = autodist.train_step(plan={**EAGER, "pp": 3, "cuts": cuts})(plain)
    for model in models:
        reference = copy.deepcopy(model)
        given, wanted = with_sgd(model), with_sgd(reference)
        for number in range(3):
            found = step(model, *given, x_of(number))
            assert error(found, plain(reference, *wanted, x_of(number))) < 1e-5
        check(model, reference, "parameter", 1e-4)
    assert owners(dict(models[1].named_parameters())["layers.0.weight"]) == (0, 2)
    value = torch.ones(())
    dist.all_reduce(value, group=dist.new_group([0, 1, 2]))
    assert value == 3


@pytest.mark.distributed
def test_owners_that_leave_a_place_out(tmp_path: Path) -> None:
    cuts = tmp_path / "cuts.json"
    cuts.write_text('{"cuts": ["layers.2", "layers.4"]}')
    run_ranks(owners_and_others, 3, str(cuts))


@pytest.mark.distributed
def test_what_a_step_may_do() -> None:
    run_ranks(possibilities, 2)


def averaged(model: nn.Module, optimizer: Any, average: Sequence[Tensor], x: Tensor) -> Tensor:
    """With the norm that is also the function to call outside of steps, and an average in a list."""
    loss = model(x)
    loss.backward()
    autodist.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for a, p in zip(average, model.parameters(), strict=True):
            a.lerp_(p, 0.1)
    return loss.detach()


def prepared() -> None:
    """A model that has been prepared with a batch, and copies that are made of its parameters."""
    fresh()
    torch.manual_seed(0)
    model = Net()
    reference = copy.deepcopy(model)
    options = {**EAGER, "pp": 2}
    autodist.prepare(model, options, batch=(x_of(0),))
    step = autodist.train_step(plan=options)(averaged)
    averages = [[p.detach().clone() for p in m.parameters()] for m in (model, reference)]
    optimizers = [torch.optim.Adagrad(m.parameters(), 0.05) for m in (model, reference)]  # has state at once
    for number in range(3):
        found = step(model, optimizers[0], averages[0], x_of(number))
        wanted = averaged(reference, optimizers[1], averages[1], x_of(number))
        assert error(found, wanted) < 1e-5
    check(model, reference, "parameter", 1e-4)
    for a, b, p in zip(*averages, model.parameters(), strict=True):
        assert not is_here(p) or error(a, b) < 1e-4


def distilled(model: nn.Module, teacher: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = teacher.body(x)
    loss = (model.body(x) - wanted).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def adversarial(models: Sequence[Any], optimizers: Sequence[Any], x: Tensor) -> tuple[Tensor, Tensor]:
    generator, judge = models
    told = judge.body(x.flip(0)).mean() - judge.body(generator.body(x).detach()).mean()
    told.backward()
    optimizers[0].step()
    optimizers[0].zero_grad()
    fooled = judge.body(generator.body(x)).mean()
    fooled.backward()
    optimizers[1].step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return told.detach(), fooled.detach()


def several_models() -> None:
    fresh()
    torch.manual_seed(0)
    options = {**EAGER, "pp": 2}
    model, teacher = Net(), Net(frozen=6)
    reference = copy.deepcopy(model)
    optimizer, other = with_adam(model)[0], with_adam(reference)[0]
    whole_teacher = copy.deepcopy(teacher)
    step = autodist.train_step(plan=options)(distilled)
    for number in range(3):
        found = step(model, teacher, optimizer, x_of(number))
        assert error(found, distilled(reference, whole_teacher, other, x_of(number))) < 1e-5
    check(model, reference, "parameter", 1e-4)
    fresh()
    models = [Net(), Net()]
    references = [copy.deepcopy(m) for m in models]
    pair, others = ([with_sgd(m)[0] for m in reversed(ms)] for ms in (models, references))
    step = autodist.train_step(plan=options)(adversarial)
    for number in range(3):
        found = step(models, pair, x_of(number))
        for a, b in zip(found, adversarial(references, others, x_of(number)), strict=True):
            assert error(a, b) < 1e-5
    for a, b in zip(models, references, strict=True):
        check(a, b, "parameter", 1e-4)


def saved(folder: str) -> list[float]:
    """A checkpoint in the middle of an accumulation goes on under a plan without pp, and under this one."""
    losses = []
    for plan in ({"pp": 2}, {"pp": 1}, {"pp": 2}):
        fresh()
        torch.manual_seed(0)
        options, resumed = {**EAGER, **plan}, bool(losses)
        model = Net()
        autodist.prepare(model, options, batch=(x_of(0),))
        (optimizer,) = with_adam(model)
        if resumed:
            autodist.load(folder, model, optimizer)
        step = autodist.train_step(plan=options)(by_flag)
        for number in range(3 if resumed else 0, 6):
            # Without pp each rank's loss is a mean over its rows, and the ranks' mean is that of all.
            rows = x_of(number) if plan["pp"] == 2 else x_of(number).chunk(2)[dist.get_rank()]
            loss = step(model, optimizer, rows, number % 2 == 1)["loss"].clone()
            dist.all_reduce(loss.div_(2))
            losses += [loss.item()] if number >= 3 else []
            if not resumed and number == 2:
                autodist.save(folder, model, optimizer)
    return losses


def from_meta() -> tuple[int, int]:
    """A model on meta gets memory for its own stages' parameters, and state for those."""
    fresh()
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Net()
    (optimizer,) = with_adam(model)
    step = autodist.train_step(plan={**EAGER, "pp": 2})(plain)
    for number in range(2):
        assert step(model, optimizer, x_of(number)).isfinite()
    held = [p for p in model.parameters() if is_here(p)]  # type: ignore[arg-type]
    assert set(optimizer.state) == set(held)
    return sum(p.to_local().numel() for p in model.parameters()), len(held)  # type: ignore[attr-defined]


def around_a_step(folder: str) -> tuple[list[float], tuple[int, int]]:
    prepared()
    several_models()
    return saved(folder), from_meta()


@pytest.mark.distributed
def test_around_a_step(tmp_path: Path) -> None:
    found = run_ranks(around_a_step, 2, str(tmp_path / "run"))
    for losses, _ in found:
        torch.testing.assert_close(losses[3:6], losses[:3], rtol=1e-4, atol=0.0)
        torch.testing.assert_close(losses[6:], losses[:3], rtol=1e-6, atol=0.0)
    assert sum(numel for _, (numel, _) in found) == sum(p.numel() for p in Net().parameters())
    assert all(0 < count < 12 for _, (_, count) in found)


# --- what is refused ---------------------------------------------------------------------------------------


def vector_norm(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    model(x).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()


def noisy(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    model(x + torch.randn_like(x)).backward()


def drawing(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    loss = model(x)
    loss.backward()
    return loss.detach() * torch.rand(())


def out_of_order(model: Any, optimizer: Any, x: Tensor) -> None:
    y = model.body(x)
    model.body(y.detach()).square().mean().backward()
    y.square().mean().backward()


def summed(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    loss = model(x)
    loss.backward()
    return functional_collectives.all_reduce(loss.detach(), "sum", dist.group.WORLD)


def no_backward(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    return model(x).detach()


def of_logits(model: Any, optimizer: Any, x: Tensor) -> Tensor:
    logits = model.body(x)[:, None].expand(-1, 3, -1).contiguous()
    logits.square().mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return (logits.detach() * norm.full_tensor()).sum()  # type: ignore[attr-defined]


def normalised(model: Any, optimizer: Any, x: Tensor) -> None:
    y = model.body(x)
    (y - y.mean(0)).square().mean().backward()


class Wide(Net):
    """Parameters too large to be sent to other stages."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(7, 3000), (3000, 7), (7, 3000), (3000, 7)]
        self.layers = nn.ModuleList([nn.Linear(*size) for size in sizes])


REFUSED: list[tuple[Callable[[], nn.Module], Callable[..., Any], str]] = [
    (Wide, vector_norm, r"StepError: .*test_train_step_pipeline.*one place of the pipeline.*too large"),
    (Net, noisy, r"PlacementError: .*in noisy.*draws random numbers for a whole batch"),
    (Net, drawing, r"StepError: .*in drawing.*draws random numbers outside of the forward"),
    (Net, out_of_order, r"StepError: the loss .*out_of_order.*of a loss that is differentiated later"),
    (Net, of_logits, r"StepError: the step asks for what only sharded tensors have .*'full_tensor'"),
    (Net, summed, r"StepError: .*in summed.*communicates among ranks \[0, 1\]"),
    (Net, no_backward, r"StepError: the step calls no backward"),
    (Net, normalised, r"PlacementError: .*in normalised.*microbatches"),
]


def refused() -> list[str]:
    found = []
    for make, function, _ in REFUSED:
        fresh()
        torch.manual_seed(0)
        model = make()
        step = autodist.train_step(plan={**EAGER, "pp": 2})(function)
        try:
            step(model, *with_sgd(model), x_of(0))
            found.append("ran")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    model = autodist.prepare(Net(), {**EAGER, "pp": 2}, batch=(x_of(0),))
    with pytest.raises(autodist.StepError, match="at one place of the pipeline and which the plan"):
        autodist.train_step(plan={**EAGER, "pp": 2})(of_logits)(model, *with_sgd(model), x_of(0))
    model = Net()
    step = autodist.train_step(plan={**EAGER, "pp": 2})(plain)
    step(model, *with_sgd(model), x_of(0))
    with pytest.raises(DifferentBatchError):
        step(model, *with_sgd(model), x_of(dist.get_rank()))
    mesh = dist.init_device_mesh("cpu", (2,))
    with pytest.raises(autodist.StepError, match=r"DTensor of shape .* on the mesh"):
        step(model, *with_sgd(model), distribute_tensor(x_of(0), mesh, [Replicate()]))
    return found


@pytest.mark.distributed
def test_what_is_refused() -> None:
    for found in run_ranks(refused, 2):
        for text, (_, function, pattern) in zip(found, REFUSED, strict=True):
            # What is made on the first rank alone fails on the others with its reason.
            assert re.search(pattern, text, re.DOTALL), (function, text)


def verified() -> list[str]:
    """verify() notices what one place does wrong, on all ranks, and leaves everything as it was."""
    fresh()
    torch.manual_seed(0)
    model = Net()
    step = autodist.train_step(plan={**EAGER, "pp": 2})(plain)
    given = model, *with_adam(model), x_of(0)
    for _ in range(2):
        step(*given)
    before = [p.to_local().clone() for p in model.parameters()]  # type: ignore[attr-defined]
    reports = [str(step.verify(*given))]
    program = step.programs[0]
    right = program.compiled

    def wrong(*inputs: Tensor) -> Any:
        made = right(*inputs)
        inputs[0].mul_(1.01)  # the first layer's, which the second place has nothing of
        return made

    program.compiled = wrong
    reports.append(str(step.verify(*given)))
    after = [p.to_local() for p in model.parameters()]  # type: ignore[attr-defined]
    assert all(map(torch.equal, before, after))
    return reports


@pytest.mark.distributed
def test_verify() -> None:
    for right, wrong in run_ranks(verified, 2):
        assert right.startswith("passed")
        assert re.match(r"FAILED: .* 'layers\.0\.weight' is off by", wrong), wrong


def fails() -> str:
    """A step that one rank cannot capture, once there are programs of it."""
    fresh()
    torch.manual_seed(0)
    model = Net()

    def step(model: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
        loss = model(x) * scale
        if x.shape[0] == 5 and dist.get_rank() == 1:
            raise RuntimeError("the second rank is out of order")
        loss.backward()
        return loss.detach()

    captured = autodist.train_step(plan={**EAGER, "pp": 2})(step)
    assert captured(model, x_of(0), torch.ones(())).isfinite()
    try:
        captured(model, x_of(0, rows=5), torch.ones(()))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ran"


@pytest.mark.distributed
def test_a_rank_that_cannot_capture_ends_the_others() -> None:
    first, second = run_ranks(fails, 2)
    assert "out of order" in first and first.startswith(("MissingRanksError", "DisagreementError")), first
    assert second == "RuntimeError: the second rank is out of order"
