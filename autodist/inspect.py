"""Print what was done to a graph, from its artifact folder (see :mod:`autodist.artifacts`).

    plan        resolved
    passes      in order, with what each changed
    graph       after a pass, repeated layers shown once
    parameters  when each is gathered, used and released
    collectives what travels when
    prediction  time and memory

Tables are folded like graphs: parameters whose names differ in numbers only, and are treated
alike, share a row; collectives that come in repeated series are shown once.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from autodist.longest import Length
from autodist.passes.analysis.layers import Repeat, common_text, fold
from autodist.passes.analysis.stages import StagePlan
from autodist.passes.base import size_text
from autodist.stage_map import show_stages

_SHOWN_BUFFERS, _SHOWN_NAMES = 6, 2


class InspectError(ValueError):
    """There is nothing to show; the message says what is missing and what there is."""


class Artifacts:
    """One graph's artifact folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name.removeprefix("graph")

    @functools.cached_property
    def plan(self) -> dict[str, Any]:
        return self._json("plan.json")

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        return self._json("summary.json")

    @functools.cached_property
    def passes(self) -> list[dict[str, Any]]:
        return self._json("passes.json")

    @functools.cached_property
    def decisions(self) -> list[dict[str, Any]]:
        return self._json("decisions.json")

    @property
    def seconds(self) -> float:
        return sum(p["seconds"] for p in self.summary["parts"].values())

    def folded(self, file: str) -> str:
        return (self.folder / "folded" / file).read_text()

    def _json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


def find_artifacts(folder: Path, rank: int = 0) -> list[Artifacts]:
    """The graphs in an artifact folder: the top one, one rank's, or one graph's own.

    Raises :class:`InspectError` when there are none.
    """
    if not folder.is_dir():
        raise InspectError(f"there is no folder '{folder}'")
    if (folder / "summary.json").exists():
        return [Artifacts(folder)]
    ranks = sorted(int(p.name[4:]) for p in folder.glob("rank*") if p.name[4:].isdigit())
    if ranks and rank not in ranks:
        have = ", ".join(map(str, ranks))
        raise InspectError(f"'{folder}' has no artifacts of rank {rank}; it has those of {have}")
    place = folder / f"rank{rank}" if ranks else folder
    found = [Artifacts(p.parent) for p in sorted(place.glob("*graph*/summary.json"), key=_number)]
    if not found:
        raise InspectError(
            f"'{folder}' holds no artifacts: it should be what AUTODIST_ARTIFACTS was when the "
            "model was compiled"
        )
    return found


def _number(path: Path) -> list[int]:
    return [int(n) for n in reversed(re.findall(r"\d+", path.parent.name))]


def choose_graph(found: Sequence[Artifacts], name: str | None) -> Artifacts:
    """The graph called ``name``, or the one predicted to take longest."""
    if name is None:
        return max(found, key=lambda a: a.seconds)
    for artifacts in found:
        if artifacts.name == name:
            return artifacts
    have = ", ".join(a.name for a in found)
    raise InspectError(f"there is no graph {name!r}; there are: {have}")


def show_lengths(console: Console, found: Sequence[Length]) -> None:
    """Print what a plan does at each length, and the longest that fits."""
    table = _table(">length", ">peak", ">a step", "what the plan does", "by the formula")
    for one in sorted(found, key=lambda f: f.length):
        does = ", ".join(f"{n} {how}" for how, n in one.made) or "saves all that min-cut saves"
        if one.fits:
            table.add_row(str(one.length), size_text(one.peak), _time(one.seconds), does, one.because)
        else:
            would = f"does not fit: {size_text(one.needed)} would do"
            table.add_row(str(one.length), "", "", would, one.because)
    _print_table(console, table)
    best = max((f.length for f in found if f.fits), default=None)
    _heading(console, "no length that was tried fits" if best is None else f"longest that fits: {best}")


# --- everything ----------------------------------------------------------------------------------


def show(console: Console, found: Sequence[Artifacts], graph: Artifacts, after: str | None) -> None:
    """Print ``graph``, one of ``found``, with its text after the pass ``after`` (default: last)."""
    texts = _texts(graph, after)
    _show_stages(console, graph)
    _heading(console, "plan")
    _print(console, "  " + " ".join(f"{k}={v}" for k, v in graph.plan.items() if v is not None))
    if len(found) > 1:
        _heading(console, f"graphs (showing {graph.name})")
        for one in found:
            nodes = sum(p["nodes"] for p in one.summary["parts"].values())
            _print(console, f"  {one.name}: {nodes} nodes, {_time(one.seconds)}")
    _show_passes(console, graph)
    for title, text in texts:
        _heading(console, title)
        _print(console, text.rstrip("\n"))
    if graph.summary["parameters"]:
        _show_parameters(console, graph.summary["parameters"])
    for name, part in graph.summary["parts"].items():
        _show_collectives(console, name, part["collectives"])
    _show_prediction(console, graph.summary)


def show_reasons(console: Console, graph: Artifacts, name: str) -> None:
    """Print all decisions on what has ``name`` in its name, and when such parameters travel.

    Raises :class:`InspectError` when there are none.
    """
    decisions = [d for d in graph.decisions if name in d["subject"]]
    parameters = {n: p for n, p in graph.summary["parameters"].items() if name in n}
    if not decisions and not parameters:
        subjects = list(dict.fromkeys(d["subject"] for d in graph.decisions))
        raise InspectError(
            f"nothing was decided on a parameter or node with {name!r} in its name; decisions were "
            f"made on {_names(subjects) or 'nothing'}"
        )
    _heading(console, f"decisions on {name!r}")
    table = _table("subject", "decision", "reason", "pass")
    for decision in decisions:
        made_by = f"{decision['pass']} ({decision['phase']})"
        table.add_row(decision["subject"], decision["action"], decision["reason"], made_by)
    _print_table(console, table)
    if parameters:
        _show_parameters(console, parameters)


def _texts(graph: Artifacts, after: str | None) -> list[tuple[str, str]]:
    """(title, folded text) of the graph after a pass: one for each part it was applied to."""
    kept = {(p["phase"], p["name"]): p["graph"] for p in graph.passes if p["graph"]}
    if after is None:
        last = {phase: name for phase, name in kept}
        phases = [p for p in last if p.endswith("part")] or list(last)[-1:]
        wanted = [(phase, last[phase]) for phase in phases]
    else:
        wanted = [key for key in kept if key[1] == after]
    if after is not None and not wanted:
        have = ", ".join(dict.fromkeys(name for _, name in kept))
        raise InspectError(f"no pass called {after!r} was applied; these were: {have}")
    return [(f"{phase} after {name}", graph.folded(kept[phase, name])) for phase, name in wanted]


def _show_stages(console: Console, graph: Artifacts) -> None:
    """How the programs of the graph's rank were cut into pipeline stages, where they were."""
    for folder in sorted(graph.folder.parent.glob("*pipeline*")):
        _heading(console, f"stages of {folder.name} (a picture of the schedule: {folder / 'schedule.svg'})")
        show_stages(console, StagePlan.from_json((folder / "stages.json").read_text()))


# --- tables --------------------------------------------------------------------------------------


def _show_passes(console: Console, graph: Artifacts) -> None:
    _heading(console, f"passes ({graph.summary['pass_seconds']:.2f} s)")
    table = _table("pass", "on", ">seconds", "operators")
    for step in graph.passes:
        changed = [f"+{n} {op}" for op, n in step["added"].items()]
        changed += [f"-{n} {op}" for op, n in step["removed"].items()]
        table.add_row(step["name"], step["phase"], f"{step['seconds']:.3f}", ", ".join(changed))
    _print_table(console, table)


def _show_parameters(console: Console, parameters: Mapping[str, Any]) -> None:
    _heading(console, "parameters (the positions are those of the first in a row)")
    rows: dict[Any, list[str]] = {}
    for name, parameter in parameters.items():
        events = [*parameter["gathers"], *parameter["reductions"]]
        alike = tuple((e["part"], e["num_bytes"], e["release"] is None) for e in events)
        key = (re.sub(r"\d+", "*", name), parameter["shard"], alike)
        rows.setdefault(key, []).append(name)
    table = _table(
        "parameter",
        ">count",
        "shard",
        ">whole",
        "gathered: start, wait, release",
        "reduced: start, wait",
    )
    for (_, shard, _), names in rows.items():
        first = parameters[names[0]]
        whole = max((e["num_bytes"] for e in first["gathers"]), default=None)
        table.add_row(
            common_text(names),
            str(len(names)),
            shard,
            "" if whole is None else size_text(whole),
            "; ".join(map(_gather, first["gathers"])) or "none",
            "; ".join(f"{e['part']} {e['start']}, {e['wait']}" for e in first["reductions"])
            or "none",
        )
    _print_table(console, table)


def _gather(event: Mapping[str, Any]) -> str:
    release = "kept" if event["release"] is None else event["release"]
    return f"{event['part']} {event['start']}, {event['wait']}, {release}"


def _show_collectives(console: Console, part: str, events: Sequence[Mapping[str, Any]]) -> None:
    if not events:
        return
    total = sum(e["num_bytes"] for e in events)
    _heading(console, f"collectives of the {part}: {len(events)}, {size_text(total)}")
    table = _table(">start", ">wait", "kind", ">bytes", ">ranks", ">tensors", "of")
    keys = [(e["kind"], e["num_bytes"], e["num_ranks"], len(e["payloads"])) for e in events]
    for row in _collective_rows(fold(keys), events, [0], ""):
        table.add_row(*row)
    _print_table(console, table)


def _collective_rows(
    items: Sequence[int | Repeat],
    events: Sequence[Mapping[str, Any]],
    offsets: Sequence[int],
    indent: str,
) -> Iterator[list[str]]:
    for item in items:
        if isinstance(item, Repeat):
            yield ["", "", f"{indent}x {item.count}:", "", "", "", ""]
            copies = [o + i * item.period for i in range(item.count) for o in offsets]
            yield from _collective_rows(item.body, events, copies, indent + "  ")
        else:
            event = events[item]
            waits = [p["wait"] for p in event["payloads"]]
            copies_names = [
                _names([p["parameter"] or "a value" for p in events[item + o]["payloads"]])
                for o in offsets
            ]
            yield [
                str(event["start"]),
                str(min(waits)),
                indent + event["kind"],
                size_text(event["num_bytes"]),
                str(event["num_ranks"]),
                str(len(event["payloads"])),
                common_text(copies_names),
            ]


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown}, {len(names) - _SHOWN_NAMES} more"


def _show_prediction(console: Console, summary: Mapping[str, Any]) -> None:
    parts = summary["parts"]
    ranks = summary["num_ranks"]
    _heading(console, f"prediction, a step on {ranks} rank{'s' if ranks > 1 else ''}")
    table = _table("part", ">time", ">compute", ">communication", ">exposed", ">peak", "at")
    for name, part in parts.items():
        times = ("seconds", "compute_seconds", "communication_seconds", "exposed_seconds")
        at = f"{part['peak_node']} ({part['peak_position']} of {part['nodes']})"
        table.add_row(name, *(_time(part[t]) for t in times), size_text(part["peak_bytes"]), at)
    _print_table(console, table)
    name, part = max(parts.items(), key=lambda item: item[1]["peak_bytes"])
    table = _table(f"alive at the peak of the {name}", ">count", ">bytes")
    for buffers in part["live_at_peak"][:_SHOWN_BUFFERS]:
        table.add_row(buffers["kind"], str(buffers["count"]), size_text(buffers["bytes"]))
    rest = part["live_at_peak"][_SHOWN_BUFFERS:]
    if rest:
        count, size = sum(b["count"] for b in rest), sum(b["bytes"] for b in rest)
        table.add_row(f"{len(rest)} more kinds", str(count), size_text(size))
    _print_table(console, table)
    resident = summary["resident_bytes"]
    seconds = sum(p["seconds"] for p in parts.values())
    _print(
        console,
        f"  {_time(seconds)} and {size_text(part['peak_bytes'] + resident)} in all, "
        f"{size_text(resident)} of it gradients and optimizer state outside the graph",
    )


# --- how things look -----------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    """A table without lines; a heading that starts with '>' aligns its column to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=right,
        )
    return table


def _print_table(console: Console, table: Table) -> None:
    with console.capture() as captured:
        console.print(Padding(table, (0, 0, 0, 2)))
    for line in captured.get().splitlines():
        console.out(line.rstrip(), highlight=False)


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold", highlight=False, markup=False, soft_wrap=True)


def _print(console: Console, text: str) -> None:
    """Lines as they are: neither wrapped nor coloured."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"
