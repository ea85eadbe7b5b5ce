"""Pictures and traces of pipeline timelines: whole, and true to what they are given."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from autodist.pipeline_picture import picture, trace
from autodist.runtime.schedules import Action, Span, Step, schedule, timeline

SVG = "{http://www.w3.org/2000/svg}"


def spans(kind: str, transfer: float = 0.0, scale: float = 1e-3) -> list[list[Span]]:
    def seconds(action: Action) -> float:
        if action.step.is_transfer:
            return transfer * scale
        return scale * (2 if action.step is Step.BACKWARD else 1)

    return timeline(schedule(kind, 2, 4 if kind != "1f1b" else 2, 3).lists, seconds)


def test_a_rectangle_for_each_computation() -> None:
    timelines = {"planned": spans("interleaved"), "measured <here>": spans("interleaved", 0.25, 0.7)}
    root = ElementTree.fromstring(picture(timelines))
    boxes = [r for r in root.iter(f"{SVG}rect") if r.get("class") == "action"]
    computed = [
        (name, rank, s)
        for name, ranks in timelines.items()
        for rank, each in enumerate(ranks)
        for s in each
        if not s.action.step.is_transfer
    ]
    assert len(boxes) == len(computed) == 2 * 2 * 4 * 3
    extents = {name: max(s.end for each in ranks for s in each) for name, ranks in timelines.items()}
    rows: dict[tuple[str, int], set[str | None]] = {}
    for box, (name, rank, span) in zip(boxes, computed, strict=True):
        told = box.find(f"{SVG}title")
        assert told is not None and told.text is not None
        assert told.text.startswith(f"{span.action}: ")
        rows.setdefault((name, rank), set()).add(box.get("y"))
        x, width = float(box.get("x", "")), float(box.get("width", ""))
        assert x - 64 == pytest.approx(1120 * span.start / extents[name], abs=0.02)
        assert width == pytest.approx(1120 * (span.end - span.start) / extents[name], abs=0.02)
    assert all(len(ys) == 1 for ys in rows.values()) and len(set.union(*rows.values())) == 4
    lines = [r for r in root.iter(f"{SVG}line") if r.get("class") == "transfer"]
    assert len(lines) == sum(s.action.step.is_transfer for each in timelines["measured <here>"] for s in each)
    titles = [t.text for t in root.iter(f"{SVG}text") if t.get("class") == "title"]
    assert titles[0] == "planned: 21 ms, bubble 14.3%" and str(titles[1]).startswith("measured <here>: ")


def test_what_is_short_or_empty_is_drawn_too() -> None:
    for timelines in ({}, {"planned": [[]]}, {"planned": [[Span(Action(Step.FORWARD, 0, 0), 5.0, 5.0)]]}):
        ElementTree.fromstring(picture(timelines))
        json.dumps(trace(timelines))


def test_a_trace_has_a_track_for_each_rank() -> None:
    timelines = {"planned": spans("zero-bubble"), "measured": spans("1f1b", 0.25)}
    events = json.loads(json.dumps(trace(timelines)))["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {
        (0, 0): "rank 0",
        (0, 2): "rank 1",
        (1, 0): "rank 0",
        (1, 1): "rank 0 transfers",
        (1, 2): "rank 1",
        (1, 3): "rank 1 transfers",
    }
    slices = [e for e in events if e["ph"] == "X"]
    first = next(e for e in slices if e["name"] == "gradients of inputs of microbatch 0 on stage 3")
    assert first["ts"] == pytest.approx(5000) and first["dur"] == pytest.approx(1000)
    assert first["args"] == {"stage": 3, "microbatch": 0} and (first["pid"], first["tid"]) == (0, 2)
    drawn = sum(not s.action.step.is_transfer for ranks in timelines.values() for each in ranks for s in each)
    moved = sum(s.action.step.is_transfer for each in timelines["measured"] for s in each)
    assert len(slices) == drawn + moved
