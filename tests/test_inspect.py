"""``autodist inspect``: what it prints, what it refuses, and that it needs no memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autodist.cli import main
from autodist.dry_run import DryRunError, StepError, dry_run
from autodist.plan import Plan

MODEL_FILE = '''
import torch
from torch import nn


class Blocks(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(count)])
        self.embed = nn.Embedding(50, 8)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return x.square().mean()


class Breaks(Blocks):
    def forward(self, ids):
        x = self.embed(ids).sin()
        torch._dynamo.graph_break()
        return super().forward(ids) + x.mean()


class Peeks(Blocks):
    def forward(self, ids):
        return super().forward(ids) * self.blocks[0].weight.sum().item()


def make_model():
    return Blocks(5)


def make_batch(rows, length):
    return {"ids": torch.zeros(rows, length, dtype=torch.long)}


def breaks():
    return Breaks(2)


def peeks():
    return Peeks(1)


def no_model():
    return {"model": make_model()}


def fails():
    raise KeyError("a missing key")
'''


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTODIST_LOGS", "warning")


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    file = tmp_path / "train_file.py"
    file.write_text(MODEL_FILE)
    return str(file)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of a model with a graph break left: two graphs."""
    file: dict[str, Any] = {}
    exec(MODEL_FILE, file)
    folder = tmp_path_factory.mktemp("artifacts")
    dry_run(file["breaks"], lambda: file["make_batch"](2, 4), Plan(hardware="cpu"), 4, folder)
    return folder


def inspect(*arguments: str) -> int:
    """The exit code of ``autodist inspect`` with ``arguments``, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["autodist", "inspect", *arguments])
        patch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def section(text: str, title: str) -> str:
    """What stands under the heading that starts with ``title``."""
    return next(p for p in text.lstrip("\n").split("\n\n") if p.startswith(title))


def test_a_model(model_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(f"{model_file}:make_model", "--batch", "2x16", "--ranks", "16") == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text  # no colours where there is no terminal
    assert max(map(len, section(text, "parameters").splitlines())) <= 160
    assert "zero=3 dp=16" in section(text, "plan") and "hardware=h100-80g" in section(text, "plan")
    passes = section(text, "passes").splitlines()
    assert [line.split()[0] for line in passes if "part " in line][-3:] == ["bucket", "lower", "overlap"]
    forward = section(text, "forward part after overlap")
    assert "x 5: nodes" in forward and "# blocks.*.weight" in forward
    parameters = section(text, "parameters").splitlines()
    (row,) = (line.split() for line in parameters if "blocks.*.weight" in line)
    assert row[1:6] == ["5", "float32[1,", "8]", "512", "B"]  # eight rows, padded to sixteen
    assert "all_gather" in section(text, "collectives of the forward")
    assert "reduce_scatter" in section(text, "collectives of the backward")
    prediction = section(text, "prediction, a step on 16 ranks")
    assert "gradients and optimizer state" in prediction


def test_after_a_pass(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(str(artifacts), "--after", "merge_reads") == 0
    joint = section(capsys.readouterr().out, "joint after merge_reads")
    assert "autodist.unshard(" in joint and "all_gather" not in joint


def test_why(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(str(artifacts), "--graph", "1", "--why", "blocks.1") == 0
    decisions = section(capsys.readouterr().out, "decisions on 'blocks.1'").splitlines()[2:]
    (row,) = (line for line in decisions if "regathered" in line)
    assert row.split()[0] == "blocks.1.weight"
    assert "no memory bound leaves room" in row and "partition (joint)" in row
    assert all(line.split()[0].startswith("blocks.1") for line in decisions)


def test_an_artifact_folder(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(str(artifacts), "--graph", "0") == 0
    text = capsys.readouterr().out
    assert "graphs (showing 0)" in text and "hardware=cpu" in text
    assert inspect(str(artifacts / "rank0" / "graph0")) == 0
    assert "aten.sin" in capsys.readouterr().out
    for arguments, sentence in (
        (("--graph", "7"), "there is no graph '7'; there are: 0, 1"),
        (("--rank", "3"), "has no artifacts of rank 3; it has those of 0"),
        (("--after", "fusing"), "no pass called 'fusing' was applied; these were: "),
        (("--why", "nowhere"), "nothing was decided on a parameter or node with 'nowhere'"),
    ):
        assert inspect(str(artifacts), *arguments) == 2
        assert sentence in capsys.readouterr().err


def test_from_the_shell(artifacts: Path) -> None:
    """Another process, without a terminal: the longest of the graphs, and no colours."""
    command = [sys.executable, "-m", "autodist", "inspect", str(artifacts)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0 and not ran.stderr
    assert "graphs (showing 1)" in ran.stdout and "\x1b" not in ran.stdout


@pytest.mark.parametrize(
    ("target", "options", "code", "sentence"),
    [
        ("missing.py:make_model", ["--batch", "2x4"], 2, "there is no file 'missing.py'"),
        ("FILE", ["--batch", "2x4"], 2, "say which function of"),
        ("FILE:nothing", ["--batch", "2x4"], 2, "has no function 'nothing'; it has "),
        ("FILE:make_model", [], 2, "as 4x512; got nothing"),
        ("FILE:make_model", ["--batch", "2by4"], 2, "as 4x512; got '2by4'"),
        ("FILE:make_model", ["--batch", "0x4"], 2, "as 4x512; got '0x4'"),
        ("FILE:make_model", ["--batch", "2x4", "--hardware", "abacus"], 2, "no hardware called 'abacus'"),
        ("FILE:make_model", ["--batch", "2x4", "--plan", "no.json"], 2, "cannot read the plan file"),
        ("FILE:no_model", ["--batch", "2x4"], 1, "returned dict, not a torch.nn.Module"),
        ("FILE:fails", ["--batch", "2x4"], 1, "failed with KeyError: 'a missing key' (at "),
        ("FILE:peeks", ["--batch", "2x4"], 1, "asks for the values of a tensor"),
        ("nowhere", [], 2, "there is no folder 'nowhere'"),
        (".", [], 2, "holds no artifacts"),
    ],
)
def test_what_it_refuses(
    target: str,
    options: list[str],
    code: int,
    sentence: str,
    model_file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert inspect(target.replace("FILE", model_file), *options) == code
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.startswith("autodist: ")
    assert "Traceback" not in captured.err and not captured.out


def test_a_folder_without_artifacts_from_the_shell(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "autodist", "inspect", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 2 and "holds no artifacts" in ran.stderr


def test_weights_take_no_memory() -> None:
    """A model of 10 TB, with tied weights, a buffer, and a weight kept in a second place."""

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(1_000_000, 1_000_000)
            self.mix = nn.Linear(1_000_000, 1_000_000, bias=False)
            self.head = nn.Linear(1_000_000, 1_000_000)
            self.head.weight = self.table.weight
            self.register_buffer("scale", torch.ones(1_000_000))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.mix(self.table(ids)) * self.scale).mean()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = torch.zeros(1, 4, dtype=torch.long)
    job = dry_run(Large, lambda: ids, Plan(hardware="h100-80g"), 1024, None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # 1 GiB, in KiB
    (report,) = job.reports
    gathered = next(r for r in report.records if r.name == "partition").decisions
    assert {d.subject for d in gathered} == {"table.weight", "mix.weight"}


def test_one_rank() -> None:
    job = dry_run(lambda: nn.Linear(4, 4), lambda: (torch.zeros(2, 4),), Plan(hardware="cpu"), 1, None)
    assert job.plan.zero == 0 and set(job.reports[0].parts) == {"forward", "backward"}


def test_what_a_dry_run_refuses() -> None:
    plan = Plan(hardware="cpu")
    with pytest.raises(DryRunError, match="no parameters"):
        dry_run(nn.ReLU, lambda: torch.zeros(2), plan, 2, None)
    with pytest.raises(StepError, match="nothing that depends on its parameters"):
        frozen = nn.Embedding(3, 3).requires_grad_(False)
        dry_run(lambda: frozen, lambda: torch.zeros(2).long(), plan, 2, None)
    with pytest.raises(StepError, match=r"failed with TypeError: .*missing 1 required"):
        dry_run(lambda: nn.Linear(2, 2), lambda: (), plan, 2, None)
