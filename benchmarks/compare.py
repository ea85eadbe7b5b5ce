"""Train one model in several ways, side by side, and report seconds, bytes and losses.

``python -m benchmarks.compare`` from the root of the repository, or ``... compare sequence`` or
``... compare pipeline``;
README.md beside this file says how to read the result. A *suite* is one question: what is trained
and in which ways. Variants are interleaved: every round runs each of them once, each round
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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

from benchmarks import allocator, report, sequence, stages
from benchmarks.launch import RunFailedError, run_once
from benchmarks.variants import VARIANTS, Variant
from benchmarks.workload import Workload

_QUICK = Workload(hidden=64, layers=2, heads=4, intermediate=128, vocab=256, batch=2, sequence=32, steps=2)
_LONG = Workload(hidden=256, layers=4, heads=8, kv_heads=2, intermediate=688, batch=1, sequence=2048, steps=5)


@dataclass(frozen=True)
class Suite:
    """``reference`` is the variant that ratios refer to, ``metrics`` are the columns of the report.

    ``shared``: what all ranks train on one batch and split: its "sequence", or the model into "stages".
    """

    variants: dict[str, Variant]
    workload: Workload
    quick: Workload
    reference: str
    metrics: tuple[str, ...]
    shared: Literal["sequence", "stages"] | None = None


SUITES = {
    "sharding": Suite(VARIANTS, Workload(), _QUICK, "fsdp2-compile", report.SHARDING),
    "sequence": Suite(
        sequence.VARIANTS,
        _LONG,
        replace(_QUICK, kv_heads=2),
        "single-compile",
        report.SEQUENCE,
        shared="sequence",
    ),
    "pipeline": Suite(
        stages.VARIANTS,
        stages.WORKLOAD,
        replace(_QUICK, batch=8),
        "torch-equal-layers",
        report.PIPELINE,
        shared="stages",
    ),
}
_RESULTS = Path(__file__).parent / "results"
_TABLE_WIDTH = 180  # columns; narrower ones would cut figures
_CONSOLE = Console(stderr=True)


def main(
    suite: Annotated[str, typer.Argument(help=f"One of: {', '.join(SUITES)}.")] = "sharding",
    variants: Annotated[str, typer.Option(help="Comma-separated; all of the suite when not given.")] = "",
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
    kv_heads: Annotated[int | None, typer.Option(help="Key-value heads; 0 for as many as heads.")] = None,
    intermediate: Annotated[int | None, typer.Option()] = None,
    vocab: Annotated[int | None, typer.Option()] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences a rank, or shared by all ranks.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds one run may take.")] = 1800,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = _RESULTS,
    quick: Annotated[bool, typer.Option(help="A tiny model and one round: does it run?")] = False,
) -> None:
    sizes: dict[str, Any] = {
        "steps": steps,
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "intermediate": intermediate,
        "vocab": vocab,
        "batch": batch,
        "sequence": sequence,
        "dtype": dtype,
    }
    if suite not in SUITES:
        raise typer.BadParameter(f"No suite {suite}; there are {', '.join(SUITES)}.")
    asked = SUITES[suite]
    workload = replace(
        asked.quick if quick else asked.workload,
        ranks=ranks,
        sp=ranks if asked.shared == "sequence" else 1,
        pp=ranks if asked.shared == "stages" else 1,
        device=device,
        threads=threads or max(1, (os.cpu_count() or 1) // ranks),
        **{name: size for name, size in sizes.items() if size is not None},
    )
    _check(workload)
    if asked.shared == "sequence":
        _check_shares(workload)
    chosen, notes = choose(variants or ",".join(asked.variants), asked.variants)
    facts = _facts(suite, workload, 1 if quick else rounds)
    runs, failures = _run_rounds(chosen, workload, 1 if quick else rounds, timeout)
    notes += failures.values()
    reference = asked.reference if asked.reference in runs else next(iter(runs), None)
    if reference is None:
        raise typer.Exit(1)
    comparisons = report.compare(runs, reference, asked.metrics, workload.dtype)
    for table in report.terminal_tables(comparisons, reference):
        Console(width=_TABLE_WIDTH).print(table)
    stem = _write(output, facts, runs, comparisons, reference, notes)
    _CONSOLE.print(f"Written: {stem}.md and {stem}.json", soft_wrap=True)
    wrong = [variant for variant, c in comparisons.items() if not c.agrees()]
    if wrong:
        _CONSOLE.print(
            f"Losses of {', '.join(wrong)} differ from {reference}'s by more than "
            f"{report.LOSS_TOLERANCE[workload.dtype]}: they did not train "
            "the same model, so do not compare them."
        )
    if wrong or not all(asked.variants[name].may_fail for name in failures):
        raise typer.Exit(1)


def _check(workload: Workload) -> None:
    if workload.dtype not in report.LOSS_TOLERANCE:
        raise typer.BadParameter(f"--dtype is float32 or bfloat16, not {workload.dtype!r}.")
    if workload.device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device is cpu or cuda, not {workload.device!r}.")
    if workload.device == "cuda" and torch.cuda.device_count() < workload.ranks:
        raise typer.BadParameter(
            f"--device cuda needs a GPU for each of the {workload.ranks} ranks and sees "
            f"{torch.cuda.device_count()}; lower --ranks."
        )


def _check_shares(workload: Workload) -> None:
    ranks, kv_heads = workload.ranks, workload.kv_heads or workload.heads
    if ranks < 2 or workload.sequence % ranks or workload.heads % ranks:
        raise typer.BadParameter(
            f"The {workload.sequence} tokens of --sequence and {workload.heads} of --heads must be shared "
            f"out evenly over 2 or more ranks, not {ranks}."
        )
    if kv_heads % ranks and ranks % kv_heads:
        raise typer.BadParameter(f"--kv-heads is a multiple or a divisor of --ranks {ranks}, not {kv_heads}.")


def choose(variants: str, known: Mapping[str, Variant]) -> tuple[dict[str, Variant], list[str]]:
    """The variants that can run here, and a note for each that cannot."""
    names = variants.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"No variant {', '.join(unknown)}; there are {', '.join(known)}.")
    missing = [name for name in names if not _installed(known[name].needs)]
    notes = [f"{name} was skipped: {known[name].needs} is not installed." for name in missing]
    for note in notes:
        _CONSOLE.print(note)
    return {name: known[name] for name in names if name not in missing}, notes


def _installed(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package) is not None


def _run_rounds(
    variants: Mapping[str, Variant], workload: Workload, rounds: int, timeout: float
) -> tuple[report.Runs, dict[str, str]]:
    """All runs, and a sentence for each variant that failed (it is left out from then on)."""
    names = list(variants)
    runs: report.Runs = {variant: [] for variant in names}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = allocator.build(Path(folder)) if workload.device == "cpu" else None
        for number in range(rounds):
            start = number % len(names) if names else 0
            for variant in names[start:] + names[:start]:
                if variant in failures:
                    continue
                own = replace(workload, ranks=1, sp=1, pp=1) if variants[variant].alone else workload
                try:
                    run = run_once(variant, own, library, timeout)
                except RunFailedError as error:
                    what = "was skipped" if variants[variant].may_fail else f"failed in round {number + 1}"
                    failures[variant] = f"{variant} {what}: {error}"
                    lines = [*error.output, failures[variant]]
                    _CONSOLE.print("\n".join(lines), markup=False, soft_wrap=True)
                    continue
                runs[variant].append(run)
                _CONSOLE.print(
                    f"round {number + 1} of {rounds}: {variant}, "
                    f"{median(run.seconds):.3f} s a step, peak {run.peak_bytes / 2**20:.0f} MiB"
                )
    finished = {variant: done for variant, done in runs.items() if done}
    return finished, failures


def _facts(suite: str, workload: Workload, rounds: int) -> dict[str, Any]:
    bound = {"Ulysses bound": f"{workload.ulysses_bytes / 2**20:.2f} MiB of all-to-all a rank and step"}
    return {
        "command": f"python -m benchmarks.compare {shlex.join(sys.argv[1:])}".strip(),
        "suite": suite,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": _machine(workload.device),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "rounds": rounds,
        "workload": asdict(workload),
        **(bound if workload.sp > 1 else {}),
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
    stem = folder / f"{day}-{facts['suite']}-{workload['device']}-{workload['ranks']}ranks"
    text = report.markdown(facts, comparisons, reference, notes)
    stem.with_suffix(".md").write_text(text)
    everything = report.as_json(facts, runs, comparisons, reference, notes)
    stem.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    return stem


if __name__ == "__main__":
    typer.run(main)
