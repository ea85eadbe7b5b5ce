"""The dialect of an axis laid out over ranks: how a value changes its placement there.

Terms. The *axis* has ``P`` ranks, those of ``group``. A dimension seen as ``(outer, length)`` is *sharded*
when rank ``r`` holds, for each of the ``outer`` indices, the ``chunk`` positions from ``r * chunk`` on. With
``P * chunk > length`` the last ranks' positions run past the end: such *padding* repeats the last position,
so it is as finite as real values are, and a gather cuts it off again. Its cotangent is zero.

    op         from -> to     forward                     backward
    slice      R -> S         take my part                all-gather
    part       W -> S         take my part                my part, zero elsewhere: no communication
    gather     S -> R         all-gather                  take my part
    exchange   S(i) -> S(j)   all-to-all                  all-to-all back
    reduce     P -> R         all-reduce                  identity
    vary       R beside S     identity                    all-reduce
    settle     W beside R     identity                    divide by P
    valid                     which positions are no padding
    last                      the last position, everywhere; no gradient
    agreed                    the first rank's value, everywhere; no gradient
    keep                      a random mask for dropout

Random numbers are a function of (seed, operator, place), not of a generator's state: :data:`keep` hashes each
element's index with them. So masks differ from piece to piece, are the same on replicas, and come out the
same when a value is computed again. The seed is drawn from torch's generator once for each run of a program
and is the first rank's, so one ``torch.manual_seed`` reproduces a run.

The placements R, W, S and P are defined in :mod:`autodist.passes.analysis.placement`. Every operator has an
eager meaning, a fake kernel and a gradient; none aliases its input. Paper: DeepSpeed Ulysses,
arXiv:2309.14509, for the exchange around attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autodist.runtime import compat

_LIBRARY = torch.library.Library("autodist", "FRAGMENT")
_collectives = torch.ops._c10d_functional

# --- pieces ----------------------------------------------------------------------------------------


def _resized(x: Tensor, dim: int, size: Any) -> list[Any]:
    return [*x.shape[:dim], size, *x.shape[dim + 1 :]]


def padded(x: Tensor, dim: int, positions: Any, repeat: bool) -> Tensor:
    """``x`` with ``dim`` extended to ``positions``, by its last position or by zeros."""
    length = x.shape[dim]
    missing = positions - length
    if isinstance(missing, int):
        if missing == 0:
            return x
        shape = _resized(x, dim, missing)
        last = x.narrow(dim, length - 1, 1).expand(shape) if repeat else x.new_zeros(shape)
        return torch.cat([x, last], dim)
    # A tensor of so many positions would be a program for lengths that lack none, and one for those that do.
    index = torch.arange(positions, device=x.device)
    longer = x.index_select(dim, index.clamp(max=length - 1))
    exists = (index < length).reshape([-1] + [1] * (x.ndim - dim - 1))
    return longer if repeat else torch.where(exists, longer, 0)


def _cut(x: Tensor, dim: int, length: Any) -> Tensor:
    if isinstance(x.shape[dim] - length, int):
        return x.narrow(dim, 0, length)
    # Whether a view of so many positions is dense would be asked, and be another program each way.
    return x.index_select(dim, torch.arange(length, device=x.device))


def _split(x: Tensor, dim: int, outer: Any, length: Any, chunk: Any, ranks: int, repeat: bool) -> Tensor:
    """``dim`` as (outer, ranks, chunk), with the ranks brought to the front."""
    x = x.reshape([*x.shape[:dim], outer, length, *x.shape[dim + 1 :]])
    x = padded(x, dim + 1, ranks * chunk, repeat)
    x = x.reshape([*x.shape[: dim + 1], ranks, chunk, *x.shape[dim + 2 :]])
    return x.movedim(dim + 1, 0)


def _join(x: Tensor, dim: int, outer: Any, length: Any, chunk: Any, ranks: int) -> Tensor:
    """The inverse: ranks from the front back into ``dim`` (of what follows them), padding cut off."""
    x = x.reshape([ranks, *x.shape[1 : dim + 1], outer, chunk, *x.shape[dim + 2 :]])
    x = x.movedim(0, dim + 1)
    x = x.reshape([*x.shape[: dim + 1], ranks * chunk, *x.shape[dim + 3 :]])
    x = _cut(x, dim + 1, length)
    return x.reshape([*x.shape[:dim], outer * length, *x.shape[dim + 2 :]])


# --- eager meaning ---------------------------------------------------------------------------------


def _slice(x: Tensor, dim: int, outer: Any, length: Any, chunk: Any, repeat: bool, group: str) -> Tensor:
    ranks, rank = compat.group_size(group), compat.group_rank(group)
    mine = _split(x, dim, outer, length, chunk, ranks, repeat)[rank]
    return mine.reshape(_resized(x, dim, outer * chunk)).clone(memory_format=torch.contiguous_format)


def _part(x: Tensor, dim: int, outer: Any, length: Any, chunk: Any, group: str) -> Tensor:
    return _slice(x, dim, outer, length, chunk, True, group)


def _unpart(x: Tensor, dim: int, outer: Any, length: Any, chunk: Any, group: str) -> Tensor:
    ranks, rank = compat.group_size(group), compat.group_rank(group)
    before, after = x.new_zeros([rank, *x.shape]), x.new_zeros([ranks - rank - 1, *x.shape])
    whole = torch.cat([before, x[None], after])
    return _join(whole, dim, outer, length, chunk, ranks).clone(memory_format=torch.contiguous_format)


def _gather(x: Tensor, dim: int, outer: Any, length: Any, chunk: Any, group: str) -> Tensor:
    ranks = compat.group_size(group)
    flat = _collectives.all_gather_into_tensor(x.contiguous().reshape(-1), ranks, group)
    parts = _collectives.wait_tensor(flat).reshape([ranks, *x.shape])
    return _join(parts, dim, outer, length, chunk, ranks).clone(memory_format=torch.contiguous_format)


def _exchange(
    x: Tensor,
    dim: int,
    outer: Any,
    length: Any,
    chunk: Any,
    from_dim: int,
    from_outer: Any,
    from_length: Any,
    from_chunk: Any,
    repeat: bool,
    group: str,
) -> Tensor:
    ranks = compat.group_size(group)
    sent = _split(x, dim, outer, length, chunk, ranks, repeat)
    shape = [ranks, *_resized(x, dim, outer * chunk)]
    flat = sent.reshape(-1).contiguous()
    each = [flat.shape[0] // ranks] * ranks
    received = _collectives.all_to_all_single(flat, each, each, group)
    parts = _collectives.wait_tensor(received).reshape(shape)
    whole = _join(parts, from_dim, from_outer, from_length, from_chunk, ranks)
    return whole.clone(memory_format=torch.contiguous_format)


def _reduce(x: Tensor, group: str) -> Tensor:
    return _collectives.wait_tensor(_collectives.all_reduce(x.contiguous(), "sum", group))


def _same(x: Tensor, group: str) -> Tensor:
    return x.clone()


def _valid(like: Tensor, outer: Any, length: Any, chunk: Any, group: str) -> Tensor:
    first = compat.group_rank(group) * chunk
    mine = torch.arange(chunk, device=like.device) + first < length
    return mine.expand([outer, chunk]).reshape(-1).clone()


def _last(x: Tensor, dim: int, outer: Any, length: Any, chunk: Any, group: str) -> Tensor:
    own = torch.full([1], length - 1, device=x.device) - compat.group_rank(group) * chunk
    pieces = x.reshape([*x.shape[:dim], outer, chunk, *x.shape[dim + 1 :]])
    found = pieces.index_select(dim + 1, own.clamp(0, chunk - 1)).reshape(_resized(x, dim, outer))
    mine = torch.where((own >= 0) & (own < chunk), found, 0)
    return _collectives.wait_tensor(_collectives.all_reduce(mine.contiguous(), "sum", group))


def _agreed(x: Tensor, group: str) -> Tensor:
    mine = x if compat.group_rank(group) == 0 else torch.zeros_like(x)
    wide = mine.to(torch.uint8) if x.dtype is torch.bool else mine
    started = _collectives.all_reduce(wide.contiguous(), "sum", group)
    return _collectives.wait_tensor(started).to(x.dtype)


_MASK31 = 2**31 - 1


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 31-bit numbers that leaves no pattern (multiply, xor-shift; products fit 62 bits)."""
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        x = x ^ (x >> 15)
        x = (x * multiplier) & _MASK31
    return x ^ (x >> 16)


def _keep(like: Tensor, seed: Tensor, number: int, p: float, sharded: bool, group: str) -> Tensor:
    place = compat.group_ranks(group)[0] + 1
    place = place * 65_537 + (compat.group_rank(group) + 1 if sharded else 0)
    key = _mixed(_mixed((seed & _MASK31) ^ (number * 7_919 + 1)) ^ (place & _MASK31))
    index = torch.arange(like.numel(), device=like.device)
    # Two rounds with the key between them: neighbours and equal indices of other masks are unrelated.
    drawn = _mixed((_mixed(index & _MASK31) + key + (index >> 31) * 101) & _MASK31)
    return (drawn >= int(p * 2**31)).reshape(like.shape)


# --- fake kernels ----------------------------------------------------------------------------------


def _fake_slice(x: Tensor, dim: int, outer: Any, length: Any, chunk: Any, *_: Any) -> Tensor:
    return x.new_empty(_resized(x, dim, outer * chunk))


def _fake_gather(x: Tensor, dim: int, outer: Any, length: Any, chunk: Any, group: str) -> Tensor:
    return x.new_empty(_resized(x, dim, outer * length))


def _fake_exchange(x: Tensor, dim: int, outer: Any, length: Any, chunk: Any, *rest: Any) -> Tensor:
    from_dim, from_outer, from_length = rest[:3]
    shape = _resized(x, dim, outer * chunk)
    shape[from_dim] = from_outer * from_length
    return x.new_empty(shape)


def _fake_same(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_clone(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def _fake_valid(like: Tensor, outer: Any, length: Any, chunk: Any, group: str) -> Tensor:
    return like.new_empty([outer * chunk], dtype=torch.bool)


def _fake_last(x: Tensor, dim: int, outer: Any, length: Any, chunk: Any, group: str) -> Tensor:
    return x.new_empty(_resized(x, dim, outer))


def _fake_keep(like: Tensor, *_: Any) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bool, device=like.device)


# --- autograd --------------------------------------------------------------------------------------


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.where = inputs[1:]


def _slice_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dim, outer, length, chunk, _, group = ctx.where
    return torch.ops.autodist.gather(grad, dim, outer, length, chunk, group), *[None] * 6


def _part_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.autodist.unpart(grad, *ctx.where), *[None] * 5


def _unpart_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *where, group = ctx.where
    return torch.ops.autodist.slice(grad, *where, False, group), *[None] * 5


def _exchange_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    to, back, group = ctx.where[:4], ctx.where[4:8], ctx.where[9]
    return torch.ops.autodist.exchange(grad, *back, *to, False, group), *[None] * 10


def _reduce_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad.clone(), None


def _vary_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.autodist.reduce(grad, *ctx.where), None


def _settle_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad / compat.group_size(ctx.where[0]), None


_PLACE = "int dim, SymInt outer, SymInt length, SymInt chunk"
_FROM = "int from_dim, SymInt from_outer, SymInt from_length, SymInt from_chunk"
_Operator = tuple[str, Callable[..., Any], Callable[..., Any], "Callable[..., Any] | None"]
_OPERATORS: tuple[_Operator, ...] = (
    (f"slice(Tensor x, {_PLACE}, bool repeat, str group) -> Tensor", _slice, _fake_slice, _slice_backward),
    (f"part(Tensor x, {_PLACE}, str group) -> Tensor", _part, _fake_slice, _part_backward),
    (f"unpart(Tensor x, {_PLACE}, str group) -> Tensor", _unpart, _fake_gather, _unpart_backward),
    (f"gather(Tensor x, {_PLACE}, str group) -> Tensor", _gather, _fake_gather, _unpart_backward),
    (
        f"exchange(Tensor x, {_PLACE}, {_FROM}, bool repeat, str group) -> Tensor",
        _exchange,
        _fake_exchange,
        _exchange_backward,
    ),
    ("reduce(Tensor x, str group) -> Tensor", _reduce, _fake_same, _reduce_backward),
    ("vary(Tensor x, str group) -> Tensor", _same, _fake_clone, _vary_backward),
    ("settle(Tensor x, str group) -> Tensor", _same, _fake_clone, _settle_backward),
    (f"last(Tensor x, {_PLACE}, str group) -> Tensor", _last, _fake_last, None),
    ("agreed(Tensor x, str group) -> Tensor", _agreed, _fake_same, None),
    (
        "keep(Tensor like, Tensor seed, int number, float p, bool sharded, str group) -> Tensor",
        _keep,
        _fake_keep,
        None,
    ),
    (
        "valid(Tensor like, SymInt outer, SymInt length, SymInt chunk, str group) -> Tensor",
        _valid,
        _fake_valid,
        None,
    ),
)

for _schema, _eager, _fake, _backward in _OPERATORS:
    _name = _schema.split("(")[0]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, compat.not_alone(_eager), "CompositeExplicitAutograd")
    torch.library.register_fake(f"autodist::{_name}", _fake, lib=_LIBRARY)
    if _backward is not None:
        torch.library.register_autograd(
            f"autodist::{_name}", _backward, setup_context=_remember, lib=_LIBRARY
        )

slice_ = torch.ops.autodist.slice.default
part = torch.ops.autodist.part.default
unpart = torch.ops.autodist.unpart.default
gather = torch.ops.autodist.gather.default
exchange = torch.ops.autodist.exchange.default
reduce = torch.ops.autodist.reduce.default
vary = torch.ops.autodist.vary.default
settle = torch.ops.autodist.settle.default
valid = torch.ops.autodist.valid.default
last = torch.ops.autodist.last.default
agreed = torch.ops.autodist.agreed.default
keep = torch.ops.autodist.keep.default

MEANING = {getattr(torch.ops.autodist, o[0].split("(")[0]).default: o[1] for o in _OPERATORS}
"""Each operator's eager meaning, as a function that can be traced."""
