"""How long the passes take on a large model: an 80-layer Llama of 70 billion parameters.

    python -m benchmarks.planning                       # 80 layers, 1x4096 tokens a rank, 64 ranks
    python -m benchmarks.planning --layers 8            # does it run?
    python -m benchmarks.planning --memory device       # within 80 GB: what the memory plan takes

The model is compiled in a dry run (no cluster, no GPU, no weights), with the decisions and the
analyses of a real one. Passes run on one thread; what is measured is that thread's time on the
processor, so a busy machine does not falsify it. The result goes to ``results/planning.md``, or, within a
bound, to ``results/planning_memory.md``: there the passes are those of the plan that was taken, and each try
of a plan is timed (the program without tiles, and with ever more of them).
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autodist import compiler
from autodist.dry_run import dry_run, token_batch
from autodist.passes.analysis.layers import folded_text, graph_text
from autodist.passes.analysis.timeline import simulate
from autodist.plan import Plan

_RESULTS = Path(__file__).parent / "results"
_BOUND = 120  # seconds that the passes may take
_MEMORY_BOUND = 60  # of a memory plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--hardware", default="h100-80g")
    parser.add_argument("--memory", help="as in a plan: 60GB, or device; there is no bound without it")
    given = parser.parse_args()

    def make_model() -> LlamaForCausalLM:
        return LlamaForCausalLM(_configuration(given.layers))

    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in make_model().parameters())
    plan = Plan(hardware=given.hardware, memory=given.memory)
    plans: list[float] = []
    start = time.thread_time()
    with mock.patch.object(compiler, "fit", _timed(compiler.fit, plans)):
        job = dry_run(make_model, lambda: token_batch(given.rows, given.length), plan, given.ranks, None)
    total = time.thread_time() - start
    (report,) = job.reports
    parts = list(report.parts.values())
    simulated = _seconds(lambda: [simulate(p, job.hardware, lambda group: given.ranks) for p in parts])
    texts = _seconds(lambda: [f(p) for p in report.parts.values() for f in (graph_text, folded_text)])
    passes = report.seconds + simulated
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = [(f"{r.name} ({r.phase.value})", r.seconds) for r in report.records]
    rows += [("simulation", simulated), ("**passes, all**", passes)]
    rows += [("Dynamo, AOTAutograd and a run on fake tensors", total - passes)]
    rows += [("texts of the two final graphs (only for artifacts)", texts)]
    rows += [(f"of these: memory plan, try {i}", seconds) for i, seconds in enumerate(plans, 1)]
    decided = [d.reason for r in report.records for d in r.decisions if d.subject == "memory"]
    nodes = {name: len(p.graph.nodes) for name, p in report.parts.items()}
    lines = [
        "# Time of the passes",
        "",
        f"Llama, {given.layers} layers, {num_parameters / 1e9:.1f} billion parameters, "
        f"{given.rows}x{given.length} tokens a rank, {given.ranks} ranks, {given.hardware}: "
        f"{' and '.join(f'{n} nodes in the {name}' for name, n in nodes.items())}.",
        "",
        f"    python -m benchmarks.planning {' '.join(sys.argv[1:])}".rstrip(),
        "",
        f"torch {torch.__version__}, one thread, at most {peak:.1f} GiB resident. The passes may take "
        f"{_BOUND} s.",
        "",
        "| step | CPU seconds |",
        "| --- | ---: |",
        *(f"| {name} | {seconds:.1f} |" for name, seconds in rows),
        *(f"\nMemory: {reason}." for reason in decided),
    ]
    print("\n".join(lines))
    _RESULTS.mkdir(exist_ok=True)
    name = "planning_memory.md" if given.memory else "planning.md"
    (_RESULTS / name).write_text("\n".join(lines) + "\n")
    if max(plans, default=0.0) > _MEMORY_BOUND:
        sys.exit(f"a memory plan took {max(plans):.0f} s, more than {_MEMORY_BOUND} s")
    if passes > _BOUND and not given.memory:
        sys.exit(f"the passes took {passes:.0f} s, more than {_BOUND} s")


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        start = time.thread_time()
        try:
            return function(*args, **options)
        finally:
            seconds.append(time.thread_time() - start)

    return timed


def _configuration(num_layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=num_layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
    )


def _seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


if __name__ == "__main__":
    main()
