"""From runs to numbers a person can compare: medians, paired ratios, agreement of the losses.

A *round* runs every variant once, so values of one round met the same machine. A *ratio* is formed
within a round, against that round's run of the reference variant; its spread over the rounds is
what says whether a difference is one. ``Runs`` holds, for each variant, its runs in round order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from benchmarks.worker import Measurement

Runs = dict[str, list[Measurement]]

# Rounding moves a loss by about 1e-6 of itself within some tens of steps in fp32; gradient clipping
# that one variant does and another does not moves it by 1e-4. In bfloat16 only gross errors show.
LOSS_TOLERANCE = {"float32": 3e-5, "bfloat16": 1e-2}
_MIB = 1 << 20


@dataclass(frozen=True)
class Metric:
    title: str
    unit: str
    digits: int
    of: Callable[[Measurement], float]
    compared: bool = True  # as a ratio: no use for what the reference may have none of


def _sent(*kinds: str) -> Callable[[Measurement], float]:
    return lambda run: sum(run.sent_bytes[kind] for kind in kinds) / _MIB


METRICS = {
    "step": Metric("step", "s", 3, lambda run: median(run.seconds)),
    "cpu": Metric("CPU a step", "s", 3, lambda run: median(run.cpu_seconds)),
    "peak": Metric("peak", "MiB", 1, lambda run: run.peak_bytes / _MIB),
    "live": Metric("kept", "MiB", 1, lambda run: run.live_bytes / _MIB),
    "warm_up": Metric("warm-up", "s", 1, lambda run: run.warm_up_seconds),
    "tokens": Metric("tokens", "1/s", 0, lambda run: run.step_tokens / median(run.seconds)),
    "activations": Metric("activations", "MiB", 1, lambda run: (run.peak_bytes - run.live_bytes) / _MIB),
    "all_to_all": Metric("all-to-all", "MiB", 2, _sent("all-to-all"), compared=False),
    "gathered": Metric("all-gather", "MiB", 2, _sent("all-gather"), compared=False),
    "reduced": Metric("reductions", "MiB", 2, _sent("all-reduce", "reduce-scatter"), compared=False),
}
# Those of a report on sharding, of one on stages, and of one on splitting a sequence.
SHARDING = ("step", "cpu", "peak", "live", "warm_up")
PIPELINE = ("tokens", "cpu", "peak", "live", "warm_up")
SEQUENCE = ("tokens", "cpu", "activations", "live", "all_to_all", "gathered", "reduced", "warm_up")


@dataclass(frozen=True)
class Spread:
    """Of one number over the rounds."""

    min: float
    median: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(min(values), median(values), max(values))


@dataclass(frozen=True)
class Comparison:
    """One variant over all rounds: ``values`` and ``ratios`` by name of the metric.

    ``loss_deviation`` is the largest relative difference, over all steps and rounds, from the
    reference's losses; above ``tolerance`` another model was trained.
    """

    values: dict[str, Spread]
    ratios: dict[str, Spread]
    final_loss: float
    loss_deviation: float
    tolerance: float

    def agrees(self) -> bool:
        return self.loss_deviation <= self.tolerance


def compare(
    runs: Runs, reference: str, metrics: Sequence[str] = SHARDING, dtype: str = "float32"
) -> dict[str, Comparison]:
    """Each variant beside ``reference``, over the rounds (from the first on) that both have run."""
    chosen = {name: METRICS[name] for name in metrics}
    tolerance = LOSS_TOLERANCE[dtype]
    return {variant: _beside(own, runs[reference], chosen, tolerance) for variant, own in runs.items()}


def _beside(
    own: list[Measurement], reference: list[Measurement], metrics: dict[str, Metric], tolerance: float
) -> Comparison:
    pairs = list(zip(own, reference, strict=False))
    compared = {name: m for name, m in metrics.items() if m.compared}
    return Comparison(
        values={name: Spread.of([m.of(run) for run in own]) for name, m in metrics.items()},
        ratios={name: Spread.of([m.of(a) / m.of(b) for a, b in pairs]) for name, m in compared.items()},
        final_loss=own[-1].losses[-1],
        loss_deviation=max(loss_deviation(a.losses, b.losses) for a, b in pairs),
        tolerance=tolerance,
    )


def loss_deviation(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference of two runs' losses; infinite when any loss is not a number."""
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


# --- the same two tables, on a terminal and in Markdown -------------------------------------------


def _value_rows(comparisons: dict[str, Comparison]) -> tuple[list[str], list[list[str]]]:
    metrics = {name: METRICS[name] for name in next(iter(comparisons.values())).values}
    titles = [f"{m.title}, {m.unit}" for m in metrics.values()]
    rows = [
        [
            variant,
            *(f"{c.values[name].median:.{m.digits}f}" for name, m in metrics.items()),
            f"{c.final_loss:.5f}",
            f"{c.loss_deviation:.1e}" + ("" if c.agrees() else " DISAGREES"),
        ]
        for variant, c in comparisons.items()
    ]
    return ["variant", *titles, "final loss", "loss deviation"], rows


def _ratio_rows(comparisons: dict[str, Comparison], reference: str) -> tuple[list[str], list[list[str]]]:
    rows = [
        [variant, *(_spread_text(ratio) for ratio in c.ratios.values())]
        for variant, c in comparisons.items()
        if variant != reference
    ]
    return ["variant", *(METRICS[name].title for name in comparisons[reference].ratios)], rows


def _spread_text(ratio: Spread) -> str:
    return f"{ratio.median:.3f} ({ratio.min:.3f} to {ratio.max:.3f})"


def _titled_tables(
    comparisons: dict[str, Comparison], reference: str
) -> list[tuple[str, list[str], list[list[str]]]]:
    ratios = f"Ratio to {reference} within a round: median (min to max)"
    return [
        ("Median over rounds", *_value_rows(comparisons)),
        (ratios, *_ratio_rows(comparisons, reference)),
    ]


def terminal_tables(comparisons: dict[str, Comparison], reference: str) -> list[Table]:
    tables = []
    for title, header, rows in _titled_tables(comparisons, reference):
        table = Table(title=title, box=SIMPLE)
        table.add_column(header[0], no_wrap=True)
        for cell in header[1:]:
            table.add_column(cell)
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def markdown(
    facts: dict[str, Any], comparisons: dict[str, Comparison], reference: str, notes: list[str]
) -> str:
    """The report. ``facts``: how, when, where; ``notes``: sentences on what is missing from it."""
    lines = ["# Training side by side", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [f"- {note}" for note in notes]
    for title, header, rows in _titled_tables(comparisons, reference):
        lines += ["", f"## {title}", "", _line(header), _line(["---"] * len(header))]
        lines += [_line(row) for row in rows]
    return "\n".join([*lines, ""])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def as_json(
    facts: dict[str, Any],
    runs: Runs,
    comparisons: dict[str, Comparison],
    reference: str,
    notes: list[str],
) -> dict[str, Any]:
    """Everything :func:`markdown` says, and every single run."""
    return {
        "facts": facts,
        "reference": reference,
        "notes": notes,
        "comparisons": {variant: asdict(c) for variant, c in comparisons.items()},
        "runs": {variant: [asdict(run) for run in own] for variant, own in runs.items()},
    }
