"""What enters and leaves a program whose sequences are split, over ranks or in time.

On the way in, all ranks of a group must bring the same batch: each computes a part of it, and the parts of
different batches would add up to nothing. On the way out, a result that stays in pieces is handed to the
caller as a DTensor, or withheld: as a tensor that has a shape and no data, and says so when it is used. One
that is made in tiles, never whole, is withheld, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from autodist.runtime import compat, dialect

_CHECKED_CALLS = 3


class WithheldOutputError(RuntimeError):
    """A result that the plan does not gather was used."""


class DifferentBatchError(ValueError):
    """Ranks that share a sequence were given different batches."""


class WithheldOutput(Tensor):
    """A result that stays in pieces: its shape and type can be read, its data cannot."""

    @classmethod
    @compat.not_alone
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METADATA:
            with compat.plain_functions():
                return func(*args, **(kwargs or {}))
        shown = next(a for a in args if isinstance(a, WithheldOutput))
        with compat.plain_functions():
            shape = tuple(shown.shape)
        raise WithheldOutputError(f"this output of shape {shape} {shown.reason}")

    reason = ""


_METADATA = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.__repr__,
}


_IN_PIECES = (
    "lies in pieces on the ranks that share its sequences, and the plan does not gather it (it can be the "
    "largest tensor of a step). Compute the loss inside the compiled model, or set "
    'outputs="gathered" or outputs="sharded" in the plan.'
)
ELSEWHERE = (
    "lies on the ranks of another pipeline stage, and the plan does not send it (it can be the largest "
    'tensor of a step). Compute the loss inside the compiled model, or set outputs="gathered" in the plan.'
)
_IN_TILES = (
    "was not made: the plan's memory has no room for it, and the loss is made of one piece of it at a time. "
    "Compute what you need of it inside the compiled model, raise 'memory', or set "
    'outputs="gathered" in the plan to have it counted among what must fit.'
)


def withheld(shape: Sequence[int], dtype: torch.dtype, reason: str = _IN_TILES) -> Tensor:
    """A stand-in for a result."""
    made = torch.empty(shape, dtype=dtype, device="meta").as_subclass(WithheldOutput)
    made.reason = reason
    return made


def shape_of(stand_in: Tensor) -> Tensor:
    """A result's shape and type, without data, from the empty tensor that a program returns in its place."""
    device = stand_in.device if isinstance(stand_in, compat.FakeTensor) else "meta"
    return torch.empty(stand_in.shape[1:], dtype=stand_in.dtype, device=device)


@dataclass(frozen=True)
class Kept:
    """A result that stays in pieces of dimension ``dim``.

    ``length`` is that dimension's size: a number, or which dimension of which argument has the same size;
    where None, the pieces' sizes together are an upper bound of it.
    """

    dim: int
    length: int | tuple[int, int] | None


def returned(
    local: Tensor, kept: Kept, arguments: Sequence[Any], mesh: DeviceMesh, as_dtensor: bool
) -> Tensor:
    """What the caller gets for ``local``, this rank's piece of a result."""
    if isinstance(local, compat.FakeTensor):
        return local  # in a dry run there is no data to withhold
    if kept.length is None:
        length = local.shape[kept.dim] * mesh.size()
    elif isinstance(kept.length, int):
        length = kept.length
    else:
        place, dim = kept.length
        length = arguments[place].shape[dim]
    shape = [*local.shape]
    shape[kept.dim] = length
    if not as_dtensor:
        return withheld(shape, local.dtype, _IN_PIECES)
    mine = local.narrow(kept.dim, 0, dialect.local_rows(length, mesh.size(), mesh.get_local_rank()))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        mine, mesh, [Shard(kept.dim)], run_check=False, shape=torch.Size(shape), stride=stride
    )


class SameBatch:
    """Compares what the ranks of ``mesh`` were given, at a program's first calls."""

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self._group, self._device = compat.mesh_group_name(mesh), device
        self._left = 0 if compat.is_fake_group(self._group) else _CHECKED_CALLS

    def check(self, arguments: Sequence[Any]) -> None:
        """Raise :class:`DifferentBatchError` on every rank when they differ."""
        if self._left == 0:
            return
        self._left -= 1
        plain = [x for x in arguments if isinstance(x, Tensor) and not isinstance(x, DTensor)]
        sums = [_digest(x) for x in plain if x.numel() and not x.is_meta]
        sizes = torch.tensor([float(s) for x in plain for s in x.shape], dtype=torch.float64)
        mine = torch.stack([*sums, sizes.sum()]) if sums else sizes.sum()[None]
        mine = torch.cat([mine, mine.new_tensor([len(plain)])]).sum()[None]
        all_ranks = dialect.all_gather_now(mine.to(self._device), self._group)
        if not bool((all_ranks == all_ranks[0]).all()):
            ranks = compat.group_ranks(self._group)
            raise DifferentBatchError(
                f"ranks {ranks} share their batch (plan fields 'sp' and 'pp') and were given different ones; "
                f"this is rank {dist.get_rank()}. Give all ranks of a group the same batch: shard the data "
                "by rank // (sp * pp), not by rank."
            )


def _digest(x: Tensor) -> Tensor:
    """A number that differs, nearly always, between different tensors and not between equal ones."""
    flat = x.detach().reshape(-1).to("cpu", torch.float64).nan_to_num()
    return (flat * torch.arange(1, flat.numel() + 1, dtype=torch.float64).sin()).sum()
