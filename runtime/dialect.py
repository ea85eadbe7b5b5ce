"""The dialect: operators through which a value changes its placement over ranks.

A graph in the dialect is an ordinary program. Every operator has an eager meaning (it communicates), a
fake kernel (shapes without data) and, where it stands in the forward program, an autograd formula; so the
graph can be run before and after each pass and the results compared.

Terms. A *shard* is one rank's block of rows (dimension 0) of a parameter; with ``n`` ranks and ``rows``
rows each block has ``chunk = ceil(rows / n)`` rows, the last ones fewer or none (``torch.chunk``'s and
``Shard(0)``'s rule). A *weight* is the whole parameter. ``divisor`` is the number of data-parallel
coordinates a gradient is averaged over; the sum runs over the whole group.

    unshard(shard)       -> weight        all-gather                 backward: reduce_grad
    reduce_grad(grad)    -> shard grad    reduce-scatter, / divisor
    replica(param)       -> weight        identity                   backward: average_grad
    average_grad(grad)   -> grad          all-reduce, / divisor

The ``*_bucket`` forms do the same for a list of tensors in one coalesced collective. Every operator takes
``dtype``: the type that travels, so that a narrowing cast costs no extra bytes on the wire.

Invariants: outputs never alias inputs; an operator is pure; group names are the only process-group
handles in a graph. Paper: ZeRO, arXiv:1910.02054.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autodist.runtime import compat

_LIBRARY = torch.library.Library("autodist", "DEF")
_collectives = torch.ops._c10d_functional


def chunk_rows(rows: int, size: int) -> int:
    """Rows of the largest shard."""
    return -(-rows // size)


def local_rows(rows: int, size: int, rank: int) -> int:
    """Rows of ``rank``'s shard; 0 for ranks past the end."""
    chunk = chunk_rows(rows, size)
    return max(0, min(chunk, rows - rank * chunk))


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """``tensor`` with zero rows appended until it has ``rows`` rows, contiguous."""
    missing = rows - tensor.shape[0]
    if missing == 0:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros((missing, *tensor.shape[1:]))])


def _reduced(summed: Tensor, divisor: int, size: int) -> Tensor:
    """Finish a reduction done with :func:`reduce_op`: divide by what it has not divided by."""
    return summed if divisor in (size, 1) else summed / divisor


def reduce_op(divisor: int, size: int) -> str:
    """The collective's own average where it is the one wanted, else a sum (see ``_reduced``)."""
    return "avg" if divisor == size and size > 1 else "sum"


def all_gather_now(tensor: Tensor, group: str) -> Tensor:
    """All ranks' ``tensor``, one after another along dimension 0; returns when they are there."""
    started = _collectives.all_gather_into_tensor(tensor, compat.group_size(group), group)
    return _collectives.wait_tensor(started)


# --- eager meaning ---------------------------------------------------------------------------------


def _unshard_bucket(
    shards: Sequence[Tensor], rows: Sequence[int], dtype: torch.dtype, group: str
) -> list[Tensor]:
    size = compat.group_size(group)
    padded = [
        pad_rows(s.to(dtype), chunk_rows(r, size)) for s, r in zip(shards, rows, strict=True)
    ]
    gathered = _collectives.all_gather_into_tensor_coalesced(padded, size, group)
    whole = [_collectives.wait_tensor(t) for t in gathered]
    return [t if t.shape[0] == r else t[:r].clone() for t, r in zip(whole, rows, strict=True)]


def _reduce_bucket(
    grads: Sequence[Tensor], divisor: int, dtype: torch.dtype, group: str
) -> list[Tensor]:
    size, rank = compat.group_size(group), compat.group_rank(group)
    padded = [pad_rows(g.to(dtype), chunk_rows(g.shape[0], size) * size) for g in grads]
    op = reduce_op(divisor, size)
    parts = _collectives.reduce_scatter_tensor_coalesced(padded, op, size, group)
    done = [_reduced(_collectives.wait_tensor(t), divisor, size) for t in parts]
    mine = [local_rows(g.shape[0], size, rank) for g in grads]
    return [t if t.shape[0] == m else t[:m].clone() for t, m in zip(done, mine, strict=True)]


def _average_bucket(
    grads: Sequence[Tensor], divisor: int, dtype: torch.dtype, group: str
) -> list[Tensor]:
    size = compat.group_size(group)
    op = reduce_op(divisor, size)
    summed = [_collectives.all_reduce(g.to(dtype).contiguous(), op, group) for g in grads]
    return [_reduced(_collectives.wait_tensor(t), divisor, size) for t in summed]


def _unshard(shard: Tensor, rows: int, divisor: int, dtype: torch.dtype, group: str) -> Tensor:
    return _unshard_bucket([shard], [rows], dtype, group)[0]


def _reduce_grad(grad: Tensor, divisor: int, dtype: torch.dtype, group: str) -> Tensor:
    return _reduce_bucket([grad], divisor, dtype, group)[0]


def _replica(param: Tensor, divisor: int, dtype: torch.dtype, group: str) -> Tensor:
    return param.to(dtype, copy=True)


def _average_grad(grad: Tensor, divisor: int, dtype: torch.dtype, group: str) -> Tensor:
    return _average_bucket([grad], divisor, dtype, group)[0]


# --- fake kernels: shapes and types only -----------------------------------------------------------


def _fake_unshard(shard: Tensor, rows: int, divisor: int, dtype: torch.dtype, group: str) -> Tensor:
    return shard.new_empty((rows, *shard.shape[1:]), dtype=dtype)


def _fake_unshard_bucket(
    shards: Sequence[Tensor], rows: Sequence[int], dtype: torch.dtype, group: str
) -> list[Tensor]:
    return [
        s.new_empty((r, *s.shape[1:]), dtype=dtype) for s, r in zip(shards, rows, strict=True)
    ]


def _fake_reduce_grad(grad: Tensor, divisor: int, dtype: torch.dtype, group: str) -> Tensor:
    rows = local_rows(grad.shape[0], compat.group_size(group), compat.group_rank(group))
    return grad.new_empty((rows, *grad.shape[1:]), dtype=dtype)


def _fake_reduce_bucket(
    grads: Sequence[Tensor], divisor: int, dtype: torch.dtype, group: str
) -> list[Tensor]:
    return [_fake_reduce_grad(g, divisor, dtype, group) for g in grads]


def _fake_same(grad: Tensor, divisor: int, dtype: torch.dtype, group: str) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


def _fake_average_bucket(
    grads: Sequence[Tensor], divisor: int, dtype: torch.dtype, group: str
) -> list[Tensor]:
    return [g.new_empty(g.shape, dtype=dtype) for g in grads]


# --- autograd --------------------------------------------------------------------------------------


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype, ctx.divisor, ctx.group = inputs[0].dtype, inputs[-3], inputs[-1]


def _unshard_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    # The parameter's own type, not the one that travelled forward: gradients are reduced at full width.
    reduced = torch.ops.autodist.reduce_grad(grad, ctx.divisor, ctx.dtype, ctx.group)
    return reduced, None, None, None, None


def _replica_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    averaged = torch.ops.autodist.average_grad(grad, ctx.divisor, ctx.dtype, ctx.group)
    return averaged, None, None, None


_OPERATORS = (
    (
        "unshard(Tensor shard, int rows, int divisor, ScalarType dtype, str group) -> Tensor",
        _unshard,
        _fake_unshard,
    ),
    (
        "unshard_bucket(Tensor[] shards, int[] rows, ScalarType dtype, str group) -> Tensor[]",
        _unshard_bucket,
        _fake_unshard_bucket,
    ),
    (
        "reduce_grad(Tensor grad, int divisor, ScalarType dtype, str group) -> Tensor",
        _reduce_grad,
        _fake_reduce_grad,
    ),
    (
        "reduce_bucket(Tensor[] grads, int divisor, ScalarType dtype, str group) -> Tensor[]",
        _reduce_bucket,
        _fake_reduce_bucket,
    ),
    (
        "replica(Tensor param, int divisor, ScalarType dtype, str group) -> Tensor",
        _replica,
        _fake_same,
    ),
    (
        "average_grad(Tensor grad, int divisor, ScalarType dtype, str group) -> Tensor",
        _average_grad,
        _fake_same,
    ),
    (
        "average_bucket(Tensor[] grads, int divisor, ScalarType dtype, str group) -> Tensor[]",
        _average_bucket,
        _fake_average_bucket,
    ),
)

for _schema, _eager, _fake in _OPERATORS:
    _name = _schema.split("(")[0]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, compat.not_alone(_eager), "CompositeExplicitAutograd")
    torch.library.register_fake(f"autodist::{_name}", _fake, lib=_LIBRARY)

torch.library.register_autograd(
    "autodist::unshard", _unshard_backward, setup_context=_remember, lib=_LIBRARY
)
torch.library.register_autograd(
    "autodist::replica", _replica_backward, setup_context=_remember, lib=_LIBRARY
)

unshard = torch.ops.autodist.unshard.default
unshard_bucket = torch.ops.autodist.unshard_bucket.default
reduce_grad = torch.ops.autodist.reduce_grad.default
reduce_bucket = torch.ops.autodist.reduce_bucket.default
replica = torch.ops.autodist.replica.default
average_grad = torch.ops.autodist.average_grad.default
average_bucket = torch.ops.autodist.average_bucket.default
