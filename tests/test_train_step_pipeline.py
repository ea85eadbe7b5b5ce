"""Captured steps as pipelines, against the same function on one process with the whole batch.

Losses to 1e-5 and parameters to 1e-4, relative, in fp32. Several steps are tried in one group of ranks. The
function is the same on both sides: with several coordinates it is given the batch of its own, and the
reference those of all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import autodist
from tests.parity import error
from tests.ranks import run_ranks
from tests.sequence import fresh
from tests.test_pipeline import batch, build, check

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


def trained(case: str, options: dict[str, Any], steps: int = 5) -> tuple[int, int]:
    """Train ``case`` captured and whole, side by side; how many parameters this rank holds, and all."""
    fresh()
    model = build(case)
    average, reference, reference_average = (copy.deepcopy(model) for _ in range(3))
    step = autodist.train_step(plan={**EAGER, **options})(full_step)
    sides: list[tuple[Any, ...]] = []
    for each in (model, reference):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2, eps=1e-4)
        sides.append((optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))))
    shared = options["pp"] * options.get("sp", 1)
    coordinate, coordinates = dist.get_rank() // shared, dist.get_world_size() // shared
    for number in range(steps):
        batches = [batch(case, number, c, 4) for c in range(coordinates)]
        found = step(model, average, *sides[0], [batches[coordinate]])
        wanted = full_step(reference, reference_average, *sides[1], batches)
        loss = found["loss"].clone()
        dist.all_reduce(loss.div_(dist.get_world_size()))  # over coordinates
        assert error(loss, wanted["loss"]) < 1e-5, (number, loss, wanted["loss"])
        assert error(found["norm"], wanted["norm"]) < 1e-4
        assert error(found["perplexity"], found["loss"].exp()) < 1e-6
    assert len(step.programs) == 1
    check(average, reference_average, "parameter", 1e-4)
    return check(model, reference, "parameter", 1e-4), len(dict(reference.named_parameters()))


def all_trained(plans: Sequence[tuple[str, dict[str, Any]]]) -> None:
    for case, options in plans:
        held, total = trained(case, options)
        assert 0 < held < total, (case, held, total)


@pytest.mark.distributed
def test_a_pipeline() -> None:
    run_ranks(all_trained, 2, [("llama_tied", {"pp": 2}), ("llama", {"pp": 2, "schedule": "zero-bubble"})])


@pytest.mark.distributed
def test_beside_data_and_sequence_parallelism() -> None:
    plans = [("llama_tied", {"pp": 2, "zero": 3}), ("bert", {"pp": 2, "sp": 2, "zero": 1})]
    run_ranks(all_trained, 4, plans)
