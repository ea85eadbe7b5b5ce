"""The comparison measures: bytes held and sent are exact, ratios are paired, wrong losses do not pass."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import typer

from benchmarks import allocator, compare, memory, report
from benchmarks.launch import RunFailedError, run_once
from benchmarks.memory_curve import Mark, picture
from benchmarks.traffic import sent_bytes
from benchmarks.variants import VARIANTS
from benchmarks.worker import Measurement
from benchmarks.workload import Workload
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent


def run(second: float = 1.0, losses: Sequence[float] = (2.0, 1.0), peak: int = 100) -> Measurement:
    sent = {"all-to-all": 2**20, "all-gather": 0, "reduce-scatter": 2**20, "all-reduce": 2**21}
    return Measurement([second], [second], peak, 50, 1.0, list(losses), 7, 600, sent)


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
    chosen, notes = compare.choose("ddp,deepspeed-zero3", VARIANTS)
    assert list(chosen) == ["ddp"]
    assert notes == ["deepspeed-zero3 was skipped: deepspeed is not installed."]
    with pytest.raises(typer.BadParameter, match="No variant fsdp3; there are ddp, "):
        compare.choose("ddp,fsdp3", VARIANTS)


def test_a_report_on_sequences_has_tokens_and_bytes_sent() -> None:
    comparisons = report.compare({"a": [run()], "b": [run(2.0)]}, "a", report.SEQUENCE)
    medians = {name: spread.median for name, spread in comparisons["b"].values.items()}
    assert medians["tokens"] == 300
    assert medians["activations"] == 50 / 2**20
    assert (medians["all_to_all"], medians["gathered"], medians["reduced"]) == (1, 0, 3)
    # One rank sends nothing: there is no ratio to it.
    assert list(comparisons["b"].ratios) == ["tokens", "cpu", "activations", "live", "warm_up"]
    assert "| b | 300 | 2.000 |" in report.markdown({}, comparisons, "a", [])


def test_the_bound_of_ulysses() -> None:
    sizes = Workload(hidden=8, layers=1, heads=4, kv_heads=2, batch=1, sequence=8, ranks=2, sp=2)
    # 4 positions of 4 + 2 + 2 + 4 heads of 2 numbers of 4 bytes, half of it sent, forward and backward.
    assert sizes.ulysses_bytes == 4 * 12 * 2 * 4 // 2 * 2
    # On 4 ranks each head of keys and values is needed twice.
    four = Workload(hidden=8, layers=1, heads=4, kv_heads=2, batch=1, sequence=8, ranks=4, sp=4)
    assert four.ulysses_bytes == 2 * 16 * 2 * 4 * 3 // 4 * 2


def _collectives() -> None:
    x, half = torch.zeros(8, 4), torch.zeros(2, 4, dtype=torch.bfloat16)
    dist.all_to_all_single(torch.empty(8, 4), x)
    dist.all_gather_into_tensor(torch.empty(16, 4), x)
    dist.all_gather([torch.empty(2), torch.empty(2)], torch.zeros(2))
    dist.reduce_scatter_tensor(torch.empty(1, 4, dtype=torch.bfloat16), half)
    dist.all_reduce(half)
    dist.barrier()


def _sent_by_collectives() -> dict[str, int]:
    return sent_bytes(_collectives, 2)


@pytest.mark.distributed
def test_what_collectives_send_is_counted() -> None:
    expected = {"all-to-all": 64, "all-gather": 128 + 8, "reduce-scatter": 8, "all-reduce": 16}
    assert run_ranks(_sent_by_collectives, 2) == [expected | {"broadcast": 0, "send": 0}] * 2


def _sent_in_training() -> tuple[dict[str, int], int]:
    sizes = Workload(
        hidden=32, layers=2, heads=4, kv_heads=1, intermediate=64, vocab=64, sequence=16, sp=2, steps=1
    )
    model = sizes.model()
    options = {"sp": 2, "zero": 0, "lowering": "eager"}
    compiled = torch.compile(model, backend="autodist", options=options)
    tokens, again, *_ = sizes.tokens(dist.get_rank())
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    sent = sent_bytes(lambda: compiled(input_ids=again, labels=again).loss.backward(), 2)
    return sent, sizes.ulysses_bytes


@pytest.mark.distributed
def test_a_sharded_sequence_sends_what_ulysses_does() -> None:
    pytest.importorskip("transformers")
    for sent, bound in run_ranks(_sent_in_training, 2):
        assert sent["all-to-all"] == bound
        assert sent["reduce-scatter"] == 0  # weights are whole, gradients all-reduced
        assert sent["all-gather"] <= 64  # fingerprints of the batch


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


@pytest.mark.thorough
@pytest.mark.distributed
def test_a_captured_step_is_compared_with_a_compiled_optimizer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    arguments = ["--quick", "--steps", "1", "--variants", "fsdp2-compile-step,autodist-step-zero3"]
    command = [sys.executable, "-m", "benchmarks.compare", *arguments, "--output", str(tmp_path)]
    eager = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # but for the captured step, which needs no Dynamo
    done = subprocess.run(command, cwd=ROOT, env=eager, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr  # it fails where losses disagree
    results = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert set(results["runs"]) == {"fsdp2-compile-step", "autodist-step-zero3"}


@pytest.mark.thorough
@pytest.mark.distributed
def test_the_overhead_of_a_captured_step_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = ["--layers", "1", "--lowering", "eager", "--rounds", "1", "--calls", "2"]
    command = [sys.executable, "-m", "benchmarks.step_overhead", *sizes, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "step_overhead.md").read_text()
    assert "lowering eager" in text
    # 12 parameters of one layer and what is around it, 3 moments of each, 2 buffers, a rate and the tokens.
    assert text.count(f"| {12 * 4 + 2 + 2} | ") == 2


@pytest.mark.distributed
def test_a_pipelines_bubble_and_overhead_are_measured(tmp_path: Path) -> None:
    sizes = ["--ranks", "2", "--microbatches", "3", "--unit", "2", "--runs", "1"]
    command = [sys.executable, "-m", "benchmarks.pipeline", *sizes, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "pipeline.md").read_text()
    assert text.count("\n| ") == 2 + 5 and "| interleaved | 2 | 14.3% | 14.3% | " in text


@pytest.mark.distributed
@pytest.mark.thorough
def test_the_comparison_of_stages_runs(tmp_path: Path) -> None:
    """Stages by hand, equal layers and the chosen cut train the same model."""
    pytest.importorskip("transformers")
    variants = "torch-equal-layers,autodist-pp-equal-layers"
    arguments = ["pipeline", "--quick", "--steps", "1", "--variants", variants, "--output", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.compare", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr  # it fails where losses disagree
    results = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert set(results["runs"]) == set(variants.split(","))


@pytest.mark.thorough
@pytest.mark.distributed
def test_the_comparison_of_sequences_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    variants = "single,manual-ulysses-fsdp2,context-parallel-fsdp2"
    arguments = ["sequence", "--quick", "--variants", variants, "--output", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.compare", *arguments]
    eager = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # what is compiled elsewhere
    done = subprocess.run(command, cwd=ROOT, env=eager, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    results = json.loads(next(tmp_path.glob("*-sequence-cpu-2ranks.json")).read_text())
    single, ulysses = (results["runs"][name][0] for name in ("single", "manual-ulysses-fsdp2"))
    assert single["losses"] == pytest.approx(ulysses["losses"], rel=1e-5)
    assert single["step_tokens"] == ulysses["step_tokens"]
    assert not any(single["sent_bytes"].values())
    assert ulysses["sent_bytes"]["all-to-all"] == Workload(**results["facts"]["workload"]).ulysses_bytes
    # torch has no ring for attention on a CPU: the report is complete without it, and says so.
    skipped = any(note.startswith("context-parallel-fsdp2 was skipped:") for note in results["notes"])
    assert skipped is ("context-parallel-fsdp2" not in results["runs"])


# --- memory and time -------------------------------------------------------------------------------


def point(variant: str, peak: int, second: float, budget: float = 0.0) -> memory.Point:
    return memory.Point(variant, budget, [run(second, peak=peak)])


def test_who_is_fastest_within_a_bound() -> None:
    others = [point("compile", 100, 1.0), point("checkpoint", 50, 1.3), point("torch-budget", 60, 1.2, 0.4)]
    names = [memory.fastest_within(bound, others) for bound in (100, 70, 55, 40)]
    assert [p and p.title for p in names] == ["compile", "torch-budget 0.4", "checkpoint", None]


def test_the_curve_is_measured_at_the_others_peaks() -> None:
    bounds: list[float] = []

    def measured(variant: str, workload: Workload) -> Measurement:
        if variant != "autodist":
            return run(peak={"compile": 100, "eager-checkpoint": 60}.get(variant, 80))
        bounds.append(workload.budget)
        return run(peak=int(workload.budget) or 100)

    points = memory.curve(measured, Workload(), 2)
    assert bounds[:6] == [0.0, 100, 80, 60, 50 + 0.85 * 10, 50 + 0.7 * 10]
    assert all(len(p.runs) == 2 for p in points)
    text = "\n".join(memory.curve_text(points))
    assert "| autodist in 0.0 MiB |" in text and "| nothing fits |" in text


@pytest.mark.parametrize("limit", [30, 700, 1000, 5000])
def test_the_longest_is_found_to_a_sixteenth(limit: int) -> None:
    found = memory.longest(lambda length: length <= limit, 512)
    assert found <= limit < found + max(found // 16, 1) + 1 or (limit < 32 and found == 0)


def test_a_picture_has_a_mark_for_each_point() -> None:
    marks = [Mark("autodist", 40.0, 1.4), Mark("autodist", 60.0, 1.0), Mark("compile", 60.0, 1.01)]
    assert picture(marks).count("<circle") == len(marks) + 2
