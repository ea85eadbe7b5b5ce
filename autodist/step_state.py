"""What a training step reads and writes beside its batch.

A *step* is a Python function of models, optimizers and a batch. Its *state* is every tensor that it reaches
through them:

    parameter   of a model, or of an optimizer alone; each object once, however often it is used
    gradient    ``parameter.grad``, where there is one
    buffer      of a model
    moment      ``optimizer.state[parameter][key]``
    rate        a parameter group's ``lr``: a number, which a program takes as a tensor

A *place* is a dictionary and a key: where such a tensor is kept, and where another is put to take its part
(:meth:`State.holding`). Everything else that a step can see of its models and optimizers is Python:
a program is made for its values (:meth:`State.constants`) and runs only while they are the same.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from autodist.runtime import compat
from autodist.runtime.compat import local_part, tree_leaves, tree_map
from autodist.runtime.parameters import containers, parameter_name

Scheduler = (LRScheduler, ReduceLROnPlateau)
Place = tuple[dict[Any, Any], Any]
_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device)
_MANY = 64


@dataclass(frozen=True)
class Roots:
    """The objects with state that a step can reach."""

    modules: tuple[nn.Module, ...]
    optimizers: tuple[Optimizer, ...]
    schedulers: tuple[Any, ...]


def roots_of(function: Callable[..., Any], arguments: Sequence[Any]) -> Roots:
    """Models, optimizers and schedulers among ``arguments``, and those that ``function`` names itself."""
    found = [*arguments, *named_objects(function).values()]
    leaves = [leaf for value in found for leaf in tree_leaves(value)]

    def those(kind: Any) -> tuple[Any, ...]:
        return tuple({id(x): x for x in leaves if isinstance(x, kind)}.values())

    return Roots(those(nn.Module), those(Optimizer), those(Scheduler))


def named_objects(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function takes from around it: its ``self``, closure, defaults and the globals it names."""
    plain = getattr(function, "__func__", function)
    code = getattr(plain, "__code__", None)
    if code is None:
        return {}
    cells = zip(code.co_freevars, plain.__closure__ or (), strict=True)
    found = {name: cell.cell_contents for name, cell in cells if filled(cell)}
    found |= {n: plain.__globals__[n] for n in global_names(code) if n in plain.__globals__}
    found |= dict(plain.__kwdefaults__ or {})
    owner = getattr(function, "__self__", None)
    if owner is not None:
        registries = REGISTRIES if isinstance(owner, nn.Module) else ()
        found["self"] = owner
        found |= {k: v for k, v in getattr(owner, "__dict__", {}).items() if k not in registries}
    return found


@functools.cache
def global_names(code: CodeType) -> set[str]:
    """The globals that a function, and functions written inside of it, read or set."""
    kinds = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL")
    names = {i.argval for i in dis.get_instructions(code) if i.opname in kinds}
    return names.union(*(global_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def outside_values(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
    """Plain values that a step finds around it: globals, closure, and attributes of objects found there or
    among its arguments. A program is made for them."""
    found = [*sorted(named_objects(function).items()), *enumerate(arguments)]
    return [(name, _shown(value)) for name, value in found]


def _shown(value: Any) -> Any:
    """What of an object is compared: itself if it is plain, or its plain attributes."""
    if _is_plain(value):
        return value
    ours = (nn.Module, Optimizer, Tensor, *Scheduler, ModuleType, FunctionType, BuiltinFunctionType)
    theirs = getattr(type(value), "__module__", "").startswith(("torch", "autodist."))
    if isinstance(value, ours) or theirs or not hasattr(value, "__dict__"):
        return None
    return {k: v for k, v in vars(value).items() if not k.startswith("__") and _is_plain(v)}


def filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that has no value yet
        return False


@dataclass(frozen=True)
class Moment:
    """``optimizer.state[parameter][key]``, of the optimizer and parameter with these numbers."""

    optimizer: int
    parameter: int
    key: Any
    tensor: Tensor


@dataclass
class State:
    """The tensors reached from ``roots``. See the module's text for the terms."""

    roots: Roots
    parameters: list[nn.Parameter] = field(default_factory=list)
    places: list[list[Place]] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    buffer_places: list[list[Place]] = field(default_factory=list)
    held: list[Place] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    _gradients: list[Tensor] = field(default_factory=list)
    _of_gradients: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, roots: Roots) -> State:
        state = cls(roots)
        state._find_tensors()
        state.find_moments()
        return state

    def _find_tensors(self) -> None:
        seen: dict[int, int] = {}
        buffers: dict[int, int] = {}
        for root in self.roots.modules:
            for prefix, module in root.named_modules():
                for key, parameter in module._parameters.items():
                    if parameter is not None:
                        self._add(parameter, seen, (module._parameters, key), prefix, key)
                for key, buffer in module._buffers.items():
                    if buffer is not None:
                        if id(buffer) not in buffers:
                            buffers[id(buffer)] = len(self.buffers)
                            self.buffers.append(buffer)
                            self.buffer_places.append([])
                        self.buffer_places[buffers[id(buffer)]].append((module._buffers, key))
                self.held += [(vars(module), name) for name in containers(module)]
        for optimizer in self.roots.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self._add(parameter, seen, None, "", f"parameter {len(self.parameters)}")
        self.index = seen

    def _add(
        self, parameter: nn.Parameter, seen: dict[int, int], place: Place | None, prefix: str, key: str
    ) -> None:
        if id(parameter) not in seen:
            seen[id(parameter)] = len(self.parameters)
            self.parameters.append(parameter)
            self.places.append([])
            self.names.append(parameter_name(parameter) or (f"{prefix}.{key}" if prefix else key))
        if place is not None:
            self.places[seen[id(parameter)]].append(place)

    def find_moments(self) -> None:
        self._states = [[v for s in o.state.values() for v in s.values()] for o in self.roots.optimizers]
        self.moments = [
            Moment(o, self.index[id(parameter)], key, value)
            for o, optimizer in enumerate(self.roots.optimizers)
            for parameter, values in optimizer.state.items()
            if id(parameter) in self.index
            for key, value in values.items()
            if isinstance(value, Tensor)
        ]

    # --- whether it is still so -------------------------------------------------------------------

    @functools.cached_property
    def _moment_names(self) -> list[tuple[int, int, Any]]:
        return [(m.optimizer, m.parameter, m.key) for m in self.moments]

    @functools.cached_property
    def kept_parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's parts of parameters and of moments, which stay while the state stands."""
        return [*map(local_part, self.parameters)], [local_part(m.tensor) for m in self.moments]

    @functools.cached_property
    def _sharded(self) -> tuple[list[DTensor], list[Tensor]]:
        """The DTensors among them, and their parts."""
        tensors = [*self.parameters, *(m.tensor for m in self.moments)]
        sharded = [t for t in tensors if isinstance(t, DTensor)]
        return sharded, [*map(local_part, sharded)]

    def stands(self) -> bool:
        """Whether the state's tensors are where they were found."""
        if any(holder.get(key) is not tensor for holder, key, tensor in self._held_tensors):
            return False
        if not compat.same_parts(*self._sharded):
            return False
        now = [[v for values in o.state.values() for v in values.values()] for o in self.roots.optimizers]
        return all(
            len(a) == len(b) and all(map(operator.is_, a, b)) for a, b in zip(now, self._states, strict=True)
        )

    @functools.cached_property
    def _held_tensors(self) -> list[tuple[dict[Any, Any], Any, Tensor]]:
        """Where each parameter and buffer is, in one list: it is read before every run."""
        tensors = [*zip(self.parameters, self.places, strict=True)]
        tensors += zip(self.buffers, self.buffer_places, strict=True)  # type: ignore[arg-type]
        return [(holder, key, tensor) for tensor, places in tensors for holder, key in places]

    @property
    def groups(self) -> list[dict[str, Any]]:
        return [g for o in self.roots.optimizers for g in o.param_groups]

    def own_rates(self) -> list[Any]:
        """The learning rates, group by group, as they are kept."""
        return [g["lr"] for g in self.groups if lifts(g)]

    def rates(self) -> list[Tensor]:
        """The learning rates as tensors."""
        return [torch.as_tensor(float(x)) if _is_number(x) else x for x in self.own_rates()]

    @functools.cached_property
    def _readers(self) -> list[tuple[dict[str, Any], Callable[[Any], Any]]]:
        """For each module, what takes its plain attributes all at once."""
        readers: list[tuple[dict[str, Any], Callable[[Any], Any]]] = []
        for module in self._modules:
            names = [k for k, v in _own(module).items() if _is_plain(v)]
            readers.append((vars(module), operator.itemgetter(*names)))
        return readers

    def attributes(self) -> list[Any]:
        """Values of the plain attributes of modules, ``training`` among them."""
        return [read(values) for values, read in self._readers]

    @property
    def _modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(m for root in self.roots.modules for m in root.modules()))

    def constants(self) -> list[Any]:
        """All that a program takes as constant: compared with ``==`` before each run."""
        return [
            [p.grad is None for p in self.parameters],
            [p.requires_grad for p in self.parameters],
            self.attributes(),
            [hyperparameters(g) for g in self.groups],
            self._moment_names,
        ]

    # --- memory that is shared ----------------------------------------------------------------------

    def relations(self, tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
        """For each of ``tensors``, which one it is and whose memory it has, among the state's and these.

        A number is that of the first: negative for the state's own.
        """
        objects, memory = self._known_memory
        held = self.gradients()
        if len(held) != len(self._gradients) or not all(map(operator.is_, held, self._gradients)):
            first = -1 - len(objects)
            self._gradients = held
            self._of_gradients = {memory_of(local_part(g)): first - i for i, g in enumerate(held)}
        found: list[tuple[int, int]] = []
        own: dict[int, int] = {}
        own_memory: dict[int, int] = {}
        for i, x in enumerate(tensors):
            place = memory_of(local_part(x))
            shared = memory.get(place, self._of_gradients.get(place))
            found.append((
                objects.get(id(x), own.setdefault(id(x), i)),
                own_memory.setdefault(place, i) if shared is None else shared,
            ))
        return found

    @functools.cached_property
    def _known_memory(self) -> tuple[dict[int, int], dict[int, int]]:
        known = [*self.parameters, *self.buffers, *(m.tensor for m in self.moments)]
        objects = {id(x): -1 - i for i, x in enumerate(known)}
        return objects, {memory_of(local_part(x)): -1 - i for i, x in enumerate(known)}

    # --- tensors ----------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """All but the rates."""
        moments = [m.tensor for m in self.moments]
        return [*self.parameters, *self.gradients(), *self.buffers, *moments]

    def gradients(self) -> list[Tensor]:
        """The gradients there are, in the order of the parameters."""
        return [p.grad for p in self.parameters if p.grad is not None]

    @contextlib.contextmanager
    def holding(
        self, parameters: Sequence[Tensor], buffers: Sequence[Tensor], moments: Sequence[Tensor],
        rates: Sequence[Tensor],
    ) -> Iterator[None]:  # fmt: skip
        """With other tensors in all places, and optimizers told that they are being compiled."""
        other = {id(old): new for old, new in zip(self.parameters, parameters, strict=True)}
        saved = [(o.state, [dict(g) for g in o.param_groups]) for o in self.roots.optimizers]
        attributes = [(h, k, h[k]) for h, k in self.held]
        try:
            _put(self.places, parameters)
            _put(self.buffer_places, buffers)
            for holder, key, value in attributes:
                holder[key] = tree_map(lambda leaf: other.get(id(leaf), leaf), value)
            for optimizer in self.roots.optimizers:
                optimizer.state = defaultdict(
                    dict, {other[id(p)]: dict(v) for p, v in optimizer.state.items() if id(p) in other}
                )
            for moment, tensor in zip(self.moments, moments, strict=True):
                owner = self.roots.optimizers[moment.optimizer]
                owner.state[parameters[moment.parameter]][moment.key] = tensor
            left = iter(rates)
            for group in self.groups:
                group["params"] = [other[id(p)] for p in group["params"]]
                if lifts(group):
                    group["lr"] = next(left)
                group.update({k: v for k, v in _CAPTURED.items() if k in group})
            yield
        finally:
            _put(self.places, self.parameters)
            _put(self.buffer_places, self.buffers)
            for holder, key, value in attributes:
                holder[key] = value
            for optimizer, (state, groups) in zip(self.roots.optimizers, saved, strict=True):
                optimizer.state = state
                for group, old in zip(optimizer.param_groups, groups, strict=True):
                    group.clear()
                    group.update(old)


# How an optimizer is run while it is captured: what it does to each parameter is the same, written in
# operators on tensors; which kernels do it is the compiler's business.
_CAPTURED = {"capturable": True, "foreach": True, "fused": None}
REGISTRIES = set(nn.Module.__annotations__) - {"training"}


def lifts(group: Mapping[str, Any]) -> bool:
    """Whether a group has a learning rate, which may change from step to step."""
    return _is_number(group.get("lr")) or isinstance(group.get("lr"), Tensor)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings, but for the learning rate."""
    return {k: v for k, v in group.items() if k != "params" and not (k == "lr" and lifts(group))}


def memory_of(tensor: Tensor) -> int:
    """What tensors have in common that share memory."""
    return compat.storage_key(tensor) if tensor.layout is torch.strided else id(tensor)


def _put(places: Sequence[Sequence[Place]], tensors: Sequence[Tensor]) -> None:
    for holders, tensor in zip(places, tensors, strict=True):
        for holder, key in holders:
            holder[key] = tensor


def _own(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in REGISTRIES}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list, set, frozenset)):
        return len(value) <= _MANY and all(map(_is_plain, value))
    if isinstance(value, dict):
        return len(value) <= _MANY and all(_is_plain(v) for v in value.values())
    return isinstance(value, _PLAIN)
