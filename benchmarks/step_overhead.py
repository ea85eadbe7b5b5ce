"""What a call of a decorated training step costs beyond the compiled graph inside of it.

    python -m benchmarks.step_overhead                                     # 80 layers, on 1 and on 2 ranks
    python -m benchmarks.step_overhead --layers 2 --lowering eager --rounds 1 --calls 2     # does it run?

A Llama of many layers and tiny width has many parameters and little to compute: the worst case for what
Python does around the graph. Two calls take turns, and train the same model:

    step     the function decorated with ``@autodist.train_step``
    direct   its program's compiled graph, on inputs that were collected before

A round is some calls of each; its *ratio* is that of their medians. On several ranks a call begins for all
together and takes what the slowest rank takes. A call of the step is also *split*, by the clock read where
the graph begins and ends:

    before   finding the program (arguments flattened, state and constants looked over) and its inputs
    inputs   of that, collecting the inputs, timed by itself
    graph    the compiled graph
    finish   results and new tensors put in their places

The split is of rank 0. The result goes to ``results/step_overhead.md``.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

import autodist
from autodist.step_capture import program_inputs
from autodist.step_state import State, roots_of
from benchmarks.report import Spread
from benchmarks.workload import WARM_UP_STEPS, Workload, adamw, training_step

_RESULTS = Path(__file__).parent / "results"
_RANKS = (1, 2)
_AIM = 1.01  # of a call of the step to one of its graph


@dataclass(frozen=True)
class Overhead:
    """Seconds, a median for each round; ``graph``, ``before`` and so on are the parts of a step's call."""

    step: list[float]
    direct: list[float]
    before: list[float]
    inputs: list[float]
    graph: list[float]
    finish: list[float]
    num_inputs: int

    @property
    def ratio(self) -> Spread:
        return Spread.of([a / b for a, b in zip(self.step, self.direct, strict=True)])

    @property
    def own(self) -> Spread:
        """What is not the graph, as a part of the graph, within the same calls."""
        parts = zip(self.before, self.graph, self.finish, strict=True)
        return Spread.of([(before + finish) / graph for before, graph, finish in parts])


class Stopwatch:
    """A compiled graph that remembers when its last call began and ended."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self.compiled = compiled
        self.began = self.ended = 0.0

    def __call__(self, *inputs: Any) -> Any:
        self.began = time.perf_counter()
        outputs = self.compiled(*inputs)
        self.ended = time.perf_counter()
        return outputs


def measure(workload: Workload, lowering: str, rounds: int) -> Overhead:
    """On this rank; the same result on every rank, but for the split."""
    model = workload.model()
    optimizer = adamw(model)
    step = autodist.train_step(plan={"lowering": lowering})(training_step)
    tokens, *_ = workload.tokens(0)
    for _ in range(WARM_UP_STEPS):
        step(model, optimizer, tokens)
    (program,) = step.programs  # type: ignore[attr-defined]
    compiled = program.compiled
    watch = program.compiled = Stopwatch(compiled)
    state = State.of(roots_of(training_step, (model, optimizer)))
    inputs = program_inputs(state, [tokens])

    def direct() -> None:
        with torch.no_grad():
            compiled(*inputs)

    def decorated() -> None:
        step(model, optimizer, tokens)

    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        calls: dict[str, list[float]] = {}
        for number in range(workload.steps):
            kinds = [("step", decorated), ("direct", direct)]
            for kind, call in kinds if number % 2 else reversed(kinds):
                start, end = _timed(call)
                calls.setdefault(kind, []).append(end - start)
                if kind == "step":
                    calls.setdefault("before", []).append(watch.began - start)
                    calls.setdefault("graph", []).append(watch.ended - watch.began)
                    calls.setdefault("finish", []).append(end - watch.ended)
            start, end = _timed(lambda: program_inputs(state, [tokens]))
            calls.setdefault("inputs", []).append(end - start)
        for kind in ("step", "direct"):
            calls[kind] = _slowest(calls[kind])
        for kind, seconds in calls.items():
            found.setdefault(kind, []).append(statistics.median(seconds))
    return Overhead(num_inputs=len(inputs), **found)  # type: ignore[arg-type]


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    """When a call that all ranks make together began and ended on this one."""
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    call()
    return start, time.perf_counter()


def _slowest(seconds: list[float]) -> list[float]:
    if not dist.is_initialized():
        return seconds
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seconds)
    return [max(ranks) for ranks in zip(*everyone, strict=True)]


def _rank(rank: int, workload: Workload, lowering: str, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    if workload.ranks > 1:
        store = dist.FileStore(f"{folder}/store", workload.ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=workload.ranks)
    found = measure(workload, lowering, rounds)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(asdict(found)))
    if workload.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def _on_ranks(workload: Workload, lowering: str, rounds: int) -> Overhead:
    """In fresh processes, one a rank."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (workload, lowering, rounds, folder)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=workload.ranks)
        return Overhead(**json.loads(Path(folder, "result.json").read_text()))


def main(
    layers: Annotated[int, typer.Option(min=1)] = 80,
    lowering: Annotated[str, typer.Option(help="inductor or eager.")] = "inductor",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    calls: Annotated[int, typer.Option(min=1, help="Of each kind, in a round.")] = 20,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = _RESULTS,
) -> None:
    load = os.getloadavg()[0]
    found = {ranks: _on_ranks(_workload(layers, calls, ranks), lowering, rounds) for ranks in _RANKS}
    command = shlex.join(["python", "-m", "benchmarks.step_overhead", *sys.argv[1:]])
    text = _markdown(found, layers, lowering, calls, f"`{command}`", load)
    output.mkdir(exist_ok=True)
    (output / "step_overhead.md").write_text(text)
    print(text)


def _workload(layers: int, calls: int, ranks: int) -> Workload:
    return Workload(
        hidden=16, layers=layers, heads=2, intermediate=32, vocab=64, batch=1, sequence=8, steps=calls,
        ranks=ranks,
    )  # fmt: skip


def _markdown(
    found: dict[int, Overhead], layers: int, lowering: str, calls: int, command: str, load: float
) -> str:
    columns = ["step", "direct", "before", "inputs", "graph", "finish"]
    lines = [
        "# Overhead of a decorated training step",
        "",
        f"{command}, {date.today()}, torch {torch.__version__}, {os.cpu_count()} cores, load before "
        f"{load:.2f}. Llama, {layers} layers of width 16, AdamW, lowering {lowering}, a thread a rank; "
        f"rounds of {calls} calls of each kind.",
        "",
        "Ratio: a call of the step to one of its graph, called directly. Own part: what of a step's call is "
        "not the graph, as a part of the graph. Median (min to max) over rounds; the aim is a ratio of "
        f"{_AIM}.",
        "",
        "| ranks | inputs of the graph | ratio | own part |",
        "| ---: | ---: | ---: | ---: |",
        *(f"| {n} | {x.num_inputs} | {_spread(x.ratio)} | {_spread(x.own)} |" for n, x in found.items()),
        "",
        "Milliseconds, median over rounds:",
        "",
        f"| ranks | {' | '.join(columns)} |",
        "| ---: |" + " ---: |" * len(columns),
    ]
    for ranks, x in found.items():
        medians = [1e3 * statistics.median(getattr(x, column)) for column in columns]
        lines.append(f"| {ranks} | {' | '.join(f'{m:.3f}' for m in medians)} |")
    return "\n".join(lines) + "\n"


def _spread(spread: Spread) -> str:
    return f"{spread.median:.4f} ({spread.min:.4f} to {spread.max:.4f})"


if __name__ == "__main__":
    typer.run(main)
