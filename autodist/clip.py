"""Clipping by the norm of all gradients, where they lie on the ranks of several pipeline stages.

    norm^p = sum over stages of (sum over the stage's parameters of |grad|^p)

A parameter that several stages hold counts once, at its first owner.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autodist.job import job_of
from autodist.runtime import compat
from autodist.runtime.parameters import plain_tensor
from autodist.runtime.stage_parameters import is_here, owners

_collectives = torch.ops._c10d_functional


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_``, by the norm of the whole model's gradients under any plan.

    Returns that norm, a plain 0-d tensor, the same on all ranks. All ranks of a pipeline must call it. Raises
    ``RuntimeError`` for a norm that is not finite, if asked to.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    job = next((job_of(p) for p in given if owners(p)), None)  # type: ignore[arg-type]
    mine = [p.grad for p in given if p.grad is not None and (job is None or _counts_here(p, job.place))]
    total = torch.nn.utils.get_total_norm([_plain(g) for g in mine], norm_type, False, foreach)
    total = total.full_tensor() if isinstance(total, DTensor) else total
    if job is not None and job.pipeline is not None:
        total = _over_stages(
            total.to(job.device, torch.float32), norm_type, compat.mesh_group_name(job.pipeline)
        )
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is {total.item()}, so it cannot be "
            f"clipped to {max_norm}; pass error_if_nonfinite=False to scale by it anyway"
        )
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for parameter in given:
        if parameter.grad is not None:
            compat.local_part(parameter.grad).mul_(scale.to(parameter.grad.device))
    return total


def _counts_here(parameter: Tensor, place: int) -> bool:
    return not isinstance(parameter, DTensor) or (
        is_here(parameter) and owners(parameter)[:1] in ((), (place,))
    )


def _plain(grad: Tensor) -> Tensor:
    """A gradient whose norm may be asked for."""
    if not isinstance(grad, DTensor):
        return plain_tensor(grad)  # type: ignore[no-any-return]
    return compat.dtensor_of(compat.local_part(grad), compat.specification(grad), False)


def _over_stages(norm: Tensor, norm_type: float, group: str) -> Tensor:
    """The norm of norms, one a stage."""
    if norm_type == math.inf:
        return _collectives.wait_tensor(_collectives.all_reduce(norm, "max", group))  # type: ignore[no-any-return]
    power = _collectives.all_reduce(norm.pow(norm_type), "sum", group)
    return _collectives.wait_tensor(power).pow(1 / norm_type)  # type: ignore[no-any-return]


__all__ = ["clip_grad_norm_"]
