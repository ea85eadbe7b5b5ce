"""One rank of one run: train one variant, and let rank 0 write what all ranks saw.

Started by :mod:`benchmarks.launch`, a fresh process a rank, with torchrun's environment variables:
``python -m benchmarks.worker VARIANT WORKLOAD_JSON RESULT_PATH [ALLOCATOR_LIBRARY]``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import memory_variants, sequence, stages
from benchmarks.allocator import CpuCounter, CudaCounter, MemoryCounter
from benchmarks.traffic import sent_bytes
from benchmarks.variants import VARIANTS, Step
from benchmarks.workload import WARM_UP_STEPS, Workload


@dataclass(frozen=True)
class Measurement:
    """One run of one variant.

    ``seconds`` (the slowest rank's) and ``cpu_seconds`` (of all ranks together) have one entry for
    each measured step; ``losses``, the mean over ranks, one for every step. ``peak_bytes`` is the
    most any rank held during the measured steps, ``live_bytes`` what the fullest rank holds between
    steps. ``warm_up_seconds``, of all steps before those, include compilation. ``sent_bytes``: what a
    rank sends in a step, by kind of collective (:mod:`benchmarks.traffic`). ``step_tokens`` are those of
    all ranks.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    peak_bytes: int
    live_bytes: int
    warm_up_seconds: float
    losses: list[float]
    parameters: int
    step_tokens: int
    sent_bytes: dict[str, int]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _timed(step: Step, tokens: Tensor, device: str) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and loss of one step that all ranks begin together."""
    dist.barrier()
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    loss = step(tokens)
    _synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu, loss.item()


def train(variant: str, workload: Workload, memory: MemoryCounter) -> Measurement:
    """Train and measure; the same result on every rank."""
    build = (VARIANTS | sequence.VARIANTS | stages.VARIANTS | memory_variants.VARIANTS)[variant].build
    model = workload.model()
    parameters = sum(p.numel() for p in model.parameters())
    step = build(model, workload)
    records = []
    *measured, extra = workload.tokens(dist.get_rank())
    for number, tokens in enumerate(measured):
        if number == WARM_UP_STEPS:
            gc.collect()
            memory.reset_peak()
        records.append(_timed(step, tokens, workload.device))
    peak = memory.peak()
    gc.collect()
    live = memory.live()
    sent = sent_bytes(lambda: step(extra), workload.ranks)
    everyone: list[Any] = [None] * workload.ranks
    dist.all_gather_object(everyone, (records, peak, live, sent))
    by_rank, peaks, lives, sents = zip(*everyone, strict=True)
    walls, cpus, losses = (
        [[record[field] for record in step_records] for step_records in zip(*by_rank, strict=True)]
        for field in range(3)
    )
    return Measurement(
        seconds=[max(ranks) for ranks in walls[WARM_UP_STEPS:]],
        cpu_seconds=[sum(ranks) for ranks in cpus[WARM_UP_STEPS:]],
        peak_bytes=max(peaks),
        live_bytes=max(lives),
        warm_up_seconds=sum(max(ranks) for ranks in walls[:WARM_UP_STEPS]),
        losses=[sum(ranks) / len(ranks) for ranks in losses],
        parameters=parameters,
        step_tokens=workload.step_tokens,
        sent_bytes={kind: max(rank[kind] for rank in sents) for kind in sent},
    )


def main(variant: str, workload_json: str, result: str, allocator: str = "") -> None:
    workload = Workload(**json.loads(workload_json))
    torch.set_num_threads(workload.threads)
    if workload.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    memory: MemoryCounter = CpuCounter(Path(allocator)) if workload.device == "cpu" else CudaCounter()
    dist.init_process_group("gloo" if workload.device == "cpu" else "nccl")
    measurement = train(variant, workload, memory)
    dist.barrier()
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(asdict(measurement)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
