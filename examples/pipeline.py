"""Train a small Llama as a pipeline: its layers shared out over ranks, its batch made in microbatches.

    torchrun --standalone --nproc-per-node 2 examples/pipeline.py
    torchrun --standalone --nproc-per-node 2 examples/pipeline.py --schedule zero-bubble --save runs/pipeline
    torchrun --standalone --nproc-per-node 2 examples/pipeline.py --steps 10 --pp 1 --resume runs/pipeline

Nobody writes a stage. The compiler cuts the model where the ranks have equally much to do, and says why
there; ``AUTODIST_ARTIFACTS=folder`` keeps that, with a picture of the schedule as planned and as it went
(``folder/rank0/pipeline*/schedule.svg``), for ``autodist inspect folder``. A checkpoint is the whole model's
and goes on under any other plan.

The text and the model are those of train_llama.py. All ranks of a pipeline are given the same rows.
"""

from __future__ import annotations

import time
from statistics import median

import torch
import torch.distributed as dist
from torch import nn
from train_llama import (
    LENGTH,
    RANK,
    RANKS,
    REPORT_EVERY,
    arguments,
    choose_device,
    make_model,
    progress,
    rows_of,
    say,
    text,
)

import autodist

ROWS = 16  # rows of text that a pipeline takes in a step


def main() -> None:
    args = arguments(
        "Train a small Llama as a pipeline.",
        steps=40,
        pp=(int, RANKS, "ranks that share the model's layers (default all)"),
        schedule=(str, "1f1b", "gpipe, 1f1b, interleaved or zero-bubble (default 1f1b)"),
    )
    device = choose_device()
    training, _ = text()
    plan = {"pp": args.pp, "schedule": args.schedule, "lowering": args.lowering}

    torch.manual_seed(0)
    model = make_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    compiled = torch.compile(model, backend="autodist", options=plan)

    def batch(step: int) -> dict[str, torch.Tensor]:
        rows = rows_of(training, ROWS, step * (RANKS // args.pp) + RANK // args.pp).to(device)
        return {"input_ids": rows, "labels": rows}

    step = 0
    if args.resume:
        autodist.prepare(model, plan, batch=batch(0))
        step = autodist.load(args.resume, model, optimizer)["step"]
    first, last, seconds = step, step + args.steps, []
    with progress(first, last) as show:
        while step < last:
            start = time.perf_counter()
            loss = compiled(**batch(step)).loss
            loss.backward()
            # A rank has the gradients of its own layers: the norm of all of them takes all ranks.
            autodist.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            seconds.append(time.perf_counter() - start)
            show(step, loss.item(), ROWS * (RANKS // args.pp) * LENGTH / median(seconds[-REPORT_EVERY:]))
    held = [0.0] * RANKS
    if dist.is_initialized():
        dist.all_gather_object(held, mebibytes(model))
    else:
        held = [mebibytes(model)]
    say(f"parameters held by the ranks: {', '.join(f'{h:.2f}' for h in held)} MiB")
    if args.save:
        autodist.save(args.save, model, optimizer, extra={"step": step})
        say(f"saved to {args.save}")
    if dist.is_initialized():
        dist.destroy_process_group()


def mebibytes(model: nn.Module) -> float:
    """Parameters that this rank holds."""
    local = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return sum(p.nbytes for p in local) / 2**20


if __name__ == "__main__":
    main()
