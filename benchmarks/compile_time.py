"""How much compiling with autodist costs beyond compiling with Inductor.

    python -m benchmarks.compile_time [--rounds N]

The model of :mod:`benchmarks.workload` takes its first step twice a round, each time in a fresh process with
a cold cache: compiled by Inductor alone, and by autodist as the first of two ranks that do not exist (their
collectives return at once, so communication is not in the figures). Reported: the ratio of the first steps,
and autodist's own seconds (passes, partition, simulation) as a share of Inductor's compile time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks.workload import Workload

_RESULT = Path(__file__).parent / "results" / "compile_time.md"


def first_step(kind: str) -> dict[str, float]:
    """Seconds of the first step in this process, and of autodist's part in them."""
    from autodist.runtime import compat

    torch.set_num_threads(1)
    workload = Workload()
    model, tokens = workload.model(), workload.tokens(0)[0]
    if kind == "inductor":
        return {"step": _timed(torch.compile(model), tokens), "own": 0.0}
    with compat.fake_ranks(2):
        step = _timed(torch.compile(model, backend="autodist"), tokens)
        job = next(model.parameters())._autodist_job  # type: ignore[attr-defined]
        return {"step": step, "own": sum(report.seconds for report in job.reports)}


def _timed(compiled: torch.nn.Module, tokens: torch.Tensor) -> float:
    start = time.perf_counter()
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    return time.perf_counter() - start


def _in_fresh_process(kind: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "AUTODIST_LOGS": "error"}
        command = [sys.executable, "-m", "benchmarks.compile_time", "--measure", kind]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(output.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=["inductor", "autodist"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(first_step(arguments.measure)))
        return
    rounds = [(_in_fresh_process("inductor"), _in_fresh_process("autodist")) for _ in range(arguments.rounds)]
    rows = {
        "first step, Inductor (s)": [a["step"] for a, _ in rounds],
        "first step, autodist (s)": [b["step"] for _, b in rounds],
        "ratio of first steps": [b["step"] / a["step"] for a, b in rounds],
        "autodist's own part (s)": [b["own"] for _, b in rounds],
        "own part / Inductor's first step": [b["own"] / a["step"] for a, b in rounds],
    }
    lines = [
        "# Compile time",
        "",
        f"`python -m benchmarks.compile_time --rounds {arguments.rounds}`, {date.today()}, torch "
        f"{torch.__version__}, {os.cpu_count()} cores. Llama, 25M parameters, cold cache, paired rounds.",
        "",
        "| | median | min | max |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {statistics.median(v):.2f} | {min(v):.2f} | {max(v):.2f} |" for name, v in rows.items()
    ]
    text = "\n".join(lines) + "\n"
    _RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
