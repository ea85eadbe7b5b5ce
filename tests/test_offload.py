"""Copies to the host and back: order, memory, and that nothing is left behind."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from autodist.runtime import offload
from autodist.runtime.offload import AtOnce, HostMemoryError, HostPool, Transfers

CPU = torch.device("cpu")
LIMIT = 1 << 20


class Delayed:
    """Copies that run as late as they may: when they are waited for. What changes before then shows.

    Like a stream, it keeps nobody's memory alive.
    """

    def __init__(self) -> None:
        self.late: list[Callable[[], None]] = []

    def copy(self, target: Tensor, source: Tensor, after: Callable[[], None] | None) -> Callable[[], None]:
        to, of, done = unowned(target), unowned(source), False

        def wait() -> None:
            nonlocal done
            if not done:
                done = True
                if after is not None:
                    after()
                to.copy_(of)
                self.late.remove(wait)

        self.late.append(wait)
        return wait

    def settle(self) -> None:
        for wait in list(self.late):
            wait()


def unowned(tensor: Tensor) -> Tensor:
    """The same memory, seen without a reference to it."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return tensor
    memory = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.fixture(params=[AtOnce, Delayed])
def transfers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    found = Transfers(HostPool(pinned=False), request.param())
    monkeypatch.setattr(offload, "transfers", lambda device: found)
    yield found
    assert not found.running


def there_and_back(x: Tensor) -> Callable[[], Tensor]:
    """What is to be done in the forward; the result does what is to be done in the backward."""
    size, stride = list(x.shape), list(x.stride())
    token = offload.offload_start(x, stride, LIMIT)
    host = offload.offload_wait(token, x)
    x.fill_(-1)  # from here on the memory is somebody else's

    def back() -> Tensor:
        token = offload.reload_start(host, size, stride, CPU)
        return offload.reload_wait(token, host, size, stride, CPU)

    return back


@pytest.mark.parametrize("layout", ["rows", "columns", "number", "empty", "bytes"])
def test_values_come_back_as_they_were(transfers: Transfers, layout: str) -> None:
    x = {
        "rows": torch.randn(7, 300),
        "columns": torch.randn(7, 300).t(),
        "number": torch.tensor(3.0),
        "empty": torch.randn(0, 4),
        "bytes": torch.rand(33) > 0.5,
    }[layout]
    want, stride = x.clone(), x.stride()
    got = there_and_back(x)()
    assert torch.equal(got, want) and got.stride() == stride


def test_a_value_laid_out_otherwise_is_rearranged(transfers: Transfers) -> None:
    x = torch.randn(4, 6)
    token = offload.offload_start(x, [1, 4], LIMIT)
    host = offload.offload_wait(token, x)
    token = offload.reload_start(host, [4, 6], [1, 4], CPU)
    back = offload.reload_wait(token, host, [4, 6], [1, 4], CPU)
    assert torch.equal(back, x) and back.stride() == (1, 4)


def test_a_thousand_steps_leave_nothing_behind(transfers: Transfers) -> None:
    owned = 0
    for step in range(1000):
        values = [torch.full((50 + i,), float(step * 10 + i)) for i in range(3)]
        backs = [there_and_back(v) for v in values]
        for i, back in reversed(list(enumerate(backs))):
            assert torch.equal(back(), torch.full((50 + i,), float(step * 10 + i)))
        del backs, back
        if step == 0:
            owned = transfers.pool.owned
    gc.collect()
    assert transfers.pool.used == 0 and transfers.pool.owned == owned


def test_memory_is_used_again_only_when_its_last_copy_has_been_made(transfers: Transfers) -> None:
    first = there_and_back(torch.full((1024,), 1.0))
    size, stride = [1024], [1]
    (host,) = [c.cell_contents for c in first.__closure__ or () if isinstance(c.cell_contents, Tensor)]
    token = offload.reload_start(host, size, stride, CPU)
    taken, memory = transfers.running[int(token)][0], host.data_ptr()
    del first, host
    gc.collect()
    second = torch.full((1024,), 2.0)
    begun = offload.offload_start(second, stride, LIMIT)  # the same chunk, while it may still be read
    again = offload.offload_wait(begun, second)
    assert again.data_ptr() == memory
    transfers.end(token)
    assert torch.equal(taken, torch.full((1024,), 1.0)) and torch.equal(again, second)


def test_a_backward_that_never_comes_gives_its_memory_back(transfers: Transfers) -> None:
    back = there_and_back(torch.randn(100))
    assert transfers.pool.used == 4096
    del back
    gc.collect()
    assert transfers.pool.used == 0


def test_more_than_the_limit_is_refused(transfers: Transfers) -> None:
    held = there_and_back(torch.randn(LIMIT // 8))
    with pytest.raises(HostMemoryError, match="raise it, or run fewer forwards before their backwards"):
        there_and_back(torch.randn(LIMIT // 4))
    assert held is not None


def test_memory_on_the_host_is_not_torchs(transfers: Transfers) -> None:
    from tests.allocations import peak_bytes

    x = torch.randn(1 << 16)
    with peak_bytes() as found:
        token = offload.offload_start(x, [1], LIMIT)
        host = offload.offload_wait(token, x)
    assert found.peak < 1000 and host.numel() == 1 << 16


def test_a_place_on_the_host_is_read_and_written_over(transfers: Transfers) -> None:
    """A thousand times, between values that must not change."""
    places = [transfers.keep(torch.full((2, 500), float(i)), LIMIT) for i in range(3)]
    owned, used = transfers.pool.owned, transfers.pool.used
    assert all(transfers.pool.holds(p) for p in places) and not transfers.pool.holds(torch.ones(3))
    layout = ([2, 500], [500, 1], CPU)
    for _ in range(1000):
        token = offload.reload_start(places[1], *layout)
        x = offload.reload_wait(token, places[1], *layout)
        made = x + 1
        token = offload.store_start(made, places[1])
        offload.store_wait(token, made, places[1])
        made.fill_(-1)  # from here on the memory is somebody else's
    transfers.settle()
    for place, value in zip(places, (0.0, 1001.0, 2.0), strict=True):
        assert torch.equal(place, torch.full((2, 500), value))
    assert (transfers.pool.owned, transfers.pool.used) == (owned, used)


def test_a_place_is_written_after_it_has_been_read(transfers: Transfers) -> None:
    host = transfers.keep(torch.ones(64), LIMIT)
    layout = ([64], [1], CPU)
    token = offload.reload_start(host, *layout)
    x = torch.full((64,), 2.0)
    stored = offload.store_start(x, host)  # before what was read has been waited for
    transfers.settle()
    assert torch.equal(offload.reload_wait(token, host, *layout), torch.ones(64))
    offload.store_wait(stored, x, host)
    assert torch.equal(host, torch.full((64,), 2.0))
