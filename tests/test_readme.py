"""What README.md and docs/ say is so: their code runs, and what they name exists."""

from __future__ import annotations

import dataclasses
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.run import get_args_parser
from torch.distributed.tensor import DTensor
from torch.fx.experimental.proxy_tensor import make_fx

import autodist
from autodist.passes import base
from autodist.passes.analysis.hardware import hardware
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under ``heading``, without its first two lines."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def run_in(folder: str, programs: list[str]) -> dict[str, bool]:
    """Run ``programs`` in ``folder`` as one program; which of the models it makes are sharded."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        names: dict[str, Any] = {"__name__": "readme"}
        for number, program in enumerate(programs):
            exec(compile(program, f"README block {number}", "exec", dont_inherit=True), names)
    finally:
        os.chdir(before)
    models = {n: m for n, m in names.items() if isinstance(m, nn.Module)}
    return {n: all(isinstance(p, DTensor) for p in m.parameters()) for n, m in models.items()}


@pytest.mark.distributed
def test_the_code_runs_on_two_ranks(tmp_path: Path) -> None:
    programs = blocks(README, "python")
    assert any("torch.compile(" in p for p in programs) and any("autodist.save(" in p for p in programs)
    names = ("model", "compiled", "large", "narrow", "long", "deep", "piped", "cut", "again")
    for sharded in run_ranks(run_in, 2, str(tmp_path), programs, seconds=900):
        assert sharded == dict.fromkeys(names, True)
    assert (tmp_path / "runs/mine-safetensors/model.safetensors").is_file()


def test_the_commands_exist() -> None:
    commands = [line for b in blocks(README, "sh") for line in b.splitlines()]
    commands += re.findall(r"`((?:\w+=\S+ )?make \w+)`", README)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = set()
    for command in commands:
        words = [w for w in command.split() if "=" not in w]
        seen.add(words[0])
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[0] == "torchrun":
            known = get_args_parser().format_help()
            assert all(w in known for w in words if w.startswith("--")), command
        else:
            assert words[0] == "autodist", f"a command that this test does not know: {command}"
            done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}: {done.stderr}"
    assert seen == {"make", "torchrun", "autodist"}


def test_the_plan_table_is_the_plan() -> None:
    told = [(name.strip("`"), default.strip("`")) for name, default, _ in rows(README, "The plan")]
    assert told == [(f.name, repr(f.default).replace("'", '"')) for f in dataclasses.fields(autodist.Plan)]


def test_every_name_exists() -> None:
    for page in PAGES:
        for name in re.findall(r"`(autodist(?:\.\w+)+)[`(]", page.read_text()):
            pkgutil.resolve_name(name)
    errors = {c[0].strip("`").removeprefix("autodist.") for c in rows(README, "What is refused")}
    assert errors == {n for n in autodist.__all__ if n.endswith("Error")}


def test_every_path_and_variable_exists() -> None:
    sources = [
        p.read_text() for folder in ("autodist", "runtime", "passes") for p in (ROOT / folder).rglob("*.py")
    ]
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for path in re.findall(r"`((?:autodist|passes|runtime|tests|\.ci)/[\w./]+)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for variable in re.findall(r"AUTODIST_\w+", text):
            assert any(variable in source for source in sources), f"{page.name}: {variable}"


def test_the_pass_of_the_architecture_page_works() -> None:
    [program] = blocks((ROOT / "docs/architecture.md").read_text(), "python")
    head = (
        "from dataclasses import dataclass\nfrom typing import ClassVar\nimport torch\n"
        "from torch.fx import GraphModule\nfrom autodist.passes.base import Context, Pass, Phase\n"
        "from autodist.passes.graph import replace\n"
    )
    names: dict[str, Any] = {"__name__": "architecture"}
    exec(compile(head + program, "docs/architecture.md", "exec", dont_inherit=True), names)

    traced = make_fx(lambda x: x.detach().sin(), tracing_mode="fake")(torch.ones(2))
    records: list[base.Record] = []
    context = base.Context(base.Phase.JOINT, hardware("cpu"))
    after = base.run_passes(traced, [names["DropDetach"]()], context, records)
    assert records[0].removed == {"aten.detach": 1}
    assert torch.equal(after(torch.ones(2)), torch.ones(2).sin())


def test_every_module_is_in_the_package() -> None:
    """A new folder under passes/ or runtime/ must be named in pyproject.toml, or no wheel has it."""
    listed = re.findall(r'^    "(autodist[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    folders = {
        p.parent.relative_to(ROOT) for top in ("autodist", "passes", "runtime", "kernels")
        for p in (ROOT / top).rglob("*.py")
    }  # fmt: skip
    names = {
        ".".join(f.parts) if f.parts[0] == "autodist" else ".".join(("autodist", *f.parts)) for f in folders
    }
    assert names == set(listed)
