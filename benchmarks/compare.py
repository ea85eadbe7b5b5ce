"""Train one model in several ways, side by side, and report seconds, bytes and losses.

``python -m benchmarks.compare`` from the root of the repository; README.md beside this file says
how to read the result. Variants are interleaved: every round runs each of them once, each round
beginning with another one, so that a machine's moods fall on all alike.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import allocator, report
from benchmarks.launch import RunFailedError, run_once
from benchmarks.variants import VARIANTS
from benchmarks.workload import Workload

PREFERRED_REFERENCE = "fsdp2-compile"
_QUICK = Workload(hidden=64, layers=2, heads=4, intermediate=128, vocab=256, batch=2, sequence=32, steps=2)
_RESULTS = Path(__file__).parent / "results"
_TABLE_WIDTH = 120  # columns; narrower ones would cut figures
_CONSOLE = Console(stderr=True)


def main(
    variants: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(VARIANTS)}.")] = ",".join(
        VARIANTS
    ),
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    device: Annotated[str, typer.Option(help="cpu (gloo) or cuda (NCCL, a GPU a rank).")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of a rank; cores divided by ranks when not given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Measured, after 3 of warm-up.")] = None,
    hidden: Annotated[int | None, typer.Option()] = None,
    layers: Annotated[int | None, typer.Option()] = None,
    heads: Annotated[int | None, typer.Option()] = None,
    intermediate: Annotated[int | None, typer.Option()] = None,
    vocab: Annotated[int | None, typer.Option()] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences a rank.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds one run may take.")] = 1800,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = _RESULTS,
    quick: Annotated[bool, typer.Option(help="A tiny model and one round: does it run?")] = False,
) -> None:
    sizes = {
        "steps": steps,
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "intermediate": intermediate,
        "vocab": vocab,
        "batch": batch,
        "sequence": sequence,
    }
    workload = replace(
        _QUICK if quick else Workload(),
        ranks=ranks,
        device=device,
        threads=threads or max(1, (os.cpu_count() or 1) // ranks),
        **{name: size for name, size in sizes.items() if size is not None},
    )
    _check_device(workload)
    chosen, notes = choose(variants)
    facts = _facts(workload, 1 if quick else rounds)
    runs, failures = _run_rounds(chosen, workload, 1 if quick else rounds, timeout)
    notes += failures
    reference = PREFERRED_REFERENCE if PREFERRED_REFERENCE in runs else next(iter(runs), None)
    if reference is None:
        raise typer.Exit(1)
    comparisons = report.compare(runs, reference)
    for table in report.terminal_tables(comparisons, reference):
        Console(width=_TABLE_WIDTH).print(table)
    stem = _write(output, facts, runs, comparisons, reference, notes)
    _CONSOLE.print(f"Written: {stem}.md and {stem}.json", soft_wrap=True)
    wrong = [variant for variant, c in comparisons.items() if not c.agrees()]
    if wrong:
        _CONSOLE.print(
            f"Losses of {', '.join(wrong)} differ from {reference}'s by more than "
            f"{report.LOSS_TOLERANCE}: they did not train the same model, so do not compare them."
        )
    if wrong or failures:
        raise typer.Exit(1)


def _check_device(workload: Workload) -> None:
    if workload.device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device is cpu or cuda, not {workload.device!r}.")
    if workload.device == "cuda" and torch.cuda.device_count() < workload.ranks:
        raise typer.BadParameter(
            f"--device cuda needs a GPU for each of the {workload.ranks} ranks and sees "
            f"{torch.cuda.device_count()}; lower --ranks."
        )


def choose(variants: str) -> tuple[list[str], list[str]]:
    """The variants that can run here, and a note for each that cannot."""
    names = variants.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise typer.BadParameter(f"No variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}.")
    missing = [name for name in names if not _installed(VARIANTS[name].needs)]
    notes = [f"{name} was skipped: {VARIANTS[name].needs} is not installed." for name in missing]
    for note in notes:
        _CONSOLE.print(note)
    return [name for name in names if name not in missing], notes


def _installed(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package) is not None


def _run_rounds(
    variants: list[str], workload: Workload, rounds: int, timeout: float
) -> tuple[report.Runs, list[str]]:
    """All runs, and a sentence for each variant that failed (it is left out from then on)."""
    runs: report.Runs = {variant: [] for variant in variants}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = allocator.build(Path(folder)) if workload.device == "cpu" else None
        for number in range(rounds):
            start = number % len(variants) if variants else 0
            for variant in variants[start:] + variants[:start]:
                if variant in failures:
                    continue
                try:
                    run = run_once(variant, workload, library, timeout)
                except RunFailedError as error:
                    failures[variant] = f"{variant} failed in round {number + 1}: {error}"
                    lines = [*error.output, failures[variant]]
                    _CONSOLE.print("\n".join(lines), markup=False, soft_wrap=True)
                    continue
                runs[variant].append(run)
                _CONSOLE.print(
                    f"round {number + 1} of {rounds}: {variant}, "
                    f"{median(run.seconds):.3f} s a step, peak {run.peak_bytes / 2**20:.0f} MiB"
                )
    finished = {variant: own for variant, own in runs.items() if own}
    return finished, list(failures.values())


def _facts(workload: Workload, rounds: int) -> dict[str, Any]:
    return {
        "command": f"python -m benchmarks.compare {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": _machine(workload.device),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "rounds": rounds,
        "workload": asdict(workload),
    }


def _machine(device: str) -> str:
    cores = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    return f"{torch.cuda.get_device_name()}, {cores}" if device == "cuda" else cores


def _write(
    folder: Path,
    facts: dict[str, Any],
    runs: report.Runs,
    comparisons: dict[str, report.Comparison],
    reference: str,
    notes: list[str],
) -> Path:
    """Write the report twice; returns the files' common path without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    workload = facts["workload"]
    day = facts["date"][:19].replace(":", "")
    stem = folder / f"{day}-{workload['device']}-{workload['ranks']}ranks"
    text = report.markdown(facts, comparisons, reference, notes)
    stem.with_suffix(".md").write_text(text)
    everything = report.as_json(facts, runs, comparisons, reference, notes)
    stem.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    return stem


if __name__ == "__main__":
    typer.run(main)
