"""The ways of training in pipeline stages that are compared: one batch, in microbatches, a stage a rank.

All are given the whole batch on every rank and return the loss of all of it. The Llama's vocabulary is large
for its width, so its head costs as much as several layers: *equal layers*, what people write by hand, leave
the last rank with more than its share. Schedules are 1F1B, with as many microbatches.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from benchmarks.variants import Step, Variant, ordinary_step
from benchmarks.workload import Workload, adamw

_MICROBATCHES = 4  # of each rank
WORKLOAD = Workload(
    hidden=256, layers=8, heads=8, intermediate=688, vocab=16384, batch=16, sequence=128, steps=10
)


def _single_compile(model: nn.Module, workload: Workload) -> Step:
    return ordinary_step(torch.compile(model), adamw(model))


def _first_layers(workload: Workload) -> list[int]:
    """The first layer of each stage, with equal layers."""
    return [workload.layers * rank // workload.pp for rank in range(workload.pp)]


def _autodist(equal: bool) -> Callable[[nn.Module, Workload], Step]:
    def build(model: nn.Module, workload: Workload) -> Step:
        options: dict[str, Any] = {
            "pp": workload.pp, "zero": 0, "schedule": "1f1b", "microbatches": _MICROBATCHES * workload.pp,
        }  # fmt: skip
        if equal:
            # A plan is the same on all ranks, and names a file: each writes this one, the same.
            cuts = Path(tempfile.gettempdir(), f"equal-layers-{workload.layers}-{workload.pp}.json")
            cuts.write_text(json.dumps({"cuts": [f"model.layers.{n}" for n in _first_layers(workload)[1:]]}))
            options["cuts"] = str(cuts)
        return ordinary_step(torch.compile(model, backend="autodist", options=options), adamw(model))

    return build


# --- by hand ---------------------------------------------------------------------------------------------


class _Layers(nn.Module):
    """A Llama's layers from ``first`` to ``end``, with the embedding before the first and the head behind
    the last."""

    def __init__(self, model: Any, first: int, end: int) -> None:
        super().__init__()
        inner = model.model
        self.embed = inner.embed_tokens if first == 0 else nn.Identity()
        self.layers, self.rotary = inner.layers[first:end], inner.rotary_emb
        last = end == len(inner.layers)
        self.head = nn.Sequential(inner.norm, model.lm_head) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        places = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.rotary(x, places)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=places, position_embeddings=rotary)
        return self.head(x)  # type: ignore[no-any-return]


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _by_hand(model: nn.Module, workload: Workload) -> Step:
    rank, firsts = dist.get_rank(), [*_first_layers(workload), workload.layers]
    part = _Layers(model, firsts[rank], firsts[rank + 1])
    mine = set(part.parameters())
    for parameter in model.parameters():
        if parameter not in mine:  # its caller keeps the whole model, which nobody would
            parameter.data = torch.empty(0)
    optimizer = adamw(part)
    device = torch.device(workload.device)
    stage = PipelineStage(torch.compile(part), rank, workload.pp, device)  # type: ignore[arg-type]
    schedule = Schedule1F1B(stage, _MICROBATCHES * workload.pp, torch.compile(_loss))
    last = workload.pp - 1

    def step(tokens: Tensor) -> Tensor:
        losses: list[Tensor] = []
        given = (tokens,) if rank == 0 else ()
        wanted = {"target": tokens, "losses": losses} if rank == last else {}
        schedule.step(*given, **wanted)
        optimizer.step()
        optimizer.zero_grad()
        loss = torch.stack(losses).detach().mean() if rank == last else torch.zeros((), device=device)
        dist.broadcast(loss, last)
        return loss

    return step


VARIANTS = {
    "single-compile": Variant(_single_compile, alone=True),
    "torch-equal-layers": Variant(_by_hand),
    "autodist-pp-equal-layers": Variant(_autodist(equal=True)),
    "autodist-pp": Variant(_autodist(equal=False)),
}
