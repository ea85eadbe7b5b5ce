"""The parity check: a sharded run against the same model on one process.

Every rank trains the reference too, on all ranks' batches: the reference gradient is the mean of the
gradients of the coordinates' losses, which is what sharded training must produce. Compared in fp32:
the rank's loss, every parameter's gradient, and the parameters after several AdamW steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import autodist
from tests.models import CASES

TOLERANCE = 1e-4


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error in the norm; absolute where the reference is (nearly) zero."""
    got, want = full(got).detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp(min=1e-3)).item()


def batches(case: str, step: int) -> list[dict[str, Any]]:
    """One batch a rank, all different."""
    return [
        CASES[case].batch(torch.Generator().manual_seed(1000 * step + r))
        for r in range(dist.get_world_size())
    ]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with an epsilon above rounding noise.

    Attention does not depend on its key bias, so that gradient is noise of about 1e-8 on any side; with the
    usual epsilon of 1e-8, Adam would scale the noise to steps of the size of the learning rate.
    """
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)


def reference_step(model: nn.Module, all_batches: list[dict[str, Any]]) -> list[float]:
    """Accumulate the mean gradient over all ranks' batches; the losses by rank.

    Buffers are each rank's own: every rank's forward starts from this rank's buffers, and ends with what
    this rank's batch made of them.
    """
    rank, losses = dist.get_rank(), []
    before = {n: b.clone() for n, b in model.named_buffers()}
    after: dict[str, torch.Tensor] = {}
    for r, batch in enumerate(all_batches):
        for n, b in model.named_buffers():
            b.copy_(before[n])
        loss = model(**batch).loss
        (loss / len(all_batches)).backward()
        losses.append(loss.item())
        if r == rank:
            after = {n: b.clone() for n, b in model.named_buffers()}
    for n, b in model.named_buffers():
        b.copy_(after[n])
    return losses


def check_gradients(model: nn.Module, reference: nn.Module, tolerance: float = TOLERANCE) -> None:
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        want = wanted[name].grad
        assert (parameter.grad is None) == (want is None), f"{name}: has a gradient on one side only"
        if want is not None:
            assert isinstance(parameter.grad, DTensor), f"{name}: {type(parameter.grad)}"
            assert parameter.grad.placements == parameter.placements, name
            found = error(parameter.grad, want)
            assert found < tolerance, f"gradient of {name}: relative error {found:.2e}"


def check_parameters(model: nn.Module, reference: nn.Module, tolerance: float = TOLERANCE) -> None:
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        found = error(parameter, wanted[name])
        assert found < tolerance, f"parameter {name}: relative error {found:.2e}"


def parity(
    case: str,
    options: dict[str, Any],
    steps: int = 5,
    optimizer: Callable[..., torch.optim.Optimizer] = adamw,
    explicit: bool = False,
) -> float:
    """Train ``case`` sharded and unsharded side by side; the largest loss error seen.

    ``explicit`` prepares the model before compiling, as models that Dynamo cannot trace need.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = CASES[case].build().train()
    reference = copy.deepcopy(model)
    if explicit:
        autodist.prepare(model, options)
    compiled = torch.compile(model, backend="autodist", options=options)
    stepper = optimizer(model.parameters())  # before the first call: it is re-pointed
    reference_stepper = optimizer(reference.parameters())
    worst = 0.0
    for step in range(steps):
        all_batches = batches(case, step)
        losses = reference_step(reference, all_batches)
        loss = compiled(**all_batches[dist.get_rank()]).loss
        loss.backward()
        worst = max(worst, abs(loss.item() - losses[dist.get_rank()]) / abs(losses[dist.get_rank()]))
        assert worst < TOLERANCE, f"step {step}: loss {loss.item()} for {losses[dist.get_rank()]}"
        check_gradients(model, reference)
        stepper.step()
        reference_stepper.step()
        stepper.zero_grad()
        reference_stepper.zero_grad()
    check_parameters(model, reference)
    for name, buffer in model.named_buffers():
        wanted = dict(reference.named_buffers())[name]
        assert torch.allclose(buffer, wanted, rtol=1e-4, atol=1e-5), f"buffer {name}"
    return worst
