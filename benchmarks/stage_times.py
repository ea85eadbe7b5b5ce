"""What a plan foretold of each pipeline stage, beside what a recorded step took.

    python -m benchmarks.stage_times              # 2 ranks, with cuts chosen and with equal layers

Trains as ``autodist-pp`` and ``autodist-pp-equal-layers`` of :mod:`benchmarks.stages` do; the third step is
recorded by the executor. The result goes to ``results/stage_times.md``.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import allocator, stages
from benchmarks.launch import run_once
from benchmarks.workload import Workload

_RESULTS = Path(__file__).parent / "results"


def main(
    ranks: Annotated[int, typer.Option(min=2)] = 2,
    runs: Annotated[int, typer.Option(min=1)] = 3,
    layers: Annotated[int | None, typer.Option()] = None,
    hidden: Annotated[int | None, typer.Option()] = None,
    vocab: Annotated[int | None, typer.Option()] = None,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = _RESULTS,
) -> None:
    sizes = {"layers": layers, "hidden": hidden, "vocab": vocab}
    given = {name: size for name, size in sizes.items() if size is not None}
    workload = replace(stages.WORKLOAD, **given, ranks=ranks, pp=ranks, steps=1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        library = allocator.build(Path(folder)) if workload.device == "cpu" else None
        cases = [(v, workload, library) for v in ("autodist-pp", "autodist-pp-equal-layers")]
        found = {case[0]: [_recorded(*case) for _ in range(runs)] for case in cases}
    command = shlex.join(["python", "-m", "benchmarks.stage_times", *sys.argv[1:]])
    text = _markdown(found, workload, f"`{command}`", load)
    output.mkdir(exist_ok=True)
    (output / "stage_times.md").write_text(text)
    print(text)


def _recorded(variant: str, workload: Workload, library: Path | None) -> dict[str, list[float]]:
    """Milliseconds that each stage computes for a microbatch, "planned" and "measured", and the first
    stage's layers."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTODIST_ARTIFACTS"] = folder
        run_once(variant, workload, library, 1800)
        [place] = Path(folder, "rank0").glob("pipeline*")
        events = json.loads((place / "schedule.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    taken: dict[str, dict[tuple[int, str], list[float]]] = {name: {} for name in names.values()}
    for event in events:
        kind = event["name"].partition(" of microbatch ")[0]
        if event["ph"] == "X" and "sending" not in kind and "receiving" not in kind:
            key = event["args"]["stage"], kind
            taken[names[event["pid"]]].setdefault(key, []).append(event["dur"] / 1e3)
    return {
        name: [
            sum(statistics.median(each) for (stage, _), each in kinds.items() if stage == number)
            for number in range(workload.pp)
        ]
        for name, kinds in taken.items()
    }


def _markdown(
    found: dict[str, list[dict[str, list[float]]]], workload: Workload, command: str, load: float
) -> str:
    lines = [
        "# Pipeline stages: foretold and measured",
        "",
        f"{command}, {date.today()}, torch {torch.__version__}, {os.cpu_count()} cores, load before "
        f"{load:.2f}, gloo. {workload}",
        "",
        "Milliseconds that a stage computes for a microbatch, forward and backward: as the plan has it, and "
        "the median of a recorded step's microbatches; median (min to max) over runs. Share: of all stages' "
        "time, which is what a cut decides. Slowest over mean: 1 is even.",
        "",
        "| cut | stage | planned, ms | measured, ms | planned share | measured share |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant, runs in found.items():
        for stage in range(workload.pp):
            times = [_spread([run[kind][stage] for run in runs], 2) for kind in ("planned", "measured")]
            shares = [
                _spread([100 * run[kind][stage] / sum(run[kind]) for run in runs], 1)
                for kind in ("planned", "measured")
            ]
            lines.append(f"| {' | '.join([variant, str(stage), *times, *(f'{s} %' for s in shares)])} |")
    lines += ["", "| cut | planned slowest over mean | measured |", "| --- | ---: | ---: |"]
    for variant, runs in found.items():
        each = [
            _spread([max(run[kind]) * workload.pp / sum(run[kind]) for run in runs], 2)
            for kind in ("planned", "measured")
        ]
        lines.append(f"| {variant} | {' | '.join(each)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if low < high else "")


if __name__ == "__main__":
    typer.run(main)
