"""The longest sequence that fits, and what the plan does on the way there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from autodist.dry_run import DryRunError
from autodist.inspect import show_lengths
from autodist.longest import Length, longest
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


def test_the_answer_lies_between_what_fits_and_what_does_not(found: list[Length]) -> None:
    fits, fails = ([f.length for f in found if f.fits is kind] for kind in (True, False))
    assert max(fits) < min(fails) <= max(fits) + max(fits) // 16 + 1
    assert all(f.peak <= 2**20 for f in found if f.fits)
    assert all(f.needed > 2**20 for f in found if not f.fits)


def test_choices_change_on_the_way(found: list[Length]) -> None:
    by_length = sorted((f for f in found if f.fits), key=lambda f: f.length)
    assert by_length[0].made != by_length[-1].made
    assert any("tiles" in how for how, _ in by_length[-1].made)


def test_without_a_bound() -> None:
    with pytest.raises(DryRunError, match="no bound on memory"):
        tried(None, 16)


def test_the_table(found: list[Length], tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        show_lengths(Console(file=file, width=160), found)
    text = (tmp_path / "out").read_text()
    assert f"longest that fits: {max(f.length for f in found if f.fits)}" in text
    assert "would do" in text and "tiles" in text
