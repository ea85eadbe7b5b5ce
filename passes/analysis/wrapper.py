"""The memory Inductor's program will use, read off the program itself.

Inductor emits Python: allocations, kernel calls, ``del``. Everything that decides the peak (what
was fused, reordered, reused) stands in that text. So the text is run, with tensors that have no
data: kernels do nothing, allocations and library calls make fake tensors of the right size, and the
program itself says when they die. Counted are storages, as an allocator counts them:

    live = bytes of the inputs not yet dropped + bytes of the storages made and not yet dropped

Views and reuses (``buf2 = reinterpret_tensor(buf1, ...); del buf1``) share a storage and count
once; a collective's wait returns the tensor that its start made. In a program that uses an
accelerator, host memory is not counted. Never counted: scratch memory inside kernels and libraries,
an allocator's rounding.
"""

from __future__ import annotations

import ast
import math
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from autodist.runtime import compat, offload
from autodist.runtime.compat import TorchDispatchMode, tree_leaves

_FILE = "<emitted program>"
_comm = torch.ops._c10d_functional
_GATHERS = {
    _comm.all_gather_into_tensor.default,
    _comm.all_gather_into_tensor_coalesced.default,
}
_STAGED = _GATHERS | {
    _comm.reduce_scatter_tensor.default,
    _comm.reduce_scatter_tensor_coalesced.default,
}


@dataclass(frozen=True)
class WrapperPeak:
    """``peak`` and ``held`` (what is alive when the program has returned) in bytes.

    ``line`` is the line of the program, counted from 1, at which the peak is first reached,
    ``statement`` its text; 0 and empty when that is the start.
    """

    peak: int
    held: int
    line: int
    statement: str


def wrapper_peak(
    code: str,
    input_bytes: Mapping[str, int],
    hints: Mapping[str, int] | None = None,
    *,
    staged: bool = False,
) -> WrapperPeak:
    """The peak of a program Inductor emitted as ``code`` (its Python wrapper).

    ``input_bytes`` says what an input counts, by its name in the program, until the program drops
    it. Inputs it does not name count nothing: their owner keeps them anyway; of inputs that share a
    storage, name the one dropped last. ``hints`` gives symbolic sizes their values, by their names
    in the program; those it leaves out have the value they were compiled with. ``staged`` counts
    what a transport that copies (gloo) holds from a collective's start to its wait.

    Raises :class:`ValueError` when ``code`` is not such a program, or needs a size that only
    running it can tell and ``hints`` does not.
    """
    program = _Program(code, hints or {})
    meter = _Meter(staged)
    with compat.FakeTensorMode(allow_non_fake_inputs=True):
        arguments = meter.count_inputs(program.inputs(), input_bytes)
        with meter:
            outputs = program.call(arguments)
    device = meter.device()
    line = meter.peak_line[device]
    statement = code.splitlines()[line - 1].strip() if line else ""
    held = meter.live[device]
    del outputs
    return WrapperPeak(meter.peak[device], held, line, statement)


# --- counting -------------------------------------------------------------------------------------


class _Meter(TorchDispatchMode):
    """Counts the storages that operators make, from then until they die, by type of device."""

    def __init__(self, stages: bool) -> None:
        super().__init__()
        self._stages = stages
        self._staged: dict[int, Any] = {}
        self._loading: dict[int, Any] = {}
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.peak_line: Counter[str] = Counter()
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is _comm.wait_tensor.default:
            self._staged.pop(compat.storage_key(args[0]), None)
            return args[0]
        result = func(*args, **(kwargs or {}))
        if self._stages and func in _STAGED:
            self._stage(func, args[0], result)
        if func is offload.offload_wait:  # on the host
            return result
        if func is offload.reload_wait:
            return self._loading.pop(compat.storage_key(args[0]))
        if func is offload.reload_start:  # takes the device's memory; its wait hands it out
            loaded = offload.reload_wait(result, *args)
            self._loading[compat.storage_key(result)] = loaded
            self.count(loaded, loaded.untyped_storage().nbytes())
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf, leaf.untyped_storage().nbytes())
        return result

    def _stage(self, func: Any, given: Any, result: Any) -> None:
        """Count what the transport holds beside the tensors, until their wait."""
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        payload = made if func in _GATHERS else tree_leaves(given)
        if func is _comm.all_gather_into_tensor_coalesced.default:
            payload = [*payload, *given]
        num_bytes = sum(t.numel() * t.element_size() for t in payload)
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=made[0].device)
        self.count(buffer, num_bytes)
        # The waits of a list stand together: the first ends it for all.
        self._staged |= dict.fromkeys(map(compat.storage_key, made[:1]), buffer)

    def count(self, tensor: torch.Tensor, num_bytes: int) -> None:
        """Count ``tensor``'s storage as ``num_bytes``, unless it is counted already."""
        key, device = compat.storage_key(tensor), tensor.device.type
        if key in self._known:
            return
        forget = partial(self._forget, key, device, num_bytes)
        self._known[key] = weakref.ref(tensor.untyped_storage(), forget)
        self.live[device] += num_bytes
        if self.live[device] > self.peak[device]:
            self.peak[device] = self.live[device]
            self.peak_line[device] = _current_line()

    def count_inputs(self, inputs: Mapping[str, Any], num_bytes: Mapping[str, int]) -> list[Any]:
        """Count each input as ``num_bytes`` says, by name; the inputs in their order."""
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                self.count(value, num_bytes.get(name, 0))
        return list(inputs.values())

    def _forget(self, key: int, device: str, num_bytes: int, _: Any) -> None:
        self.live[device] -= num_bytes
        del self._known[key]

    def device(self) -> str:
        """The accelerator if the program uses one."""
        return max(self.peak.keys() - {"cpu"}, key=self.peak.__getitem__, default="cpu")


def _current_line() -> int:
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_filename != _FILE:
        frame = frame.f_back  # type: ignore[assignment]
    return frame.f_lineno if frame else 0


# --- running --------------------------------------------------------------------------------------


class _Silent:
    """Stands for a kernel, or anything else whose doings do not concern memory."""

    def __getattr__(self, name: str) -> _Silent:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Silent:
        return self

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


_SILENT = _Silent()


class _Torch:
    """``torch``, without touching a device; the helpers it keeps in C++ are replaced below."""

    cuda = xpu = _C = _SILENT

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _ExternKernels:
    """Library calls: with ``out`` they make nothing, else what the ATen operator of that name
    makes.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return kwargs["out"] if "out" in kwargs else getattr(torch.ops.aten, name)(*args, **kwargs)

        return call


def _empty(device: str, size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _reinterpret(tensor: torch.Tensor, size: Any, stride: Any, offset: int) -> torch.Tensor:
    return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


def _example(size: Any, stride: Any, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


_KNOWN: dict[str, Any] = {
    "__name__": "emitted",
    "torch": _Torch(),
    "device": torch.device,
    "math": math,
    "inf": math.inf,
    "nan": math.nan,
    "empty_strided": torch.empty_strided,
    "extern_kernels": _ExternKernels(),
    "rand_strided": _example,
    "reinterpret_tensor": _reinterpret,
    "empty_strided_cpu": partial(_empty, "cpu"),
    "empty_strided_cpu_pinned": partial(_empty, "cpu"),
    "empty_strided_cuda": partial(_empty, "cuda"),
    "empty_strided_xpu": partial(_empty, "xpu"),
}


class _Program:
    """An emitted module, made harmless: no imports, no kernels, every name one of ours."""

    def __init__(self, code: str, hints: Mapping[str, int]) -> None:
        try:
            edit = _Disarm(hints)
            self._tree = ast.fix_missing_locations(edit.visit(ast.parse(code)))
            self._names = dict.fromkeys(edit.imported, _SILENT) | _KNOWN
            exec(compile(self._tree, _FILE, "exec"), self._names)
        except Exception as error:
            raise ValueError(f"this is not a program that Inductor emitted: {error}") from error
        self._names |= _KNOWN
        self._functions = {f.name: f for f in ast.walk(self._tree) if isinstance(f, ast.FunctionDef)}
        if "call" not in self._functions:
            raise ValueError("this is not a program that Inductor emitted: it has no function 'call'")

    def call(self, arguments: list[Any]) -> Any:
        """Run the program; it empties ``arguments``."""
        try:
            return self._names["call"](arguments)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((f.lineno for f in reversed(frames) if f.filename == _FILE), None)
            raise ValueError(
                f"line {line} of the emitted program cannot be followed without data: {error}; "
                "a size that is known only at run time needs a hint"
            ) from error

    def inputs(self) -> dict[str, Any]:
        """The program's inputs by name: fake tensors, numbers, or stand-ins for anything else.

        Types, devices and the sizes compiled for come from the example inputs that Inductor lists
        for benchmarks, sizes under other hints from what the program asserts of its inputs.
        """
        names = self._input_names()
        examples = dict.fromkeys(names, _SILENT) | self._examples(names)
        symbols = self._symbols(examples)
        for name, size, stride in self._declared():
            example = examples.get(name)
            if isinstance(example, torch.Tensor):
                sizes, strides = self._value(size, symbols), self._value(stride, symbols)
                if tuple(example.shape) != sizes:
                    examples[name] = example.new_empty_strided(sizes, strides)
        return examples

    def _input_names(self) -> list[str]:
        for statement in self._functions["call"].body:
            match statement:
                case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Name(id="args")):
                    return [n.id for n in names if isinstance(n, ast.Name)]
        return []

    def _examples(self, names: Sequence[str]) -> dict[str, Any]:
        lists = self._functions.get("get_args") or self._functions.get("benchmark_compiled_module")
        if lists is None and names:
            raise ValueError(
                "the emitted program lists no example inputs; compile with Inductor's benchmark_harness on"
            )
        found: dict[str, Any] = {}
        for statement in lists.body if lists else ():
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in names:
                    found[name] = self._value(value, {})
        return found

    def _symbols(self, examples: Mapping[str, Any]) -> dict[str, int]:
        """Values of the symbolic sizes that the program reads from its inputs or was given."""
        symbols = {}
        for statement in self._functions["call"].body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=symbol)], value=ast.Name(id=name)):
                    symbols[symbol] = examples.get(name)
                case ast.Assign(targets=[ast.Name(id=symbol)], value=ast.Constant(value=number)):
                    symbols[symbol] = number
        return {s: v for s, v in symbols.items() if isinstance(v, int)}

    def _declared(self) -> list[tuple[str, ast.expr, ast.expr]]:
        """(name, sizes, strides) of every assertion about a tensor."""
        found = []
        for node in ast.walk(self._functions["call"]):
            match node:
                case ast.Call(ast.Name("assert_size_stride"), [ast.Name(name), size, stride, *_]):
                    found.append((name, size, stride))
                case ast.Call(
                    ast.Name("assert_size_stride_grouped"),
                    [ast.Tuple(tensors), ast.Tuple(sizes), ast.Tuple(strides), *_],
                ):
                    ids = [t.id if isinstance(t, ast.Name) else "" for t in tensors]
                    found += zip(ids, sizes, strides, strict=True)
        return found

    def _value(self, expression: ast.expr, symbols: Mapping[str, int]) -> Any:
        return eval(compile(ast.Expression(expression), _FILE, "eval"), self._names, dict(symbols))


class _Disarm(ast.NodeTransformer):
    """Takes out imports (keeping the names) and fixes the symbols that have a hint."""

    def __init__(self, hints: Mapping[str, int]) -> None:
        self._hints = hints
        self.imported: list[str] = []

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> ast.Pass:
        self.imported += [(a.asname or a.name).split(".")[0] for a in node.names]
        return ast.copy_location(ast.Pass(), node)

    visit_ImportFrom = visit_Import  # type: ignore[assignment]

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        match node.targets:
            case [ast.Name(id=name)] if name in self._hints:
                node.value = ast.copy_location(ast.Constant(self._hints[name]), node.value)
        return node
