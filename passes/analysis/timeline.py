"""What a graph does with its time: a simulation with two streams.

The compute stream runs the nodes in graph order. A collective's start is issued when the compute
stream gets to it, and occupies the communication stream from then, or from when that is free; nodes
are computed meanwhile. A wait holds the compute stream until the collective is done, and a dialect
operator, which is start and wait in one, for all of its time. Hence

    seconds = compute seconds + exposed communication seconds

where exposed is the time the compute stream stood still, the end of the graph counting as a wait
for all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from autodist.passes.analysis.cost import (
    collective_bytes,
    collective_group,
    collective_kind,
    collective_seconds,
    graph_seconds,
    is_blocking_collective,
    is_collective_start,
    is_wait,
)
from autodist.passes.analysis.hardware import Hardware
from autodist.passes.analysis.liveness import liveness

COMPUTE, COMMUNICATION, STALLED = "compute", "communication", "stalled"


@dataclass(frozen=True)
class Event:
    """``name`` of the node; ``start`` and ``end`` in seconds from the graph's start.

    ``num_bytes`` is a collective's payload; for compute, what is alive.
    """

    name: str
    stream: str
    start: float
    end: float
    num_bytes: int


@dataclass(frozen=True)
class Timeline:
    """``events`` in the order of their issue, ``seconds`` from first start to last end."""

    events: tuple[Event, ...]
    seconds: float
    compute_seconds: float
    exposed_seconds: float
    peak_bytes: int

    @property
    def communication_seconds(self) -> float:
        return sum(e.end - e.start for e in self.events if e.stream == COMMUNICATION)


def simulate(
    graph: GraphModule,
    hardware: Hardware,
    group_sizes: Mapping[str, int] | Callable[[str], int],
    *,
    fused: bool = True,
) -> Timeline:
    """Predict one run of ``graph``; ``group_sizes`` gives the number of ranks of each group it
    names.

    ``fused`` as Inductor runs it, otherwise node by node. Peak bytes count the graph's inputs.
    """
    ranks = group_sizes if callable(group_sizes) else group_sizes.__getitem__
    seconds = graph_seconds(graph.graph, hardware, fused=fused)
    memory = liveness(graph, fused=fused, staged=hardware.stages_collectives)
    clock = _Clock()
    done: dict[Node, float] = {}
    for node in graph.graph.nodes:
        clock.compute(node.name, seconds[node], memory.live[node])
        if is_collective_start(node) or is_blocking_collective(node):
            size = collective_bytes(node)
            duration = collective_seconds(
                size, ranks(collective_group(node)), hardware, collective_kind(node)
            )
            done[node] = clock.communicate(node.name, duration, size)
        if is_wait(node) or is_blocking_collective(node):
            clock.wait(node.name, done.get(_start_of(node), 0.0), memory.live[node])
    clock.wait("end", clock.communication, memory.held)
    return Timeline(tuple(clock.events), clock.now, clock.computed, clock.now - clock.computed, memory.peak)


def _start_of(node: Node) -> Node:
    """The start that a wait waits for: directly, or through the item of a coalesced start."""
    while is_wait(node) or node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node


class _Clock:
    """Both streams: when each is free, and what they did."""

    def __init__(self) -> None:
        self.now = self.communication = self.computed = 0.0
        self.events: list[Event] = []

    def compute(self, name: str, duration: float, live: int) -> None:
        if duration > 0:
            self.events.append(Event(name, COMPUTE, self.now, self.now + duration, live))
            self.now += duration
            self.computed += duration

    def communicate(self, name: str, duration: float, size: int) -> float:
        """Queue a collective; when it will be done."""
        start = max(self.now, self.communication)
        self.communication = start + duration
        self.events.append(Event(name, COMMUNICATION, start, self.communication, size))
        return self.communication

    def wait(self, name: str, until: float, live: int) -> None:
        if until > self.now:
            self.events.append(Event(name, STALLED, self.now, until, live))
            self.now = until


def chrome_trace(timelines: Mapping[str, Timeline], rank_label: str) -> dict[str, Any]:
    """A trace for Perfetto (ui.perfetto.dev) or chrome://tracing, to be written as JSON.

    The timelines ("forward", "backward") follow one another in the mapping's order, on common
    tracks: one for the phases, one for each stream, and the live bytes as a counter.
    """
    tracks = {"phase": 0, COMPUTE: 1, COMMUNICATION: 2}
    labels = [_label("process_name", rank_label)]
    labels += [_label("thread_name", name, number) for name, number in tracks.items()]
    return {"traceEvents": [*labels, *_slices(timelines, tracks)], "displayTimeUnit": "ms"}


def _label(kind: str, name: str, track: int = 0) -> dict[str, Any]:
    return {"ph": "M", "pid": 0, "tid": track, "name": kind, "args": {"name": name}}


def _slices(timelines: Mapping[str, Timeline], tracks: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    offset = 0.0
    for phase, timeline in timelines.items():
        yield _slice(phase, tracks["phase"], offset, timeline.seconds, peak_bytes=timeline.peak_bytes)
        for event in timeline.events:
            start, duration = offset + event.start, event.end - event.start
            if event.stream == COMMUNICATION:
                track = tracks[COMMUNICATION]
                yield _slice(event.name, track, start, duration, bytes=event.num_bytes)
                continue
            name = event.name if event.stream == COMPUTE else f"waiting: {event.name}"
            yield _slice(name, tracks[COMPUTE], start, duration)
            counter = {"bytes": event.num_bytes}
            yield {"ph": "C", "pid": 0, "name": "live bytes", "ts": start * 1e6, "args": counter}
        offset += timeline.seconds


def _slice(name: str, track: int, start: float, duration: float, **details: int) -> dict[str, Any]:
    times = {"ts": start * 1e6, "dur": duration * 1e6}
    return {"ph": "X", "pid": 0, "tid": track, "name": name, **times, "args": details}
