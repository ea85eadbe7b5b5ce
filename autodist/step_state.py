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
a program is made for its values (:mod:`autodist.step_guards`) and runs only while they are the same.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections import ChainMap, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from autodist.runtime import compat, offload
from autodist.runtime.compat import local_part, tree_leaves, tree_map
from autodist.runtime.parameters import containers, parameter_name
from autodist.step_guards import Scheduler, Surroundings, is_number, lifts, named_objects, tensor_kind

Place = tuple[dict[Any, Any], Any]

# How an optimizer is run while it is captured: what it does to each parameter is the same, written in
# operators on tensors; which kernels do it is the compiler's business.
CAPTURED = {"capturable": True, "foreach": True, "fused": None}


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


@dataclass(frozen=True)
class Moment:
    """``optimizer.state[parameter][key]``, of the optimizer and parameter with these numbers."""

    optimizer: int
    parameter: int
    key: Any
    tensor: Tensor


@dataclass
class State:
    """The tensors reached from ``roots``. See the module's text for the terms.

    Of a pipeline's parameters that lie elsewhere a rank has neither gradients nor moments. While a step is
    captured they count too (:func:`autodist.step_pipeline.of_all_places`): ``gradients_elsewhere`` by the
    parameter's number, and among ``moments``; ``values_elsewhere`` are what else optimizers keep, by
    optimizer and parameter, or None without a pipeline.
    """

    roots: Roots
    parameters: list[nn.Parameter] = field(default_factory=list)
    places: list[list[Place]] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    buffer_places: list[list[Place]] = field(default_factory=list)
    held: list[Place] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    around: Surroundings = field(default_factory=lambda: Surroundings([]))
    fixed: Collection[int] = ()
    gradients_elsewhere: Mapping[int, Tensor] = field(default_factory=dict)
    values_elsewhere: Mapping[tuple[int, int], dict[Any, Any]] | None = None

    @classmethod
    def of(
        cls, roots: Roots, around: Surroundings | None = None, fixed: Collection[int] = ()
    ) -> State:
        """The state as it is; to be asked later whether it stands, it is given what is ``around``.

        ``fixed`` are ids of parameter groups whose learning rates are no tensors of the state, but values.
        """
        state = cls(roots, fixed=fixed)
        state.around = around or state.around
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
        values = [v for o in self.roots.optimizers for s in o.state.values() for v in s.values()]
        self._states = [*values, *_END]
        self._state_sizes = [len(o.state) for o in self.roots.optimizers]
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
        """Whether the state's tensors, and the Python around them, are what was found."""
        if not (self.around.unchanged() and compat.same_parts(*self._sharded)):
            return False
        held = [o.state for o in self.roots.optimizers]
        if list(map(len, held)) != self._state_sizes:
            return False
        values = itertools.chain(*map(dict.values, held))
        now = itertools.chain(itertools.chain.from_iterable(map(dict.values, values)), _END)
        return all(map(operator.is_, now, self._states))

    @property
    def groups(self) -> list[dict[str, Any]]:
        return [g for o in self.roots.optimizers for g in o.param_groups]

    def own_rates(self) -> list[Any]:
        """The learning rates, group by group, as they are kept."""
        return [g["lr"] for g in self.groups if lifts(g, self.fixed)]

    def rates(self) -> list[Tensor]:
        """The learning rates as tensors."""
        return [torch.as_tensor(float(x)) if is_number(x) else x for x in self.own_rates()]

    @functools.cached_property
    def values(self) -> list[Any]:
        """All that a program takes as constant while the state stands."""
        moments = [
            (m.optimizer, m.parameter, m.key, tensor_kind(m.tensor), self.is_on_host(m)) for m in self.moments
        ]
        return [*self.around.values, *moments]

    def is_on_host(self, moment: Moment) -> bool:
        """Whether a moment's place is the host (:mod:`autodist.passes.host_state`)."""
        device = local_part(self.parameters[moment.parameter]).device
        return offload.is_on_host(local_part(moment.tensor), device)

    def keep_on_host(self, numbers: Collection[int], limit: int) -> None:
        """Give moments, by number, a place in host memory, of which ``limit`` bytes may be used.

        Raises :class:`~autodist.runtime.offload.HostMemoryError` where that is not enough. What is known of
        the state has to be found again.
        """
        for number in sorted(numbers):
            moment = self.moments[number]
            local, parameter = local_part(moment.tensor), self.parameters[moment.parameter]
            host = offload.transfers(local_part(parameter).device).keep(local, limit)
            if isinstance(moment.tensor, DTensor):
                host = compat.dtensor_of(host, compat.specification(moment.tensor), False)
            self.roots.optimizers[moment.optimizer].state[parameter][moment.key] = host

    # --- memory that is shared ----------------------------------------------------------------------

    def relations(
        self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[tuple[int, int]]:
        """For each of ``tensors``, which one it is and whose memory it has, among the state's and these.

        A number is that of the first: negative for the state's own. ``gradients`` are the state's.
        """
        of_buffers, of_gradients = self._numbers
        held = [g for g in gradients if g is not None]
        parts = (self._kept_numbers, of_buffers.of(self.buffers), of_gradients.of(held))
        objects, memory = (ChainMap(*(getattr(p, n) for p in parts)) for n in ("objects", "memory"))
        own: dict[int, int] = {}
        own_memory: dict[int, int] = {}
        found: list[tuple[int, int]] = []
        for i, x in enumerate(tensors):
            place = memory_of(local_part(x))
            one, whose = own.setdefault(id(x), i), own_memory.setdefault(place, i)
            found.append((objects.get(id(x), one), memory.get(place, whose)))
        return found

    def forget_gradients(self) -> None:
        """Keep none alive until the next call."""
        self._numbers[1].of([])

    @functools.cached_property
    def _kept_numbers(self) -> _Numbers:
        """Of parameters and moments, which stay while the state stands."""
        return _Numbers(-1).of([*self.parameters, *(m.tensor for m in self.moments)])

    @functools.cached_property
    def _numbers(self) -> tuple[_Numbers, _Numbers]:
        """Of buffers and gradients."""
        first = -1 - len(self.parameters) - len(self.moments)
        return _Numbers(first), _Numbers(first - len(self.buffers))

    # --- tensors ----------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """All but the rates."""
        held = [g for g in self.gradients() if g is not None]
        return [*self.parameters, *held, *self.buffers, *(m.tensor for m in self.moments)]

    def gradients(self) -> list[Tensor | None]:
        """The gradient of each parameter, or None."""
        found: list[Tensor | None] = list(map(_gradient, self.parameters))
        for number, gradient in self.gradients_elsewhere.items():
            found[number] = gradient
        return found

    def trained(self) -> list[bool]:
        """Of each parameter, whether it requires a gradient."""
        return list(map(_trained, self.parameters))

    def put_buffer(self, number: int, value: Tensor) -> None:
        """Put another tensor in a buffer's places. Of the same kind, it becomes the state's."""
        old = self.buffers[number]
        for holder, key in self.buffer_places[number]:
            holder[key] = value
        if tensor_kind(value) == tensor_kind(old):
            self.buffers[number] = value
            self.around.replace(old, value)

    @contextlib.contextmanager
    def holding(
        self, parameters: Sequence[Tensor], buffers: Sequence[Tensor], moments: Sequence[Tensor],
        rates: Sequence[Any], settings: Mapping[str, Any] = CAPTURED,
    ) -> Iterator[None]:  # fmt: skip
        """With other tensors in all places, and optimizers told that they are being compiled, or other
        ``settings``."""
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
            for (number, parameter), values in (self.values_elsewhere or {}).items():
                self.roots.optimizers[number].state[parameters[parameter]] = dict(values)
            for moment, tensor in zip(self.moments, moments, strict=True):
                owner = self.roots.optimizers[moment.optimizer]
                owner.state[parameters[moment.parameter]][moment.key] = tensor
            if self.values_elsewhere is not None:  # in one order on all ranks
                for optimizer in self.roots.optimizers:
                    held = optimizer.state
                    optimizer.state = defaultdict(dict, {p: held[p] for p in parameters if p in held})
            left = iter(rates)
            for group in self.groups:
                group["params"] = [other[id(p)] for p in group["params"]]
                if lifts(group, self.fixed):
                    group["lr"] = next(left)
                group.update({k: v for k, v in settings.items() if k in group})
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


_END = (object(),)  # tells a list from one that goes on
_gradient, _trained = operator.attrgetter("grad"), operator.attrgetter("requires_grad")


def hyperparameters(group: Mapping[str, Any], fixed: Collection[int]) -> dict[str, Any]:
    """A group's settings, but for a learning rate that is lifted."""
    return {k: v for k, v in group.items() if k != "params" and not (k == "lr" and lifts(group, fixed))}


class _Numbers:
    """Numbers of tensors from ``first`` downwards, by identity and by memory."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._tensors: Sequence[Tensor] = []
        self.objects: dict[int, int] = {}
        self.memory: dict[int, int] = {}

    def of(self, tensors: Sequence[Tensor]) -> _Numbers:
        """These tensors' numbers, found anew if they are not the last ones."""
        if len(tensors) != len(self._tensors) or not all(map(operator.is_, tensors, self._tensors)):
            self._tensors = [*tensors]
            self.objects, self.memory = {}, {}
            for i, x in enumerate(tensors):
                self.objects.setdefault(id(x), self._first - i)
                self.memory.setdefault(memory_of(local_part(x)), self._first - i)
        return self


def memory_of(tensor: Tensor) -> int:
    """What tensors have in common that share memory."""
    return compat.storage_key(tensor) if tensor.layout is torch.strided else id(tensor)


def _put(places: Sequence[Sequence[Place]], tensors: Sequence[Tensor]) -> None:
    for holders, tensor in zip(places, tensors, strict=True):
        for holder, key in holders:
            holder[key] = tensor
