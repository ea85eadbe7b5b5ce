"""From a plain model to a sharded one, in place.

    agree    every rank has the same torch, plan and parameters (names, shapes, types)
    init     parameters on ``meta`` are given memory and values, one module at a time
    share    values come from the first rank, as DDP's do, so ranks need not be seeded alike
    shard    each parameter becomes a DTensor under its name; this rank keeps its rows
    re-point optimizers that hold the old parameters now hold the new ones

A model built on ``meta`` is initialised by ``reset_parameters`` (torch's own layers) and ``_init_weights``
(Hugging Face's models), in the order in which constructors call them; ``init`` takes the place of both. Every
rank draws every number and keeps its rows.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from autodist import __version__
from autodist.initialise import initialise
from autodist.job import Job, job_of, start_job
from autodist.plan import Plan, PlanError, PlanLike
from autodist.runtime import compat
from autodist.runtime.parameters import (
    MovedParameter,
    MovedParameterError,
    adopt,
    distribute,
    placement_of,
    plain_parameters,
    read_through,
    replace_parameters,
)
from autodist.runtime.stage_parameters import absent, is_here, own, owners


class PrepareError(ValueError):
    """A model cannot be sharded as it is; the message names the parameter and what to do."""


def prepare(
    model: nn.Module,
    plan: PlanLike = None,
    *,
    device: torch.device | str | None = None,
    init: Callable[[nn.Module], None] | None = None,
    batch: Any = None,
) -> nn.Module:
    """Shard ``model``'s parameters over all ranks, in place, and return it.

    ``plan`` is a :class:`Plan`, a dict of its fields, a path to its JSON, or None. Parameters become
    DTensors under their original names; reading ``module.weight`` gathers the whole weight. Parameters on
    ``meta`` are created on ``device`` (default: the accelerator if there is one, else the CPU) and
    initialised one module at a time, so the model is never whole on a rank; ``init(module)``, if given,
    is called for every module that owns parameters or buffers and must fill them. Their values are those of
    the same model built whole under the same seed, if its constructors draw no random numbers of their own
    (those of Hugging Face's GPT-2 and ViT do): then they are other draws from the same distributions.

    With ``pp`` a parameter lies on the ranks whose stages use it. Which those are is found by tracing the
    model on ``batch``, its arguments in training (a dict of keyword arguments, a tuple, or one value; sizes
    matter, values do not); without one it is found at the first call of the compiled model.

    On one rank the model is only initialised. Raises :class:`PlanError` for a plan that cannot run here,
    :class:`PrepareError` for a model that cannot be sharded, and
    :class:`~autodist.runtime.agreement.DisagreementError` when ranks have different models or plans.
    """
    adopt(model)
    job = prepared_job(model)
    if job is not None:
        check_same_plan(job.plan, plan)
        if not any(True for _ in plain_parameters(model)):
            return model
    else:
        job = start_job(Plan.make(plan), device_of(model, device))
    if job.plan.pp > 1:
        from autodist.pipeline import shard_on_batch  # which compiles, and so stands above this

        return shard_on_batch(model, job, batch, init)
    return shard_model(model, job, init)


def shard_model(
    model: nn.Module,
    job: Job,
    init: Callable[[nn.Module], None] | None = None,
    places: Mapping[str, tuple[int, ...]] | None = None,
) -> nn.Module:
    """Shard a model that has not been prepared over ``job``'s ranks, as :func:`prepare` says.

    ``places`` says of each parameter, by name, which places of a pipeline hold it; None: there is no
    pipeline.
    """
    job.model = weakref.ref(model)
    _refuse(model)
    if places is not None:
        job.share(places.values())
    if job.mesh is not None:
        _refuse_optimizers(model)
        _refuse_gradients(model)
    _agree(model, job)
    if job.mesh is None:
        _materialise(model, job, init, places)
        _repoint_optimizers(model)
        return model
    if _on_meta(model):
        _materialise(model, job, init, places)
    _share(model, job)
    # Ranks hold the same values now; keep this rank's rows of what is still whole.
    replace_parameters(model, lambda name, parameter: _sharded(name, parameter, job, places))
    model.register_load_state_dict_pre_hook(_shard_state)
    _repoint_optimizers(model)
    return model


def _shard_state(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let ``load_state_dict`` take whole tensors too: each rank keeps its rows of them."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        given: Any = state.get(prefix + name)
        fits = isinstance(given, torch.Tensor) and given.shape == parameter.shape
        if fits and isinstance(parameter, DTensor) and not isinstance(given, DTensor):
            sharded = parameter.placements[0].is_shard()
            mesh, whole = parameter.device_mesh, given.to(parameter.device)
            if is_here(parameter):
                state[prefix + name] = distribute(whole, mesh, sharded)
            else:
                state[prefix + name] = absent(whole, mesh, parameter.placements[0])


def prepared_job(model: nn.Module) -> Job | None:
    """The job of a model prepared earlier, or None."""
    return next((j for j in map(job_of, model.parameters()) if j is not None), None)


def check_same_plan(plan: Plan, options: PlanLike) -> None:
    """Raise :class:`PlanError` when ``options`` ask for something else than the prepared ``plan``."""
    if options is None:
        return
    asked = Plan.make(options)
    names = list(options if isinstance(options, Mapping) else [f.name for f in dataclasses.fields(Plan)])
    if (plan.dp or 1) * plan.sp == 1 and "zero" in names:
        names.remove("zero")  # one rank has all of its stages' parameters, whatever was asked
    for name in names:
        given = getattr(asked, name)
        if given is not None and given != getattr(plan, name):
            raise PlanError(
                f"this model was prepared with {name}={getattr(plan, name)!r}, and is now asked to run "
                f"with {name}={given!r}; prepare it with the plan you want"
            )


def _sharded(
    name: str, parameter: nn.Parameter, job: Job, places: Mapping[str, tuple[int, ...]] | None
) -> nn.Parameter:
    whole, shard = parameter.detach(), job.plan.zero > 0
    mine = () if places is None else places[name]
    if mine and job.place not in mine:
        value = absent(whole, job.stage_mesh(mine[0]), placement_of(whole.shape, shard))
    else:
        value = distribute(whole, job.stage_mesh(job.place), shard)
    made = _mark(nn.Parameter(value, requires_grad=parameter.requires_grad), job)
    return own(made, mine) if mine else made


def _mark(parameter: nn.Parameter, job: Job) -> nn.Parameter:
    parameter._autodist_job = job  # type: ignore[attr-defined]
    return parameter


def device_of(model: nn.Module, device: torch.device | str | None = None) -> torch.device:
    if device is not None:
        return torch.device(device)
    found = {p.device for p in model.parameters() if p.device.type != "meta"}
    if len({d.type for d in found}) > 1:
        raise PrepareError(f"the model's parameters are on several devices: {sorted(map(str, found))}")
    if found:
        return next(iter(found))
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _refuse_gradients(model: nn.Module) -> None:
    """Gradients and hooks on plain parameters would be left behind with them."""
    for name, parameter in plain_parameters(model):
        if parameter.grad is not None:
            raise PrepareError(
                f"'{name}' has a gradient from before the model was sharded, which is this rank's alone. "
                "Clear it with model.zero_grad(), or prepare the model first."
            )
        if compat.has_gradient_hooks(parameter):
            raise PrepareError(
                f"'{name}' has a gradient hook, which would see nothing once the parameter is sharded. "
                "Register it on model.named_parameters() after autodist.prepare(model, plan)."
            )


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise PrepareError(
                f"'{name}' has max_norm={module.max_norm}: it rewrites its weight in every forward, "
                "which a sharded weight would lose. Normalise the rows where they are used instead."
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise PrepareError(
                f"'{name}' has sparse=True: sparse gradients are not reduced over ranks. Use sparse=False."
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise PrepareError(
                f"'{name}' has no shape yet (a lazy module): run one batch before preparing the model."
            )
        if parameter.is_sparse or parameter.layout is not torch.strided:
            raise PrepareError(f"'{name}' has layout {parameter.layout}; only dense ones are sharded.")


def _agree(model: nn.Module, job: Job) -> None:
    if job.agreement is None:
        return
    lines = [
        f"{n}: {tuple(p.shape)} {p.dtype} requires_grad={p.requires_grad}"
        for n, p in model.named_parameters(remove_duplicate=False)
    ]
    job.agreement.require(
        f"the model to prepare ({type(model).__name__})",
        {
            "torch": torch.__version__,
            "autodist": __version__,
            "plan": job.plan.to_json(),
            "parameters": "\n".join(lines),
        },
    )


def _share(model: nn.Module, job: Job) -> None:
    """Take every parameter and buffer from the first rank."""
    if job.agreement is None:
        return
    assert job.mesh is not None
    group = job.mesh.get_group()
    first = dist.get_process_group_ranks(group)[0]
    for _, tensor in _whole_tensors(model):
        shown = tensor.detach()
        for dim, stride in enumerate(shown.stride()):
            # Rows that an expanded buffer shows several times are sent and written once.
            shown = shown.narrow(dim, 0, min(1, shown.shape[dim])) if stride == 0 else shown
        dense = shown.contiguous()
        dist.broadcast(dense, first, group=group)
        if dense is not shown:
            shown.copy_(dense)


def _whole_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            yield name, parameter
        elif parameter.placements[0].is_replicate() and not owners(parameter):
            yield name, parameter.to_local()
    for name, buffer in model.named_buffers():
        if not isinstance(buffer, DTensor):
            yield name, buffer


# --- models built on meta --------------------------------------------------------------------------


def _on_meta(model: nn.Module) -> bool:
    tensors = [t for _, t in _whole_tensors(model)]
    meta = [t for t in tensors if t.device.type == "meta"]
    if meta and len(meta) < len([t for t in tensors if isinstance(t, nn.Parameter)]):
        name = next(n for n, t in plain_parameters(model) if t.device.type != "meta")
        raise PrepareError(f"some parameters are on meta and some are not ('{name}'): build all on meta")
    return bool(meta)


def _materialise(
    model: nn.Module,
    job: Job,
    init: Callable[[nn.Module], None] | None,
    places: Mapping[str, tuple[int, ...]] | None,
) -> None:
    """Give a meta model memory; sharded as it goes when there are several ranks."""
    if not _on_meta(model):
        return

    def convert(name: str, whole: nn.Parameter) -> nn.Parameter:
        if job.mesh is None:
            return whole
        made = _sharded(name, whole, job, places)
        made._autodist_name = name  # type: ignore[attr-defined]
        return made

    initialise(model, job.device, convert, init)
    if job.mesh is not None:
        for module in model.modules():
            names = tuple(n for n, p in module._parameters.items() if p is not None)
            if names:
                read_through(module, names)


# --- optimizers ------------------------------------------------------------------------------------


def optimizers() -> list[Optimizer]:
    """Every optimizer alive."""
    gc.collect()  # Schedulers and their optimizers refer to each other: the dead ones go first.
    return [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]


def _refuse_optimizers(model: nn.Module) -> None:
    """Momenta of a whole tensor cannot be guessed onto a shard."""
    names = {p: name for name, p in plain_parameters(model)}
    for optimizer in optimizers():
        stepped = next((p for p in optimizer.state if p in names and optimizer.state[p]), None)
        if stepped is not None:
            raise MovedParameterError(
                f"{type(optimizer).__name__} already has state for '{names[stepped]}', which is to be "
                "sharded now. Call autodist.prepare(model, plan) before the optimizer's first step, and "
                "load earlier state with autodist.load."
            )


def _repoint_optimizers(model: nn.Module) -> None:
    """Optimizers that hold parameters which ``model`` has replaced hold the new ones from now on."""
    new = set(model.parameters())
    for optimizer in optimizers():
        repoint(optimizer, new)


def repoint(optimizer: Optimizer, new: Container[nn.Parameter] | None = None) -> None:
    """Replace moved parameters in ``optimizer`` by their successors (those in ``new``, if given)."""
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            moved = isinstance(parameter, MovedParameter)
            if moved and (new is None or parameter.successor in new):
                group["params"][i] = parameter.successor
