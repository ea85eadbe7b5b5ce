"""A plan of pipeline stages as a table for people.

    stage  from       to     parameters  forward  backward  transfer   memory  sends
    0      embedding  add_9     1.2 MiB   3.1 ms    6.0 ms    0.2 ms  8.1 MiB  add_9 (64.0 KiB, and gradients)
    ...

then what the schedule takes, how even it is, and why each stage begins where it does.
"""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autodist.passes.analysis.stages import CutValue, StagePlan
from autodist.passes.base import size_text

_SHOWN = 4  # sent values that are named


def show_stages(console: Console, plan: StagePlan) -> None:
    """Print ``plan``: its stages, its balance, and the reason of every cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("stage", "from", "to"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "forward", "backward", "transfer", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("sends", overflow="fold")
    for number, stage in enumerate(plan.stages):
        sent = plan.stages[number + 1].receives if number + 1 < len(plan.stages) else ()
        table.add_row(
            str(number),
            _place(stage.first, stage.first_line),
            _place(stage.last, stage.last_line),
            size_text(stage.parameter_bytes),
            _time(stage.forward),
            _time(stage.backward),
            _time(stage.forward_transfer + stage.backward_transfer),
            size_text(stage.memory),
            Text(_values(sent)),
        )
    console.print(Padding(table, (0, 0, 0, 2)))
    console.print()
    pace = f"the slowest stage takes {plan.balance:.2f} times the mean"
    _print(console, f"  {plan.microbatches} microbatches in {_time(plan.seconds)}; {pace}")
    for name, why in zip(plan.cuts, plan.why, strict=False):
        _print(console, f"  at '{name}': {why}")


def _place(name: str, line: str) -> Text:
    """A node, and the file and line it comes from where that is known."""
    parts = line.split('"')
    if len(parts) < 3:
        return Text(name)
    file, number = parts[1].rsplit("/", 1)[-1], parts[2].split(",")[1].split()[-1]
    return Text(f"{name} ({file}:{number})")


def _values(values: tuple[CutValue, ...]) -> str:
    named = [f"{v.name} ({size_text(v.num_bytes)}{', and gradients' if v.gradient else ''})" for v in values]
    more = len(named) - _SHOWN
    return ", ".join(named[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _print(console: Console, text: str) -> None:
    """A line as it is: neither wrapped nor coloured."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
