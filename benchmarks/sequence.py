"""The ways of training on one long sequence that are compared: its positions are split over all ranks.

A step is given the whole batch on every rank and returns the loss of the whole. ``single`` is what
all must agree with: one rank that has the sequence to itself. In the variants written by hand a rank
takes its piece of tokens and of labels (shifted before they are cut) and the loss is the sum over
its tokens divided by the number of all, times the ranks, because DDP, FSDP2 and DeepSpeed average
gradients.

*Ulysses* (arXiv:2309.14509): around attention an all-to-all exchanges pieces of the sequence for
heads.

Attention is causal and without a mask in every variant. Functions registered with transformers are
given none; its own attention, compiled with torch before 2.14, makes a mask and with it twice the
products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from benchmarks.variants import Step, Variant, deepspeed_zero3, import_deepspeed, ordinary_step, shard_blocks
from benchmarks.workload import Workload, adamw


def _attend(model: nn.Module, name: str, attention: Callable[..., Any]) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(name, attention)
    model.set_attn_implementation(name)  # type: ignore[operator]


def _causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **_: Any
) -> tuple[Tensor, None]:
    """Attention on [batch, heads, sequence, head size], as transformers calls it."""
    output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


def attend_causally(model: nn.Module) -> None:
    _attend(model, "causal", _causal)


def _single(model: nn.Module, workload: Workload) -> Step:
    attend_causally(model)
    return ordinary_step(model, adamw(model))


def _single_compile(model: nn.Module, workload: Workload) -> Step:
    attend_causally(model)
    return ordinary_step(torch.compile(model), adamw(model))


def _autodist(stage: int) -> Callable[[nn.Module, Workload], Step]:
    def build(model: nn.Module, workload: Workload) -> Step:
        attend_causally(model)
        options = {"sp": workload.sp, "zero": stage}
        return ordinary_step(torch.compile(model, backend="autodist", options=options), adamw(model))

    return build


# --- by hand ---------------------------------------------------------------------------------------


def _whole(tokens: Tensor) -> list[Tensor]:
    """Tokens, the labels of the tokens and their positions, each of the whole sequence."""
    labels = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return [tokens.clone(), labels, positions.contiguous()]


def _my_part(tokens: Tensor) -> list[Tensor]:
    return [x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].contiguous() for x in _whole(tokens)]


def _loss(forward: Callable[..., Any], part: list[Tensor], workload: Workload) -> Tensor:
    """This rank's share of the loss, by the model's own loss function: the mean of all is the loss."""
    tokens, labels, positions = part
    valid = workload.batch * (workload.sequence - 1)
    loss: Tensor = forward(
        input_ids=tokens,
        position_ids=positions,
        labels=labels,
        shift_labels=labels,
        num_items_in_batch=valid,
    ).loss
    return loss * workload.sp


def _mean(loss: Tensor) -> Tensor:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _step_on_parts(forward: Callable[..., Any], optimizer: torch.optim.Optimizer, workload: Workload) -> Step:
    def step(tokens: Tensor) -> Tensor:
        loss = _loss(forward, _my_part(tokens), workload)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return _mean(loss)

    return step


def _exchange(x: Tensor, split: int, join: int, group: dist.ProcessGroup) -> Tensor:
    """Give away dimension ``split`` in pieces, receive the others' pieces of dimension ``join``."""
    each = [1] * group.size()
    sent = torch.stack(x.chunk(group.size(), split))
    return torch.cat(all_to_all_single_autograd(sent, each, each, group).unbind(), join)


def _ulysses(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **_: Any
) -> tuple[Tensor, None]:
    """:func:`_causal` attention on pieces of the sequence."""
    group = dist.distributed_c10d._get_default_group()
    if key.shape[1] < group.size():
        repeats = group.size() // key.shape[1]
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    query, key, value = (_exchange(x, 1, 2, group) for x in (query, key, value))
    output = _causal(module, query, key, value, mask)[0]
    return _exchange(output, 1, 2, group), None


def _manual_ddp(model: nn.Module, workload: Workload) -> Step:
    _attend(model, "ulysses", _ulysses)
    return _step_on_parts(torch.compile(DistributedDataParallel(model)), adamw(model), workload)


def _manual_fsdp2(model: nn.Module, workload: Workload) -> Step:
    _attend(model, "ulysses", _ulysses)
    for block in model.model.layers:  # type: ignore[union-attr]
        block.compile(fullgraph=True)
    shard_blocks(model, workload)
    return _step_on_parts(model, adamw(model), workload)


# --- others' sequence parallelism -------------------------------------------------------------------


def _deepspeed(model: nn.Module, workload: Workload) -> Step:
    import_deepspeed(workload).init_distributed()
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    groups = UlyssesSPAttentionHF.register_with_transformers(
        model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=workload.sp,
        micro_batch_size=workload.batch,
        seq_length=workload.sequence,
        seq_length_is_variable=False,
    )
    engine = deepspeed_zero3(model, workload, mpu=groups)

    def step(tokens: Tensor) -> Tensor:
        loss = _loss(engine, _my_part(tokens), workload)
        engine.backward(loss)
        engine.step()
        return _mean(loss)

    return step


def _causal_with_all_heads(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **_: Any
) -> tuple[Tensor, None]:
    # Not every kernel that context_parallel has a ring for takes fewer key-value heads.
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    return _causal(module, query, key, value, mask)


def _context_parallel(model: nn.Module, workload: Workload) -> Step:
    from torch.distributed.tensor.experimental import context_parallel

    _attend(model, "causal_with_all_heads", _causal_with_all_heads)
    shard_blocks(model, workload)
    optimizer = adamw(model)
    mesh = init_device_mesh(workload.device, (workload.ranks,))

    def step(tokens: Tensor) -> Tensor:
        buffers = _whole(tokens)  # each rank's part of them within the context
        dims = [1] * len(buffers)
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=dims, no_restore_buffers=set(buffers)):
            loss = _loss(model, buffers, workload)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return _mean(loss)

    return step


VARIANTS = {
    "single": Variant(_single, alone=True),
    "single-compile": Variant(_single_compile, alone=True),
    "manual-ulysses-ddp": Variant(_manual_ddp),
    "manual-ulysses-fsdp2": Variant(_manual_fsdp2),
    "deepspeed-ulysses-zero3": Variant(_deepspeed, needs="deepspeed", may_fail=True),
    "context-parallel-fsdp2": Variant(_context_parallel, may_fail=True),
    "autodist-sp-zero0": Variant(_autodist(0)),
    "autodist-sp-zero3": Variant(_autodist(3)),
}
