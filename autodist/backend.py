"""Door 1: ``torch.compile(model, backend="autodist")``.

Dynamo hands over one captured graph at a time. The first graph that holds plain parameters, on more than
one rank, means that the model has not been prepared: it is prepared in place and Dynamo is asked to trace
again, so that nobody has to change a model or a training loop. Every later graph is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autodist.compiler import compile_graph
from autodist.job import Job, job_of, num_ranks, start_job
from autodist.pipeline import pipelined, shard_by_stages
from autodist.plan import Plan, PlanError, PlanLike
from autodist.prepare import PrepareError, check_same_plan, device_of, prepare, repoint
from autodist.runtime import compat
from autodist.runtime.parameters import parameter_name


def autodist(
    graph: GraphModule,
    inputs: Sequence[Any],
    *,
    options: PlanLike = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend. ``options`` is a :class:`Plan`, a dict of its fields, or a path to its JSON.

    ``mode`` is Inductor's. Raises :class:`PlanError` and
    :class:`~autodist.prepare.PrepareError` before anything is communicated.
    """
    if mode is not None and mode not in compat.inductor_modes():
        raise PlanError(f"mode must be one of {', '.join(compat.inductor_modes())}; got {mode!r}")
    plain = [x for x in inputs if isinstance(x, nn.Parameter) and not isinstance(x, DTensor)]
    if plain and num_ranks() > 1:
        _prepare_root(graph, inputs, plain, options)
        compat.retrace()
    job = next((j for j in map(job_of, inputs) if j is not None), None)
    if job is None:
        alone = dataclasses.replace(Plan.make(options), dp=None, sp=1, pp=1, stages=None)
        job = _local_job(alone, _device(inputs))
    else:
        check_same_plan(job.plan, options)
    if job.pipeline is not None:
        return pipelined(graph, inputs, job)
    return compile_graph(graph, inputs, job, mode)


@functools.cache
def _local_job(plan: Plan, device: torch.device) -> Job:
    """The job of graphs without sharded parameters: nothing in them concerns other ranks."""
    return start_job(plan, device, alone=True)


def _device(inputs: Sequence[Any]) -> torch.device:
    devices = [x.device for x in inputs if isinstance(x, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def _prepare_root(
    graph: GraphModule, inputs: Sequence[Any], plain: Sequence[nn.Parameter], options: PlanLike
) -> None:
    wanted = {id(p) for p in plain}
    for module in _candidates():
        if wanted <= {id(p) for p in module.parameters()}:
            if Plan.make(options).pp > 1:
                shard_by_stages(graph, inputs, module, start_job(Plan.make(options), device_of(module)))
            else:
                prepare(module, options)
            return
    shapes = ", ".join(str(tuple(p.shape)) for p in plain[:3])
    raise PrepareError(
        f"the compiled code uses parameters (shapes {shapes}) of a model that cannot be found from it. "
        "Call autodist.prepare(model, plan) before compiling."
    )


def _candidates() -> Iterator[nn.Module]:
    """Modules that could be the one being compiled, the outermost first."""
    for frame in compat.python_frames():
        module = compat.compiled_module(frame.f_locals.get("self"))
        if module is not None:
            yield module
    for local in compat.dynamo_frame_locals().values():
        if isinstance(local, nn.Module):
            yield local
    for frame in compat.python_frames():
        for local in list(frame.f_locals.values()):
            if isinstance(local, nn.Module):
                yield compat.compiled_module(local) or local


# --- before an optimizer's step ---------------------------------------------------------------------


@torch.compiler.disable
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """No step without effect, none on gradients that were never averaged.

    Registered for every optimizer of the process. Under ``torch.compile(optimizer.step)``, anyone's, it runs
    as Python before each step: Dynamo breaks its graph there anyway, and cannot trace the search for models.
    """
    repoint(optimizer)
    if num_ranks() > 1:
        _refuse_mixed(optimizer)
        if not optimizer.state:
            _refuse_unprepared(optimizer)


def _refuse_mixed(optimizer: torch.optim.Optimizer) -> None:
    """Some parameters sharded, some not: the rest of the model was left out, and is never averaged."""
    held = [p for g in optimizer.param_groups for p in g["params"]]
    plain = [p for p in held if type(p) is nn.Parameter and p.grad is not None]
    sharded = [n for n in map(parameter_name, held) if n is not None]
    if plain and sharded:
        shapes = ", ".join(str(tuple(p.shape)) for p in plain[:3])
        raise PrepareError(
            f"{type(optimizer).__name__} holds sharded parameters ('{sharded[0]}', ...) and "
            f"{len(plain)} that are not (shapes {shapes}), whose gradients are this rank's alone. "
            "Compile the whole model, or call autodist.prepare on all of it."
        )


def _refuse_unprepared(optimizer: torch.optim.Optimizer) -> None:
    """An optimizer's first step on a model that should have been sharded, and was not.

    Dynamo runs a function eagerly, without asking any backend, when it meets something it cannot trace at
    all (``nn.LSTM``, for one). A model that was never traced was never prepared.
    """
    held = {id(p) for g in optimizer.param_groups for p in g["params"] if type(p) is nn.Parameter}
    for module in gc.get_objects():
        if not issubclass(type(module), nn.Module):
            continue
        root = compat.compiled_module(module)
        if root is None or compat.compile_backend(module) is not autodist:
            _refuse_partly_prepared(optimizer, module, held)
            continue
        for name, parameter in root.named_parameters():
            if id(parameter) in held and parameter.grad is not None:
                raise PrepareError(
                    f"{type(optimizer).__name__} is about to step '{name}', which is not sharded: the "
                    "model was compiled with backend='autodist', but Dynamo ran it eagerly (see why "
                    "with TORCH_LOGS=graph_breaks), so its gradients are this rank's alone. Call "
                    "autodist.prepare(model, plan) before the first step: prepared models train "
                    "correctly in eager mode too."
                )


def _refuse_partly_prepared(optimizer: torch.optim.Optimizer, module: nn.Module, held: set[int]) -> None:
    """``module`` has sharded parameters and, held by ``optimizer``, trained ones that are not."""
    own = [(n, p) for n, p in module.named_parameters() if p is not None]
    sharded = next((n for n, p in own if isinstance(p, DTensor) and job_of(p) is not None), None)
    plain = next((n for n, p in own if id(p) in held and p.grad is not None), None)
    if sharded is not None and plain is not None:
        raise PrepareError(
            f"{type(optimizer).__name__} is about to step '{plain}' of a {type(module).__name__} of which "
            f"only a part ('{sharded}', ...) is sharded: its gradient is this rank's alone. Compile the "
            "whole model, or call autodist.prepare on all of it."
        )


register_optimizer_step_pre_hook(_before_step)
