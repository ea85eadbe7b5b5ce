"""The ways of training in less memory that are compared; the loss alone leaves what is compiled.

``Workload.budget`` is what a variant is given: bytes in all for autodist, a part of 1 for torch's budget; the
others take none. Attention is causal without a mask in all of them (see :mod:`benchmarks.sequence`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sequence import attend_causally
from benchmarks.variants import Step, Variant, import_deepspeed
from benchmarks.workload import Workload, adamw

Loss = Callable[[Tensor], Tensor]


def _step(loss_of: Loss, optimizer: torch.optim.Optimizer) -> Step:
    def step(tokens: Tensor) -> Tensor:
        loss = loss_of(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _loss_of(model: nn.Module) -> Loss:
    attend_causally(model)
    return lambda tokens: model(input_ids=tokens, labels=tokens).loss


def _checkpointed(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def _eager_checkpoint(model: nn.Module, workload: Workload) -> Step:
    _checkpointed(model)
    return _step(_loss_of(model), adamw(model))


def _compile(model: nn.Module, workload: Workload) -> Step:
    return _step(torch.compile(_loss_of(model)), adamw(model))


def _compile_checkpoint(model: nn.Module, workload: Workload) -> Step:
    _checkpointed(model)
    return _compile(model, workload)


def _torch_budget(model: nn.Module, workload: Workload) -> Step:
    torch._functorch.config.activation_memory_budget = workload.budget
    return _compile(model, workload)


def _autodist(model: nn.Module, workload: Workload) -> Step:
    # A plan counts gradients twice, for loops that accumulate; this one does not.
    gradients = sum(p.nbytes for p in model.parameters())
    options = {"memory": int(workload.budget) + gradients} if workload.budget else {}
    compiled = torch.compile(_loss_of(model), backend="autodist", options=options)
    return _step(compiled, adamw(model))


def _alst(model: nn.Module, workload: Workload) -> Step:
    """DeepSpeed's tiled MLP and tiled loss (arXiv:2506.13996) beside checkpoints of the blocks, as its
    documentation puts them into a Llama: an MLP in as many tiles as the sequence is longer than wide."""
    import_deepspeed(workload)
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP

    def mlp(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def tiled(self: Any, x: Tensor) -> Tensor:
        weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
        return TiledMLP.apply(mlp, self, x, math.ceil(x.shape[1] / x.shape[2]), weights)

    def piece(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.lm_head(x), y, reduction="sum")

    _checkpointed(model)
    attend_causally(model)
    for block in model.model.layers:  # type: ignore[union-attr]
        block.mlp.forward = MethodType(tiled, block.mlp)
    shards = math.ceil(workload.vocab / workload.hidden)  # a tile's logits are as large as what it is made of

    def loss_of(tokens: Tensor) -> Tensor:
        hidden = model.model(input_ids=tokens).last_hidden_state  # type: ignore[union-attr, operator]
        labels = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        weights = [model.lm_head.weight]  # type: ignore[union-attr]
        total = TiledFusedLogitsLoss.apply(piece, model, hidden, labels, None, shards, weights, "sum")
        return total / (labels != -100).sum()

    return _step(loss_of, adamw(model))


VARIANTS = {
    "compile": Variant(_compile, alone=True),
    "eager-checkpoint": Variant(_eager_checkpoint, alone=True),
    "compile-checkpoint": Variant(_compile_checkpoint, alone=True),
    "torch-budget": Variant(_torch_budget, alone=True),
    "alst": Variant(_alst, needs="deepspeed", alone=True, may_fail=True),
    "autodist": Variant(_autodist, alone=True),
}
