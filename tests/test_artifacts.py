"""The artifact directory: complete, each rank's own, whole or absent, and true."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autodist
from autodist.artifacts import _write
from autodist.dry_run import dry_run
from autodist.runtime import compat
from tests.ranks import run_ranks

PLAN = {"lowering": "eager", "hardware": "cpu"}
FILES = ["decisions.json", "passes.json", "plan.json", "summary.json", "trace.json"]


class Blocks(nn.Module):
    """Residual blocks, with rows that do not divide by the number of ranks."""

    def __init__(self, count: int = 3, width: int = 6) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(width, 9), nn.ReLU(), nn.Linear(9, width)) for _ in range(count)]
        self.blocks = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


def read(folder: Path) -> dict[str, Any]:
    return {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}


def train(artifacts: str | None, steps: int = 1) -> None:
    os.environ.pop("AUTODIST_ARTIFACTS", None)
    if artifacts is not None:
        os.environ["AUTODIST_ARTIFACTS"] = artifacts
    torch.manual_seed(0)
    model = Blocks()
    autodist.prepare(model, PLAN)
    compiled = torch.compile(model, backend="autodist")
    try:
        for _ in range(steps):
            compiled(torch.randn(2 + dist.get_rank(), 6)).sum().backward()
    finally:
        os.environ.pop("AUTODIST_ARTIFACTS", None)


def dry(artifacts: Path | None, blocks: int = 1) -> None:
    plan = autodist.Plan.make(PLAN)
    dry_run(lambda: Blocks(blocks), lambda: torch.zeros(2, 6), plan, 2, artifacts)


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three blocks' one graph, from a dry run on two ranks."""
    folder = tmp_path_factory.mktemp("dry")
    dry(folder, blocks=3)
    return folder / "rank0" / "graph0"


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.distributed
def test_two_ranks_write_what_a_dry_run_predicts(tmp_path: Path, predicted: Path) -> None:
    run_ranks(train, 2, str(tmp_path / "real"))
    # The workers are kept, so this need not have been their first model.
    (real,) = (tmp_path / "real" / "rank0").iterdir()
    (other,) = (tmp_path / "real" / "rank1").iterdir()
    assert tree(real) == tree(other) == tree(predicted)
    assert [name for name in tree(real) if "/" not in name] == FILES
    here, there, dried = read(real), read(other), read(predicted)
    assert here["plan"]["dp"] == 2
    assert here["decisions"] == there["decisions"] == dried["decisions"]
    assert here["summary"]["parts"] == dried["summary"]["parts"]
    assert here["summary"]["parameters"] == dried["summary"]["parameters"]
    # Five rows on two ranks are three and two; the wire carries the same.
    assert here["summary"]["parameters"]["blocks.0.0.weight"]["shard"] == "float32[5, 6]"
    assert there["summary"]["parameters"]["blocks.0.0.weight"]["shard"] == "float32[4, 6]"


def test_contents(predicted: Path) -> None:
    found = read(predicted)
    summary, parts = found["summary"], found["summary"]["parts"]
    assert set(parts) == {"forward", "backward"}
    assert set(summary["parameters"]) == {n for n, _ in Blocks().named_parameters()}
    for name, parameter in summary["parameters"].items():
        forward = [g for g in parameter["gathers"] if g["part"] == "forward"]
        assert len(forward) == 1, name
        for event in parameter["gathers"]:
            assert event["start"] < event["wait"] < event["use"] <= event["release"], name
        (reduction,) = parameter["reductions"]
        assert reduction["part"] == "backward" and reduction["start"] < reduction["wait"], name
    weight = summary["parameters"]["blocks.1.2.weight"]
    assert {g["num_bytes"] for g in weight["gathers"]} == {6 * 9 * 4}
    assert [g["part"] for g in weight["gathers"]] == ["forward", "backward"]
    # Positions are those of the last text of each part.
    lines = {
        p["phase"]: (predicted / "graphs" / p["graph"]).read_text().splitlines()
        for p in found["passes"]
        if p["graph"]
    }
    for name, part in parts.items():
        nodes = [line for line in lines[f"{name} part"] if not line.lstrip().startswith("#")]
        assert len(nodes) == part["nodes"]
        for collective in part["collectives"]:
            assert f"{collective['start']}  {collective['name']}:" in nodes[collective["start"]]
        assert part["peak_node"] in nodes[part["peak_position"]]
        assert sum(b["bytes"] for b in part["live_at_peak"]) == part["peak_bytes"]
    # Passes in order, each with its graph; the graph before the first one too.
    assert [p["name"] for p in found["passes"]][-3:] == ["bucket", "lower", "overlap"]
    named = [p["graph"] for p in found["passes"] if p["graph"]]
    texts = sorted(p.name for p in (predicted / "graphs").iterdir())
    assert texts == sorted(p.name for p in (predicted / "folded").iterdir())
    assert set(named) <= set(texts) and texts[0] == "00-captured.txt"
    lowered = next(p for p in found["passes"] if p["name"] == "lower")
    assert lowered["added"]["_c10d_functional.wait_tensor"] == 14
    tracks = {e["args"]["name"] for e in found["trace"]["traceEvents"] if e["ph"] == "M"}
    assert {"rank 0", "compute", "communication"} <= tracks


def test_nothing_is_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dry(None)
    assert tree(tmp_path) == []


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "graph0"
    _write(folder, {"a.json": "1", "graphs/b.txt": "old"})
    written = Path.write_text

    def fails(self: Path, text: str) -> int:
        if self.name == "b.txt":
            raise OSError("No space left on device")
        return written(self, text)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fails)
        with pytest.raises(OSError, match="No space"):
            _write(folder, {"a.json": "2", "graphs/b.txt": "new"})
    assert (folder / "a.json").read_text() == "1"
    _write(folder, {"a.json": "2"})
    assert tree(folder) == ["a.json"] and (folder / "a.json").read_text() == "2"


def test_a_full_disk_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    logger = logging.getLogger("autodist")
    logger.addHandler(caplog.handler)
    try:
        dry(blocked)
    finally:
        logger.removeHandler(caplog.handler)
    assert "cannot write artifacts, and go on without them" in caplog.text


def test_structured_trace(tmp_path: Path) -> None:
    """What tlparse reads: the same files, as artifacts of the compilation."""
    assert not compat.structured_trace_enabled()
    program = "from tests.test_artifacts import dry; dry(None)"
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=240)
    (log,) = tmp_path.iterdir()
    artifacts = {}
    for entry in re.split(r"^V\d", log.read_text(), flags=re.M)[1:]:
        header, *payload = entry.splitlines()
        metadata = json.loads(header[header.index("{") :])
        artifact = metadata.get("artifact", {"name": ""})
        if artifact["name"].startswith("autodist_"):
            assert metadata["frame_id"] == 0
            text = "\n".join(line.removeprefix("\t") for line in payload)
            artifacts[artifact["name"]] = (artifact["encoding"], text)
    stems = {Path(name).stem for name in FILES}
    assert {f"autodist_graph0_{stem}" for stem in stems} <= set(artifacts)
    encoding, text = artifacts["autodist_graph0_summary"]
    assert encoding == "json" and json.loads(text)["num_ranks"] == 2
    encoding, text = artifacts["autodist_graph0_graphs_00-captured"]
    assert encoding == "string" and "relu" in text
