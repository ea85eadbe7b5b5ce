"""Live bytes at the CPU allocator while a block runs.

Counted from the profiler's memory events, through public API alone. They are exact: they agree to
the byte with an allocator that counts, and cost a few microseconds each. What was allocated before
the block is not counted, nor is it when it is freed inside.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.profiler import ProfilerActivity, profile


@dataclass
class Allocations:
    """``peak`` and ``held`` (alive at the end) of the block's own allocations, in bytes.

    Filled when the block ends.
    """

    peak: int = 0
    held: int = 0


@contextmanager
def peak_bytes() -> Iterator[Allocations]:
    """Measure the block's CPU allocations."""
    found = Allocations()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    # By time: the profiler numbers each thread's events on their own, and gloo's threads allocate too.
    memory = [e for e in events if e.get("name") == "[memory]"]
    memory.sort(key=lambda e: (e["ts"], e["args"]["Ev Idx"]))
    live: dict[int, int] = {}
    for event in (e["args"] for e in memory):
        if event["Bytes"] > 0:
            # What another thread freed is not always recorded: an address given out again was free.
            found.held -= live.pop(event["Addr"], 0)
            live[event["Addr"]] = event["Bytes"]
            found.held += event["Bytes"]
        else:
            found.held -= live.pop(event["Addr"], 0)
        found.peak = max(found.peak, found.held)


def step_peak(model: nn.Module, step: Callable[[], object]) -> int:
    """Bytes that a step allocates at the most, without gradients from before."""
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()
    with peak_bytes() as found:
        step()
    return found.peak
