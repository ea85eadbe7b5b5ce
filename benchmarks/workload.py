"""What every variant trains: one model, one stream of tokens, one optimizer.

All of it follows from the workload's numbers and a fixed seed, so that variants differ in how they
distribute and compile the step and in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SEED = 0
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 3  # the first compiles, the second may compile again for what the first has changed


@dataclass(frozen=True)
class Workload:
    """Sizes of a Llama (fp32, untied) and of its training.

    ``batch`` sequences of ``sequence`` tokens a rank and step; ``steps`` are measured, after
    ``WARM_UP_STEPS``; ``threads`` is what one rank computes with.
    """

    hidden: int = 640
    layers: int = 4
    heads: int = 10
    intermediate: int = 1728
    vocab: int = 4096
    batch: int = 2
    sequence: int = 256
    steps: int = 10
    ranks: int = 2
    threads: int = 1
    device: str = "cpu"

    def model(self) -> nn.Module:
        """A Hugging Face Llama in training mode, with the same weights on every rank."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(SEED)
        config = LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab,
            max_position_embeddings=self.sequence,
            tie_word_embeddings=False,
            use_cache=False,
        )
        return LlamaForCausalLM(config).train().to(self.device)

    def tokens(self, rank: int) -> list[Tensor]:
        """One tensor [batch, sequence] for each step, warm-up included."""
        generator = torch.Generator().manual_seed(SEED + 1 + rank)
        shape = (WARM_UP_STEPS + self.steps, self.batch, self.sequence)
        drawn = torch.randint(0, self.vocab, shape, generator=generator)
        return list(drawn.to(self.device).unbind())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
