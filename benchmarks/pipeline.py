"""A pipeline's bubble against theory, and what its executor takes for itself.

    python -m benchmarks.pipeline                                        # 4 ranks, 8 microbatches
    python -m benchmarks.pipeline --ranks 2 --unit 1 --runs 2            # does it run?

The bubble is measured on stages that sleep instead of computing: a forward for one unit of time, each half of
a backward for one. So ranks do not take each other's cores, and what a recorded run lacks to theory is the
executor's and the transport's. Each schedule is run several times, beside its planned timeline and the
formula of :mod:`autodist.runtime.schedules`.

The overhead is that of stages that do nothing, and send each other eight numbers: the time of a run, and the
time of the thread that runs it on the processor, which a busy machine does not falsify, for each of the
rank's microbatches and stages. Both with the watch over the other ranks that a training run has.

The result goes to ``results/pipeline.md``.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from autodist.runtime import compat
from autodist.runtime.monitor import RankMonitor
from autodist.runtime.pipeline import Executor, Recorder, Spec
from autodist.runtime.schedules import Step, bubble, ideal_bubble, schedule, timeline

_RESULTS = Path(__file__).parent / "results"
_CPU = torch.device("cpu")
_CASES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1), ("zero-bubble", 2))
_UNITS = {Step.FORWARD: 1, Step.BACKWARD: 2, Step.BACKWARD_INPUT: 1, Step.BACKWARD_WEIGHT: 1}


class Stage:
    """Sleeps ``unit`` seconds a unit of work; sends eight numbers."""

    draws = False

    def __init__(self, index: int, num_stages: int, unit: float) -> None:
        self.index, self.last, self.unit = index, index == num_stages - 1, unit
        self.spec = (Spec((8,), torch.float32, True),)
        self.value, self.gradient = torch.ones(8), torch.ones(8)

    def received(self, microbatch: int) -> tuple[Spec, ...]:
        return self.spec if self.index > 0 else ()

    def sent(self, microbatch: int) -> tuple[Spec, ...]:
        return () if self.last else self.spec

    def forward(self, received: list[Tensor], microbatch: int) -> Any:
        self._work(Step.FORWARD)
        return ([], [self.value], []) if self.last else ([self.value], [], [])

    def backward(self, saved: list[Any], gradients: list[Tensor | None]) -> Any:
        self._work(Step.BACKWARD)
        return ([self.value] if self.index > 0 else []), [self.gradient]

    def backward_input(self, saved: list[Any], gradients: list[Tensor | None]) -> Any:
        self._work(Step.BACKWARD_INPUT)
        return ([self.value] if self.index > 0 else []), []

    def backward_weight(self, kept: list[Any]) -> list[Tensor]:
        self._work(Step.BACKWARD_WEIGHT)
        return [self.gradient]

    def _work(self, step: Step) -> None:
        if self.unit:
            time.sleep(_UNITS[step] * self.unit)


@dataclass(frozen=True)
class Measured:
    """``bubbles`` and ``seconds`` have an entry for each run; ``seconds`` are of a run, ``processor`` of a
    rank's threads within it, the largest of all ranks, both of stages that do nothing."""

    kind: str
    per_rank: int
    theory: float
    planned: float
    bubbles: list[float]
    seconds: list[float]
    processor: list[float]


def measure(
    kind: str, per_rank: int, microbatches: int, unit: float, runs: int, monitor: RankMonitor
) -> Measured:
    """On every rank; the same on all."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    made = schedule(kind, ranks, per_rank * ranks, microbatches)
    executor = Executor(made, rank, dist.group.WORLD, _CPU, monitor)
    found: dict[str, list[float]] = {"bubbles": [], "seconds": [], "processor": []}
    for _ in range(runs):
        recorder = Recorder(_CPU)
        executor.run([Stage(s, made.num_stages, unit) for s in made.stages_of(rank)], 0, recorder)
        found["bubbles"].append(bubble(recorder.everyones(dist.group.WORLD)))
        idle = [Stage(s, made.num_stages, 0) for s in made.stages_of(rank)]
        dist.barrier()
        start, used = time.perf_counter(), time.thread_time()
        executor.run(idle)
        used, taken = time.thread_time() - used, time.perf_counter() - start
        found["processor"].append(max(_everyone(used)))
        found["seconds"].append(max(_everyone(taken)))
    planned = bubble(timeline(made.lists, lambda a: _UNITS.get(a.step, 0)))
    theory = ideal_bubble(kind, ranks, made.num_stages, microbatches)
    return Measured(kind, per_rank, theory, planned, **found)


def _everyone(value: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def _rank(rank: int, ranks: int, microbatches: int, unit: float, runs: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    monitor = RankMonitor(compat.default_store(), range(ranks), rank, 10.0, "benchmark")
    found = [measure(kind, v, microbatches, unit, runs, monitor) for kind, v in _CASES]
    monitor.stop()
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps([asdict(f) for f in found]))
    dist.barrier()
    dist.destroy_process_group()


def main(
    ranks: Annotated[int, typer.Option(min=2)] = 4,
    microbatches: Annotated[int, typer.Option(min=1)] = 8,
    unit: Annotated[float, typer.Option(help="Milliseconds of a forward.")] = 20.0,
    runs: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = _RESULTS,
) -> None:
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, microbatches, unit / 1e3, runs, folder)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=ranks)
        found = [Measured(**f) for f in json.loads(Path(folder, "result.json").read_text())]
    command = shlex.join(["python", "-m", "benchmarks.pipeline", *sys.argv[1:]])
    text = _markdown(found, ranks, microbatches, unit, f"`{command}`", load)
    output.mkdir(exist_ok=True)
    (output / "pipeline.md").write_text(text)
    print(text)


def _markdown(
    found: list[Measured], ranks: int, microbatches: int, unit: float, command: str, load: float
) -> str:
    lines = [
        "# Pipeline: bubble and overhead",
        "",
        f"{command}, {date.today()}, torch {torch.__version__}, {os.cpu_count()} cores, load before "
        f"{load:.2f}, gloo. {ranks} ranks, {microbatches} microbatches; medians (min to max) of "
        f"{len(found[0].bubbles)} runs.",
        "",
        f"Bubble: stages that sleep {unit:g} ms for a forward and as long for each half of a backward. "
        "Overhead: stages that do nothing; microseconds a microbatch and stage, of the whole run, and of the "
        "busiest rank's Python on the processor.",
        "",
        "| schedule | stages a rank | bubble in theory | planned | measured | overhead | on the processor |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for f in found:
        each = 1e6 / (f.per_rank * microbatches)
        cells = [
            f.kind,
            str(f.per_rank),
            f"{f.theory:.1%}",
            f"{f.planned:.1%}",
            _spread([100 * b for b in f.bubbles], 1),
            _spread([each * s for s in f.seconds], 0),
            _spread([each * s for s in f.processor], 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    typer.run(main)
