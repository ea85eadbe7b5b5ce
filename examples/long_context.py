"""Train a small Llama on sequences too long for the memory of one rank, split over the ranks.

    torchrun --standalone --nproc-per-node 4 examples/long_context.py
    torchrun --standalone --nproc-per-node 4 examples/long_context.py --sp 1 --bound 1GiB

The ranks of a group (here all four) are given the same sequence, and each computes a part of it. What a
rank may hold is bounded, and the bound is checked twice:

    before training   the compiler is asked, without data, for the peak of a rank: with whole sequences
                      (sp=1), and with the sequences split as asked for
    in every step     the bytes that tensors hold are counted where they are allocated

More than the bound ends the program, either time. Counted are parameters, gradients, optimizer state,
activations and what is sent to other ranks; not the text, which is no tensor of torch's, nor what
libraries take for themselves. The text is that of train_llama.py, one token a byte.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

# The profiler, which counts bytes here, tells of each start and stop, and of what is older than it is.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from train_llama import RANK, RANKS, choose_device, mean_over_ranks, num_parameters, say, text
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import autodist
from autodist.dry_run import dry_run, token_batch
from autodist.inspect import choose_graph, find_artifacts

LENGTH = 8192  # tokens in a sequence

T = TypeVar("T")


def main() -> None:
    args = arguments()
    device = choose_device()
    if RANK == 0:
        check_plan(args)
    training, _ = text()

    torch.manual_seed(0)
    model = make_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    options = {"sp": args.sp, "lowering": args.lowering}
    # The one line: sp ranks split each sequence; parameters and Adam's moments are sharded over all.
    compiled = torch.compile(model, backend="autodist", options=options)
    groups = RANKS // args.sp
    say(f"{num_parameters(model) / 1e6:.1f} million parameters, {RANKS} x {device.type}")

    seconds: list[float] = []
    peaks = [0] * RANKS

    def train(step: int) -> Tensor:
        start = time.perf_counter()
        # Seeded by the group: its ranks draw the same sequence.
        batch = sequence(training, args.length, step * groups + RANK // args.sp).to(device)
        loss = compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        return loss.detach()

    for step in range(args.steps):
        held = state_bytes(model, optimizer)
        loss, allocated = with_peak(partial(train, step), device)
        now = of_all_ranks(held + allocated, device)
        speed = groups * args.length / median(seconds[1:][-5:] or seconds)
        say(
            f"step {step + 1:3d} of {args.steps}   loss {mean_over_ranks(loss):.3f}   "
            f"{speed:,.0f} tokens/s   {mib(max(now))} of {mib(args.bound)} on a rank"
        )
        check_peaks(now, args.bound)
        peaks = [max(pair) for pair in zip(peaks, now, strict=True)]

    say(f"the first step took {seconds[0]:.1f} s, most of it compilation; a later one {seconds[-1]:.1f} s")
    say(f"peaks of the ranks: {', '.join(map(mib, peaks))}; the bound is {mib(args.bound)}")
    if dist.is_initialized():
        dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small Llama on long sequences, split over ranks.")
    parser.add_argument("--steps", type=int, default=20, help="steps to train (default 20)")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens in a sequence (default {LENGTH})")
    parser.add_argument("--sp", type=int, default=RANKS, help="ranks that share a sequence (default all)")
    parser.add_argument("--bound", type=size, default="96MiB", help="what a rank may hold (default 96MiB)")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    args = parser.parse_args()
    if args.steps < 1 or args.length < 2:
        parser.error(f"--steps must be at least 1 and --length 2; got {args.steps} and {args.length}")
    if args.sp < 1 or RANKS % args.sp:
        parser.error(f"--sp must divide the number of ranks, which is {RANKS}; got {args.sp}")
    return args


def size(words: str) -> int:
    """Bytes, written as in a plan's ``memory``."""
    try:
        found = autodist.Plan(memory=words).memory_on(None)
    except autodist.PlanError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if found is None:  # "device": what that has, only a running rank knows
        raise argparse.ArgumentTypeError(f"an amount of bytes is needed here; got {words!r}")
    return found


# --- the model ---------------------------------------------------------------------------------------


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    attended = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2), None


# Beside attention of its own transformers lays a mask of length x length elements, which would be the largest
# tensor of all. This one needs none.
AttentionInterface.register("causal", causal_attention)


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("causal")
    return model


def sequence(source: Tensor, length: int, seed: int) -> Tensor:
    """One row of ``source`` that begins anywhere: (1, length) token numbers."""
    generator = torch.Generator().manual_seed(seed)
    start = int(torch.randint(len(source) - length, (), generator=generator))
    return source[None, start : start + length].long()


# --- what is predicted -------------------------------------------------------------------------------


def check_plan(args: argparse.Namespace) -> None:
    """Say what a rank would hold, with whole and with split sequences; end if it is more than the bound."""
    plans = [{"sp": sp, "lowering": args.lowering} for sp in sorted({1, args.sp})]
    # In a process of its own: a dry run makes a process group, of ranks that do not exist.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        peaks = [child.submit(predicted_peak, plan, RANKS, args.length).result() for plan in plans]
    say(f"{args.length:,} tokens a sequence; a rank may hold {mib(args.bound)}")
    for plan, peak in zip(plans, peaks, strict=True):
        verdict = "within" if peak <= args.bound else "over"
        say(f"predicted for sp={plan['sp']}: {mib(peak)}, {verdict} the bound")
    if peaks[-1] > args.bound:
        sys.exit(
            f"a rank would hold {mib(peaks[-1])} and may hold {mib(args.bound)}: use more ranks to a "
            f"sequence (--sp, now {args.sp}), shorter ones (--length, now {args.length}) or a larger --bound"
        )


def predicted_peak(plan: dict[str, Any], ranks: int, length: int) -> int:
    """Bytes a rank holds at the peak of a step, read off the compiled program: nothing is run."""
    os.environ["AUTODIST_LOGS"] = "warning"
    with tempfile.TemporaryDirectory() as folder:
        dry_run(make_model, lambda: token_batch(1, length), autodist.Plan.make(plan), ranks, Path(folder))
        summary = choose_graph(find_artifacts(Path(folder)), None).summary
    return summary["resident_bytes"] + max(part["peak_bytes"] for part in summary["parts"].values())


# --- what is measured --------------------------------------------------------------------------------


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What this rank holds of the model and of the optimizer's state."""
    states = [t for state in optimizer.state.values() for t in state.values()]
    tensors = [*model.parameters(), *model.buffers(), *states]
    mine = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.nbytes for t in mine)


def with_peak(run: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """What ``run`` returns, and the most bytes of its own allocations that were alive at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run(), torch.cuda.max_memory_allocated() - before
    # A CPU's allocator does not count; the profiler sees each of its allocations.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    alive: dict[int, int] = {}
    held = peak = 0
    for event in sorted(events, key=lambda e: (e["ts"], e["args"]["Ev Idx"])):
        address, change = event["args"]["Addr"], event["args"]["Bytes"]
        # What was there before has no size here. What stands at the address of a new tensor has gone: the
        # profiler does not see what gloo's threads let go of when they are done.
        held += max(change, 0) - alive.pop(address, 0)
        if change > 0:
            alive[address] = change
        peak = max(peak, held)
    return result, peak


def of_all_ranks(number: int, device: torch.device) -> list[int]:
    if not dist.is_initialized():
        return [number]
    found = torch.zeros(RANKS, dtype=torch.long, device=device)
    found[RANK] = number
    dist.all_reduce(found)
    return found.tolist()


def check_peaks(peaks: list[int], bound: int) -> None:
    """End, on every rank, if one held more than the bound."""
    for rank, peak in enumerate(peaks):
        if peak > bound:
            sys.exit(
                f"rank {rank} held {mib(peak)} and may hold {mib(bound)}: the prediction fell short of it; "
                "use more ranks to a sequence (--sp), shorter ones (--length) or a larger --bound"
            )


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
