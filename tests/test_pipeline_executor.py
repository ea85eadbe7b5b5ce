"""The pipeline executor on gloo ranks: every schedule gives the loss and gradients of one process."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from autodist.runtime import compat
from autodist.runtime.monitor import PeerError, RankMonitor
from autodist.runtime.pipeline import Executor, Outcome, Recorder, Spec, stage_seed
from autodist.runtime.schedules import Action, Step, bubble, schedule
from tests.ranks import run_ranks
from tests.stage_programs import WIDTH, AutogradProgram, Stack, split

CPU = torch.device("cpu")
KINDS = ("gpipe", "1f1b", "interleaved", "zero-bubble")


def model_of(stages: int, dropout: float = 0.0) -> Stack:
    torch.manual_seed(stages)
    return Stack(stages, dropout)


def on_one_process(model: Stack, batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the whole batch at once."""
    x, counted = (torch.cat(parts) for parts in zip(*batch, strict=True))
    sent: list[Tensor] = []
    results: list[Tensor] = []
    for stage in range(len(model.layers)):
        sent, results = model.piece(stage, sent, x, counted, float(counted.sum()))
        if stage == 0:  # numbers start anew in each microbatch
            sent[2] = torch.cat([torch.arange(len(part)) for part, _ in batch]) + 1
    return results[0].detach(), list(torch.autograd.grad(results[0], list(model.parameters())))


def run_case(
    kind: str, stages: int, batch: list[tuple[Tensor, Tensor]]
) -> tuple[Stack, list[AutogradProgram], Outcome, Executor]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = model_of(stages)
    made = schedule(kind, ranks, stages, len(batch))
    executor = Executor(made, rank, dist.group.WORLD, CPU)
    programs = [AutogradProgram(model, s, batch) for s in made.stages_of(rank)]
    return model, programs, executor.run(programs), executor


def check_against_one_process(kind: str, stages: int, batch: list[tuple[Tensor, Tensor]]) -> None:
    model, programs, outcome, executor = run_case(kind, stages, batch)
    made = executor.schedule
    loss, gradients = on_one_process(model, batch)
    expected = dict(zip(model.parameters(), gradients, strict=True))
    shared = torch.zeros_like(model.shared)
    losses = torch.zeros(())
    for program in programs:
        ends = ("backward",) if kind != "zero-bubble" else ("backward_input", "backward_weight")
        assert Counter(name for name, _ in program.calls) == dict.fromkeys(("forward", *ends), len(batch))
        assert [m for name, m in program.calls if name == "forward"] == list(range(len(batch)))
        assert program.most_alive == made.in_flight(program.index)
        assert program.alive == 0
        for weight, found in zip(
            model.weights(program.index), outcome.gradients[program.index], strict=True
        ):
            assert found is not None
            if weight is model.shared:
                shared += found
            else:
                torch.testing.assert_close(found, expected[weight], rtol=1e-6, atol=1e-6)
        for results in outcome.results[program.index]:
            if results:
                losses += results[0]
    dist.all_reduce(shared)
    dist.all_reduce(losses)
    torch.testing.assert_close(shared, expected[model.shared], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(losses, loss, rtol=1e-6, atol=1e-6)


def every_schedule(counts: tuple[int, ...]) -> None:
    ranks = dist.get_world_size()
    for kind in KINDS:
        for per_rank in (1,) if kind == "1f1b" else (1, 2):
            for microbatches in counts:
                check_against_one_process(kind, ranks * per_rank, split(7, microbatches))


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "counts"), [(2, (1, 2, 3, 4, 5)), (4, (1, 4, 5))])
def test_every_schedule_equals_one_process(ranks: int, counts: tuple[int, ...]) -> None:
    """Loss and every gradient, with microbatches of unequal sizes; each part runs once, memory is bounded."""
    run_ranks(every_schedule, ranks, counts)


def test_several_stages_on_one_process() -> None:
    """Neighbours on one rank hand values over, without a process group."""
    for kind in ("gpipe", "interleaved", "zero-bubble"):
        batch = split(7, 3)
        model = model_of(3)
        made = schedule(kind, 1, 3, 3)
        programs = [AutogradProgram(model, s, batch) for s in range(3)]
        outcome = Executor(made, 0, None, CPU).run(programs)
        loss, gradients = on_one_process(model, batch)
        expected = dict(zip(model.parameters(), gradients, strict=True))
        torch.testing.assert_close(sum(r[0] for r in outcome.results[2]), loss)
        (*middle,) = outcome.gradients[1]
        for weight, found in zip(model.weights(1), middle, strict=True):
            torch.testing.assert_close(found, expected[weight])
        first, last = outcome.gradients[0][-1], outcome.gradients[2][-1]
        assert first is not None and last is not None
        torch.testing.assert_close(first + last, expected[model.shared])


def forwards_only() -> None:
    batch = split(7, 3)
    model, _, outcome, _ = run_case("forward", 2 * dist.get_world_size(), batch)
    assert not outcome.gradients
    losses = sum((r[0] for results in outcome.results.values() for r in results if r), torch.zeros(()))
    dist.all_reduce(losses)
    torch.testing.assert_close(losses, on_one_process(model, batch)[0])


def use_buffers_again() -> None:
    """A second run makes no new ones; none is made for more microbatches than may be in flight."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, batch = model_of(2), split(24, 12)
    made = schedule("1f1b", ranks, 2, 12)
    executor = Executor(made, rank, dist.group.WORLD, CPU)
    counts, totals = [], []
    for _ in range(2):
        outcome = executor.run([AutogradProgram(model, rank, batch)])
        counts.append(executor.pool.made)
        totals.append([g.clone() for g in outcome.gradients[rank] if g is not None])
    assert counts[0] == counts[1] <= 4 * (made.in_flight(rank) + 1)
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=0)
    executor.run([AutogradProgram(model, rank, split(36, 12))])
    assert executor.pool.made > counts[1]
    assert {shape[0] for shape, _ in executor.pool.free} == {3}  # the shape of before is let go


def draw() -> dict[tuple[str, int, int], tuple[list[float], bool]]:
    """By schedule, stages and seed: each microbatch's loss, and whether torch's generator is as it was."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for kind, per_rank in (("1f1b", 1), ("gpipe", 1), ("zero-bubble", 1), ("interleaved", 2)):
        for seed in (0, 1):
            alike = [(torch.ones(4, WIDTH), torch.ones(4))] * 3
            made = schedule(kind, ranks, per_rank * ranks, 3)
            model = model_of(made.num_stages, dropout=0.5)
            programs = [AutogradProgram(model, s, alike) for s in made.stages_of(rank)]
            before = torch.get_rng_state()
            outcome = Executor(made, rank, dist.group.WORLD, CPU).run(programs, seed)
            losses = [r[0].item() for results in outcome.results.values() for r in results if r]
            found[kind, made.num_stages, seed] = losses, torch.equal(before, torch.get_rng_state())
    return found


class Layer(nn.Module):
    """A stage for torch's own runtime: a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class LayerProgram:
    """The same stage for ours; the loss is the sum of squares."""

    draws = False

    def __init__(self, layer: nn.Module, index: int, last: int, parts: tuple[Tensor, ...]) -> None:
        self.layer, self.index, self.last, self.parts = layer, index, last, parts

    def received(self, microbatch: int) -> list[Spec]:
        return [Spec((2, WIDTH), torch.float32, True)] if self.index > 0 else []

    def sent(self, microbatch: int) -> list[Spec]:
        return [Spec((2, WIDTH), torch.float32, True)] if self.index < self.last else []

    def forward(self, received: list[Tensor], microbatch: int) -> Any:
        x = received[0] if received else self.parts[microbatch]
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = torch.tanh(self.layer(x))
            if self.index == self.last:
                y = (y**2).sum()
        return ([], [y.detach()], [x, y]) if self.index == self.last else ([y.detach()], [], [x, y])

    def backward(self, saved: list[Any], gradients: list[Tensor | None]) -> Any:
        x, y = saved
        of_x, *of_weights = torch.autograd.grad(y, [x, *self.layer.parameters()], gradients or None)
        return [of_x] if self.index > 0 else [], of_weights

    def backward_input(self, saved: list[Any], gradients: list[Tensor | None]) -> Any:
        x, y = saved
        (of_x,) = torch.autograd.grad(y, [x], gradients or None, retain_graph=True)
        return [of_x] if self.index > 0 else [], [y, *gradients]

    def backward_weight(self, kept: list[Any]) -> Any:
        y, *gradients = kept
        return torch.autograd.grad(y, list(self.layer.parameters()), gradients or None)


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output**2).sum()


def compare_with_torch() -> None:
    """torch.distributed.pipelining's runtime on the same stack, microbatches and stages."""
    from torch.distributed import pipelining

    rank, ranks = dist.get_rank(), dist.get_world_size()
    runs = {
        "gpipe": (pipelining.ScheduleGPipe, 1),
        "interleaved": (pipelining.ScheduleInterleaved1F1B, 2),
        "zero-bubble": (pipelining.ScheduleInterleavedZeroBubble, 2),
    }
    for kind, (theirs, per_rank) in runs.items():
        stages = per_rank * ranks
        torch.manual_seed(1)
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(stages)]
        x = torch.randn(8, WIDTH)
        mine = range(rank, stages, ranks)
        made = [
            pipelining.PipelineStage(Layer(layers[s]), s, stages, CPU, input_args=(x[:2],)) for s in mine
        ]
        losses: list[Tensor] = []
        runtime = theirs(made if per_rank > 1 else made[0], 4, loss_fn=squares, scale_grads=False)
        inputs = (x,) if rank == 0 else ()
        runtime.step(*inputs, **({"target": x, "losses": losses} if rank == ranks - 1 else {}))
        ours = schedule(kind, ranks, stages, 4)
        if kind == "interleaved":
            theirs_done = [a for a in runtime.pipeline_order[rank] if a is not None]
            order = [(a.stage_index, a.microbatch_index) for a in theirs_done]
            assert order == [(a.stage, a.microbatch) for a in ours.lists[rank] if not a.step.is_transfer]
        programs = [LayerProgram(layers[s], s, stages - 1, x.split(2)) for s in mine]
        outcome = Executor(ours, rank, dist.group.WORLD, CPU).run(programs)
        for stage in mine:
            theirs_found = [p.grad for p in layers[stage].parameters()]
            torch.testing.assert_close(outcome.gradients[stage], theirs_found, rtol=1e-6, atol=1e-6)
        if rank == ranks - 1:
            our_losses = [r[0] for r in outcome.results[stages - 1]]
            torch.testing.assert_close(our_losses, losses, rtol=1e-6, atol=1e-6)


def record() -> tuple[float, int]:
    made = schedule("interleaved", dist.get_world_size(), 4, 4)
    recorder = Recorder(CPU)
    batch = split(8, 4)
    programs = [AutogradProgram(model_of(4), s, batch) for s in made.stages_of(dist.get_rank())]
    Executor(made, dist.get_rank(), dist.group.WORLD, CPU).run(programs, recorder=recorder)
    spans = recorder.spans()
    computed = [a for a in made.lists[dist.get_rank()] if not a.step.is_transfer]
    assert [s.action for s in spans] == computed
    assert all(0 <= s.start <= s.end for s in spans)
    assert dist.group.WORLD is not None
    every = recorder.everyones(dist.group.WORLD)
    ends = {s.action: s for spans in every for s in spans}
    # On one machine a barrier lets ranks go together to well below a second.
    for action, span in ends.items():
        if action.step is Step.FORWARD and action.stage > 0:
            before = ends[Action(Step.FORWARD, action.stage - 1, action.microbatch)]
            assert span.start > before.end - 0.5
    return bubble(every), len(spans)


def refuse() -> list[str]:
    rank = dist.get_rank()
    made = schedule("1f1b", 2, 2, 2)
    said = []
    for wrong in (
        lambda: Executor(made, rank, None, CPU),
        lambda: Executor(schedule("1f1b", 3, 3, 2), rank, dist.group.WORLD, CPU),
        lambda: Executor(made, rank, dist.group.WORLD, CPU).run([]),
    ):
        with pytest.raises(ValueError) as error:
            wrong()
        said.append(str(error.value))
    if rank == 0:

        class Longer(AutogradProgram):
            def forward(self, received: list[Tensor], microbatch: int) -> Any:
                sent, *rest = super().forward(received, microbatch)
                return [torch.cat([s, s]) for s in sent], *rest

        with pytest.raises(ValueError) as error:
            Executor(made, rank, dist.group.WORLD, CPU).run([Longer(model_of(2), 0, split(4, 2))])
        said.append(str(error.value))
    return said


def everything_else() -> Any:
    forwards_only()
    use_buffers_again()
    compare_with_torch()
    return draw(), record(), refuse()


@pytest.mark.distributed
def test_the_executor_on_two_ranks() -> None:
    (drawn0, recorded, said), (drawn, _, _) = run_ranks(everything_else, 2)
    # Losses are on the last rank. Same seed and cut, same numbers, whatever the schedule.
    assert drawn["1f1b", 2, 0] == drawn["gpipe", 2, 0] == drawn["zero-bubble", 2, 0]
    assert drawn["1f1b", 2, 0] != drawn["1f1b", 2, 1]
    assert all(kept for _, kept in [*drawn.values(), *drawn0.values()])
    assert all(len(set(losses)) == 3 for losses, _ in drawn.values())  # equal microbatches, other masks
    assert 0 < recorded[0] < 1 and recorded[1] == 16
    assert said[0] == "a pipeline of 2 ranks needs their process group"
    assert said[1] == "a schedule for 3 ranks cannot run on a group of 2"
    assert said[2] == "rank 0 runs stages [0], and was given programs of []"
    assert "stage 0 sends [((4, 5), torch.float32)" in said[3] and "announced [((2, 5)" in said[3]


def test_seeds_differ() -> None:
    seeds = {stage_seed(seed, s, m) for seed in range(3) for s in range(5) for m in range(20)}
    assert len(seeds) == 300 and all(0 <= seed < 2**63 for seed in seeds)


# --- memory that programs share -----------------------------------------------------------------------


class Sharing:
    """A stage whose results lie in each other's memory: gradients that are one tensor, values passed on."""

    draws = False

    def __init__(self, index: int) -> None:
        self.index = index

    def _spec(self) -> list[Spec]:
        return [Spec((3,), torch.float32, True)]

    def received(self, microbatch: int) -> list[Spec]:
        return self._spec() if self.index > 0 else []

    def sent(self, microbatch: int) -> list[Spec]:
        return self._spec() if self.index < 3 else []

    def forward(self, received: list[Tensor], microbatch: int) -> Any:
        x = received[0] if received else torch.full((3,), float(microbatch))
        return ([x], [], []) if self.index < 3 else ([], [x], [])  # saves nothing of what it passes on

    def backward(self, saved: list[Any], gradients: list[Tensor | None]) -> Any:
        g = gradients[0] if gradients else torch.ones(())
        assert g is not None
        g = g.expand(3)
        return ([g] if self.index > 0 else []), [g, g, None, torch.ones(()).expand(3)]


def share_memory(ranks: int) -> None:
    rank = dist.get_rank() if ranks > 1 else 0
    for kind in ("gpipe", "interleaved"):
        made = schedule(kind, ranks, 4, 9)
        executor = Executor(made, rank, dist.group.WORLD if ranks > 1 else None, CPU)
        outcome = executor.run([Sharing(s) for s in made.stages_of(rank)])
        assert executor.pool.made <= 8  # of 18 that are received, for nothing is saved of them
        for stage in made.stages_of(rank):
            first, second, third, last = outcome.gradients[stage]
            assert third is None
            for found in (first, second, last):
                torch.testing.assert_close(found, torch.full((3,), 9.0))
        if 3 in outcome.results:
            passed = [results[0] for results in outcome.results[3]]
            torch.testing.assert_close(passed, [torch.full((3,), float(m)) for m in range(9)])


@pytest.mark.distributed
def test_memory_that_is_shared_is_not_written_to() -> None:
    share_memory(1)
    run_ranks(share_memory, 2, 2)


# --- ranks that die -----------------------------------------------------------------------------------


class Waiting(AutogradProgram):
    """Ends its process in the forward of a microbatch."""

    def forward(self, received: list[Tensor], microbatch: int) -> Any:
        if self.index == 1 and microbatch == 2:
            os._exit(1)
        return super().forward(received, microbatch)


def be_a_rank(rank: int, port: int, results: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    assert dist.group.WORLD is not None
    compat.set_group_timeout(dist.group.WORLD, 3.0)
    monitor = RankMonitor(compat.default_store(), range(3), rank, 0.3, "test")
    made = schedule("1f1b", 3, 3, 4)
    executor = Executor(made, rank, dist.group.WORLD, CPU, monitor)
    start = time.monotonic()
    try:
        executor.run([Waiting(model_of(3), rank, split(8, 4))])
    except PeerError as error:
        results.send((str(error), time.monotonic() - start))
    os._exit(0)


@pytest.mark.distributed
def test_a_dead_rank_ends_the_others_with_its_name() -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["autodist.runtime.monitor"])
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(3):
        here, there = context.Pipe()
        process = context.Process(target=be_a_rank, args=(rank, host.port, there), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        for rank in (0, 2):
            assert pipes[rank].poll(60), f"rank {rank} said nothing"
            text, seconds = pipes[rank].recv()
            assert f"Rank {rank} lost contact with its peers in pipeline: " in text
            assert "of microbatch" in text and f"on stage {rank}" in text
            assert "rank 1 gives no sign of life" in text
            assert seconds < 15
    finally:
        for process in processes:
            process.kill()
            process.join()
