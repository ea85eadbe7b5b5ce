"""Passes take time in proportion to the model: twice the layers, twice the work."""

from __future__ import annotations

import cProfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autodist.compiler
from autodist.dry_run import dry_run
from autodist.passes.analysis.cost import bucket_bytes, collective_bytes
from autodist.passes.analysis.hardware import hardware
from autodist.plan import Plan

_OURS = {"autodist", "passes", "runtime"}


class Blocks(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(count))
        self.blocks = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x).relu()
        return x.sum()


def calls(num_layers: int, width: int) -> Counter[str]:
    """How often each of our functions is called to transform the graphs of a model.

    Calls from comprehensions and generators count too, so that work in loops shows.
    """
    profile = cProfile.Profile(builtins=False)
    partition = autodist.compiler.Compilation.partition

    def profiled(self: Any, *args: Any, **options: Any) -> Any:
        return profile.runcall(partition, self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autodist.compiler.Compilation, "partition", profiled)
        plan = Plan(hardware="h100-80g", memory="60GB")
        dry_run(lambda: Blocks(num_layers, width), lambda: torch.zeros(1, width), plan, 64, None)
    profile.create_stats()
    found: Counter[str] = Counter()
    for (file, _, name), (_, count, *_) in profile.stats.items():  # type: ignore[attr-defined]
        if Path(file).parent.name in _OURS or Path(file).parent.parent.name in _OURS:
            found[f"{Path(file).stem}.{name}"] += count
    return found


@pytest.mark.parametrize("width", [16, 8192], ids=["everything in one bucket", "a bucket a weight"])
def test_twice_the_layers_twice_the_work(width: int) -> None:
    small, middle, large = (calls(count, width) for count in (6, 12, 24))
    assert sum(large.values()) > 10_000
    # With work a + b n, what 12 more layers add is twice what 6 more add.
    excess = {
        name: (large[name] - middle[name]) / (2 * (middle[name] - small[name]))
        for name in large
        if middle[name] > small[name] and large[name] > 500
    }
    total = (large.total() - middle.total()) / (2 * (middle.total() - small.total()))
    worst = {name: round(ratio, 2) for name, ratio in excess.items() if ratio > 1.2}
    assert total < 1.05 and not worst, (total, worst)


def test_no_more_gradients_wait_for_each_other_than_a_bucket_holds() -> None:
    """Counted whole, as they are sent: each rank keeps only its part, and that is small on many ranks."""
    job = dry_run(lambda: Blocks(6, 4096), lambda: torch.zeros(1, 4096), Plan(hardware="h100-80g"), 64, None)
    nodes = list(job.reports[0].parts["backward"].graph.nodes)
    sent = [collective_bytes(n) for n in nodes if "reduce_scatter" in str(n.target)]
    assert sum(sent) > 6 * 4096 * 4096 * 4
    assert max(sent) <= bucket_bytes(64, hardware("h100-80g"))
