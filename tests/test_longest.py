"""The longest sequence that fits, and what the plan does on the way there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from autodist.dry_run import DryRunError, dry_run
from autodist.inspect import show_lengths
from autodist.longest import Length, _Formula, _formula, longest
from autodist.passes.analysis.lengths import LENGTH, ByLength, NoFormulaError, Sample
from autodist.plan import Plan

VOCAB, WIDTH = 16, 16


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(F.silu(self.up(x)))
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def ids(rows: int, length: int) -> Tensor:
    return torch.zeros(rows, length, dtype=torch.long)


def tried(memory: str | None, length: int) -> list[Length]:
    return list(longest(Model, ids, Plan(memory=memory, hardware="cpu"), 2, 2, length))


@pytest.fixture(scope="module")
def found() -> list[Length]:
    return tried("1MiB", 1024)


@pytest.mark.thorough
def test_the_answer_lies_between_what_fits_and_what_does_not(found: list[Length]) -> None:
    fits, fails = ([f.length for f in found if f.fits is kind] for kind in (True, False))
    assert max(fits) < min(fails) <= max(fits) + max(fits) // 16 + 1
    assert all(f.peak <= 2**20 for f in found if f.fits)
    assert all(f.needed > 2**20 for f in found if not f.fits)


@pytest.mark.thorough
def test_choices_change_on_the_way(found: list[Length]) -> None:
    by_length = sorted((f for f in found if f.fits), key=lambda f: f.length)
    assert by_length[0].made != by_length[-1].made
    assert any("tiles" in how for how, _ in by_length[-1].made)


@pytest.fixture(scope="module")
def formula() -> _Formula:
    made = _formula(Model, ids, Plan(memory="1MiB", hardware="cpu"), 2, 2, 256)
    assert made is not None
    return made


def test_the_formula_says_what_a_compiled_program_says(formula: _Formula) -> None:
    """At a length that it has not seen: candidates, costs, and the peak of what min-cut saves."""
    samples: list[Sample] = []
    plan = Plan(memory="1MiB", hardware="cpu")
    dry_run(Model, lambda: ids(2, 704), plan, 2, None, loss_only=True, samples=samples)
    assert len(formula.programs) == len(samples) > 1  # without tiles and with them
    for program, seen in zip(formula.programs, samples, strict=True):
        for said, is_so in zip(program.values(704), seen.found.values, strict=True):
            assert said.num_bytes == is_so.num_bytes and said.inputs == is_so.inputs
            for cost in ("recompute", "save", "offload"):
                assert getattr(said, cost) == pytest.approx(getattr(is_so, cost))
        as_is = program.as_is(704)
        assert as_is.peak == seen.replay.peak(seen.as_is) + seen.correction
        assert program.peak(as_is.choice.how, 704).subs(LENGTH, 704) == as_is.peak
        seconds = program.seconds(as_is.choice.how).subs(LENGTH, 704)
        assert float(seconds) == pytest.approx(as_is.choice.seconds)


def test_a_choice_fits_up_to_a_root_of_its_peak(formula: _Formula) -> None:
    program = formula.programs[0]
    how = program.as_is(256).choice.how
    last = program.until(how, 256)
    peak = program.peak(how, 256)
    assert peak.subs(LENGTH, last) <= program.first.room < peak.subs(LENGTH, last + 1)


def test_sizes_that_are_no_polynomials_are_refused(formula: _Formula) -> None:
    program = formula.programs[0]
    odd = program.samples[3].replay.sizes.copy()
    odd[odd.argmax()] += 1
    broken = replace(program.samples[3], replay=program.samples[3].replay.resized(odd))
    with pytest.raises(NoFormulaError, match="no polynomial"):
        ByLength(program.lengths, [*program.samples[:3], broken], program.hardware)


def test_without_a_bound() -> None:
    with pytest.raises(DryRunError, match="no bound on memory"):
        tried(None, 16)


@pytest.mark.thorough
def test_the_table(found: list[Length], tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        show_lengths(Console(file=file, width=160), found)
    text = (tmp_path / "out").read_text()
    assert f"longest that fits: {max(f.length for f in found if f.fits)}" in text
    assert "would do" in text and "tiles" in text
