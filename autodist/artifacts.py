"""The artifact directory: what was done to each graph, as files a person can read.

With ``AUTODIST_ARTIFACTS=DIR`` set, each compilation writes ``DIR/rank<r>/graph<n>/``:

    plan.json         the resolved plan
    summary.json      predicted time and memory, collectives, when each parameter is gathered
    passes.json       the passes in order: seconds, operators added and removed, their graph's file
    decisions.json    what each pass decided, of which parameter or node, and why
    trace.json        the predicted schedule, for ui.perfetto.dev or chrome://tracing
    graphs/           the graph before the first pass and after each one, numbered
    folded/           the same with repeated layers shown once

With pipelines ``DIR/rank<r>/pipeline<n>/`` says how each program was cut:

    stages.json       the stages, what they cost, what they send, and why they begin where they do; a plan's
                      ``cuts`` may name it, edited
    schedule.svg      the planned timelines of the ranks, and after a run that was recorded the measured ones
    schedule.json     the same as a trace

The same files go to torch's structured trace (``TORCH_TRACE=DIR``), where tlparse finds them.

A graph's folder appears whole or not at all: it is written beside its place and then renamed. An
earlier run's folder is replaced. Graphs of a process's second prepared model and later ones are in
``job<k>-graph<n>``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.fx import GraphModule, Node

from autodist.logs import log
from autodist.passes.analysis.layers import node_type, operator_name
from autodist.passes.analysis.liveness import liveness
from autodist.passes.analysis.stages import StagePlan
from autodist.passes.analysis.timeline import Timeline, chrome_trace
from autodist.passes.analysis.traffic import collectives
from autodist.passes.base import Record
from autodist.pipeline_picture import Timelines, picture, trace
from autodist.runtime import compat

if TYPE_CHECKING:
    from autodist.compiler import GraphReport
    from autodist.job import Job

_ALL = 1_000_000  # more buffers than a graph has
_SHOWN_TENSORS = 3  # of a node that makes several


def artifact_folder() -> Path | None:
    """Where artifacts go, or None when nobody asked for them."""
    folder = os.environ.get("AUTODIST_ARTIFACTS")
    return Path(folder) if folder else None


def write_graph(
    job: Job, report: GraphReport, parameters: Mapping[int, str], resident: int
) -> None:
    """Write what was done to one graph, to the job's folder and to torch's structured trace.

    ``parameters`` maps the captured graph's inputs, by position, to parameter names; ``resident``
    counts the bytes of gradients and optimizer state, which live outside the graph.
    """
    files = _files(job, report, parameters, resident)
    name = f"graph{report.number}"
    if job.artifacts is not None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        place = name if job.number == 0 or job.dry_run else f"job{job.number}-{name}"
        try:
            _write(job.artifacts / f"rank{rank}" / place, files)
        except OSError as error:
            log.warning("cannot write artifacts, and go on without them: %s", error)
    for path, text in files.items():
        if not path.startswith("folded/"):
            _trace(f"autodist_{name}_{path.replace('/', '_')}", text)


def write_pipeline(job: Job, number: int, plan: StagePlan, timelines: Timelines) -> None:
    """Write how a program was cut into stages, and when ranks do what."""
    if job.artifacts is None:
        return
    rank = dist.get_rank() if dist.is_initialized() else 0
    files = {
        "stages.json": plan.to_json(),
        "schedule.svg": picture(timelines),
        "schedule.json": json.dumps(trace(timelines)),
        "plan.json": job.plan.to_json(),
    }
    place = f"pipeline{number}" if job.number == 0 or job.dry_run else f"job{job.number}-pipeline{number}"
    try:
        _write(job.artifacts / f"rank{rank}" / place, files)
    except OSError as error:
        log.warning("cannot write artifacts, and go on without them: %s", error)


def _files(
    job: Job, report: GraphReport, parameters: Mapping[int, str], resident: int
) -> dict[str, str]:
    """Every file by its path in the graph's folder."""
    steps = _Steps(report.records)
    parts = {
        name: _part(part, report.timelines[name], job, parameters)
        for name, part in report.parts.items()
    }
    summary = {
        "graph": report.number,
        "num_ranks": 1 if job.mesh is None else job.mesh.size(),
        "pass_seconds": report.seconds,
        "resident_bytes": resident,
        "parts": parts,
        "parameters": _parameters(report.parts, parts, parameters),
    }
    rank = f"rank {dist.get_rank() if dist.is_initialized() else 0}"
    decisions = [
        {"pass": r.name, "phase": r.phase.value, **asdict(d), "means": d.means and d.means.value}
        for r in report.records
        for d in r.decisions
    ]
    return {
        "plan.json": job.plan.to_json(),
        "summary.json": json.dumps(summary, indent=1),
        "passes.json": json.dumps(steps.table, indent=1),
        "decisions.json": json.dumps(decisions, indent=1),
        "trace.json": json.dumps(chrome_trace(report.timelines, rank)),
        **steps.texts,
    }


class _Steps:
    """The passes' table, and the graphs' texts by path."""

    def __init__(self, records: list[Record]) -> None:
        self.table: list[dict[str, Any]] = []
        self.texts: dict[str, str] = {}
        last = None
        for record in records:
            phase = record.phase.value
            if record.before is not None and phase != last:
                self._add(phase.replace(" ", "_"), record.before.full, record.before.folded)
                last = phase
            file = None
            if record.after is not None:
                name = f"{phase.replace(' ', '_')}-{record.name}"
                file = self._add(name, record.after.full, record.after.folded)
            self.table.append(
                {
                    "name": record.name,
                    "phase": phase,
                    "seconds": record.seconds,
                    "added": dict(record.added),
                    "removed": dict(record.removed),
                    "graph": file,
                }
            )

    def _add(self, name: str, full: str, folded: str) -> str:
        file = f"{len(self.texts) // 2:02}-{name}.txt"
        self.texts |= {f"graphs/{file}": full, f"folded/{file}": folded}
        return file


def _part(
    graph: GraphModule, timeline: Timeline, job: Job, parameters: Mapping[int, str]
) -> dict[str, Any]:
    """The numbers of one scheduled graph."""
    memory = liveness(graph, fused=job.plan.lowering == "inductor", top=_ALL)
    made_by = {n.name: n for n in graph.graph.nodes}
    alive: dict[str, list[int]] = defaultdict(list)
    for buffer in memory.top:
        alive[_kind(made_by[buffer.name])].append(buffer.num_bytes)
    return {
        "nodes": len(graph.graph.nodes),
        "seconds": timeline.seconds,
        "compute_seconds": timeline.compute_seconds,
        "communication_seconds": timeline.communication_seconds,
        "exposed_seconds": timeline.exposed_seconds,
        "peak_bytes": memory.peak,
        "peak_node": memory.peak_node.name,
        "peak_position": list(made_by).index(memory.peak_node.name),
        "live_at_peak": [
            {"kind": kind, "count": len(sizes), "bytes": sum(sizes)}
            for kind, sizes in sorted(alive.items(), key=lambda item: -sum(item[1]))
        ],
        "collectives": [asdict(c) for c in collectives(graph, parameters, job.group_sizes)],
    }


def _kind(node: Node) -> str:
    """What a buffer is, alike for the same buffer of another layer."""
    made = "input" if node.op == "placeholder" else operator_name(node)
    return f"{made} {node_type(node, _SHOWN_TENSORS)}"


def _parameters(
    graphs: Mapping[str, GraphModule], parts: Mapping[str, Any], parameters: Mapping[int, str]
) -> dict[str, Any]:
    """Of each parameter its shard, and when it is gathered, used, released and reduced."""
    found: dict[str, dict[str, Any]] = {}
    for graph in graphs.values():
        for node in graph.graph.find_nodes(op="placeholder"):
            name = parameters.get(compat.placeholder_index(node), "")  # type: ignore[arg-type]
            if name and isinstance(node.meta.get("val"), compat.FakeTensor):
                found.setdefault(name, {"shard": node_type(node), "gathers": [], "reductions": []})
    for part, numbers in parts.items():
        for collective in numbers["collectives"]:
            events = "gathers" if collective["kind"] == "all_gather" else "reductions"
            for payload in collective["payloads"]:
                if payload["parameter"] in found:
                    event = {"part": part, "start": collective["start"], **payload}
                    del event["parameter"]
                    found[payload["parameter"]][events].append(event)
    return found


# --- writing -------------------------------------------------------------------------------------


def _write(folder: Path, files: Mapping[str, str]) -> None:
    """Make ``folder`` hold ``files`` and nothing else."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    for path, text in files.items():
        (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / path).write_text(text)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def _trace(name: str, text: str) -> None:
    stem, suffix = os.path.splitext(name)  # tlparse gives its files a suffix of its own
    compat.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": stem, "encoding": "json" if suffix == ".json" else "string"},
        payload_fn=lambda: text,
    )
