"""verify() says of a right model that it is right, of a wrong one what is wrong, and touches neither."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import autodist
from tests.models import CASES
from tests.ranks import run_ranks

EAGER = {"lowering": "eager"}


class Net(nn.Module):
    """Batch norm, so that a forward changes buffers; dropout on demand."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.up(x)).relu())).square().mean() * scale


class TwoPrograms(Net):
    """What the compiler sees is not what eager mode runs."""

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return super().forward(x) * (1.1 if torch.compiler.is_compiling() else 1.0)


class Noisy(Net):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return super().forward(x + torch.randn_like(x))


def compiled(build: Callable[[], nn.Module] = Net, **options: Any) -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return torch.compile(build(), backend="autodist", options={**EAGER, **options})


def inputs() -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(dist.get_rank()))


def printed(*args: Any, **kwargs: Any) -> tuple[autodist.Report, str]:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        report = autodist.verify(*args, **kwargs)
    return report, text.getvalue()


def right_models() -> list[str]:
    model = compiled()
    report, text = printed(model, inputs())  # not prepared: nothing has run yet
    assert report.passed and report.mode == "training"
    assert isinstance(next(model.parameters()), DTensor)
    names = [(r.kind, r.name) for r in report.rows]
    assert ("gradient", "up.weight") in names and ("buffer", "norm.running_mean") in names
    assert abs(report.loss - report.reference_loss) < 1e-6 and report.reference_norm > 0.01
    texts = [text]
    # A tuple, a mapping, a loss of one's own; a model prepared and not compiled.
    assert printed(model, (inputs(), 2.0))[0].passed
    report, _ = printed(model, {"x": inputs()}, loss_fn=lambda output: output * 3)
    assert report.passed
    model = autodist.prepare(CASES["odds"].build(), EAGER)
    batch = CASES["odds"].batch(torch.Generator().manual_seed(dist.get_rank()))
    report, text = printed(model, batch)
    assert report.passed, report
    return [*texts, text]


def the_model_is_left_alone() -> None:
    model = compiled()
    model(inputs()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    values = {n: v.clone() for n, v in model.state_dict().items()}
    parameters, buffers = list(model.parameters()), list(model.buffers())
    model.drop.eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    assert printed(model, inputs())[0].passed
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is gradients[n] for n, p in model.named_parameters())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    for name, value in model.state_dict().items():
        local, before = (v.to_local() if isinstance(v, DTensor) else v for v in (value, values[name]))
        assert torch.equal(local, before), name


def random_models() -> None:
    model = compiled(lambda: Net(dropout=0.5))
    report, text = printed(model, inputs())
    assert report.passed and report.mode == "evaluation" and model.drop.training
    assert dist.get_rank() or "in evaluation mode" in text
    with pytest.raises(ValueError, match="random in evaluation mode too"):
        printed(compiled(Noisy), inputs())


def narrow_models() -> tuple[bool, bool]:
    model = compiled(precision="bf16")
    wide, narrow = printed(compiled(), inputs())[0], printed(model, inputs(), tolerance=2e-2)[0]
    assert 1e-6 < abs(narrow.loss - wide.loss) / wide.loss < 2e-2, "the plan's precision is not used"
    return wide.passed, narrow.passed


def wrong_models() -> list[tuple[autodist.Report, str]]:
    model = autodist.prepare(Net(), EAGER)
    parameter = dict(model.named_parameters())["head.weight"]
    # Wrong on one rank alone, by 1% there.
    hook = parameter.register_hook(lambda g: g * (1 + 0.01 * dist.get_rank()))
    torch._dynamo.reset()
    found = [printed(model, inputs())]
    hook.remove()
    assert printed(model, inputs())[0].passed
    found.append(printed(compiled(TwoPrograms), inputs()))
    found.append(printed(compiled(), inputs(), loss_fn=lambda output: output * float("nan")))
    return found


def test_a_right_model_passes() -> None:
    (first, odds), (silent, _) = run_ranks(right_models, 2)
    assert "one step in training mode" in first and "autodist.verify passed" in first
    assert "norm of the gradient" in first and "gradient of up.weight" in first
    assert "the worst 8 of" in odds
    assert silent == ""


def test_the_model_is_left_as_it_was() -> None:
    run_ranks(the_model_is_left_alone, 2)


def test_a_random_model_is_compared_in_evaluation_mode() -> None:
    run_ranks(random_models, 2)


def test_a_bf16_plan_is_compared_with_autocast() -> None:
    assert run_ranks(narrow_models, 2) == [(True, True)] * 2


def test_a_wrong_model_fails_by_name() -> None:
    found = run_ranks(wrong_models, 2)
    assert all(not report.passed for rank in found for report, _ in rank)
    (gradient, text), (scaled, _), (undefined, _) = found[0]
    wrong = [r for r in gradient.rows if r.error > gradient.tolerance]
    assert [r.name for r in wrong] == ["head.weight"] and 1e-4 < wrong[0].error < 1.1e-2
    assert wrong == [r for r in found[1][0][0].rows if r.error > gradient.tolerance]
    assert "FAILED" in text and "The gradient of 'head.weight' is off by" in text
    assert abs(scaled.loss_error - 0.1) < 1e-3
    assert all(abs(r.error - 0.1) < 0.05 for r in scaled.rows if r.kind == "gradient" and r.norm > 0.1)
    assert undefined.loss_error == float("inf")


def test_one_rank_and_a_model_without_a_loss() -> None:
    torch._dynamo.reset()
    model = torch.compile(Net(), backend="autodist", options=EAGER)
    report, text = printed(model, torch.randn(4, 5))
    assert report.passed and "passed" in text and type(next(model.parameters())) is nn.Parameter
    linear = torch.compile(nn.Linear(2, 2), backend="autodist", options=EAGER)
    with pytest.raises(ValueError, match="no scalar loss can be had from Tensor"):
        autodist.verify(linear, torch.randn(1, 2))
