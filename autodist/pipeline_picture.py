"""What the ranks of a pipeline do with their time, as a picture and as a Chrome trace.

Both show several *timelines* ("planned", "measured") one above the other: of each rank, its actions from
start to end (:class:`~autodist.runtime.schedules.Span`), in seconds. A timeline starts at its first action.
In the picture each fills the width, so that shapes can be compared where speeds differ, and says how long it
is and how much of it ranks stand still. A computation is a rectangle with its microbatch's number, in the
colour of its kind, paler for a rank's later stages; a transfer that takes time is a line below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from autodist.runtime.schedules import Span, Step, bubble

Timelines = Mapping[str, Sequence[Sequence[Span]]]

_WIDTH, _LEFT, _RIGHT = 1200, 64, 16  # of the picture, and of its margins, in pixels
_ROW, _BAR, _HEAD, _AXIS = 24, 18, 34, 30  # heights: of a rank, its rectangles, a timeline's title, its axis
_DIGIT = 6.5  # the width of one
_TICKS = 8  # at the most, on an axis

_COLOURS = {
    Step.FORWARD: (76, 120, 168),
    Step.BACKWARD: (228, 87, 46),
    Step.BACKWARD_INPUT: (238, 150, 60),
    Step.BACKWARD_WEIGHT: (84, 140, 90),
}
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#222}.title{font-size:13px;font-weight:600}"
    ".number{font-size:10px;fill:#fff;text-anchor:middle;pointer-events:none}"
    ".rank{text-anchor:end}.tick{text-anchor:middle;fill:#666}"
    ".grid{stroke:#ddd}.transfer{stroke:#888;stroke-width:2}"
)


def picture(timelines: Timelines) -> str:
    """An SVG that needs no other file; what a rectangle stands for is told where the pointer rests on it."""
    parts: list[str] = []
    top = float(_HEAD)
    parts += _legend(timelines)
    for name, ranks in timelines.items():
        parts += _timeline(name, ranks, top)
        top += _HEAD + len(ranks) * _ROW + _AXIS
    size = f'width="{_WIDTH}" height="{top:g}" viewBox="0 0 {_WIDTH} {top:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{_STYLE}</style>'
    paper = '<rect class="paper" width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head, paper, *parts, "</svg>\n"])


def _legend(timelines: Timelines) -> Iterator[str]:
    shown = {s.action.step for ranks in timelines.values() for spans in ranks for s in spans}
    x = float(_LEFT)
    for step in _COLOURS:
        if step in shown:
            yield f'<circle cx="{x + 6:g}" cy="20" r="6" fill="{_colour(step, 0, 1)}"/>'
            yield f'<text x="{x + 17:g}" y="24">{step.value}</text>'
            x += 40 + _DIGIT * len(step.value)


def _timeline(name: str, ranks: Sequence[Sequence[Span]], top: float) -> Iterator[str]:
    start, seconds = _extent(ranks)
    scale = (_WIDTH - _LEFT - _RIGHT) / seconds
    title = f"{name}: {_time(seconds)}, bubble {bubble(ranks):.1%}"
    yield f'<text class="title" x="{_LEFT}" y="{top + 22:g}">{escape(title)}</text>'
    top += _HEAD
    bottom = top + len(ranks) * _ROW
    for tick in _ticks(seconds):
        x = _LEFT + tick * scale
        yield f'<line class="grid" x1="{x:.2f}" y1="{top:g}" x2="{x:.2f}" y2="{bottom:g}"/>'
        yield f'<text class="tick" x="{x:.2f}" y="{bottom + 14:g}">{_time(tick)}</text>'
    for rank, spans in enumerate(ranks):
        y = top + rank * _ROW
        yield f'<text class="rank" x="{_LEFT - 8}" y="{y + 14:g}">rank {rank}</text>'
        stages = sorted({s.action.stage for s in spans})
        for span in spans:
            x, width = _LEFT + (span.start - start) * scale, (span.end - span.start) * scale
            number = stages.index(span.action.stage)
            yield from _drawn(span, x, y, width, _colour(span.action.step, number, len(stages)))


def _drawn(span: Span, x: float, y: float, width: float, colour: str) -> Iterator[str]:
    told = f"<title>{escape(f'{span.action}: {_time(span.end - span.start)}')}</title>"
    if span.action.step.is_transfer:
        if width > 0:
            line = f'x1="{x:.2f}" y1="{y + _BAR + 2:g}" x2="{x + width:.2f}" y2="{y + _BAR + 2:g}"'
            yield f'<line class="transfer" {line}>{told}</line>'
        return
    box = f'x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{_BAR}"'
    yield f'<rect class="action" {box} fill="{colour}" stroke="#fff" stroke-width="0.5">{told}</rect>'
    number = str(span.action.microbatch)
    if width > _DIGIT * len(number) + 2:
        yield f'<text class="number" x="{x + width / 2:.2f}" y="{y + 13:g}">{number}</text>'


def _colour(step: Step, number: int, count: int) -> str:
    """That of a kind of action, paler for the later of a rank's ``count`` stages."""
    pale = 0.45 * number / max(1, count - 1)
    red, green, blue = (round(c + (255 - c) * pale) for c in _COLOURS.get(step, (136, 136, 136)))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _extent(ranks: Sequence[Sequence[Span]]) -> tuple[float, float]:
    """When a timeline starts, and how long it is; never zero."""
    spans = [s for spans in ranks for s in spans]
    start = min((s.start for s in spans), default=0.0)
    return start, max((s.end for s in spans), default=0.0) - start or 1.0


def _ticks(seconds: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(seconds / _TICKS))
    step = next(power * f for f in (1, 2, 5, 10) if seconds / (power * f) <= _TICKS)
    return [n * step for n in range(int(seconds / step * (1 + 1e-9)) + 1)]


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size or seconds == 0:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-6:.4g} µs"


def trace(timelines: Timelines) -> dict[str, Any]:
    """For Perfetto (ui.perfetto.dev) or chrome://tracing, to be written as JSON: a process for each timeline,
    a track for each rank's computations and, where they take time, one for its transfers."""
    events: list[dict[str, Any]] = []
    for process, (name, ranks) in enumerate(timelines.items()):
        events.append(_label("process_name", name, process))
        start, _ = _extent(ranks)
        for rank, spans in enumerate(ranks):
            tracks = {2 * rank: f"rank {rank}"}
            for span in spans:
                duration = span.end - span.start
                if span.action.step.is_transfer and duration == 0:
                    continue
                track = 2 * rank + span.action.step.is_transfer
                tracks.setdefault(track, f"rank {rank} transfers")
                where = {"pid": process, "tid": track}
                times = {"ts": (span.start - start) * 1e6, "dur": duration * 1e6}
                details = {"stage": span.action.stage, "microbatch": span.action.microbatch}
                events.append({"ph": "X", **where, "name": str(span.action), **times, "args": details})
            events += [_label("thread_name", text, process, track) for track, text in tracks.items()]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _label(kind: str, name: str, process: int, track: int = 0) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": track, "name": kind, "args": {"name": name}}
