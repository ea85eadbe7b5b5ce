"""The Python values that a training step can read, and whether they still are what they were.

A captured step runs its Python once. What that Python may have read is found by walking from the function,
and the objects among its arguments, through

    functions    closure, defaults, attributes, and the globals that they name; functions of the user's own
                 that are found there, and methods of the classes found whose names are used
    modules      all attributes, parameters and buffers (which tensor where, not what is in it), hooks,
                 submodules, attributes of their classes
    optimizers   settings and members of groups, and their own attributes
    containers   lists, tuples, dictionaries, sets, of any size up to ``_MOST`` elements
    objects      attributes, and those of objects in them, ``_DEPTH`` deep

What is plain counts by value, other objects by identity and by what they hold. Not looked into are installed
packages' functions, classes and modules of the standard library and of torch, and schedulers.

Walking is slow and done when something has changed. Whether it has is asked before every run, and answered by
comparing objects by identity, all in a few passes that run in C (:meth:`Surroundings.unchanged`).
"""

from __future__ import annotations

import argparse
import dis
import functools
import operator
import os
import sys
import sysconfig
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from autodist.passes.base import StepError
from autodist.runtime import compat
from autodist.runtime.compat import local_part, tree_flatten, tree_leaves
from autodist.runtime.parameters import MovedParameter, containers, parameter_name, weight_name

Scheduler = (LRScheduler, ReduceLROnPlateau)
PLAIN = (
    int, float, bool, str, bytes, complex, range, slice, type(None), torch.dtype, torch.device, numpy.generic,
)  # fmt: skip
# What a module keeps for torch: ``training`` and a ``forward`` of its own are attributes like others.
REGISTRIES = frozenset(nn.Module.__annotations__) - {"training", "forward"}
_DICTS = (dict, OrderedDict, MappingProxyType)  # whose items are read without a side effect
_MANY, _MOST, _ARRAY, _DEPTH = 64, 10_000, 4096, 6
_LIBRARIES = {"torch", "numpy", "autodist", "builtins"} | (sys.stdlib_module_names - {"__main__"})
_is, _flat = operator.is_, chain.from_iterable
_CALLED = (FunctionType, MethodType, functools.partial, staticmethod, classmethod, property)
_OF_CLASSES = {"__dict__", "__weakref__", "__doc__", "__slots__"}  # what Python keeps there for itself
_PLACES = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), Path(torch.__file__).parents[1])
_INSTALLED = tuple(f"{path}{os.sep}" for path in (*_PLACES, Path(__file__).parent))


class Surroundings:
    """What can be read from ``roots`` (name, object), as it was when this was made.

    ``values`` are the plain values and objects found, ``names`` where each was. Parameter groups with the ids
    ``fixed`` have learning rates that count as values.
    """

    def __init__(self, roots: Iterable[tuple[str, Any]], fixed: Collection[int] = ()) -> None:
        self._fixed = fixed
        self.values: list[Any] = []
        self.names: list[str] = []
        self._reads: dict[int, tuple[Any, dict[Any, Any]]] = {}
        self._sized: list[Any] = []
        self._empty: list[Any] = []
        self._children: list[dict[str, nn.Module | None]] = []
        self._children_found: list[dict[str, nn.Module | None]] = []
        self._listed: list[Iterable[Any]] = []
        self._items: list[Any] = []
        self._attributes: list[tuple[Any, str, Any]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._held: list[tuple[Any, list[Any]]] = []
        self._hooks = compat.hooks_registered()
        self._seen: dict[int, tuple[int, Any]] = {}
        self._inside = False  # the first function, the step, may be anyone's
        self._classes: set[type] = set()
        self._used: set[str] = {"forward", "step"}
        self._unused: dict[str, list[tuple[str, Any]]] = {}
        for name, value in roots:
            self._visit(name, value, 0)
        for hooks in compat.global_hooks():
            self._mapping("a hook of all modules", hooks, 1, with_keys=False)
        self._sizes = list(map(len, self._sized))
        self._groups = _grouped(self._reads.values())
        del self._reads, self._seen, self._used, self._unused, self._classes

    def unchanged(self) -> bool:
        """Whether every object is where it was; an equal one in its place is a change."""
        try:
            return (
                compat.hooks_registered() == self._hooks
                and not any(self._empty)
                and list(map(len, self._sized)) == self._sizes
                and all(map(operator.eq, self._children, self._children_found))  # modules equal themselves
                and all(all(map(_is, _flat(map(*read)), then)) for read, then in self._groups)
                and all(getattr(owner, key) is value for owner, key, value in self._attributes)
                and all(map(_is, _flat(self._listed), self._items))
                and all(_content(array) == then for array, then in self._arrays)
                and all(_same_leaves(value, then) for value, then in self._held)
            )
        except (LookupError, AttributeError, ValueError):  # it is gone; a cell has been emptied
            return False

    def difference(self, other: Surroundings) -> str | None:
        """The name of the first value in which ``other`` differs."""
        pairs = zip(self.values, other.values, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if not same_value(a, b)), None)
        if place is None and len(self.values) != len(other.values):
            place = min(len(self.values), len(other.values))
        longer = max(self.names, other.names, key=len)
        return None if place is None else longer[place]

    def replace(self, old: Any, new: Any) -> None:
        """Expect ``new`` where ``old`` has been."""
        self._groups = [(g, [new if x is old else x for x in then]) for g, then in self._groups]

    # --- the walk ---------------------------------------------------------------------------------

    def _leaf(self, name: str, value: Any) -> None:
        self.names.append(name)
        self.values.append(value)

    def _read(self, holder: Any, key: Any) -> Any:
        """``holder[key]``, which is looked at again before every run."""
        value = holder[key]
        self._reads.setdefault(id(holder), (holder, {}))[1][key] = value
        return value

    def _visit(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, PLAIN):
            self._leaf(name, value)
        elif is_note_of_tensor(value):
            self._leaf(name, type(value))
        elif id(value) in self._seen:
            self._leaf(name, self._seen[id(value)][0])
        else:
            self._seen[id(value)] = len(self._seen), value
            self._enter(name, value, depth)

    def _enter(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, (Tensor, *Scheduler)):
            known = isinstance(value, nn.Parameter) and not isinstance(value, MovedParameter)
            self._leaf(name, tensor_kind(value) if known else value)
        elif isinstance(value, nn.Module):
            self._module(name, value)
        elif isinstance(value, Optimizer):
            self._optimizer(name, value)
        elif isinstance(value, (dict, MappingProxyType)):
            self._leaf(name, type(value))
            self._mapping(name, value, depth)
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            self._leaf(name, type(value))
            self._sequence(name, value, depth)
        elif isinstance(value, numpy.ndarray):
            self._array(name, value, depth)
        elif isinstance(value, _CALLED):
            self._function(name, value, depth)
        elif isinstance(value, type):
            self._leaf(name, value)
            self._class(value)
        else:
            self._leaf(name, value)
            if depth < _DEPTH and is_open(value):
                self._object(name, value, depth)

    def _mapping(self, name: str, value: Any, depth: int, with_keys: bool = True) -> None:
        self._leaf(name, len(value))
        if not value:
            self._empty.append(value)
        elif len(value) > _MOST or type(value) not in _DICTS:
            self._list(name, value, (value, value.values()), depth)
        else:
            self._sized.append(value)
            depth = _DEPTH if len(value) > _MANY else depth
            for key in list(value):
                if with_keys:
                    self._leaf(name, key)
                shown = f"{name}[{key!r}]" if with_keys and isinstance(key, PLAIN) else name
                self._visit(shown, self._read(value, key), depth)

    def _sequence(self, name: str, value: Any, depth: int) -> None:
        self._leaf(name, len(value))
        if type(value) is tuple:
            for i, item in enumerate(value):
                self._visit(f"{name}[{i}]", item, depth)
        else:
            self._list(name, value, (value,), depth)

    def _list(self, name: str, value: Any, parts: Sequence[Iterable[Any]], depth: int) -> None:
        """Compare what is in a container by iterating."""
        self._sized.append(value)
        for part in parts if len(value) <= _MOST else ():
            items = list(part)
            self._listed.append(part)
            self._items += items
            if isinstance(value, (set, frozenset)):  # with the same elements, the order may be another
                items.sort(key=hash)
            for i, item in enumerate(items):
                self._visit(f"{name}[{i}]", item, _DEPTH if len(value) > _MANY else depth)

    def _array(self, name: str, value: Any, depth: int) -> None:
        if value.size <= _ARRAY and value.dtype != object:
            self._arrays.append((value, _content(value)))
            self._leaf(name, _content(value))
        elif depth < 2:
            raise StepError(
                f"{name} is an array of {value.size} elements, which cannot be compared before every "
                "run of a captured step. Pass a tensor: torch.from_numpy(array)."
            )
        else:
            self._leaf(name, value)

    def _module(self, name: str, module: nn.Module) -> None:
        own = vars(module)
        self._leaf(name, module)
        self._sized.append(own)
        held = containers(module)
        for key in list(own):
            if key in held:
                self._container(f"{name}.{key}", self._read(own, key))
            elif key not in REGISTRIES:
                self._visit(f"{name}.{key}", self._read(own, key), 1)
        self._mapping(name, module._parameters, 0)
        self._buffers(name, module._buffers)
        self._submodules(name, module._modules)
        for hooks in filter(None, compat.forward_hooks(module)):
            self._mapping(f"a hook of {name}", hooks, 1, with_keys=False)
        self._class(type(module))

    def _container(self, name: str, value: Any) -> None:
        """Parameters, or what was gathered of them when the module last ran eagerly: which ones they are."""
        leaves, structure = tree_flatten(value)
        self._held.append((value, leaves))
        self._leaf(name, str(structure))
        for leaf in leaves:
            weight = parameter_name(leaf) or weight_name(leaf)
            self._visit(name, leaf if weight is None else weight, 1)

    def _submodules(self, name: str, children: dict[str, nn.Module | None]) -> None:
        if children:
            self._children.append(children)
            self._children_found.append(dict(children))
        else:
            self._empty.append(children)
        for key, child in children.items():
            self._leaf(name, key)
            self._visit(f"{name}.{key}", child, 0)

    def _buffers(self, name: str, buffers: Any) -> None:
        """Buffers are inputs of a program: what counts is which tensor it is, and of what kind."""
        (self._sized if buffers else self._empty).append(buffers)
        for key in list(buffers):
            buffer = self._read(buffers, key)
            number, _ = self._seen.setdefault(id(buffer), (len(self._seen), buffer))
            self._leaf(f"{name}.{key}", (key, number, None if buffer is None else tensor_kind(buffer)))

    def _optimizer(self, name: str, optimizer: Optimizer) -> None:
        own = vars(optimizer)
        self._leaf(name, optimizer)
        self._sized.append(own)
        for key in list(own):
            if key not in compat.OPTIMIZER_FLAGS and key not in ("state", "param_groups"):
                self._visit(f"{name}.{key}", self._read(own, key), 1)
        self._sized.append(optimizer.param_groups)
        for i, group in enumerate(optimizer.param_groups):
            self._read(optimizer.param_groups, i)
            self._sized.append(group)
            self._leaf(name, len(group))
            for key in list(group):
                if key == "params":
                    self._visit(f"{name}.param_groups[{i}]['params']", self._read(group, key), 1)
                elif not (key == "lr" and lifts(group, self._fixed)):
                    self._leaf(name, key)
                    self._visit(f"{name}.param_groups[{i}]['{key}']", self._read(group, key), 1)
        self._class(type(optimizer))

    def _object(self, name: str, value: Any, depth: int) -> None:
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self._sized.append(own)
            for key in list(own):
                if not isinstance(getattr(type(value), str(key), None), functools.cached_property):
                    self._leaf(name, key)
                    self._visit(f"{name}.{key}", self._read(own, key), depth + 1)
        for slot in _slots(type(value)):
            if hasattr(value, slot):
                self._attributes.append((value, slot, getattr(value, slot)))
                self._visit(f"{name}.{slot}", getattr(value, slot), depth + 1)
        self._class(type(value))

    def _class(self, kind: type) -> None:
        """Attributes of a class and its bases; methods once their names are used somewhere."""
        for base in kind.__mro__:
            if base in self._classes or not is_open(base):
                continue
            self._classes.add(base)
            own = vars(base)
            self._sized.append(own)
            self._listed.append(own.values())
            self._items += own.values()
            for key, value in list(own.items()):
                if key in _OF_CLASSES:
                    continue
                name = f"{base.__name__}.{key}"
                if not isinstance(value, _CALLED):
                    self._visit(name, value, 1)
                elif key in self._used or key.startswith("__"):
                    self._visit(name, value, 0)
                else:
                    self._leaf(name, value)
                    self._unused.setdefault(key, []).append((name, value))

    def _function(self, name: str, function: Any, depth: int) -> None:
        """What a function takes from around it. Two functions of the same code are the same."""
        if isinstance(function, functools.partial):
            for part in (function.func, function.args, function.keywords):
                self._visit(name, part, depth)
            return
        if isinstance(function, MethodType):
            self._visit("self", function.__self__, depth)
        while not isinstance(function, FunctionType):
            function = getattr(function, "__func__", None) or getattr(function, "fget", None)
            if function is None:
                return
        code = function.__code__
        self._leaf(name, code)
        if self._inside and code.co_filename.startswith(_INSTALLED):
            return
        self._inside = True
        for key, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if is_filled(cell):
                self._attributes.append((cell, "cell_contents", cell.cell_contents))
                self._visit(key, cell.cell_contents, 0)
        for part in (function.__defaults__ or (), function.__kwdefaults__ or {}, vars(function)):
            self._visit(name, part, 0)
        around, used = function.__globals__, names_used(code)
        for key in sorted(global_names(code)):
            if key in around:
                self._global(key, self._read(around, key), used)
        self._use(used)

    def _global(self, name: str, value: Any, used: frozenset[str]) -> None:
        """A global; of a module of the user's own, what is used of it."""
        if not isinstance(value, ModuleType):
            self._visit(name, value, 0)
        elif is_open(value):
            for key in sorted(used & vars(value).keys()):
                self._global(f"{name}.{key}", self._read(vars(value), key), used)

    def _use(self, names: frozenset[str]) -> None:
        new = names - self._used
        self._used |= new
        for key in sorted(new & self._unused.keys()):
            for name, method in self._unused.pop(key):
                self._visit(name, method, 0)


def _grouped(reads: Iterable[tuple[Any, dict[Any, Any]]]) -> list[tuple[tuple[Any, list[Any]], list[Any]]]:
    """Holders that are read with the same keys, together: (what reads them all, holders), what was found."""
    groups: dict[tuple[Any, ...], tuple[list[Any], list[Any]]] = {}
    for holder, found in reads:
        holders, values = groups.setdefault(tuple(found), ([], []))
        holders.append(holder)
        values += found.values()
    return [((_getter(keys), holders), values) for keys, (holders, values) in groups.items()]


def _getter(keys: tuple[Any, ...]) -> Callable[[Any], tuple[Any, ...]]:
    return operator.itemgetter(*keys) if len(keys) > 1 else lambda holder: (holder[keys[0]],)


def step_roots(function: Callable[..., Any], arguments: Sequence[Any]) -> list[tuple[str, Any]]:
    """From where a step's Python is found: the function, and the objects among its arguments."""
    objects = [x for x in arguments if not isinstance(x, (*PLAIN, Tensor))]
    return [("", function), *(("an argument", x) for x in objects)]


def same_value(a: Any, b: Any) -> bool:
    """Whether Python that reads ``b`` does what it did with ``a``."""
    if a is b:
        return True
    if type(a) is not type(b) or not isinstance(a, (*PLAIN, tuple, torch.Size)):
        return False
    return bool(a == b) or (a != a and b != b)


def named_objects(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function takes from around it: its ``self``, closure, defaults and the globals it names."""
    plain = getattr(function, "__func__", function)
    code = getattr(plain, "__code__", None)
    if code is None:
        return {}
    cells = zip(code.co_freevars, plain.__closure__ or (), strict=True)
    found = {name: cell.cell_contents for name, cell in cells if is_filled(cell)}
    found |= {n: plain.__globals__[n] for n in global_names(code) if n in plain.__globals__}
    defaults = plain.__defaults__ or ()
    found |= dict(zip(code.co_varnames[code.co_argcount - len(defaults) :], defaults, strict=False))
    found |= dict(plain.__kwdefaults__ or {})
    owner = getattr(function, "__self__", None)
    if owner is not None:
        registries = REGISTRIES if isinstance(owner, nn.Module) else ()
        found["self"] = owner
        found |= {k: v for k, v in getattr(owner, "__dict__", {}).items() if k not in registries}
    return found


@functools.cache
def global_names(code: CodeType) -> frozenset[str]:
    """The globals that a function, and functions written inside of it, read or set."""
    kinds = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL")
    names = {i.argval for i in dis.get_instructions(code) if i.opname in kinds}
    return frozenset(names.union(*(global_names(c) for c in code.co_consts if isinstance(c, CodeType))))


@functools.cache
def names_used(code: CodeType) -> frozenset[str]:
    """The names of attributes that a function, and functions written inside of it, may read."""
    names = {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
    return frozenset(names.union(*(names_used(c) for c in code.co_consts if isinstance(c, CodeType))))


def is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that has no value yet
        return False


def lifts(group: Mapping[str, Any], fixed: Collection[int]) -> bool:
    """Whether a group has a learning rate, which may change from step to step; not those with the ids
    ``fixed``, whose optimizers ask for the number."""
    return id(group) not in fixed and (is_number(group.get("lr")) or isinstance(group.get("lr"), Tensor))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_open(value: Any) -> bool:
    """Whether to look into an object, a class or a module: not one of torch or the standard library."""
    if isinstance(value, (SimpleNamespace, argparse.Namespace)):
        return True
    if isinstance(value, ModuleType):
        return not str(getattr(value, "__file__", None) or _INSTALLED[0]).startswith(_INSTALLED)
    kind = value if isinstance(value, type) else type(value)
    return not is_library(kind.__module__)


def is_library(module: str | None) -> bool:
    """Whether what a module of this name defines is not looked into."""
    return str(module).partition(".")[0] in _LIBRARIES


def _slots(kind: type) -> list[str]:
    """Names of attributes that objects of a class keep outside of a dictionary."""
    found = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = {name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)}
    return sorted(n for n in names if not n.startswith("__"))


def is_note_of_tensor(value: Any) -> bool:
    """Whether this is a weak reference to a tensor: a note of which object there was, as ``nn.LSTM`` keeps of
    its weights. A program has inputs for tensors, whichever objects they are."""
    return isinstance(value, weakref.ref) and isinstance(value(), (Tensor, type(None)))


def tensor_kind(tensor: Tensor) -> tuple[Any, ...]:
    """What a program that takes a tensor as its input knows of it."""
    local = local_part(tensor)
    hooked = isinstance(tensor, nn.Parameter) and compat.has_gradient_hooks(tensor)
    return type(tensor), tensor.shape, local.shape, local.stride(), local.dtype, local.device, hooked


def _same_leaves(value: Any, then: list[Any]) -> bool:
    now = tree_leaves(value)
    return len(now) == len(then) and all(map(_is, now, then))


def _content(array: Any) -> tuple[Any, ...]:
    return array.dtype.str, array.shape, array.tobytes()


__all__ = ["Surroundings"]
