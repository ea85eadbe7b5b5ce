"""Numbers and small tensors of several places of a pipeline, on all of its ranks: one collective for all.

    mine     the bytes of the values that this place sends, one after another, each begun at a multiple of 16
    all      the places' buffers, as long as the longest, gathered

Bytes, so that values of all types travel together, and arrive as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autodist.runtime import compat, dialect

_ALIGNED = 16  # bytes: as much as an element of any type has


@dataclass(frozen=True)
class Sent:
    """A value that ``place`` sends to all: a tensor of this kind."""

    place: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def num_bytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def exchange(
    values: Sequence[Sent], mine: Mapping[int, Tensor], group: str, device: torch.device
) -> list[Tensor]:
    """The ``values``, on every rank of ``group``, whose ranks are the places.

    ``mine`` are those of this rank's place, by number; ``device`` is where the group's collectives run.
    """
    starts, lengths = _layout(values)
    longest = max(lengths.values())
    buffer = torch.zeros(longest, dtype=torch.uint8, device=device)
    for number, value in mine.items():
        flat = value.to(device).contiguous().reshape(-1).view(torch.uint8)
        buffer[starts[number] : starts[number] + flat.numel()] = flat
    gathered = dialect.all_gather_now(buffer, group).view(compat.group_size(group), longest)
    found = []
    for number, sent in enumerate(values):
        part = gathered[sent.place, starts[number] : starts[number] + sent.num_bytes].clone()
        found.append(part.view(sent.dtype).reshape(sent.shape).to(sent.device))
    return found


def _layout(values: Sequence[Sent]) -> tuple[list[int], dict[int, int]]:
    """Where each value begins in its place's buffer, and how long the buffers are."""
    starts, lengths = [], dict[int, int]()
    for sent in values:
        start = lengths.get(sent.place, 0)
        starts.append(start)
        lengths[sent.place] = start + -(-sent.num_bytes // _ALIGNED) * _ALIGNED
    return starts, lengths


__all__ = ["Sent", "exchange"]
