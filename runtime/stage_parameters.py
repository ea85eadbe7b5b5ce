"""Parameters of a pipeline: each on the ranks of its stage, nothing of it elsewhere.

Ranks at one *place* of their pipelines hold the same stages, and shard the parameters of those over a mesh
of their own. A parameter's *owners* are the places of the stages that use it, in order; one that several use
has a copy at each. On an owner it is a DTensor over the owner's mesh; on any other rank it is a DTensor over
the first owner's mesh, of which that rank is no member: with the parameter's shape and name and without
memory. Optimizers skip it there, as it never has a gradient.

Invariants: copies of a parameter stay equal (their gradients are summed before anybody sees them); a norm of
gradients of one stage's parameters, which is not the model's, is refused (:class:`StageGradient`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autodist.runtime import compat

_OWNERS, _MARKED = "_autodist_owners", "_autodist_refuses_norms"


class StageGradientError(RuntimeError):
    """Something is asked of one stage's parameters or gradients that only the whole model's can answer."""


class StageGradient(DTensor):
    """A gradient of a pipeline's parameter: a DTensor that is one stage's alone, and refuses what would take
    it for the model's: norms, and a GradScaler's search for infinities."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _NORMS:
            raise StageGradientError(
                "the norm of these gradients is that of one pipeline stage, not of the model: clip with "
                "autodist.clip_grad_norm_(model.parameters(), max_norm), which returns the model's norm. "
                "(One gradient's norm: p.grad.full_tensor().norm().)"
            )
        if func in compat.GRADIENT_SCALING:
            raise StageGradientError(
                "a GradScaler looks for infinities among these gradients, which are those of one pipeline "
                "stage, and ranks would skip different steps. Use the plan's precision='bf16', which needs "
                "no scaling."
            )
        with compat.plain_functions():
            result = func(*args, **(kwargs or {}))
            return _marked(result) if func in _SAME and type(result) is DTensor else result


_SAME = {Tensor.data.__get__, Tensor.detach, Tensor.float, Tensor.double, Tensor.to}  # type: ignore[attr-defined]
"""What people write before the norm."""
_NORMS = {
    torch.linalg.vector_norm,
    torch.linalg.norm,
    torch.norm,
    Tensor.norm,
    compat.FOREACH_NORM,
}


def owners(parameter: Tensor) -> tuple[int, ...]:
    """Places of a pipeline that hold ``parameter``; empty where there is no pipeline."""
    return getattr(parameter, _OWNERS, ())


def own(parameter: nn.Parameter, places: tuple[int, ...]) -> nn.Parameter:
    """Note ``parameter``'s owners; what autograd gives it is a :class:`StageGradient`."""
    note_owners(parameter, places)
    refuse_norms(parameter)
    return parameter


def note_owners(parameter: Tensor, places: tuple[int, ...]) -> None:
    setattr(parameter, _OWNERS, places)


def refuse_norms(parameter: Tensor) -> None:
    """Have the gradients that ``parameter`` will get refuse their norm; once it takes any."""
    if parameter.requires_grad and getattr(parameter, _MARKED, None) != id(parameter):
        parameter.register_post_accumulate_grad_hook(as_stage_gradient)
        setattr(parameter, _MARKED, id(parameter))  # a copy has the attribute, and not the hook


def as_stage_gradient(parameter: Tensor) -> None:
    """Have a parameter's gradient refuse its norm."""
    if type(parameter.grad) is DTensor:
        parameter.grad = _marked(parameter.grad)


def _marked(grad: DTensor) -> DTensor:
    return compat.dtensor_of(compat.local_part(grad), compat.specification(grad), False, StageGradient)


def is_here(parameter: DTensor) -> bool:
    """Whether this rank holds a part of ``parameter``."""
    return parameter.device_mesh.get_coordinate() is not None


def place_of(tensor: DTensor, meshes: Sequence[DeviceMesh]) -> int | None:
    """The place whose mesh, of those of all places, a DTensor lies on, if it lies on one."""
    return next((p for p, mesh in enumerate(meshes) if mesh == tensor.device_mesh), None)


def absent(value: Tensor, mesh: DeviceMesh, placement: Any) -> DTensor:
    """What stands on this rank for a parameter like ``value`` that lies on ``mesh``, elsewhere."""
    return absent_like(value.shape, value.dtype, value.device, mesh, placement)


def absent_like(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, mesh: DeviceMesh, placement: Any
) -> DTensor:
    """The same for a tensor of this kind."""
    local = torch.empty((0, *shape[1:]), dtype=dtype, device=device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=shape, stride=stride)


def whole_value(parameter: DTensor, mine: Tensor | None, group: str) -> Tensor:
    """A parameter's value on every rank of the pipeline ``group``: its first owner, which has it as ``mine``,
    sends it to the others. It cannot be differentiated."""
    source = compat.group_ranks(group)[owners(parameter)[0]]
    shape = (parameter.shape, parameter.dtype, parameter.device)
    value = mine.contiguous() if mine is not None else torch.empty(shape[0], dtype=shape[1], device=shape[2])
    if not compat.is_fake_group(group):
        dist.broadcast(value.detach(), source, group=compat.process_group(group))
    return not_differentiable(value, parameter) if parameter.requires_grad else value


def not_differentiable(value: Tensor, parameter: Tensor) -> Tensor:
    """``value``, which depends on ``parameter``, and whose backward is an error rather than nothing."""
    return _NotDifferentiable.apply(value, parameter)  # type: ignore[no-any-return]


class _NotDifferentiable(torch.autograd.Function):
    """A read whose gradient nobody could use: says so in the backward, where it would be lost."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, parameter: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise StageGradientError(
            "a loss was differentiated that was computed from a pipeline's weights or results outside of "
            "the compiled program, where they can be read but not trained. The compiled program returns one "
            "loss, its first result that is one number: compute all of it there, without graph breaks "
            "(TORCH_LOGS=graph_breaks shows them)."
        )
