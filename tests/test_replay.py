"""What a choice is said to hold, without extracting its parts, is what they hold; drafts are the parts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import autodist.compiler
from autodist.passes import memory
from autodist.passes.analysis.liveness import liveness
from autodist.passes.analysis.search import Search
from autodist.passes.base import Context
from autodist.passes.drafts import names
from tests.models import CASES
from tests.sequence import fresh
from tests.test_memory_plan import MODELS


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_peaks_of_choices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, int]] = []

    def compare(program: Any, budget: Any, context: Context, measure: Any) -> Any:
        def plain(parts: memory.Parts) -> memory.Peak:
            return memory.Peak(max(liveness(p).peak for p in parts), ())

        fit = memory._Fit(program, budget, context, plain)
        most = sum(v.num_bytes for v in fit.found.values if v.needed)
        search = Search(fit.found.values, fit.found.results, fit.replay.peak, [0])
        for way, share in itertools.product(search.ways[:3], (0.0, 0.3, 0.7)):
            least = way.least()
            choice = way.solve(int(least.device_bytes + share * (most - least.device_bytes)))
            assert names(fit._draft(choice)) == names(fit._parts(choice))
            found.append((fit.replay.peak(choice.how), fit._measured(choice).num_bytes))
        return memory.fit(program, budget, context, measure)

    fresh()
    monkeypatch.setattr(autodist.compiler, "fit", compare)
    model, batch = CASES[name].build().train(), MODELS[name]()
    out = torch.compile(model, backend="autodist", options={"lowering": "eager", "memory": "1GB"})(**batch)
    out.loss.backward()
    assert len({exact for _, exact in found}) > 3
    for replayed, exact in found:
        assert abs(replayed - exact) <= 0.05 * exact, found
