"""Compile a model for ranks that do not exist: no cluster, no GPU, no weights in memory.

    build on meta ──> fake CPU tensors ──> prepare on fake ranks ──> torch.compile ──> backward

A *fake tensor* has a type and a device, and no memory. Parameters and batch are fake, the process
group's ranks are fake, and everything between them is the real thing: Dynamo, AOTAutograd and every
pass make the decisions that they would make on the cluster. Only the last step is left out, from
graphs to kernels. That the fakes say they are on the CPU decides which attention operator torch
chooses; the cost model knows it and its relatives on other devices to be the same work.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import GraphModule

from autodist.compiler import compile_graph
from autodist.job import Job, start_job
from autodist.pipeline import pipelined
from autodist.plan import Plan
from autodist.prepare import prepare, prepared_job
from autodist.runtime import compat
from autodist.runtime.compat import tree_leaves, tree_map


class DryRunError(RuntimeError):
    """A model cannot be compiled without data; the message says where and why."""


class StepError(DryRunError):
    """The model was built, and its training step cannot be run on this batch without data."""


def dry_run(
    make_model: Callable[[], nn.Module],
    make_batch: Callable[[], Any],
    plan: Plan,
    num_ranks: int,
    artifacts: Path | None,
    loss_only: bool = False,
    samples: list[Any] | None = None,
) -> Job:
    """Compile one training step as the first of ``num_ranks`` ranks.

    What was done is written to the folder ``artifacts``, if there is one; the job that is returned
    holds the graphs.

    ``make_model`` is called under ``torch.device("meta")``. ``make_batch`` returns the model's
    keyword arguments (a dict), positional arguments (a tuple or list) or its one argument. The loss
    is what the model returns as ``loss``, or a scalar that it returns; of other results the sum. With
    ``loss_only`` the program compiled returns nothing else. ``samples`` as in :class:`~autodist.job.Job`.

    Raises :class:`DryRunError`, and what ``prepare`` and the compiler raise.
    """
    if dist.is_initialized():
        raise DryRunError(
            "a dry run makes a process group of its own, and this process has one already: run it "
            "in a process of its own"
        )
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        if num_ranks > 1:
            stack.enter_context(compat.fake_ranks(num_ranks))
        stack.callback(torch._dynamo.reset)
        fakes = compat.FakeTensorMode()
        model = _hollow(_build(make_model), fakes).train()
        arguments = _arguments(_call("the function that makes a batch", make_batch), fakes)
        job = _job(model, plan, num_ranks, arguments)
        for part in (job, job.stage) if job.pipeline is not None else (job,):
            part.dry_run, part.artifacts, part.samples = True, artifacts, samples
        whole: Callable[..., Any] = (lambda *a, **k: _loss(model(*a, **k))) if loss_only else model

        def backend(graph: GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
            if job.pipeline is not None:
                return pipelined(graph, given, job)
            return compile_graph(graph, given, job, None)

        compiled = torch.compile(whole, backend=backend)
        with fakes:
            _call("the training step", lambda: _step(compiled, *arguments), StepError)
    if not job.reports:
        raise DryRunError(
            "Dynamo captured nothing of this model and would run all of it eagerly: see why with "
            "TORCH_LOGS=graph_breaks"
        )
    return job


def token_batch(batch: int, length: int) -> dict[str, Tensor]:
    """What Hugging Face's language models take: ``batch`` x ``length`` token ids and labels."""
    ids = torch.zeros(batch, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}


def _build(make_model: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        model = _call("the function that makes the model", make_model)
    if not isinstance(model, nn.Module):
        raise DryRunError(
            f"the function that makes the model returned {type(model).__name__}, not a "
            "torch.nn.Module: return the model itself"
        )
    return model


def _hollow(model: nn.Module, fakes: compat.FakeTensorMode) -> nn.Module:
    """``model`` with a fake CPU tensor for every parameter and buffer, each object once."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        owned = chain(module._parameters.items(), module._buffers.items())
        for name, tensor in list(owned):
            if tensor is not None:
                if tensor not in made:
                    made[tensor] = _fake(tensor, fakes)
                # Modules that keep their weights in a second place (nn.LSTM) follow assignments.
                setattr(module, name, made[tensor])
    return model


def _fake(tensor: Tensor, fakes: compat.FakeTensorMode) -> Tensor:
    with fakes:
        fake = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
        )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def _arguments(batch: Any, fakes: compat.FakeTensorMode) -> tuple[tuple[Any, ...], dict[str, Any]]:
    values = tree_map(lambda v: _fake(v, fakes) if isinstance(v, Tensor) else v, batch)
    if isinstance(values, Mapping):
        return (), dict(values)
    return tuple(values) if isinstance(values, (tuple, list)) else (values,), {}


def _job(
    model: nn.Module,
    plan: Plan,
    num_ranks: int,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
) -> Job:
    if num_ranks == 1:
        return start_job(plan, torch.device("cpu"), alone=True)
    positional, named = arguments
    if plan.pp > 1:
        job = prepared_job(prepare(model, plan, batch=named or positional))
    else:
        job = prepared_job(prepare(model, plan))
    if job is None:
        raise DryRunError("the model has no parameters: there is nothing to shard")
    return job


def _step(
    compiled: Callable[..., Any], positional: tuple[Any, ...], named: dict[str, Any]
) -> None:
    _loss(compiled(*positional, **named)).backward()


def _loss(output: Any) -> Tensor:
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(named, Tensor):
        return named
    results = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if not results:
        raise StepError("the model returns nothing that depends on its parameters")
    scalars = [t for t in results if t.ndim == 0]
    return scalars[0] if scalars else torch.stack([t.sum() for t in results]).sum()


def _call(
    what: str, function: Callable[[], Any], kind: type[DryRunError] = DryRunError
) -> Any:
    """``function()``; an error that is not ours becomes a sentence about ``what``."""
    try:
        return function()
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        if type(cause).__module__.startswith("autodist."):
            raise cause from None
        if compat.needs_data(cause):
            reason = f"asks for the values of a tensor ({cause}), and a dry run has none"
        else:
            reason = f"failed with {type(cause).__name__}: {cause}"
        raise kind(f"{what} {reason}{_place(cause)}") from cause


def _place(error: BaseException) -> str:
    """The innermost line, on the way to ``error``, that is neither torch's nor ours."""
    ours = tuple(str(Path(m.__file__).parent) for m in (torch, compat))  # type: ignore[arg-type]
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((*ours, str(Path(__file__).parent), "<"))
    ]
    return f" (at {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
