"""Give a model built on ``meta`` memory and values, one module at a time.

Each module's parameters and buffers are made whole, filled by the module's own initialisation, cut to this
rank's rows, and the whole is dropped before the next module's turn. All ranks draw the same random numbers
in the same order, so nothing is communicated to initialise.

    built      parents first; ``init(module)`` if given, else ``module.reset_parameters()``
    finished   when all parts of a model that has ``_init_weights`` are built, ``_init_weights(part)`` for
               each part, children first (the convention of Hugging Face models, which overwrite their
               layers' own initialisation). Parts that are such models themselves have been finished
               already: a constructor finishes an inner model before it goes on to build the next part.

That is the order in which constructors draw random numbers, so a seed gives the values it gives the model
built whole, except for numbers that a constructor draws itself: from a model on ``meta`` nobody can tell
that it did.

A parameter owned by several modules takes the value its first owner gives it; the later owners' draws are
made and dropped, as they are when such a model is built whole and tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from autodist.runtime.compat import tree_map
from autodist.runtime.parameters import distribute, move, whole_value

Init = Callable[[nn.Module], None]
Shard = Callable[[str, nn.Parameter], nn.Parameter]


class InitialiseError(ValueError):
    """A tensor on ``meta`` was left without a value."""


@torch.no_grad()
def initialise(model: nn.Module, device: torch.device, shard: Shard, init: Init | None) -> None:
    """Replace every meta tensor of ``model``; parameters become what ``shard(name, whole)`` returns.

    Raises :class:`InitialiseError` for a parameter or buffer that nothing has filled.
    """
    owners = {m: prefix for prefix, m in model.named_modules() if any(_meta_tensors(m))}
    unbuilt = {m for m in model.modules() if not owners.keys().isdisjoint(m.modules())}
    names = {p: name for name, p in model.named_parameters()}
    first = _first_owners(model)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module, finish in _as_constructed(model, set(), set()):
        if finish is None and module in owners:
            _fill_module(module, owners[module], device, shard, made, init or _reset)
        elif finish is not None and init is None and module in unbuilt:
            _finish(module, finish, first[module], set(made.values()))
    _check_filled(owners)
    for old, new in made.items():
        move(old, names[old], new)


def _as_constructed(
    module: nn.Module, built: set[nn.Module], finished: set[nn.Module]
) -> Iterator[tuple[nn.Module, Init | None]]:
    """``(module, None)`` when a module is built, ``(module, _init_weights)`` when it is finished."""
    if module in built:
        return
    built.add(module)
    yield module, None
    for child in module.children():
        yield from _as_constructed(child, built, finished)
    finish = getattr(module, "_init_weights", None)
    if finish is not None:
        for part in _children_first(module, finished):
            yield part, finish


def _children_first(module: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    for child in module.children():
        if child not in seen:
            yield from _children_first(child, seen)
    seen.add(module)
    yield module


def _meta_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and tensor.device.type == "meta":
            yield name, tensor


def _fill_module(
    module: nn.Module,
    prefix: str,
    device: torch.device,
    shard: Shard,
    made: dict[nn.Parameter, nn.Parameter],
    init: Init,
) -> None:
    meta = {n: p for n, p in module._parameters.items() if p is not None and p.device.type == "meta"}
    for name, parameter in meta.items():
        whole = nn.Parameter(_unfilled(parameter, device), requires_grad=parameter.requires_grad)
        module._parameters[name] = whole
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.device.type == "meta":
            module._buffers[name] = _unfilled(buffer, device)
    init(module)
    for name, parameter in meta.items():
        if parameter not in made:
            full_name = f"{prefix}.{name}" if prefix else name
            made[parameter] = shard(full_name, module._parameters[name])  # type: ignore[arg-type]
        module._parameters[name] = made[parameter]


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()


class _Whole(TorchFunctionMode):
    """While active, every sharded parameter that is used is whole; ``values`` holds those used."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[Tensor, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(self._value, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _value(self, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        if leaf not in self.values:
            self.values[leaf] = whole_value(leaf)
        return self.values[leaf]


def _finish(module: nn.Module, finish: Init, own: set[str], made: set[Tensor]) -> None:
    """``finish(module)``, which may write into parameters of ``module`` and of its descendants.

    Kept of it is this rank's rows of those in ``made``; what ``module`` owns but not first (``own``) is
    drawn and dropped.
    """
    later = {n: p for n, p in module._parameters.items() if p is not None and n not in own}
    for name, parameter in later.items():
        module._parameters[name] = nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device),
            requires_grad=parameter.requires_grad,
        )
    with _Whole() as whole:
        finish(module)
    for parameter, value in whole.values.items():
        if parameter in made:
            _keep_rows(parameter, value)
    module._parameters.update(later)


def _first_owners(model: nn.Module) -> dict[nn.Module, set[str]]:
    """Of each module, the names of the parameters that no module before it owns."""
    seen: set[nn.Parameter] = set()
    owned: dict[nn.Module, set[str]] = {}
    for module in model.modules():
        held = {n: p for n, p in module._parameters.items() if p is not None}
        owned[module] = {n for n, p in held.items() if p not in seen}
        seen.update(held.values())
    return owned


def _keep_rows(parameter: nn.Parameter, whole: Tensor) -> None:
    assert isinstance(parameter, DTensor)
    mine = distribute(whole, parameter.device_mesh, parameter.placements[0].is_shard())
    parameter.to_local().copy_(mine.to_local())


# --- what has not been filled ----------------------------------------------------------------------


def _sentinel(dtype: torch.dtype) -> float | int | None:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return None if dtype is torch.bool else torch.iinfo(dtype).max


def _unfilled(tensor: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_like(tensor, device=device, requires_grad=False)
    sentinel = _sentinel(tensor.dtype)
    return made if sentinel is None else made.fill_(sentinel)


def _is_unfilled(tensor: Tensor) -> bool:
    sentinel = _sentinel(tensor.dtype)
    if sentinel is None or tensor.numel() == 0:
        return False
    unfilled = tensor.isnan() if sentinel != sentinel else tensor == sentinel
    return bool(unfilled.all())


def _check_filled(owners: dict[nn.Module, str]) -> None:
    for module, prefix in owners.items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if _is_unfilled(local.detach()):
                full_name = f"{prefix}.{name}" if prefix else name
                raise InitialiseError(
                    f"'{full_name}' was built on meta and nothing has given it a value: "
                    f"{type(module).__name__} has no reset_parameters() that fills it. "
                    "Pass init=..., a function that is called with each such module."
                )
