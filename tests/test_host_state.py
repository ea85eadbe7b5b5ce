"""Optimizer state on the host: the same training, with less on the device.

On a CPU the host's memory is not torch's, so what is counted at the allocator is the device's.
"""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import autodist
from autodist import checkpoint
from autodist.passes.memory import MemoryBoundError
from autodist.runtime import offload
from autodist.runtime.compat import local_part
from autodist.runtime.offload import HostMemoryError
from autodist.step_state import State, roots_of
from tests.allocations import peak_bytes
from tests.parity import full
from tests.ranks import run_ranks
from tests.sequence import fresh
from tests.test_offload import Delayed

MIB = 2**20
WIDTH, LAYERS, ROWS = 128, 8, 8
PARAMETERS = 4 * LAYERS * WIDTH * WIDTH  # bytes
EAGER: dict[str, Any] = {"lowering": "eager"}


class Layers(nn.Module):
    """More parameters than activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return x.square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    loss = model(x)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def batch(step: int, rank: int = 0) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


class Run:
    """A model and its optimizer, trained by a captured step under a plan."""

    def __init__(self, make: Any = torch.optim.AdamW, **plan: Any) -> None:
        fresh()
        self.model = Layers()
        self.optimizer = make(self.model.parameters(), lr=1e-2)
        self.step = autodist.train_step(plan={**EAGER, **plan})(train)

    def run(self, steps: int, first: int = 0) -> list[Tensor]:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return [self.step(self.model, self.optimizer, batch(first + i, rank)) for i in range(steps)]

    def tensors(self) -> list[Tensor]:
        state = [v for s in self.optimizer.state.values() for v in s.values()]
        return [full(x.detach()).clone() for x in (*self.model.parameters(), *state)]

    def on_host(self) -> list[Tensor]:
        """This rank's parts of the state on the host."""
        state = [local_part(v) for s in self.optimizer.state.values() for v in s.values()]
        return [v for v in state if offload.is_on_host(v, torch.device("cpu"))]

    def peak(self) -> int:
        gc.collect()
        with peak_bytes() as found:
            self.run(1, 9)
        return found.peak


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_state_goes_to_the_host_where_the_device_has_no_room() -> None:
    plain = Run()
    losses, unplanned = plain.run(5), plain.peak()
    wanted = Run(memory="1GB", host_memory="1GB")
    same(wanted.run(5), losses)
    assert not wanted.on_host()  # it fits anyway
    in_turn = wanted.peak()
    assert in_turn < unplanned - PARAMETERS  # an update ends before the next begins
    memory = 2 * PARAMETERS + in_turn
    run = Run(memory=memory, host_memory="1GB")
    same(run.run(5), losses)
    moved = sum(x.nbytes for x in run.on_host())
    assert 0.9 * PARAMETERS <= moved <= 1.5 * PARAMETERS  # what is lacking, and room for an update
    held = sum(x.nbytes for x in run.model.parameters()) + 2 * PARAMETERS - moved
    assert held + run.peak() <= memory + 4096
    wanted_peak = wanted.tensors()
    same(run.tensors(), wanted_peak)


def bounded(parameters: float) -> dict[str, Any]:
    """A plan in which the device has room for a step, the parameters, and so much of the state."""
    return {"memory": int((2.6 + parameters) * PARAMETERS), "host_memory": "1GB"}


AMSGRAD = functools.partial(torch.optim.Adam, amsgrad=True)
MOMENTUM = functools.partial(torch.optim.SGD, momentum=0.9)


@pytest.mark.thorough
@pytest.mark.parametrize("make", [MOMENTUM, AMSGRAD], ids=["sgd", "amsgrad"])
def test_state_of_other_optimizers(make: Any) -> None:
    plain, run = Run(make), Run(make, **bounded(0.3))
    same(run.run(3), plain.run(3))
    same(run.tensors(), plain.tensors())
    assert run.on_host()


def test_state_that_is_there_already_and_many_steps() -> None:
    """Trained before by another step, the state moves when a program is made that has no room for it."""
    run, plain = Run(), Run()
    same(run.run(2), plain.run(2))
    pool = offload.transfers(torch.device("cpu")).pool
    gc.collect()
    used = pool.used
    run.step = autodist.train_step(plan={**EAGER, **bounded(0.2)})(train)
    same(run.run(3, 2), plain.run(3, 2))
    held, owned = sum(x.nbytes for x in run.on_host()), pool.owned
    assert held and pool.used == used + held
    found = run.run(50, 5)
    run.step = autodist.train_step(plan=EAGER)(train)  # one that has no bound finds it there
    found += run.run(1, 55)
    assert all(torch.isfinite(x) for x in found) and not offload.transfers(torch.device("cpu")).running
    assert (pool.used, pool.owned) == (used + held, owned)
    del run, found
    fresh()
    gc.unfreeze()
    gc.collect()
    assert pool.used == used


@pytest.mark.thorough
def test_copies_beside_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where copies take their time, and are made when they are waited for at the latest."""
    late = offload.Transfers(offload.HostPool(pinned=False), Delayed())
    monkeypatch.setattr(offload, "transfers", lambda device: late)
    plain, run = Run(), Run(**bounded(1.3), hardware="h100-80g")
    same(run.run(4), plain.run(4))
    same(run.tensors(), plain.tensors())
    assert run.on_host() and not late.running


def test_what_does_not_fit_the_host_is_refused() -> None:
    run = Run(memory=bounded(0.2)["memory"], host_memory=PARAMETERS // 2)
    with pytest.raises(MemoryBoundError, match="the least that this program can do with is"):
        run.run(1)


def test_no_room_on_the_host_is_an_error_with_a_name() -> None:
    run = Run()
    run.run(1)
    state = State.of(roots_of(train, [run.model, run.optimizer]))
    with pytest.raises(HostMemoryError, match="host_memory"):
        state.keep_on_host(range(len(state.moments)), PARAMETERS)


@pytest.mark.thorough
def test_inductor() -> None:
    plain, run = Run(lowering="inductor"), Run(lowering="inductor", **bounded(0.0))
    for a, b in zip(run.run(4), plain.run(4), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    for a, b in zip(run.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert run.on_host()
    state = 2 * PARAMETERS - sum(x.nbytes for x in run.on_host())
    assert PARAMETERS + state + run.peak() <= bounded(0.0)["memory"] + 4096


def with_shards(folder: str) -> None:
    """Two ranks, each with a part of the state on the host; stopped, and gone on with."""
    plain = Run(zero=2, memory="1GB")
    plain.run(2)
    assert plain.step.job is not None
    needed = plain.step.job.reports[-1].timelines["step"].peak_bytes
    memory = {"memory": needed - PARAMETERS // 2, "host_memory": "1GB", "zero": 2}
    losses, state = plain.run(2, 2), plain.tensors()
    run = Run(**memory)
    run.run(2)
    for a, b in zip([*run.run(2, 2), *run.tensors()], [*losses, *state], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert run.on_host()
    checkpoint.save(folder, run.model, run.optimizer)
    wanted = [*run.run(2, 4), *run.tensors()]
    checkpoint.load(folder, run.model, run.optimizer)
    for a, b in zip([*run.run(2, 4), *run.tensors()], wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert run.on_host()
    other = Run(zero=2)  # without a bound
    autodist.prepare(other.model, other.step.plan)
    checkpoint.load(folder, other.model, other.optimizer)
    for a, b in zip([*other.run(2, 4), *other.tensors()], wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert not other.on_host()


def test_with_shards_and_checkpoints(tmp_path: Path) -> None:
    run_ranks(with_shards, 2, str(tmp_path / "run"), seconds=400)
