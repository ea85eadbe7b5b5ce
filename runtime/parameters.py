"""Sharded parameters: what a model's attributes become when it is prepared.

A prepared module holds ``nn.Parameter(DTensor)`` under the original names. Its class gains a property for
each, so that *reading* a weight (``self.weight`` in a forward, in a hook, in user code) yields the whole
tensor through :func:`unshard`, and the optimizer, ``named_parameters`` and ``state_dict`` see the shard.

Reading is the same in eager mode (it gathers, there and then) and under Dynamo (it becomes one graph
node); where gathers really stand in a compiled program is decided by the passes, not here.

Invariants:
- one parameter object stays one object: a parameter used by several modules becomes one DTensor used by
  the same modules;
- a stale reference is loud: the plain parameter that was replaced raises on any use
  (:class:`MovedParameter`), so nothing can train a tensor the model no longer holds;
- so is a lost write: a weight read eagerly is a copy, and refuses what only the parameter itself
  could take, in-place changes and hooks (:class:`GatheredWeight`).
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from autodist.runtime import compat, dialect, stage_parameters
from autodist.runtime.compat import tree_any, tree_map
from autodist.runtime.stage_parameters import is_here, owners

DP_AXIS = "dp"


class MovedParameterError(RuntimeError):
    """A plain parameter was used after its model had been prepared."""


class MovedParameter(nn.Parameter):
    """What a plain parameter turns into once a DTensor has taken its place.

    ``successor`` is the new parameter, ``moved_name`` its name. Any tensor operation, and any
    read of ``grad``, raises :class:`MovedParameterError`.
    """

    successor: nn.Parameter
    moved_name: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        moved = next((a for a in args if isinstance(a, MovedParameter)), None)
        name = f"'{moved.moved_name}'" if moved is not None else "a parameter"
        raise MovedParameterError(
            f"{name} was replaced when its model was prepared, but something still uses the old tensor "
            "(an optimizer or a list built before the first call). Build it from model.parameters() after "
            "autodist.prepare(model, plan), or after the first call."
        )


@torch._dynamo.allow_in_graph
@compat.not_alone
def unshard(parameter: Tensor, divisor: int | None = None) -> Tensor:
    """The whole value of a parameter; plain tensors are returned as they are.

    Differentiable: the gradients arriving here on all ranks are summed, divided by ``divisor`` (the number of
    ranks when None: their mean) and become the shard's gradient, a DTensor with the parameter's placement.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    if not is_here(parameter) or owners(parameter):
        return _read_of_stage(parameter)
    mesh = parameter.device_mesh
    group = compat.mesh_group_name(mesh)
    leaf = getattr(parameter, "_autodist_leaf", None)
    if leaf is not None:  # in a step being captured
        whole = _gather(parameter, leaf, group, divisor)
        whole._autodist_gathered = True  # type: ignore[attr-defined]
        return whole
    local = parameter.to_local()
    name = parameter_name(parameter)
    if name is None:  # in a graph being captured, where the compiler checks order and writes
        return _gather(parameter, local, group, divisor)
    job = getattr(parameter, "_autodist_job", None)
    monitor = job.monitor if job is not None else None
    with contextlib.nullcontext() if monitor is None else monitor.guard(f"a read of '{name}'"):
        check_same(name, f"reads '{name}'", group, local.device)
        whole = _gather(parameter, local, group, divisor).as_subclass(GatheredWeight)
    whole.weight_name = name
    return whole


def _read_of_stage(parameter: DTensor) -> Tensor:
    """A pipeline's weight: gathered by the ranks that hold it, and sent to the others."""
    name = parameter_name(parameter)
    local = parameter.to_local()
    if isinstance(local, compat.FakeTensor):  # in a graph being captured: the pipeline has its own reads
        return local.new_empty(parameter.shape) + local.sum()
    if name is None:
        raise stage_parameters.StageGradientError(
            "a parameter of a pipeline was copied or converted (Module.to, deepcopy) after its model had "
            "been sharded, and does not know its stage any more. Convert and copy models before they are "
            "compiled or prepared."
        )
    job = parameter._autodist_job
    pipeline = compat.mesh_group_name(job.pipeline)
    with contextlib.nullcontext() if job.monitor is None else job.monitor.guard(f"a read of '{name}'"):
        check_same(name, f"reads '{name}'", pipeline, parameter.device)
        mine = None
        if is_here(parameter):
            with torch.no_grad():
                group = compat.mesh_group_name(parameter.device_mesh)
                mine = _gather(parameter, parameter.to_local(), group, 1)
        whole = stage_parameters.whole_value(parameter, mine, pipeline).as_subclass(GatheredWeight)
    whole.weight_name = name
    return whole


def captured_parameter(parameter: nn.Parameter, leaf: Tensor, spec: Any) -> Tensor:
    """What stands for ``parameter`` while a training step is captured.

    ``leaf``, the shard that the program takes, is what it differentiates for: reads of the parameter gather
    ``leaf``; what writes into the parameter writes into the same memory. ``spec`` makes a DTensor of it; None
    where it is the whole parameter.
    """
    if spec is None:
        return leaf
    made = compat.dtensor_of(leaf.detach(), spec, parameter.requires_grad)
    ours = ("_autodist_name", "_autodist_job", "_autodist_owners")
    vars(made).update({k: v for k, v in vars(parameter).items() if k not in ours and k not in vars(made)})
    made._autodist_leaf = leaf  # type: ignore[attr-defined]
    return compat.mark_parameter(made)


def is_captured(tensor: Tensor) -> bool:
    """Whether a tensor stands for a sharded parameter in a step being captured."""
    return hasattr(tensor, "_autodist_leaf")


def whole_value(parameter: Tensor) -> Tensor:
    """A plain tensor, the caller's own, of a parameter's whole value; collective."""
    with torch.no_grad():
        return plain_tensor(unshard(parameter))  # type: ignore[no-any-return]


def _gather(parameter: DTensor, local: Tensor, group: str, divisor: int | None) -> Tensor:
    size = parameter.device_mesh.size() if divisor is None else divisor
    if parameter.placements == (Replicate(),):
        return dialect.replica(local, size, local.dtype, group)
    return dialect.unshard(local, parameter.shape[0], size, local.dtype, group)


class LostWriteError(RuntimeError):
    """A program changes a gathered copy of a weight where it means the weight."""


class GatheredWeight(Tensor):
    """A weight read eagerly: a copy of the whole, computed with as with any tensor.

    What would be lost with the copy raises :class:`LostWriteError`: in-place changes (of views too),
    ``.data =``, ``.grad =``, hooks and ``requires_grad``. Results that are not views are plain tensors.
    """

    weight_name: str

    @classmethod
    @compat.not_alone
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("out", args[0] if args else None)
        if isinstance(target, GatheredWeight) and ("out" in kwargs or _changes_its_tensor(func)):
            raise LostWriteError(
                f"'{target.weight_name}' is sharded: reading it gives a gathered copy, and "
                f"{_readable_name(func)} on that copy would not reach the parameter. Use the parameter "
                f"itself, dict(model.named_parameters())['{target.weight_name}'], a DTensor, or load new "
                "values with model.load_state_dict."
            )
        with compat.plain_functions():
            result = func(*args, **kwargs)
            if torch.compiler.is_compiling():
                return result
            weight = next((a for a in args if isinstance(a, GatheredWeight)), None)
            return result if weight is None else tree_map(lambda r: _mark_view(r, weight), result)


def plain_tensor(value: Any) -> Any:
    """A :class:`GatheredWeight` as the tensor it is; anything else as it comes."""
    if not isinstance(value, GatheredWeight):
        return value
    with compat.plain_functions():
        return value.as_subclass(Tensor)


_CHANGES = {
    Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook,
    Tensor.retain_grad,
    Tensor.requires_grad_,
    Tensor.__setitem__,
    Tensor.data.__set__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    Tensor.grad.__set__,  # type: ignore[attr-defined]
}


@compat.not_alone
def _changes_its_tensor(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return func in _CHANGES or in_place or (name.startswith("__i") and name not in _NOT_IN_PLACE)


_NOT_IN_PLACE = {"__invert__", "__index__", "__int__", "__iter__", "__init__"}


def _readable_name(func: Any) -> str:
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    verb = {"__get__": f"reading .{owner}", "__set__": f"setting .{owner}"}
    return verb.get(func.__name__, f"{func.__name__}()")


@compat.not_alone
def _mark_view(result: Any, weight: GatheredWeight) -> Any:
    """A result in the copy's memory is still the copy."""
    if type(result) is Tensor and result.layout is torch.strided and result.numel() > 0:
        same = result.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        if same:
            result = result.as_subclass(GatheredWeight)
            result.weight_name = weight.weight_name
    return result


class MixedReadError(RuntimeError):
    """Ranks read different parameters at the same time."""


def check_same(key: str, doing: str, group: str, device: torch.device) -> None:
    """Every rank comes here with the same ``key`` now, or all raise :class:`MixedReadError`.

    A gather takes what each rank sends. Ranks whose Python went different ways (an expert that only some
    of them need) would silently be given pieces of different weights.
    """
    if compat.is_fake_group(group):
        return
    tag = torch.tensor([zlib.crc32(key.encode())], device=device)
    tags = dialect.all_gather_now(tag, group).tolist()
    if len(set(tags)) > 1:
        others = [r for r, t in zip(compat.group_ranks(group), tags, strict=True) if t != tag.item()]
        raise MixedReadError(
            f"this rank {doing} while ranks {others} do something else: their programs took different "
            "ways. All ranks must use the same parameters in the same order; make what depends "
            "on a rank's data (the experts it needs, a branch) use all of them, with weight zero if need be."
        )


def placement_of(shape: torch.Size, shard: bool) -> Shard | Replicate:
    """``Shard(0)`` for anything with rows to share out, else ``Replicate``."""
    return Shard(0) if shard and len(shape) > 0 else Replicate()


def distribute(value: Tensor, mesh: DeviceMesh, shard: bool) -> DTensor:
    """This rank's DTensor of ``value``, which every rank holds alike. Copies; no communication."""
    placement = placement_of(value.shape, shard)
    local = value
    if isinstance(placement, Shard):
        chunk = dialect.chunk_rows(value.shape[0], mesh.size())
        start = min(chunk * mesh.get_local_rank(), value.shape[0])
        local = value[start : min(start + chunk, value.shape[0])]
    local = local.detach().clone(memory_format=torch.contiguous_format)
    shape, stride = value.shape, torch.empty(value.shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, [placement], run_check=False, shape=shape, stride=stride
    )


def replace_parameters(root: nn.Module, convert: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Replace every plain parameter of ``root`` by ``convert(name, parameter)``, once per object.

    The modules' classes become subclasses whose properties read through :func:`unshard`. Attributes
    that hold parameters outside the registry (the flat weights of ``nn.LSTM``) become properties too.
    A parameter already replaced through another root is found again by its ``successor``.
    """
    for prefix, module in list(root.named_modules()):
        owned = {n: p for n, p in module._parameters.items() if p is not None}
        for name, parameter in owned.items():
            if isinstance(parameter, MovedParameter):
                module._parameters[name] = parameter.successor
            elif not isinstance(parameter, DTensor):
                full_name = f"{prefix}.{name}" if prefix else name
                move(parameter, full_name, convert(full_name, parameter))
                module._parameters[name] = parameter.successor  # type: ignore[attr-defined]
        if owned:
            held = tuple(k for k, v in vars(module).items() if _holds_parameters(k, v))
            for name in held:
                vars(module)[name] = tree_map(_successor, vars(module)[name])
            read_through(module, tuple(owned), held)


def adopt(root: nn.Module) -> None:
    """Give ``root`` the successors of parameters that were replaced through another model."""
    for module in root.modules():
        moved = {n: p.successor for n, p in module._parameters.items() if isinstance(p, MovedParameter)}
        if moved:
            module._parameters.update(moved)
            read_through(module, tuple(moved))


def read_through(module: nn.Module, names: tuple[str, ...], held: tuple[str, ...] = ()) -> None:
    """Make reading ``names`` of ``module`` (parameters) and ``held`` (containers of them) unshard."""
    base: type[nn.Module] = getattr(type(module), "_autodist_base", type(module))
    names = tuple(sorted({*names, *getattr(type(module), "_autodist_names", ())}))
    held = tuple(sorted({*held, *getattr(type(module), "_autodist_held", ())}))
    module.__class__ = _sharded_class(base, names, held)  # type: ignore[arg-type]


@functools.cache
def _sharded_class(
    base: type[nn.Module], names: tuple[str, ...], held: tuple[str, ...]
) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        name: property(functools.partial(_read_parameter, name=name)) for name in names
    }
    namespace |= {
        name: property(
            functools.partial(_read_container, name=name),
            functools.partial(_write_container, name),
        )
        for name in held
    }
    namespace |= {
        "_autodist_base": base,
        "_autodist_names": names,
        "_autodist_held": held,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), namespace)


@compat.not_alone
def _read_parameter(module: nn.Module, name: str) -> Tensor | None:
    return unshard(module._parameters[name])  # type: ignore[arg-type]


@compat.not_alone
def _read_container(module: nn.Module, name: str) -> Any:
    return tree_map(_read, vars(module)[name])


@compat.not_alone
def _write_container(name: str, module: nn.Module, value: Any) -> None:
    # A module may rebuild its container from weights it has just read: nn.LSTM does, in every forward.
    vars(module)[name] = value


def move(old: nn.Parameter, name: str, new: nn.Parameter) -> None:
    """Turn ``old`` into a :class:`MovedParameter` and give its memory back.

    Attributes that the user set on it (``no_weight_decay = True``) go on to ``new``.
    """
    vars(new).update({k: v for k, v in vars(old).items() if k not in vars(new)})
    new._autodist_name = name  # type: ignore[attr-defined]
    if old.requires_grad:
        old.register_hook(functools.partial(_refuse_gradient, name))
    old.data = old.data.new_empty(0)
    old.grad = None
    old.__class__ = MovedParameter
    vars(old).update(successor=new, moved_name=name)


def _refuse_gradient(name: str, grad: Tensor) -> None:
    raise MovedParameterError(
        f"'{name}' was used eagerly before the first compiled part of the model was reached, where the "
        "model was sharded; its gradient in this step would be lost. Call autodist.prepare(model, plan) "
        "before the first step."
    )


def _holds_parameters(key: str, value: Any) -> bool:
    registry = key in nn.Module.__annotations__
    if registry or not isinstance(value, (list, tuple, dict)):
        return False
    return bool(tree_any(lambda leaf: isinstance(leaf, MovedParameter), value))


def _successor(leaf: Any) -> Any:
    return leaf.successor if isinstance(leaf, MovedParameter) else leaf


def _read(leaf: Any) -> Any:
    return unshard(leaf) if isinstance(leaf, DTensor) else leaf


def parameter_name(value: Any) -> str | None:
    """The name under which :func:`replace_parameters` found a parameter."""
    return getattr(value, "_autodist_name", None)


def weight_name(value: Any) -> str | None:
    """The name of the parameter that a gathered weight is a copy of."""
    return value.weight_name if isinstance(value, GatheredWeight) else None


def containers(module: nn.Module) -> tuple[str, ...]:
    """Attributes through which ``module`` holds sharded parameters outside its registry."""
    return getattr(type(module), "_autodist_held", ())


def plain_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of ``root`` that have not been prepared, each object once."""
    for name, parameter in root.named_parameters():
        if not isinstance(parameter, DTensor):
            yield name, parameter
