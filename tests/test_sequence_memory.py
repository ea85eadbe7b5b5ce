"""What a rank keeps for the backward shrinks with the number of ranks that share a sequence."""

from __future__ import annotations

import time
from typing import Any

import torch

from tests.allocations import peak_bytes
from tests.models import VOCAB
from tests.ranks import run_ranks


def _model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=172, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=VOCAB, max_position_embeddings=128, use_cache=False,
        )
    )  # fmt: skip


def kept_for_backward(sp: int) -> tuple[int, int]:
    """Bytes of activations, by the graph and as measured, between forward and backward: the least of several
    times, as a busy machine's gloo keeps buffers for longer."""
    torch._dynamo.reset()
    model = _model()
    options: dict[str, Any] = {"sp": sp, "lowering": "eager"}
    compiled = torch.compile(model, backend="autodist", options=options)
    ids = torch.randint(0, VOCAB, (2, 96), generator=torch.Generator().manual_seed(0))
    compiled(input_ids=ids, labels=ids).loss.backward()
    report = next(model.parameters())._autodist_job.reports[-1]

    def held() -> int:
        with peak_bytes() as measured:
            loss = compiled(input_ids=ids, labels=ids).loss
            time.sleep(0.2)  # for gloo's threads to let go of the buffers of finished collectives
        loss.backward()
        return measured.held

    return sum(report.saved_bytes["backward"].values()), min(held() for _ in range(5))


def both() -> tuple[tuple[int, int], tuple[int, int]]:
    return kept_for_backward(1), kept_for_backward(2)


def test_activations_are_shared_out() -> None:
    for (whole, whole_measured), (part, part_measured) in run_ranks(both, 2):
        assert whole > 1_000_000
        assert part <= 1.1 / 2 * whole, (part, whole)
        assert part_measured <= 1.1 / 2 * whole_measured, (part_measured, whole_measured)
