"""Examples train, within a bound or from where they stopped, or say why not; README shows a pass at work."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autodist.dry_run import dry_run, token_batch
from autodist.plan import Plan

pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def example() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        return importlib.import_module("long_context")


def run(bound: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--lowering", "eager", "--length", "1024", "--steps", "8", "--bound", bound]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["examples/long_context.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.mark.thorough
@pytest.mark.distributed
def test_it_trains_where_one_rank_has_no_room() -> None:
    done = run("22MiB")
    assert done.returncode == 0, done.stderr
    assert re.search(r"predicted for sp=1: \S+ MiB, over the bound\n", done.stdout), done.stdout
    assert re.search(r"predicted for sp=2: \S+ MiB, within the bound\n", done.stdout), done.stdout
    losses = [float(loss) for loss in re.findall(r"step +\d+ of 8   loss (\S+)   \S+ tokens/s", done.stdout)]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.3, losses
    peaks = re.search(r"peaks of the ranks: (\S+) MiB, (\S+) MiB; the bound is 22.0 MiB", done.stdout)
    assert peaks is not None and all(1 < float(peak) <= 22 for peak in peaks.groups()), done.stdout


@pytest.mark.thorough
@pytest.mark.distributed
def test_a_bound_that_is_too_small_is_refused_before_training() -> None:
    done = run("2MiB")
    assert done.returncode != 0 and "step" not in done.stdout
    told = r"a rank would hold \S+ MiB and may hold 2.0 MiB: use more ranks to a sequence \(--sp, now 2\)"
    assert re.search(told, done.stderr), done.stderr


def test_a_rank_that_holds_too_much_ends_the_training(example: Any) -> None:
    example.check_peaks([3 * 2**20, 2**20], 3 * 2**20)
    with pytest.raises(SystemExit, match=r"rank 1 held 3.5 MiB and may hold 3.0 MiB"):
        example.check_peaks([2**20, 7 * 2**19], 3 * 2**20)


def test_bytes_are_counted_at_the_allocator(example: Any) -> None:
    def allocate() -> torch.Tensor:
        first = torch.empty(3000, dtype=torch.uint8)
        del first, older[0]
        torch.empty(2**20, dtype=torch.uint8)
        return torch.empty(1000, dtype=torch.uint8)

    older = [torch.empty(5000, dtype=torch.uint8)]
    kept, peak = example.with_peak(allocate, torch.device("cpu"))
    assert kept.nbytes == 1000 and peak == 2**20


def readable(text: str) -> list[str]:
    """A graph's lines without numbers and element types, weights under their names where they are used."""
    lines = [re.sub(r"^ *\d+ +", "", line) for line in text.splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(
        r"l_self_modules_(\w+)_parameters_(\w+)_(?!\w)",
        lambda name: f"{name[1].replace('_modules_', '.')}.{name[2]}",
        "\n".join(lines),
    )
    text = re.sub(r"\b(float32|int64|bool)(?=\[)|, '0'(?=\))", "", text)
    weights = dict(re.findall(r"^(unshard\w*): .* = (?:autodist\.)?unshard\(([\w.]+)", text, re.MULTILINE))
    lines = [line for line in text.splitlines() if not line.startswith("unshard")]
    return [re.sub(r"\bunshard\w*", lambda name: weights[name[0]], line) for line in lines]


def test_readme_shows_what_the_pass_does(example: Any, tmp_path: Path) -> None:
    """README's lines are the graph's, in order; where it leaves lines out it has three dots."""
    job = dry_run(example.make_model, lambda: token_batch(1, example.LENGTH), Plan(sp=4), 4, tmp_path)
    [record] = [r for r in job.reports[0].records if r.name == "sequence_parallel"]
    assert record.before is not None and record.after is not None
    pictures = re.findall(r"^```text\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for picture, text in zip(pictures, (record.before, record.after), strict=True):
        graph = readable(text.full)
        place, skips = 0, True
        for line in picture.splitlines():
            if line == "...":
                skips = True
                continue
            assert line in graph[place:], f"not in the graph, or not here: {line}\n" + "\n".join(graph)
            found = graph.index(line, place)
            assert skips or found == place, f"README leaves out: {graph[place]}"
            place, skips = found + 1, False


def trained(program: str, ranks: int, *arguments: str) -> str:
    """What an example prints that runs to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [f"examples/{program}.py", "--lowering", "eager", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.distributed
def test_a_captured_step_trains_stops_and_goes_on(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    before = trained("train_step", 2, "--steps", "10", "--save", folder)
    first, last = (float(loss) for loss in re.findall(r"step +\d+ of 10   loss (\S+) ", before))
    assert last < first - 1, before
    after = trained("train_step", 1, "--steps", "1", "--resume", folder)
    found, wanted = re.findall(r"held-out loss (\S+); it was (\S+) when saved", after)[0]
    assert abs(float(found) - float(wanted)) < 1e-3 and "after 11 steps" in after, after
    # As after ten steps of the schedule and one more, not as after the first.
    assert "learning rate 1.8e-03" in after, after


@pytest.mark.thorough
@pytest.mark.distributed
def test_a_pipeline_trains_and_goes_on_as_something_else(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    before = trained("pipeline", 2, "--steps", "6", "--save", folder)
    first, last = (float(loss) for loss in re.findall(r"step +\d+ of 6   loss (\S+) ", before))
    assert last < first - 1, before
    held = [float(h) for h in re.findall(r"held by the ranks: (\S+), (\S+) MiB", before)[0]]
    after = trained("pipeline", 1, "--steps", "1", "--pp", "1", "--resume", folder)
    [now] = [float(loss) for loss in re.findall(r"step +7 of 7   loss (\S+) ", after)]
    assert abs(now - last) < 0.5, (before, after)
    [whole] = [float(h) for h in re.findall(r"held by the ranks: (\S+) MiB", after)]
    assert max(held) < 0.7 * whole
