"""Train a small Llama with the whole step captured as one program; stop; go on where it stopped.

    torchrun --standalone --nproc-per-node 2 examples/train_step.py --steps 60 --save runs/step
    torchrun --standalone --nproc-per-node 2 examples/train_step.py --steps 20 --resume runs/step

The step is an ordinary function with a loop over microbatches, clipping and a schedule. Its Python runs at
the first call, where it makes the optimizer's state, and at the second, where it finds that state; neither
time on data. Programs are made of it, and every call runs one of them. The learning rate is an input.

The text and the model are those of train_llama.py. In a step every rank draws ``MICROBATCHES`` times
``ROWS`` rows of its own; the gradient is the mean over all of them and over ranks.
"""

from __future__ import annotations

import time
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from train_llama import (
    LENGTH,
    RANK,
    RANKS,
    REPORT_EVERY,
    arguments,
    choose_device,
    evaluate,
    make_model,
    mean_over_ranks,
    num_parameters,
    progress,
    rows_of,
    say,
    state_bytes,
    text,
)

import autodist

MICROBATCHES, ROWS = 2, 4  # microbatches a rank takes in a step; rows of text in each
WARM_UP = 10  # steps in which the learning rate rises; it falls from then on


def main() -> None:
    args = arguments("Train a small Llama with the whole step as one program.", steps=60)
    device = choose_device()
    training, held_out = text()

    torch.manual_seed(0)
    model = make_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = LambdaLR(optimizer, warm_up_and_fall)
    plan = {"lowering": args.lowering}

    @autodist.train_step(plan=plan)
    def train(
        model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR, microbatches: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=microbatches[0].device)
        for rows in microbatches:
            loss = model(input_ids=rows, labels=rows).loss / len(microbatches)
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return total, norm

    step = 0
    if args.resume:
        # Sharded first, so that every rank reads its own rows of the checkpoint and no more.
        autodist.prepare(model, plan)
        done = autodist.load(args.resume, model, optimizer)
        scheduler.load_state_dict(done["scheduler"])
        step = done["step"]
        now = evaluate(model, held_out, device)
        say(f"held-out loss {now:.4f}; it was {done['held_out']:.4f} when saved")
    say(f"{num_parameters(model) / 1e6:.1f} million parameters, {RANKS} x {device.type}, from step {step}")

    first, last, seconds = step, step + args.steps, []
    tokens = RANKS * MICROBATCHES * ROWS * LENGTH
    with progress(first, last) as show:
        while step < last:
            start = time.perf_counter()
            rows = rows_of(training, MICROBATCHES * ROWS, step * RANKS + RANK).to(device)
            loss, norm = train(model, optimizer, scheduler, list(rows.split(ROWS)))
            step += 1
            value = mean_over_ranks(loss)
            seconds.append(time.perf_counter() - start)
            show(step, value, tokens / median(seconds[-REPORT_EVERY:]))

    say(f"norm of the last gradient {norm.item():.2f}, learning rate {scheduler.get_last_lr()[0]:.1e}")
    early = f"the first {len(seconds[:2])} steps took {sum(seconds[:2]):.1f} s, most of it compilation"
    say(f"{early}; the last one {seconds[-1]:.2f} s")
    mine, whole = state_bytes(optimizer)
    say(f"a rank holds {mine:.1f} of the {whole:.1f} MiB of parameters and Adam's moments")
    held_out_loss = evaluate(model, held_out, device)
    say(f"held-out loss {held_out_loss:.4f} after {step} steps")
    if args.save:
        extra = {"step": step, "held_out": held_out_loss, "scheduler": scheduler.state_dict()}
        autodist.save(args.save, model, optimizer, extra=extra)
        say(f"saved to {args.save}")
    if dist.is_initialized():
        dist.destroy_process_group()


def warm_up_and_fall(step: int) -> float:
    """The learning rate after ``step`` steps, as a part of the highest: 1 after ``WARM_UP`` steps, then as
    the inverse root. It does not depend on when training ends, so a run can be prolonged."""
    return min((step + 1) / WARM_UP, (WARM_UP / (step + 1)) ** 0.5)


if __name__ == "__main__":
    main()
