"""Programs around sequence parallelism: packed sequences, selective checkpoints, the order of exchanges."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

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


# --- verify ----------------------------------------------------------------------------------------


def verified() -> bool:
    torch.manual_seed(0)
    model = CASES["llama"].build()
    compiled = torch.compile(model, backend="autodist", options=SP2)
    batch = CASES["llama"].batch(torch.Generator().manual_seed(dist.get_rank() // 2))
    return autodist.verify(compiled, batch).passed


def test_verify_on_two_groups() -> None:
    assert all(run_ranks(verified, 4))
