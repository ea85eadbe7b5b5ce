"""The comparison measures: bytes are exact, ratios are paired, and wrong losses do not pass."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import typer

from benchmarks import allocator, compare, report
from benchmarks.launch import RunFailedError, run_once
from benchmarks.worker import Measurement
from benchmarks.workload import Workload

ROOT = Path(__file__).parent.parent


def run(second: float = 1.0, losses: Sequence[float] = (2.0, 1.0), peak: int = 100) -> Measurement:
    return Measurement([second], [second], peak, 50, 1.0, list(losses), 7)


def test_ratios_pair_the_runs_of_one_round() -> None:
    # The machine is ten times slower in round 2; within each round b takes half of a's time.
    runs = {"a": [run(2.0), run(20.0), run(4.0)], "b": [run(1.0), run(10.0), run(2.0)]}
    ratio = report.compare(runs, "a")["b"].ratios["step"]
    assert ratio == report.Spread(0.5, 0.5, 0.5)


def test_a_variant_that_failed_later_is_compared_over_its_rounds() -> None:
    runs = {"a": [run(2.0), run(20.0)], "b": [run(1.0)]}
    comparisons = report.compare(runs, "a")
    assert comparisons["b"].ratios["step"] == report.Spread(0.5, 0.5, 0.5)
    assert comparisons["a"].values["step"] == report.Spread(2.0, 11.0, 20.0)


@pytest.mark.parametrize(
    ("losses", "agrees"),
    [((2.0, 1.0 + 1e-6), True), ((2.0, 1.0002), False), ((2.0, math.nan), False)],
)
def test_losses_must_agree(losses: tuple[float, float], agrees: bool) -> None:
    comparisons = report.compare({"a": [run(), run()], "b": [run(losses=losses), run()]}, "a")
    assert comparisons["b"].agrees() is agrees
    assert ("DISAGREES" in report.markdown({}, comparisons, "a", [])) is not agrees


def test_what_is_not_installed_is_skipped_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    chosen, notes = compare.choose("ddp,deepspeed-zero3")
    assert chosen == ["ddp"]
    assert notes == ["deepspeed-zero3 was skipped: deepspeed is not installed."]
    with pytest.raises(typer.BadParameter, match="No variant fsdp3; there are ddp, "):
        compare.choose("ddp,fsdp3")


COUNTING = """
import sys
from pathlib import Path
import torch
from benchmarks.allocator import CpuCounter
counter = CpuCounter(Path(sys.argv[1]))
kept = torch.empty(1000)
start = counter.live()
counter.reset_peak()
for _ in range(3):
    torch.empty(2**20, dtype=torch.uint8)
kept.untyped_storage().resize_(0)
print(counter.live() - start, counter.peak() - start)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return allocator.build(tmp_path_factory.mktemp("allocator"))


def test_every_byte_is_counted(library: Path) -> None:
    # In a process of its own: an installed allocator stays for good.
    command = [sys.executable, "-c", COUNTING, str(library)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["-4000", str(2**20)]


@pytest.mark.distributed
def test_a_failing_rank_is_reported_with_its_output(library: Path) -> None:
    tiny = Workload(hidden=8, layers=1, heads=1, intermediate=8, vocab=8)
    with pytest.raises(RunFailedError, match=r"ended without a result.*KeyError: 'no such variant'"):
        run_once("no such variant", tiny, library, timeout=120)


@pytest.mark.distributed
def test_a_run_that_takes_too_long_is_ended(library: Path) -> None:
    with pytest.raises(RunFailedError, match="no result within 1 s"):
        run_once("ddp", Workload(), library, timeout=1)


@pytest.mark.distributed
def test_the_comparison_runs_and_sharding_halves_what_stays(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    arguments = ["--quick", "--variants", "ddp,fsdp2", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.compare", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert "| fsdp2 |" in next(tmp_path.glob("*.md")).read_text()
    assert results["facts"]["command"].startswith("python -m benchmarks.compare --quick")
    assert results["facts"]["torch"] == torch.__version__

    ddp, fsdp2 = (results["runs"][name][0] for name in ("ddp", "fsdp2"))
    assert set(ddp) == set(asdict(run()))
    assert ddp["losses"] == pytest.approx(fsdp2["losses"], rel=1e-5)
    weights = 4 * ddp["parameters"]  # bytes in fp32; AdamW keeps two moments of that size
    assert ddp["live_bytes"] == pytest.approx(4 * weights, rel=0.05)  # and DDP its gradient buckets
    assert fsdp2["live_bytes"] == pytest.approx(3 * weights / 2, rel=0.05)
    for measured in (ddp, fsdp2):
        assert measured["peak_bytes"] >= measured["live_bytes"] + weights / 2  # sharded gradients
        assert min(measured["seconds"] + measured["cpu_seconds"]) > 0
