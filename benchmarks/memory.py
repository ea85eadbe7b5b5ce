"""What less memory costs in time, and how long a sequence trains in a bound: one process, a small Llama.

    python -m benchmarks.memory                          # both, 3 rounds
    python -m benchmarks.memory --parts curve --rounds 1 --quick           # does it run?

*curve*: peak and seconds a step of training as it is, of full checkpointing, of torch's
``activation_memory_budget`` and of autodist under bounds. torch's budget says which part of the saved bytes
may stay, not what the peak will be. So the peaks that the others have are measured first, and are the bounds
that autodist is given: at each the question is who is faster than it without holding more.

*longest*: within the bytes that training as it is holds at the workload's length, the longest sequence that
trains. The peak of one length after the other is measured: doubled until it is too much, then halved.

Every run is a fresh process with an empty compile cache, and is measured as in :mod:`benchmarks.compare`. A
round runs each point once, each round beginning with another one; ratios are formed within a round. The
result goes to ``results/memory.md``, ``.json`` and ``.svg``.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import allocator
from benchmarks.compare import choose
from benchmarks.launch import RunFailedError, run_once
from benchmarks.memory_curve import Mark, picture
from benchmarks.memory_variants import VARIANTS
from benchmarks.report import Spread, loss_deviation
from benchmarks.worker import Measurement
from benchmarks.workload import Workload

_RESULTS = Path(__file__).parent / "results"
_SMALL = Workload(
    hidden=256, layers=4, heads=8, kv_heads=4, intermediate=688, vocab=8192, batch=1, sequence=512, steps=5,
    ranks=1,
)  # fmt: skip
_QUICK = replace(_SMALL, hidden=64, layers=2, intermediate=128, vocab=512, sequence=128, steps=2)
_TORCH_BUDGETS = (0.8, 0.6, 0.4, 0.2, 0.0)
_LOWER = (0.85, 0.7)  # of what the leanest of the others makes beside what it keeps
_SAME = 0.005  # of a peak: two that are as near as that are one bound
_FINEST = 16  # of the answer's length: the interval in which it is left
_MIB = 2**20
_CONSOLE = Console(stderr=True)

Run = Callable[[str, Workload], Measurement]


@dataclass
class Point:
    """A variant with what it is given, and its runs in the order of the rounds."""

    variant: str
    budget: float = 0.0
    runs: list[Measurement] = field(default_factory=list)
    failure: str = ""

    @property
    def title(self) -> str:
        if self.variant == "autodist" and self.budget:
            return f"autodist in {self.budget / _MIB:.1f} MiB"
        return f"{self.variant} {self.budget}" if self.variant == "torch-budget" else self.variant

    @property
    def peak(self) -> float:
        return max(run.peak_bytes for run in self.runs)

    @property
    def seconds(self) -> float:
        return median(median(run.seconds) for run in self.runs)

    def beside(self, other: Point) -> Spread:
        """Seconds over those of ``other`` in the same round."""
        pairs = zip(self.runs, other.runs, strict=False)
        return Spread.of([median(a.seconds) / median(b.seconds) for a, b in pairs])


# --- the curve ---------------------------------------------------------------------------------------


def curve(run: Run, workload: Workload, rounds: int) -> list[Point]:
    """The points of the others, then those of autodist at their peaks and below, largest first."""
    others = [Point("compile"), Point("eager-checkpoint"), Point("compile-checkpoint")]
    others += [Point("torch-budget", budget) for budget in _TORCH_BUDGETS]
    _round(run, workload, others)
    ours = [Point("autodist"), *(Point("autodist", b) for b in _bounds([p for p in others if p.runs]))]
    _round(run, workload, ours)
    points = others + ours
    for number in range(1, rounds):
        start = number * len(points) // rounds
        _round(run, workload, points[start:] + points[:start])
    return points


def _bounds(others: Sequence[Point]) -> Iterator[float]:
    peaks = sorted((p.peak for p in others), reverse=True)
    for i, peak in enumerate(peaks):
        if i == 0 or peak < (1 - _SAME) * peaks[i - 1]:
            yield peak
    kept = others[0].runs[0].live_bytes
    yield from (kept + part * (peaks[-1] - kept) for part in _LOWER)


def _round(run: Run, workload: Workload, points: Sequence[Point]) -> None:
    for point in points:
        if point.failure:
            continue
        try:
            found = run(point.variant, replace(workload, budget=point.budget))
        except RunFailedError as error:
            point.failure = error.output[-1] if error.output else str(error)
            _CONSOLE.print(f"{point.title}: {point.failure}", markup=False, soft_wrap=True)
            continue
        point.runs.append(found)
        peak, seconds = found.peak_bytes / _MIB, median(found.seconds)
        _CONSOLE.print(f"{point.title}: peak {peak:.1f} MiB, {seconds:.3f} s")


def fastest_within(bound: float, others: Sequence[Point]) -> Point | None:
    """Who of ``others`` is fastest without holding more than ``bound`` bytes."""
    fitting = [p for p in others if p.runs and p.peak <= (1 + _SAME) * bound]
    return min(fitting, key=lambda p: p.seconds, default=None)


# --- the longest sequence ----------------------------------------------------------------------------


def longest(fits: Callable[[int], bool], length: int, limit: int = 2**20) -> int:
    """The longest length that fits, to a sixteenth of it; 0 where not even a sixteenth of ``length`` does."""
    least, low, high = length // 16, 0, 0
    while not low or not high:
        if fits(length):
            low, length = length, 2 * length
        else:
            high, length = length, length // 2
        if not least <= length <= limit:
            return low
    while high - low > max(low // _FINEST, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def longest_of_each(
    run: Run, workload: Workload, bound: float, variants: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """For each variant the longest length within ``bound`` bytes, and the peaks of all lengths tried."""
    return {variant: _longest_of(run, workload, bound, variant) for variant in variants}


def _longest_of(run: Run, workload: Workload, bound: float, variant: str) -> dict[str, Any]:
    peaks: dict[int, float] = {}
    seconds: dict[int, float] = {}

    def fits(length: int) -> bool:
        try:
            one = run(variant, replace(workload, sequence=length, budget=bound, steps=1))
        except RunFailedError as error:
            _CONSOLE.print(f"{variant}, {length} tokens: {error}", markup=False, soft_wrap=True)
            return False
        peaks[length], seconds[length] = one.peak_bytes, one.seconds[0]
        _CONSOLE.print(f"{variant}, {length} tokens: {one.peak_bytes / _MIB:.1f} MiB")
        return one.peak_bytes <= bound

    best = longest(fits, workload.sequence)
    return {"length": best, "seconds": seconds.get(best), "peaks": peaks}


# --- what is written ---------------------------------------------------------------------------------


def _facts(workload: Workload, rounds: int) -> dict[str, Any]:
    return {
        "command": f"python -m benchmarks.memory {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "rounds": rounds,
        "workload": asdict(workload),
    }


def curve_text(points: Sequence[Point]) -> list[str]:
    """Two tables: every point; and at each bound autodist beside the fastest that holds no more."""
    reference = points[0]
    lines = ["", "## Peak and time", "", "| | peak, MiB | a step, s | to compile, in a round | loss |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for point in points:
        if not point.runs:
            lines.append(f"| {point.title} | failed: {point.failure} | | | |")
            continue
        pairs = zip(point.runs, reference.runs, strict=False)
        error = max(loss_deviation(a.losses, b.losses) for a, b in pairs)
        numbers = f"{point.peak / _MIB:.1f} | {point.seconds:.3f} | {_spread(point.beside(reference))}"
        lines.append(f"| {point.title} | {numbers} | {error:.0e} |")
    ours = [p for p in points if p.variant == "autodist" and p.budget]
    others = [p for p in points if p.variant != "autodist"]
    lines += ["", "## At each bound", ""]
    lines += ["| bound, MiB | autodist's peak, MiB | kept | fastest of the others | autodist's time to its |"]
    lines += ["| ---: | ---: | --- | --- | ---: |"]
    for point in ours:
        other = fastest_within(point.budget, others)
        name = "nothing fits" if other is None else other.title
        if not point.runs:
            lines.append(f"| {point.budget / _MIB:.1f} | | refused | {name} | |")
            continue
        kept = "yes" if point.peak <= point.budget else "NO"
        beside = "" if other is None else _spread(point.beside(other))
        lines.append(f"| {point.budget / _MIB:.1f} | {point.peak / _MIB:.1f} | {kept} | {name} | {beside} |")
    return lines


def _spread(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.min:.2f} to {ratio.max:.2f})"


def longest_text(bound: float, found: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["", f"## Longest sequence in {bound / _MIB:.1f} MiB", ""]
    lines += ["| | tokens | to the first | a step, s |", "| --- | ---: | ---: | ---: |"]
    first = next(iter(found.values()))["length"]
    for variant, one in found.items():
        seconds = "" if one["seconds"] is None else f"{one['seconds']:.3f}"
        lines.append(f"| {variant} | {one['length']} | {one['length'] / max(first, 1):.2f} | {seconds} |")
    return lines


def main(
    parts: Annotated[str, typer.Option(help="curve, longest, or both with a comma.")] = "curve,longest",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    quick: Annotated[bool, typer.Option(help="A tiny model: does it run?")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds one run may take.")] = 1800,
    note: Annotated[str, typer.Option(help="A sentence for the report.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = _RESULTS,
) -> None:
    workload = replace(_QUICK if quick else _SMALL, threads=threads)
    facts = _facts(workload, rounds)
    text = ["# Memory and time", "", *(f"- {name}: {value}" for name, value in facts.items())]
    text += [f"- {note}"] if note else []
    result: dict[str, Any] = {"facts": facts, "note": note}
    available, notes = choose(",".join(VARIANTS), VARIANTS)
    text += [f"- {one}" for one in notes]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        library = allocator.build(Path(folder))

        def run(variant: str, own: Workload) -> Measurement:
            return run_once(variant, own, library, timeout)

        if "curve" in parts.split(","):
            points = curve(run, workload, rounds)
            text += curve_text(points)
            result["curve"] = [asdict(p) for p in points]
            marks = [Mark(p.variant, p.peak / _MIB, p.beside(points[0]).median) for p in points if p.runs]
            (output / "memory.svg").write_text(picture(marks))
        if "longest" in parts.split(","):
            bound = float(run("compile", replace(workload, steps=1)).peak_bytes)
            wanted = [v for v in ("compile", "eager-checkpoint", "alst", "autodist") if v in available]
            found = longest_of_each(run, workload, bound, wanted)
            text += longest_text(bound, found)
            result["longest"] = {"bound": bound, "variants": found}
    print("\n".join(text))
    (output / "memory.md").write_text("\n".join([*text, ""]))
    (output / "memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
