"""What a training step finds around it, kept while the step is captured.

A step runs its Python only while it is captured, with stand-ins for its tensors. What it changes of the
objects that it can reach would be changed then and never again, and a stand-in that it leaves in one has no
value. So these objects are recorded before, compared after, and put back (:class:`Snapshot`).

A *record* is one object with its contents: a list, dict or set, the attributes of an object, a class or a
module, a closure's cell, the globals that a function names. Where one holds parameters, stand-ins take their
place while the step runs: a step that clips the gradients of a list from its closure clips those it has made.
"""

from __future__ import annotations

import inspect
import io
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from autodist.step_guards import (
    Scheduler,
    global_names,
    is_filled,
    is_library,
    is_note_of_tensor,
    is_open,
    named_objects,
    same_value,
)

_MANY = 1000
_CONTAINERS = (list, dict, set, deque, tuple)
_Contents = dict[Any, Any]


class Globals:
    """The globals that a function names."""

    def __init__(self, function: FunctionType) -> None:
        self.module, self.names = function.__globals__, global_names(function.__code__)

    def read(self) -> _Contents:
        return {n: self.module[n] for n in self.names if n in self.module}

    def write(self, contents: _Contents) -> None:
        for name in self.names & (self.module.keys() - contents.keys()):
            del self.module[name]
        self.module.update(contents)


class Record:
    """One object, what a person calls it, its contents by key, and the object that it is a part of."""

    def __init__(self, name: str, holder: Any, owner: Any) -> None:
        self.name, self.holder, self.owner = name, holder, owner
        self.saved = self.read()

    def read(self) -> _Contents:
        holder = self.holder
        if isinstance(holder, dict):
            return dict(holder)
        if isinstance(holder, (list, deque)):
            return dict(enumerate(holder))
        if isinstance(holder, set):
            return {id(x): x for x in holder}
        if isinstance(holder, CellType):
            return {self.name: holder.cell_contents} if is_filled(holder) else {}
        return holder.read() if isinstance(holder, Globals) else dict(vars(holder))

    def write(self, contents: _Contents) -> None:
        holder = self.holder
        if isinstance(holder, dict):
            holder.clear()
            holder.update(contents)
        elif isinstance(holder, (list, deque)):
            holder.clear()
            holder.extend(contents.values())
        elif isinstance(holder, set):
            holder.clear()
            holder.update(contents.values())
        elif isinstance(holder, CellType):
            holder.cell_contents = contents[self.name]
        elif isinstance(holder, Globals):
            holder.write(contents)
        elif isinstance(holder, type):
            for key in vars(holder).keys() - contents.keys():
                delattr(holder, key)
            for key in [k for k, v in contents.items() if vars(holder).get(k) is not v]:
                setattr(holder, key, contents[key])
        else:
            vars(holder).clear()
            vars(holder).update(contents)

    def put(self, contents: _Contents) -> None:
        """Write what is not there already."""
        now = self.read()
        if len(now) != len(contents) or any(
            a is not b or k is not o for (k, a), (o, b) in zip(now.items(), contents.items(), strict=True)
        ):
            self.write(contents)

    def stand_in(self, stand_ins: Mapping[int, Any]) -> None:
        """Put stand-ins, by the id of what they stand for, in the place of contents."""
        keys = {k: stand_ins.get(id(k), k) if isinstance(k, Tensor) else k for k in self.saved}
        self.put({keys[k]: _substituted(v, stand_ins) for k, v in self.saved.items()})

    def changed(self, stand_ins: Mapping[int, Any]) -> list[Any]:
        """Keys whose values are neither what they were nor stand for it."""
        if isinstance(self.holder, set):
            wanted = {id(stand_ins.get(i, x)) for i, x in self.saved.items()}
            return [] if self.read().keys() in (self.saved.keys(), wanted) else ["its elements"]
        stands_for = {id(new): old for old, new in stand_ins.items()}
        now, found = self.read(), []
        for key, value in now.items():
            own = next((k for k in self.saved if id(k) == stands_for.get(id(key))), key)
            if own not in self.saved or not _same(value, self.saved[own], stand_ins):
                found.append(own)
        missing = len(self.saved) - len(now)
        return found or ([k for k in self.saved if k not in now][:1] if missing > 0 else [])


class Snapshot:
    """Records of everything that a step can reach: see the module's text.

    ``named`` are objects by name; without ``objects`` only containers among them are followed.
    """

    def __init__(
        self, named: Mapping[str, Any], functions: Sequence[Callable[..., Any]] = (), objects: bool = True
    ) -> None:
        self.records: list[Record] = []
        self.objects = objects
        self._seen: dict[int, Any] = {}
        for function in functions:
            self._function(function)
        for name, value in named.items():
            self._walk(name, value)

    def stand_in(self, stand_ins: Mapping[int, Any]) -> None:
        for record in self.records:
            record.stand_in(stand_ins)

    def changed(self, stand_ins: Mapping[int, Any]) -> tuple[Record, Any] | None:
        """The first record that is not what it was, and the key."""
        for record in self.records:
            keys = record.changed(stand_ins)
            if keys:
                return record, keys[0]
        return None

    def restore(self) -> None:
        for record in self.records:
            record.put(record.saved)

    def find(self, wanted: Callable[[Any], bool]) -> tuple[Record, Any] | None:
        """Where, and under which key, the first value is that is ``wanted``."""
        for record in self.records:
            for key, value in record.saved.items():
                if any(map(wanted, value if isinstance(value, tuple) else (value,))):
                    return record, key
        return None

    def _record(self, name: str, holder: Any, owner: Any = None) -> Record:
        record = Record(name, holder, owner)
        self.records.append(record)
        return record

    def _function(self, function: Any) -> None:
        owner, plain = getattr(function, "__self__", None), getattr(function, "__func__", function)
        if owner is not None:
            self._walk("self", owner)
        if not isinstance(plain, FunctionType):
            return
        self._walk("its defaults", plain.__defaults__)
        self._walk("its defaults", plain.__kwdefaults__)
        for name, cell in zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True):
            for value in self._record(name, cell).saved.values():
                self._walk(name, value)
        for name, value in self._record("globals", Globals(plain)).saved.items():
            self._walk(name, value)

    def _walk(self, name: str, value: Any, owner: Any = None) -> None:
        contained = isinstance(value, _CONTAINERS)
        if id(value) in self._seen or not (contained or (self.objects and _is_followed(value))):
            return
        self._seen[id(value)] = value
        if isinstance(value, (FunctionType, MethodType)):
            self._function(value)
        elif isinstance(value, tuple):
            for x in value[:_MANY]:
                self._walk(name, x, owner)
        else:
            record = self._record(name, value, owner if contained else value)
            if len(record.saved) <= _MANY and not isinstance(value, (type, *Scheduler)):
                for key, x in record.saved.items():  # elements of a container are called as it is
                    self._walk(name if contained else f"{name}.{key}", x, record.owner)


def _is_followed(value: Any) -> bool:
    if isinstance(value, (nn.Module, *Scheduler)):
        return True
    if isinstance(value, (Tensor, Optimizer, ModuleType)):
        return False
    if isinstance(value, (FunctionType, MethodType)):
        return not is_library(value.__module__)
    return is_open(value) and hasattr(value, "__dict__")


def _substituted(value: Any, stand_ins: Mapping[int, Any]) -> Any:
    if isinstance(value, tuple):
        found = [_substituted(x, stand_ins) for x in value]
        if all(a is b for a, b in zip(found, value, strict=True)):
            return value
        return tuple(found) if type(value) is tuple else type(value)(*found)  # a named tuple
    return stand_ins.get(id(value), value)


def _same(now: Any, before: Any, stand_ins: Mapping[int, Any]) -> bool:
    if now is before or now is stand_ins.get(id(before), before):
        return True
    if type(now) is type(before) and isinstance(now, (tuple, list)):  # another list of the same is as good
        pairs = zip(now, before, strict=False)
        return len(now) == len(before) and all(_same(a, b, stand_ins) for a, b in pairs)
    return same_value(now, before) or (is_note_of_tensor(now) and is_note_of_tensor(before))


def named_arguments(
    function: Callable[..., Any], arguments: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[str, Any]:
    """Arguments (positional, keyword) by the names that the function has for them."""
    args, kwargs = arguments
    try:
        found = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):  # calling it says so
        return {}
    named: dict[str, Any] = {}
    for parameter in found.signature.parameters.values():
        value = found.arguments.get(parameter.name)
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= value or {}
        elif parameter.kind is parameter.VAR_POSITIONAL:
            named |= {f"{parameter.name}[{i}]": x for i, x in enumerate(value or ())}
        elif parameter.name in found.arguments:
            named[parameter.name] = value
    return named


def outer_names(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function reads from around it: closure, globals, and those attributes of its ``self``."""
    plain, owner = getattr(function, "__func__", function), getattr(function, "__self__", None)
    code = getattr(plain, "__code__", None)
    if code is None:
        return {}
    attributes = getattr(owner, "__dict__", {})
    return {
        **named_objects(plain),
        **{f"self.{n}": v for n, v in attributes.items() if n in code.co_names},
    }


def iterators(named: Mapping[str, Any]) -> list[str]:
    """Names of iterators: what one gives next, it gives once."""
    return [n for n, v in named.items() if isinstance(v, Iterator) and not isinstance(v, io.IOBase)]
