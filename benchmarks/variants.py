"""The ways of training that are compared: each turns a model into a step.

A *step* takes this rank's tokens [batch, sequence], trains on them once and returns this rank's
loss, detached. Every variant runs inside an initialised process group and stays as close to its
project's own recipe as it can; where a setting had to be chosen, a comment says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import autodist
from benchmarks.workload import Workload, adamw, training_step

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """``build(model, workload)`` makes the step; ``needs`` is a package that may be missing.

    ``alone``: on one rank only, whatever the others run on. ``may_fail``: its project does not claim
    to support every device; where it fails the report says so and is complete without it.
    """

    build: Callable[[nn.Module, Workload], Step]
    needs: str | None = None
    alone: bool = False
    may_fail: bool = False


def ordinary_step(
    forward: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    update: Callable[[], object] | None = None,
) -> Step:
    """``update`` is what runs the optimizer, where that is not its own method as it stands."""
    update = update or optimizer.step

    def step(tokens: Tensor) -> Tensor:
        loss: Tensor = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        update()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _ddp(model: nn.Module, workload: Workload) -> Step:
    return ordinary_step(DistributedDataParallel(model), adamw(model))


def _ddp_compile(model: nn.Module, workload: Workload) -> Step:
    return ordinary_step(torch.compile(DistributedDataParallel(model)), adamw(model))


def shard_blocks(model: nn.Module, workload: Workload) -> None:
    """FSDP2's recipe: one group of parameters a block, the rest with the root."""
    mesh = init_device_mesh(workload.device, (workload.ranks,))
    for block in model.model.layers:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _fsdp2(model: nn.Module, workload: Workload) -> Step:
    shard_blocks(model, workload)
    return ordinary_step(model, adamw(model))


def _fsdp2_compile(model: nn.Module, workload: Workload) -> Step:
    for block in model.model.layers:  # type: ignore[union-attr]
        block.compile(fullgraph=True)
    return _fsdp2(model, workload)


def _fsdp2_compile_step(model: nn.Module, workload: Workload) -> Step:
    for block in model.model.layers:  # type: ignore[union-attr]
        block.compile(fullgraph=True)
    shard_blocks(model, workload)
    optimizer = adamw(model)
    return ordinary_step(model, optimizer, update=torch.compile(optimizer.step))


def _fsdp2_compile_whole(model: nn.Module, workload: Workload) -> Step:
    shard_blocks(model, workload)
    return ordinary_step(torch.compile(model), adamw(model))


def import_deepspeed(workload: Workload) -> Any:
    if workload.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    import deepspeed

    return deepspeed


def deepspeed_zero3(model: nn.Module, workload: Workload, **arguments: Any) -> Any:
    """An engine at stage 3; ``arguments`` are more of those of ``deepspeed.initialize``."""
    # DeepSpeed counts its windows in elements and its defaults are for models of billions: left
    # alone, a small model is never released within a step, beside a reduce bucket of 2 GB. Counted
    # in blocks instead, as FSDP2's groups are. Small parameters stay whole up to the size the
    # Hugging Face integration chooses.
    block = sum(p.numel() for p in model.model.layers[0].parameters())  # type: ignore[union-attr, index]
    config = {
        "train_micro_batch_size_per_gpu": workload.batch,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # the default is 1.0, and the others do not clip
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": block,
            "stage3_prefetch_bucket_size": block,
            "stage3_max_live_parameters": 2 * block,
            "stage3_max_reuse_distance": block,
            "stage3_param_persistence_threshold": 10 * workload.hidden,
        },
    }
    engine, *_ = import_deepspeed(workload).initialize(
        model=model, optimizer=adamw(model), config=config, **arguments
    )
    return engine


def _deepspeed(model: nn.Module, workload: Workload) -> Step:
    engine = deepspeed_zero3(model, workload)

    def step(tokens: Tensor) -> Tensor:
        loss: Tensor = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def _autodist(stage: int) -> Callable[[nn.Module, Workload], Step]:
    def build(model: nn.Module, workload: Workload) -> Step:
        compiled = torch.compile(model, backend="autodist", options={"zero": stage})
        return ordinary_step(compiled, adamw(model))

    return build


def _autodist_step(model: nn.Module, workload: Workload) -> Step:
    optimizer = adamw(model)
    step = autodist.train_step(plan={"zero": 3})(training_step)
    return lambda tokens: step(model, optimizer, tokens)


VARIANTS = {
    "ddp": Variant(_ddp),
    "ddp-compile": Variant(_ddp_compile),
    "fsdp2": Variant(_fsdp2),
    "fsdp2-compile": Variant(_fsdp2_compile),
    "fsdp2-compile-step": Variant(_fsdp2_compile_step),
    "fsdp2-compile-whole": Variant(_fsdp2_compile_whole),
    "deepspeed-zero3": Variant(_deepspeed, needs="deepspeed"),
    "autodist-zero3": Variant(_autodist(3)),
    "autodist-zero2": Variant(_autodist(2)),
    "autodist-step-zero3": Variant(_autodist_step),
}
