"""How many bytes tensors hold on one rank: now, and at most since the last reset.

On CUDA this is the caching allocator's own count. On a CPU nothing counts, so torch's allocator is
wrapped (``counting_allocator.cpp``). Resident pages are no substitute: malloc keeps pages that were
freed, which hides exactly the differences between ways of sharding.

Counted: every tensor and every scratch buffer torch allocates as one, compiled code included. Not
counted: memory that libraries take for themselves (gloo's and oneDNN's workspaces), numpy arrays,
and tensors that were there before the counter.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Protocol

import torch

_SOURCE = Path(__file__).with_name("counting_allocator.cpp")
_NAME = "counting_allocator"


class MemoryCounter(Protocol):
    """All in bytes, of this process."""

    def live(self) -> int: ...

    def peak(self) -> int: ...

    def reset_peak(self) -> None: ...


class CudaCounter:
    def live(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()


class CpuCounter:
    """Counts from now on. ``library`` is what :func:`build` returned; one per process is enough."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.live_bytes.restype = ctypes.c_int64
        self._library.peak_bytes.restype = ctypes.c_int64
        self._library.install()

    def live(self) -> int:
        return int(self._library.live_bytes())

    def peak(self) -> int:
        return int(self._library.peak_bytes())

    def reset_peak(self) -> None:
        self._library.reset_peak()


def build(folder: Path) -> Path:
    """Compile the counting allocator into ``folder`` (seconds) and return the shared library.

    Raises RuntimeError where no C++ compiler or ninja is at hand.
    """
    from torch.utils.cpp_extension import load

    load(_NAME, [str(_SOURCE)], build_directory=str(folder), is_python_module=False)
    return folder / f"{_NAME}.so"
