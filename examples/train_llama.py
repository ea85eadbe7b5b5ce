"""Train a small Llama, sharded over all ranks; stop; go on with another number of ranks.

    torchrun --standalone --nproc-per-node 2 examples/train_llama.py --steps 100 --save runs/demo
    torchrun --standalone --nproc-per-node 3 examples/train_llama.py --steps 20 --resume runs/demo

The text is the source code of Python's standard library, one token a byte; the model is Hugging Face's,
built from a configuration. Nothing is downloaded.

In a step every rank draws ``ROWS`` rows of text of its own. The gradient is the mean over ranks.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import autodist

ROWS, LENGTH = 4, 128  # rows of text a rank takes in a step; bytes in a row
TEXT_BYTES = 8_000_000
REPORT_EVERY = 10  # steps, where the output is not a terminal

RANK = int(os.environ.get("RANK", "0"))  # set by torchrun
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

console = Console(quiet=RANK != 0, highlight=False, soft_wrap=True)


def main() -> None:
    args = arguments()
    device = choose_device()
    training, held_out = text()

    torch.manual_seed(0)
    model = make_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    options = {"lowering": args.lowering}
    # The one line: parameters, gradients and Adam's moments are sharded over all ranks (ZeRO-3).
    compiled = torch.compile(model, backend="autodist", options=options)

    step, done = 0, {}
    if args.resume:
        # Sharded first, so that every rank reads its own rows of the checkpoint and no more.
        autodist.prepare(model, options)
        done = autodist.load(args.resume, model, optimizer)
        step = done["step"]
    say(f"{num_parameters(model) / 1e6:.1f} million parameters, {RANKS} x {device.type}, from step {step}")
    if args.resume:
        loss = evaluate(model, held_out, device)
        say(
            f"held-out loss {loss:.4f} (ranks: {RANKS}); "
            f"it was {done['held_out']:.4f} when saved (ranks: {done['ranks']})"
        )

    last, seconds = step + args.steps, []
    with progress(step, last) as show:
        while step < last:
            start = time.perf_counter()
            batch = rows_of(training, ROWS, step * RANKS + RANK).to(device)
            loss = compiled(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            seconds.append(time.perf_counter() - start)
            show(step, mean_over_ranks(loss), RANKS * ROWS * LENGTH / median(seconds[-REPORT_EVERY:]))

    say(f"the first step took {seconds[0]:.1f} s, most of it compilation; a later one {seconds[-1]:.2f} s")
    mine, whole = state_bytes(optimizer)
    say(f"a rank holds {mine:.1f} of the {whole:.1f} MiB of parameters and Adam's moments")
    loss = evaluate(model, held_out, device)
    say(f"held-out loss {loss:.4f} after {step} steps")
    if args.save:
        extra = {"step": step, "held_out": loss, "ranks": RANKS}
        autodist.save(args.save, model, optimizer, extra=extra)
        say(f"saved to {args.save}")
    if dist.is_initialized():
        dist.destroy_process_group()


def arguments(
    description: str = "Train a small Llama on Python's own source code.",
    steps: int = 100,
    **others: tuple[type, Any, str],
) -> argparse.Namespace:
    """What all examples take, and ``others``: (type, default, help) by name."""
    parser = argparse.ArgumentParser(description=description)
    meaning = f"steps to train from here (default {steps})"
    parser.add_argument("--steps", type=int, default=steps, help=meaning)
    parser.add_argument("--save", type=Path, help="folder to write a checkpoint to, in the end")
    parser.add_argument("--resume", type=Path, help="folder to read a checkpoint from, first")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    for name, (kind, default, help_text) in others.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=help_text)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1; got {args.steps}")
    return args


def choose_device() -> torch.device:
    """An accelerator for each rank of this machine, or its share of the processor's cores."""
    if torch.cuda.device_count() >= LOCAL_RANKS:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // LOCAL_RANKS))
    return torch.device("cpu")


def make_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            use_cache=False,
        )
    )


# --- the text ----------------------------------------------------------------------------------------


def text() -> tuple[Tensor, Tensor]:
    """The first ``TEXT_BYTES`` of the standard library's source, and the last twentieth of it apart."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if "site-packages" not in path.parts:
            found += path.read_bytes()
        if len(found) >= TEXT_BYTES:
            break
    whole = torch.frombuffer(found, dtype=torch.uint8)
    cut = len(whole) * 19 // 20
    return whole[:cut], whole[cut:]


def rows_of(source: Tensor, num_rows: int, seed: int) -> Tensor:
    """Rows of ``source`` that begin anywhere: (num_rows, LENGTH) token numbers."""
    starts = torch.randint(len(source) - LENGTH, (num_rows,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([source[start : start + LENGTH] for start in starts.tolist()]).long()


# --- what is reported --------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Tensor, device: torch.device) -> float:
    """The loss on 32 rows that are never trained on, the same on every rank.

    The model runs as it is, not compiled: a sharded model gathers each weight when it reads it.
    """
    batch = rows_of(held_out, 32, seed=0).to(device)
    return model(input_ids=batch, labels=batch).loss.item()


def mean_over_ranks(loss: Tensor) -> float:
    value = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item() / RANKS


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def state_bytes(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """MiB of parameters and optimizer state: those this rank holds, and those of all ranks together."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [t for p in parameters for t in (p, *optimizer.state[p].values())]
    whole = sum(t.numel() * t.element_size() for t in tensors)
    mine = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in mine) / 2**20, whole / 2**20


def say(line: str) -> None:
    console.print(line, markup=False)


@contextmanager
def progress(first: int, last: int) -> Iterator[Callable[[int, float, float], None]]:
    """A bar on a terminal; elsewhere a line now and then. Yields ``show(step, loss, tokens a second)``."""

    def words(loss: float, speed: float) -> str:
        return f"loss {loss:.3f}   {speed:,.0f} tokens/s"

    def line(step: int, loss: float, speed: float) -> None:
        if step in (first + 1, last) or step % REPORT_EVERY == 0:
            say(f"step {step:4d} of {last}   {words(loss, speed)}")

    if not console.is_terminal or RANK != 0:
        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=last, completed=first)
        yield lambda step, loss, speed: bar.update(task, completed=step, description=words(loss, speed))


if __name__ == "__main__":
    main()
