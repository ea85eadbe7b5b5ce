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
    """Sizes of a Llama (untied) and of its training.

    ``batch`` sequences of ``sequence`` tokens a step for every ``sp`` or ``pp`` ranks, which share them;
    ``steps`` are measured, after ``WARM_UP_STEPS``; ``threads`` is what one rank computes with;
    ``kv_heads`` of 0 means as many as ``heads``. ``dtype`` is that of parameters and activations,
    ``budget`` what a variant that saves memory is given.
    """

    hidden: int = 640
    layers: int = 4
    heads: int = 10
    kv_heads: int = 0
    intermediate: int = 1728
    vocab: int = 4096
    batch: int = 2
    sequence: int = 256
    steps: int = 10
    ranks: int = 2
    sp: int = 1
    pp: int = 1
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    budget: float = 0.0

    @property
    def step_tokens(self) -> int:
        """Tokens that all ranks together train on in a step."""
        return self.batch * self.sequence * self.ranks // (self.sp * self.pp)

    @property
    def ulysses_bytes(self) -> int:
        """What a rank has to send in a step to exchange sequence for heads around every attention.

        It keeps one of ``sp`` pieces of its part of q, k, v and the output, forward and backward.
        Key-value heads are repeated as far as every rank needs one.
        """
        heads = 2 * self.heads + 2 * max(self.kv_heads or self.heads, self.sp)
        part = self.batch * self.sequence // self.sp * heads * (self.hidden // self.heads)
        return 2 * self.layers * part * self._dtype().itemsize * (self.sp - 1) // self.sp

    def _dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def model(self) -> nn.Module:
        """A Hugging Face Llama in training mode, with the same weights on every rank."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(SEED)
        config = LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab,
            max_position_embeddings=self.sequence,
            tie_word_embeddings=False,
            use_cache=False,
        )
        return LlamaForCausalLM(config).train().to(self.device, self._dtype())

    def tokens(self, rank: int) -> list[Tensor]:
        """One tensor [batch, sequence] for each step, and one more; the same on ranks that share it."""
        generator = torch.Generator().manual_seed(SEED + 1 + rank // (self.sp * self.pp))
        shape = (WARM_UP_STEPS + self.steps + 1, self.batch, self.sequence)
        drawn = torch.randint(0, self.vocab, shape, generator=generator)
        return list(drawn.to(self.device).unbind())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Tensor:
    """What the benchmarks of captured steps capture."""
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss
