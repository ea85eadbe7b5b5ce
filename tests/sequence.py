"""Parity under sequence parallelism: ranks that share a batch, against the same model on one process.

With ``sp`` ranks to a group, group ``g`` trains on batch ``g``; the reference is the mean over groups.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import autodist
from tests.models import Case
from tests.parity import TOLERANCE, adamw, check_gradients, check_parameters, reference_step


def train(
    case: Case, options: dict[str, Any], steps: int = 3, tolerance: float = TOLERANCE, explicit: bool = False
) -> tuple[nn.Module, float]:
    """Train sharded and unsharded side by side; the model and the largest relative error of the loss.

    ``tolerance`` is for the loss and for the first step's gradients. Later steps begin from parameters that
    AdamW has moved apart: it scales gradients that are nothing but rounding noise (a key's bias) up.
    """
    fresh()
    model = case.build().train()
    reference = copy.deepcopy(model)
    if explicit:
        autodist.prepare(model, options)
    compiled = torch.compile(model, backend="autodist", options=options)
    stepper = adamw(model.parameters())
    reference_stepper = adamw(reference.parameters())
    group = dist.get_rank() // options["sp"]
    worst = 0.0
    for step in range(steps):
        groups = dist.get_world_size() // options["sp"]
        generators = [torch.Generator().manual_seed(1000 * step + g) for g in range(groups)]
        batches = [case.batch(g) for g in generators]
        losses = reference_losses(reference, batches)
        loss = compiled(**batches[group]).loss
        loss.backward()
        found = abs(loss.item() - losses[group]) / abs(losses[group])
        assert found < tolerance, f"step {step}: loss {loss.item()} for {losses[group]}"
        worst = max(worst, found)
        check_gradients(model, reference, tolerance if step == 0 else max(tolerance, TOLERANCE))
        for optimizer in (stepper, reference_stepper):
            optimizer.step()
            optimizer.zero_grad()
    check_parameters(model, reference, max(tolerance, TOLERANCE))
    if dist.get_world_size() == options["sp"]:  # other groups' buffers have seen other batches
        check_buffers(model, reference, TOLERANCE)
    return model, worst


def check_buffers(model: nn.Module, reference: nn.Module, tolerance: float) -> None:
    wanted = dict(reference.named_buffers())
    for name, found in model.named_buffers():
        close = torch.allclose(found.double(), wanted[name].double(), rtol=tolerance, atol=1e-6)
        assert close, f"buffer {name}"


def fresh() -> None:
    """Begin anew: no compiled code, the same seed, and no old objects to look through.

    Preparing a model searches all objects that Python tracks for optimizers, and what compilers leave behind
    is most of them.
    """
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()
    torch.manual_seed(0)


def reference_losses(reference: nn.Module, batches: list[dict[str, Any]]) -> list[float]:
    losses = []
    for batch in batches:
        loss = reference(**batch).loss
        (loss / len(batches)).backward()
        losses.append(loss.item())
    return losses


def gathers(model: nn.Module) -> list[str]:
    """What the pass gathered, in the last graph compiled."""
    job = next(model.parameters())._autodist_job
    records = [r for report in job.reports for r in report.records if r.name == "sequence_parallel"]
    return [f"{d.action}: {d.reason}" for r in records for d in r.decisions]


__all__ = ["fresh", "gathers", "reference_losses", "reference_step", "train"]
