"""Where a forward can be cut so that little crosses: what lets a backward compute it again piece by piece.

A value computed again needs its inputs, those need theirs, and so on to something that was kept. When nothing
is kept on the way, the first value that the backward reads asks for the whole forward, and all of it is alive
at once. *Cuts* end such chains: the forward is divided into segments of about equal cost, and what crosses
from one to a later one is kept. Each cut is put where the fewest bytes cross, near its place; in a model of
layers that is between two of them.

What crosses and is cheap to make from the program's inputs (masks, rotary tables) need not be kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from autodist.passes.analysis.budget import Value

_WINDOW = 0.5  # of a segment: how far a cut may be from its place
_CHEAP = 0.1  # of a segment's cost: what may be made anew from the inputs


def crossing(values: Sequence[Value], segments: int) -> set[int]:
    """The values to keep so that nothing is computed again over more than one of so many segments."""
    cost = [v.recompute if math.isfinite(v.recompute) else 0.0 for v in values]
    total = sum(cost)
    last = list(range(len(values)))
    for i, value in enumerate(values):
        for u in value.inputs:
            last[u] = max(last[u], i)
    width = [0] * (len(values) + 1)  # bytes that cross from before a position to it or beyond
    for i, value in enumerate(values):
        if last[i] > i:
            width[i + 1] += value.num_bytes
            width[last[i] + 1] -= value.num_bytes
    done, at = [], 0.0
    for i in range(len(values)):
        width[i + 1] += width[i]
        done.append(at)
        at += cost[i]
    step, found = total / segments, set()
    for k in range(1, segments):
        near = [i for i in range(1, len(values)) if abs(done[i] - k * step) <= _WINDOW * step]
        if near:
            place = min(near, key=lambda i: (width[i], abs(done[i] - k * step)))
            found |= {u for u in range(place) if last[u] >= place and values[u].num_bytes}
    return {u for u in found if _cone(values, cost, u, _CHEAP * step) >= _CHEAP * step}


def _cone(values: Sequence[Value], cost: Sequence[float], value: int, enough: float) -> float:
    """Seconds to make a value from the program's inputs; no more than ``enough`` is counted."""
    seen, frontier, seconds = {value}, [value], 0.0
    while frontier and seconds < enough:
        i = frontier.pop()
        seconds += cost[i]
        new = [u for u in values[i].inputs if u not in seen]
        seen.update(new)
        frontier += new
    return seconds


__all__ = ["crossing"]
