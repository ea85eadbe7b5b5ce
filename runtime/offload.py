"""Values that wait on the host while the device has no room for them.

    token = offload_start(x)          x begins to be copied to the host; it must live on
    host  = offload_wait(token, x)    the copy is made, as far as what follows can tell: x may die
    token = reload_start(host)        memory on the device is taken, and begins to be filled
    x     = reload_wait(token, host)  it is filled, as far as what follows can tell

What has its place on the host for good (optimizer state) is written over there:

    token = store_start(x, host)      x begins to be copied to host; it must live on
    store_wait(token, x, host)        host holds it, as far as what follows can tell: x may die

The copy is flat: the elements in the order of ``stride``, which is how ``x`` lies in memory as a rule. A
compiler may have laid it out in another way; then it is rearranged on the way out, not on the way back.

On an accelerator copies run on two streams of their own, one a direction, and order is kept by events: a wait
makes the current stream wait, not Python. On a CPU "host" is other memory than torch allocates, so what a
program holds on either side can be told apart; copies are made at once.

Host memory comes from a :class:`HostPool`: *chunks*, pinned where there is an accelerator, that go back to
the pool when the tensor in them dies and are used again by tensors of their size. What a pool has handed out
never exceeds its limit. A chunk remembers the last copy that read it, and the next one that writes it waits.

Invariants: outputs never alias inputs; every start is followed by its wait; the operators are pure, but for
``store_wait``, which stands for the write that its start begins: what was to be read of ``host`` before, has
been. Python must not read host memory before :meth:`Transfers.settle`.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from autodist.runtime import compat

Wait = Callable[[], None]
PAGE = 4096


class HostMemoryError(MemoryError):
    """More was to be offloaded than the host may hold."""


@dataclass
class Chunk:
    """``last`` makes what is to be written into this memory wait for what is still read from it."""

    memory: np.ndarray
    last: Wait | None = None


class HostPool:
    """Chunks of host memory, ``pinned`` where a device copies from them by itself.

    ``used`` and ``most`` count bytes handed out, now and at the most; ``owned`` those the pool has.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.used = self.most = self.owned = 0
        self._free: dict[int, list[Chunk]] = defaultdict(list)
        self._at: dict[int, Chunk] = {}

    def take(self, like: Tensor, limit: int) -> Tensor:
        """Memory for the elements of ``like``, flat. It comes back when the tensor dies.

        Raises :class:`HostMemoryError` when more than ``limit`` bytes would be in use.
        """
        wanted = max(like.numel() * like.element_size(), 1)
        size = -(-wanted // PAGE) * PAGE
        if self.used + size > limit:
            raise HostMemoryError(
                f"offloading {size} bytes more would exceed the {limit} bytes that the plan's 'host_memory' "
                f"allows on the host, of which {self.used} are in use; raise it, or run fewer forwards "
                "before their backwards"
            )
        chunk = self._free[size].pop() if self._free[size] else self._new(size)
        self.used += size
        self.most = max(self.most, self.used)
        view = chunk.memory[:]  # lives as long as the tensor does
        weakref.finalize(view, self._put, chunk)
        return torch.from_numpy(view)[: like.numel() * like.element_size()].view(like.dtype)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in memory of this pool."""
        return tensor.untyped_storage().data_ptr() in self._at

    def chunk(self, host: Tensor) -> Chunk:
        """The chunk that a tensor of this pool lies in."""
        return self._at[host.untyped_storage().data_ptr()]

    def _new(self, size: int) -> Chunk:
        self.owned += size
        if self.pinned:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        else:
            memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        chunk = Chunk(memory)
        self._at[memory.ctypes.data] = chunk
        return chunk

    def _put(self, chunk: Chunk) -> None:
        self.used -= chunk.memory.nbytes
        self._free[chunk.memory.nbytes].append(chunk)


class Copier(Protocol):
    """What copies between device and host, and says how to wait for it."""

    def copy(self, target: Tensor, source: Tensor, after: Wait | None) -> Wait:
        """Begin to copy, once ``after`` has been waited for; the result waits for the copy."""
        ...

    def settle(self) -> None:
        """Let Python wait until all copies have been made."""
        ...


class AtOnce:
    """Copies are made when they are asked for: a CPU."""

    def copy(self, target: Tensor, source: Tensor, after: Wait | None) -> Wait:
        if after is not None:
            after()
        target.copy_(source)
        return _nothing

    def settle(self) -> None:
        pass


class OnStreams:
    """Copies run beside the computation, on a stream for each direction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor, after: Wait | None) -> Wait:
        stream = self.out if source.is_cuda else self.back
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            if after is not None:
                after()
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        (source if source.is_cuda else target).record_stream(stream)
        return lambda: torch.cuda.current_stream(self.device).wait_event(done)

    def settle(self) -> None:
        self.out.synchronize()
        self.back.synchronize()


def _nothing() -> None:
    pass


@dataclass
class Transfers:
    """Host memory, what copies, and the copies that have begun, by token."""

    pool: HostPool
    copier: Copier
    running: dict[int, tuple[Tensor, Wait]] = field(default_factory=dict)
    _tokens: Iterator[int] = field(default_factory=itertools.count)

    def out(self, x: Tensor, stride: Sequence[int], limit: int) -> Tensor:
        host = self.pool.take(x, limit)
        target = host.as_strided(x.shape, stride)
        return self._begun(host, self.copier.copy(target, x, self.pool.chunk(host).last))

    def back(
        self, host: Tensor, size: Sequence[int], stride: Sequence[int], device: torch.device
    ) -> Tensor:
        x = torch.empty_strided(size, stride, dtype=host.dtype, device=device)
        wait = self.copier.copy(x, host.as_strided(size, stride), None)
        self.pool.chunk(host).last = wait
        return self._begun(x, wait)

    def over(self, x: Tensor, host: Tensor) -> Tensor:
        return self._begun(host, self.copier.copy(host, x, self.pool.chunk(host).last))

    def keep(self, x: Tensor, limit: int) -> Tensor:
        """A copy of ``x``, of its layout, in host memory; at once."""
        host = self.pool.take(x, limit).as_strided(x.shape, x.stride())
        self.settle()
        return host.copy_(x)

    def settle(self) -> None:
        """Let Python wait until what has begun to be copied is there."""
        self.copier.settle()

    def end(self, token: Tensor) -> Tensor:
        target, wait = self.running.pop(int(token))
        wait()
        return target

    def _begun(self, target: Tensor, wait: Wait) -> Tensor:
        number = next(self._tokens)
        self.running[number] = (target, wait)
        return torch.tensor(number)


@functools.cache
def transfers(device: torch.device) -> Transfers:
    """Those of a device: a process has one set of streams and of pinned memory for each."""
    if device.type == "cuda":
        return Transfers(HostPool(pinned=True), OnStreams(device))
    return Transfers(HostPool(pinned=False), AtOnce())


def is_on_host(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor of a program on ``device`` lies in host memory that is kept here."""
    if tensor.device.type != "cpu" or tensor.dim() == 0 or isinstance(tensor, compat.FakeTensor):
        return False
    return tensor.layout is torch.strided and transfers(device).pool.holds(tensor)


# --- operators ---------------------------------------------------------------------------------------


def _offload_start(x: Tensor, stride: Sequence[int], limit: int) -> Tensor:
    return transfers(x.device).out(x, stride, limit)


def _offload_wait(token: Tensor, x: Tensor) -> Tensor:
    return transfers(x.device).end(token)


def _reload_start(
    host: Tensor, size: Sequence[int], stride: Sequence[int], device: torch.device
) -> Tensor:
    return transfers(device).back(host, size, stride, device)


def _reload_wait(
    token: Tensor, host: Tensor, size: Sequence[int], stride: Sequence[int], device: torch.device
) -> Tensor:
    return transfers(device).end(token)


def _store_start(x: Tensor, host: Tensor) -> Tensor:
    return transfers(x.device).over(x, host)


def _store_wait(token: Tensor, x: Tensor, host: Tensor) -> None:
    transfers(x.device).end(token)


def _fake_nothing(*_: object) -> None:
    pass


def _fake_token(*_: object) -> Tensor:
    return torch.empty((), dtype=torch.int64)


def _fake_host(token: Tensor, x: Tensor) -> Tensor:
    return torch.empty((x.numel(),), dtype=x.dtype, device="cpu")


def _fake_back(
    token: Tensor, host: Tensor, size: Sequence[int], stride: Sequence[int], device: torch.device
) -> Tensor:
    return torch.empty_strided(size, stride, dtype=host.dtype, device=device)


_OPERATORS: tuple[tuple[str, Callable[..., Tensor | None], Callable[..., Tensor | None]], ...] = (
    ("offload_start(Tensor x, int[] stride, int limit) -> Tensor", _offload_start, _fake_token),
    ("offload_wait(Tensor token, Tensor x) -> Tensor", _offload_wait, _fake_host),
    (
        "reload_start(Tensor host, int[] size, int[] stride, Device device) -> Tensor",
        _reload_start,
        _fake_token,
    ),
    (
        "reload_wait(Tensor token, Tensor host, int[] size, int[] stride, Device device) -> Tensor",
        _reload_wait,
        _fake_back,
    ),
    ("store_start(Tensor x, Tensor host) -> Tensor", _store_start, _fake_token),
    ("store_wait(Tensor token, Tensor x, Tensor(a!) host) -> ()", _store_wait, _fake_nothing),
)

_LIBRARY = torch.library.Library("autodist", "FRAGMENT")
for _schema, _eager, _fake in _OPERATORS:
    _name = _schema.split("(")[0]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, compat.not_alone(_eager), "CompositeExplicitAutograd")
    torch.library.register_fake(f"autodist::{_name}", _fake, lib=_LIBRARY)

offload_start = torch.ops.autodist.offload_start.default
offload_wait = torch.ops.autodist.offload_wait.default
reload_start = torch.ops.autodist.reload_start.default
reload_wait = torch.ops.autodist.reload_wait.default
store_start = torch.ops.autodist.store_start.default
store_wait = torch.ops.autodist.store_wait.default

__all__ = [
    "PAGE",
    "AtOnce",
    "Copier",
    "HostMemoryError",
    "HostPool",
    "OnStreams",
    "Transfers",
    "is_on_host",
    "offload_start",
    "offload_wait",
    "reload_start",
    "reload_wait",
    "store_start",
    "store_wait",
    "transfers",
]
