"""Every private torch API autodist uses, held to the signature and the behaviour it relies on.

When a torch release moves or changes one, the failing test here names it; the rest of the suite need not be
read to find out. Quick: run on every supported torch version.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import autodist.backend
from autodist.runtime import compat

aten = torch.ops.aten


# --- nothing is left out ---------------------------------------------------------------------------


def test_every_public_name_is_used_here() -> None:
    """A name without a test would move unnoticed."""
    here = ast.walk(ast.parse(Path(__file__).read_text()))
    used = {n.attr for n in here if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "compat"}
    defined = {n for n, v in vars(compat).items() if getattr(v, "__module__", "") == compat.__name__}
    public = {n for n in defined if not n.startswith("_")} | set(compat.__all__)
    assert len(public) > 40
    assert not public - used, "names of compat.py without a test in this file"


FOLDERS = ("autodist", "passes", "runtime", "kernels")
# Operators' names are part of ATen's and c10d's schemas, underscore or not. The other two have been in use
# everywhere for so long that torch cannot move them.
NOT_PRIVATE = ("torch.ops.", "torch._dynamo.reset", "torch._dynamo.allow_in_graph")
# nn.Module's dictionaries have a test below; the initialiser is Hugging Face's, fields are a named tuple's.
ATTRIBUTES = ("_parameters", "_buffers", "_modules", "_init_weights", "_fields")


class PrivateUses(ast.NodeVisitor):
    """Collects, as ``line: name``, the private names of torch that a program imports or touches.

    Followed are imports, names given to parts of torch (``_aten = torch.ops.aten``) and chains of
    attributes. Of other objects the type is not known: a private attribute counts as torch's unless the
    program itself defines one of that name.
    """

    def __init__(self, source: str) -> None:
        self.found: list[str] = []
        self._paths: dict[str, str] = {}
        self._own: set[str] = set()
        program = ast.parse(source)
        for node in ast.walk(program):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self._own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self._own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _of_self(node):
                self._own.add(node.attr)
        self.visit(program)

    def _check(self, node: ast.AST, path: str) -> None:
        allowed = path.startswith(NOT_PRIVATE)
        if path.startswith("torch.") and not allowed and any(map(_is_private, path.split("."))):
            self.found.append(f"{node.lineno}: {path}")  # type: ignore[attr-defined]

    def _check_attribute(self, node: ast.AST, name: str) -> None:
        known = name in ATTRIBUTES or name in self._own or name.startswith("_autodist_")
        if _is_private(name) and not known:
            self.found.append(f"{node.lineno}: .{name}")  # type: ignore[attr-defined]

    def _path(self, node: ast.AST) -> str | None:
        """The dotted path of a name or of a chain of attributes that starts from an imported module."""
        if isinstance(node, ast.Name):
            return self._paths.get(node.id)
        if isinstance(node, ast.Attribute) and (path := self._path(node.value)):
            return f"{path}.{node.attr}"
        return None

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._check(node, alias.name)
            top = alias.name.split(".")[0]
            self._paths[alias.asname or top] = alias.name if alias.asname else top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            path = f"{node.module}.{alias.name}"
            self._check(node, path)
            self._paths[alias.asname or alias.name] = path

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs: list[tuple[ast.expr, ast.expr]] = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                if isinstance(name, ast.Name) and (path := self._path(value)):
                    self._paths[name.id] = path

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if path := self._path(node):
            self._check(node, path)
            return
        if not _of_self(node):
            self._check_attribute(node, node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(ast.Name("getattr" | "setattr" | "hasattr"), [value, ast.Constant(str(name)), *_]):
                path = self._path(value)
                if path:
                    self._check(node, f"{path}.{name}")
                else:
                    self._check_attribute(node, name)
        self.generic_visit(node)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def test_private_torch_is_touched_in_one_place() -> None:
    root = Path(__file__).parent.parent
    files = [p for folder in FOLDERS for p in sorted((root / folder).rglob("*.py"))]
    assert len(files) > 30
    found = [
        f"{path.relative_to(root)}:{use}"
        for path in files
        if path != root / "runtime" / "compat.py"
        for use in PrivateUses(path.read_text()).found
    ]
    assert not found, "private torch outside of runtime/compat.py:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch._inductor.config", ["1: torch._inductor.config"]),
        ("from torch.utils._pytree import tree_map", ["1: torch.utils._pytree.tree_map"]),
        ("from torch.amp.autocast_mode import _cast", ["1: torch.amp.autocast_mode._cast"]),
        ("import torch.distributed as dist\nf(dist._make())", ["2: torch.distributed._make"]),
        ("import torch\na, b = torch.ops, torch.fx\nb._x", ["3: torch.fx._x"]),
        ("import torch\nhasattr(torch.fx, '_x')", ["2: torch.fx._x"]),
        ("def f(tensor):\n    return tensor._base", ["2: ._base"]),
        ("def f(tensor):\n    return getattr(tensor, '_base')", ["2: ._base"]),
        ("import torch\na = torch.ops.aten\na._to_copy, torch.__version__, torch._dynamo.reset()", []),
        ("class C:\n    def f(self, other):\n        self._x = 1\n        return other._x, self._y", []),
        ("import sys\nsys._getframe()", []),
    ],
)
def test_the_search_for_private_names_finds_them(source: str, found: list[str]) -> None:
    assert PrivateUses(source).found == found


def test_modules_keep_parameters_and_buffers_in_dictionaries() -> None:
    """Read and written all over autodist, and by other libraries: what stands there is what a name yields."""
    module = nn.BatchNorm1d(2)
    assert list(module._parameters) == ["weight", "bias"]
    assert set(module._buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    other = nn.Parameter(torch.zeros(2))
    module._parameters["weight"] = other
    assert module.weight is other and dict(module.named_parameters())["weight"] is other
    del module._buffers["running_mean"]
    assert not hasattr(module, "running_mean")
    parent = nn.Sequential(module)
    assert parent._modules == dict(parent.named_children()) == {"0": module}


# --- signatures and options --------------------------------------------------------------------------


def parameters_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "needed"),
    [
        (compat.aot_autograd, []),
        (compat.compile_fx, ["model_", "example_inputs_", "inner_compile", "config_patches"]),
        (compat.compile_fx_inner, ["gm", "example_inputs", "kwargs"]),
        (
            compat.min_cut_rematerialization_partition,
            ["joint_module", "_joint_inputs", "compiler", "num_fwd_outputs", "static_lifetime_input_indices"],
        ),
        (compat.CustomPartitionerFn.__call__, ["self", "gm", "joint_inputs", "kwargs"]),
        (compat.trace_structured, ["name", "metadata_fn", "payload_fn"]),
        (compat.set_code_exec_strategy, []),
    ],
)
def test_signature(function: Any, needed: list[str]) -> None:
    assert callable(function)
    try:
        found = parameters_of(function)
    except ValueError:  # a C function without a signature
        assert not needed
        return
    missing = [n for n in needed if n not in found]
    assert not missing, f"{function} lost {missing}; it has {found}"


def test_partitioner_options_exist() -> None:
    from torch._inductor import config

    for option in ("custom_partitioner_fn", "reorder_for_peak_memory", "reorder_for_locality"):
        assert hasattr(config, option)


def test_inductor_modes() -> None:
    assert "max-autotune" in compat.inductor_modes()
    assert compat.inductor_mode_options(None) == {}
    assert compat.inductor_mode_options("max-autotune")["max_autotune"] is True


@pytest.mark.parametrize("option", ["enable_autograd_cache", "ban_recompute_materialized_backward"])
def test_functorch_options_hold_within(option: str) -> None:
    config = torch._functorch.config
    before = getattr(config, option)
    with compat.functorch_patch(**{option: not before}):
        assert getattr(config, option) is not before
    assert getattr(config, option) is before
    with pytest.raises(AttributeError, match="no_such_option"), compat.functorch_patch(no_such_option=1):
        pass


# --- process groups --------------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank() -> Iterator[str]:
    """The group of a mesh of one real rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield compat.mesh_group_name(init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


def test_groups_by_name() -> None:
    with compat.fake_ranks(6):
        mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("outer", "inner"))
        outer, inner = (compat.mesh_group_name(mesh[axis]) for axis in ("outer", "inner"))
        assert compat.process_group(outer) is mesh.get_group("outer")
        assert (compat.group_size(outer), compat.group_size(inner)) == (2, 3)
        assert compat.group_rank(outer) == compat.group_rank(inner) == 0
        assert compat.group_ranks(outer) == [0, 3] and compat.group_ranks(inner) == [0, 1, 2]


def test_an_lstm_for_training_has_no_kernel_for_inference() -> None:
    """With that kernel, which torch takes where inputs have no gradients, the backward lacks a workspace."""
    from torch.fx.experimental.proxy_tensor import make_fx

    lstm = torch.ops.aten.lstm.input

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        state = [torch.zeros(1, 2, 4)] * 2
        with compat.taken_apart_for_training(lstm):
            return lstm(x, state, weights, True, 1, 0.0, True, False, True)[0]

    given = [torch.ones(s) for s in ((2, 3, 5), (16, 5), (16, 4), (16,), (16,))]
    assert "mkldnn" not in make_fx(run)(*given).code
    assert torch._C._get_mkldnn_enabled()


def test_transformed_tensors() -> None:
    seen = []
    torch.func.vmap(lambda x: seen.append(compat.is_transformed(x)) or x)(torch.ones(2))
    assert seen == [True] and not compat.is_transformed(torch.ones(2))


def test_integers_keep_no_value() -> None:
    fake = compat.fake_of(compat.shape_tracing_mode(), torch.tensor(3), set(), 0)
    with pytest.raises(Exception) as caught:
        fake.item()
    assert compat.needs_data(caught.value)


def test_fake_ranks_communicate_without_data() -> None:
    with compat.fake_ranks(4):
        group = compat.mesh_group_name(init_device_mesh("cpu", (4,)))
        assert compat.is_fake_group(group) and dist.get_world_size() == 4
        started = torch.ops._c10d_functional.all_gather_into_tensor(torch.ones(2, 3), 4, group)
        assert torch.ops._c10d_functional.wait_tensor(started).shape == (8, 3)
    assert not dist.is_initialized()
    with one_rank() as group:
        assert not compat.is_fake_group(group)


def test_the_default_store() -> None:
    with one_rank():
        compat.default_store().set("key", "value")
        assert compat.default_store().get("key") == b"value"


def test_group_timeout() -> None:
    """That the timeout ends a wait takes two processes: see tests/test_monitor.py."""
    with one_rank() as name, warnings.catch_warnings():
        warnings.simplefilter("error")
        group = compat.process_group(name)
        compat.set_group_timeout(group, 7)
        options = group._get_backend(torch.device("cpu")).options
        assert options._timeout == timedelta(seconds=7)


def tcp_store(folder: Path) -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, 1, is_master=True)


def file_store(folder: Path) -> dist.Store:
    return dist.FileStore(str(folder / "store"), 1)


@pytest.mark.parametrize("make", [tcp_store, file_store])
@pytest.mark.parametrize("prefix", [False, True])
def test_a_second_store_handle_has_its_own_wait(
    make: Callable[[Path], dist.Store], prefix: bool, tmp_path: Path
) -> None:
    store = make(tmp_path)
    if prefix:
        store = dist.PrefixStore("inner", dist.PrefixStore("outer", store))
    store.set_timeout(timedelta(seconds=30))
    second = compat.second_store_handle(store, 0.1)
    store.set("key", "value")
    assert second.get("key") == b"value"
    waiting = threading.Thread(target=store.get, args=("later",), daemon=True)
    waiting.start()
    began = time.monotonic()
    with pytest.raises(RuntimeError):  # its own timeout, while the first handle waits
        second.get("never")
    assert time.monotonic() - began < 10
    assert waiting.is_alive()
    second.set("later", "now")
    waiting.join(10)
    assert not waiting.is_alive()


@pytest.mark.parametrize("prefix", [False, True])
def test_a_store_in_one_process_is_its_own_second_handle(prefix: bool) -> None:
    store: dist.Store = dist.HashStore()
    before = store.timeout
    if prefix:
        store = dist.PrefixStore("inner", store)
    second = compat.second_store_handle(store, 0.1)
    second.set("key", "value")
    assert store.get("key") == b"value"
    assert store.timeout == second.timeout == before


# --- Dynamo and AOTAutograd ------------------------------------------------------------------------


class Recorder:
    """A backend that keeps what a backend may ask for while Dynamo calls it."""

    def __init__(self, restart: bool = True) -> None:
        self.calls = 0
        self.restart = restart
        self.root: nn.Module | None = None
        self.trained: set[int] = set()
        self.joint_inputs: list[int | None] = []
        self.gradients: list[int | None] = []
        self.received: list[Any] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.calls += 1
        self.root = compat.dynamo_frame_locals().get("self")
        self.trained = {i for i, x in enumerate(inputs) if x.requires_grad}
        if self.calls == 1 and self.restart:
            try:
                compat.retrace()
            except Exception as error:
                assert compat.restarts_tracing(error) and not compat.restarts_tracing(RuntimeError())
                raise

        def partition(joint: torch.fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
            holders = joint.graph.find_nodes(op="placeholder")
            tensors = [p for p in holders if isinstance(p.meta["val"], torch.Tensor)]
            self.joint_inputs = [compat.placeholder_index(p) for p in tensors]
            return compat.min_cut_rematerialization_partition(joint, joint_inputs, **options)

        def forward(gm: torch.fx.GraphModule, example: Any) -> Any:
            def call(arguments: list[Any]) -> Any:
                self.received.append(arguments)
                return gm.forward(*arguments)

            return compat.takes_list(call)

        def backward(gm: torch.fx.GraphModule, example: Any) -> Any:
            (output,) = gm.graph.find_nodes(op="output")
            self.gradients = [compat.gradient_index(d) for d in output.meta["desc"]]
            return compat.boxed(gm)

        backend = compat.aot_autograd(fw_compiler=forward, bw_compiler=backward, partition_fn=partition)
        return backend(graph, inputs)


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))
        self.bias = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def test_retrace_placeholders_and_gradients() -> None:
    torch._dynamo.reset()
    recorder, model = Recorder(), Affine()
    out = torch.compile(model, backend=recorder)(torch.ones(4, 2))
    out.sum().backward()
    assert recorder.calls == 2  # asked to trace again, and did
    assert recorder.root is model
    assert sorted(i for i in recorder.joint_inputs if i is not None) == [0, 1, 2]
    assert None in recorder.joint_inputs  # the tangent
    assert len(recorder.trained) == 2
    assert {i for i in recorder.gradients if i is not None} == recorder.trained
    (received,) = recorder.received
    assert isinstance(received, list)
    assert model.bias.grad is not None and model.bias.grad.tolist() == [4, 4, 4]


def test_the_shard_of_a_dtensor_is_the_input_that_the_dtensor_was() -> None:
    """From torch 2.13 its mesh is a placeholder too, described as part of the same input."""
    torch._dynamo.reset()
    recorder = Recorder(restart=False)
    with compat.fake_ranks(2):
        mesh = init_device_mesh("cpu", (2,))
        made = DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)], run_check=False)
        weight = made.requires_grad_()
        compiled = torch.compile(lambda x, w: x * w.to_local(), backend=recorder)
        compiled(torch.ones(2, 2), weight).sum().backward()
    assert sorted(i for i in recorder.joint_inputs if i is not None) == [0, 1]
    assert len(recorder.trained) == 1
    assert {i for i in recorder.gradients if i is not None} == recorder.trained


def test_frame_locals_outside_of_a_trace() -> None:
    found: list[dict[str, Any]] = []
    fresh = threading.Thread(target=lambda: found.append(compat.dynamo_frame_locals()))
    fresh.start()
    fresh.join()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    found.append(compat.dynamo_frame_locals())
    assert found == [{}, {}]  # in a thread that has never traced, and in one that has


def test_python_frames_end_with_the_caller() -> None:
    def inner() -> list[Any]:
        return list(compat.python_frames())

    frames = inner()
    assert [f.f_code.co_name for f in frames[-2:]] == ["test_python_frames_end_with_the_caller", "inner"]
    assert frames[-2] is sys._getframe()


def test_boxed_graphs_take_a_list_and_empty_it() -> None:
    graph = torch.fx.symbolic_trace(lambda a, b: a - b)
    given = [5, 3]
    assert compat.boxed(graph)(given) == 2 and not given


def test_parts_save_exactly_what_is_asked() -> None:
    found: dict[str, Any] = {}

    def partition(joint: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        compat.min_cut_rematerialization_partition(joint, inputs, **options)
        nodes = {n.target: n for n in joint.graph.nodes if n.op == "call_function"}
        saved = [nodes[torch.ops.aten.sin.default]]
        forward, backward = compat.extract_parts(joint, saved, [], [], options["num_fwd_outputs"], [])
        (output,) = forward.graph.find_nodes(op="output")
        found["saved"] = [n.name for n in output.args[0][options["num_fwd_outputs"] :]]
        found["again"] = [n.target for n in backward.graph.nodes if n.op == "call_function"]
        found["mutated"] = compat.mutated_inputs(joint.graph.find_nodes(op="output")[0], 1)
        found["sides"] = {
            (compat.must_be_in_forward(n), compat.must_be_in_backward(n)) for n in joint.graph.nodes
        }
        return forward, backward

    def as_is(gm: torch.fx.GraphModule, _: Any) -> Any:
        return compat.boxed(gm)

    backend = compat.aot_autograd(fw_compiler=as_is, bw_compiler=as_is, partition_fn=partition)
    x = torch.linspace(0.1, 1, 5, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.sin().exp().sum()

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(x).backward()
    want = torch.autograd.grad(function(x), x)[0]
    assert torch.allclose(x.grad, want)
    assert "sin" in found["saved"] and not any("exp" in n for n in found["saved"])
    assert torch.ops.aten.exp.default in found["again"] and torch.ops.aten.sin.default not in found["again"]
    assert found["mutated"] == set() and found["sides"] == {(False, False)}


def test_mutated_inputs_are_known() -> None:
    found: list[set[str]] = []

    def partition(joint: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        output = joint.graph.find_nodes(op="output")[0]
        found.append(compat.mutated_inputs(output, options["num_fwd_outputs"]))
        return compat.min_cut_rematerialization_partition(joint, inputs, **options)

    def as_is(gm: torch.fx.GraphModule, _: Any) -> Any:
        return compat.boxed(gm)

    backend = compat.aot_autograd(fw_compiler=as_is, bw_compiler=as_is, partition_fn=partition)
    torch._dynamo.reset()
    norm = nn.BatchNorm1d(3)
    torch.compile(norm, backend=backend)(torch.randn(4, 3)).sum().backward()
    assert len(found[0]) == 3  # mean, variance, number of batches


def test_what_checkpoints_ask_for_is_known() -> None:
    node = torch.fx.Graph().placeholder("x")
    assert not compat.checkpoint_saves(node) and not compat.checkpoint_recomputes(node)
    node.meta |= compat.checkpoint_tags(1)
    assert compat.checkpoint_recomputes(node) and not compat.checkpoint_saves(node)
    node.meta |= compat.saved_tags()
    assert compat.checkpoint_saves(node) and not compat.checkpoint_recomputes(node)


def test_a_lazy_module_is_compiled_when_it_is_called() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (x, x)))
    module = compat.lazy_module(torch.fx.GraphModule({}, torch.fx.Graph()), graph)
    assert module._needs_recompile()  # type: ignore[operator]
    assert module(torch.ones(1)) == 2
    module.recompile()
    assert module._needs_recompile()  # type: ignore[operator]


def test_dense_and_symbolic_tensors_are_told_apart() -> None:
    x = torch.ones(4, 6)
    assert compat.is_dense(x.t()) and not compat.is_dense(x[:, ::2])
    assert not compat.is_symbolic(x)
    mode = compat.shape_tracing_mode()
    assert compat.is_symbolic(compat.fake_of(mode, x, {0}, 0))
    assert compat.is_seed(torch.ops.prims.inductor_seeds.default)
    assert not compat.is_seed(torch.ops.aten.sin.default)


def test_compiled_module_and_backend() -> None:
    model = nn.Linear(2, 2)
    assert compat.compiled_module(model) is None
    assert compat.compiled_module("not a module") is None
    wrapped = torch.compile(model, backend="autodist")
    assert compat.compiled_module(wrapped) is model
    assert compat.compile_backend(wrapped) is autodist.backend.autodist
    assert compat.compile_options(wrapped) is None
    model.compile(backend="autodist")
    assert compat.compiled_module(model) is model
    assert compat.compile_backend(model) is autodist.backend.autodist
    assert compat.compile_options(model) is None
    assert compat.compile_backend(torch.compile(nn.Linear(1, 1), backend="eager")) is not (
        autodist.backend.autodist
    )


def test_compile_options() -> None:
    model, options = nn.Linear(2, 2), {"zero": 1}
    wrapped = torch.compile(model, backend="autodist", options=options)
    assert compat.compile_options(wrapped) == options
    assert compat.compile_backend(wrapped) is autodist.backend.autodist
    model.compile(backend="autodist", options=options)
    assert compat.compile_options(model) == options
    assert compat.compile_backend(model) is autodist.backend.autodist


def test_functions_marked_not_alone_are_not_captured() -> None:
    torch._dynamo.reset()
    captured: list[torch.fx.Graph] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        captured.append(graph.graph)
        return graph.forward

    def inner(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    torch.compile(compat.not_alone(inner), backend=keep)(torch.ones(2))
    assert not captured
    torch.compile(lambda x: inner(x) * 2, backend=keep)(torch.ones(2))
    assert len(captured) == 1 and len(captured[0].nodes) == 4


def test_the_entry_point_lists_the_backend() -> None:
    assert "autodist" in torch._dynamo.list_backends()


# --- Inductor ----------------------------------------------------------------------------------------


class Partitioner(compat.CustomPartitionerFn):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gm: torch.fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        self.calls += 1
        return compat.min_cut_rematerialization_partition(gm, joint_inputs, **options)

    def uuid(self) -> str:
        return "test_compat"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.uuid(),)


def test_inductor_compiles_both_parts_and_shows_its_programs() -> None:
    """Only a library call in the graph, so that no C++ is compiled."""
    torch._dynamo.reset()
    partitioner, programs = Partitioner(), {}

    def inner(gm: torch.fx.GraphModule, example_inputs: Any, **options: Any) -> Any:
        compiled = compat.compile_fx_inner(gm, example_inputs, **options)
        part = "backward" if options.get("is_backward") else "forward"
        programs["inference" if options.get("is_inference") else part] = compat.emitted_program(compiled)
        return compiled

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        patches = {"custom_partitioner_fn": partitioner}
        return compat.compile_fx(graph, inputs, inner_compile=inner, config_patches=patches)

    compiled = torch.compile(lambda x, w: x @ w, backend=backend)
    weight = torch.ones(3, 4, requires_grad=True)
    with compat.functorch_patch(enable_autograd_cache=False):
        compiled(torch.full((2, 3), 5.0), weight).sum().backward()
        assert weight.grad is not None and (weight.grad == 10).all()
        with torch.no_grad():
            compiled(torch.ones(2, 3), weight)
    assert partitioner.calls == 1
    assert set(programs) == {"forward", "backward", "inference"}
    for program in programs.values():
        functions = [n.name for n in ast.walk(ast.parse(program)) if isinstance(n, ast.FunctionDef)]
        assert "call" in functions and "extern_kernels.mm(" in program


def test_structured_trace(tmp_path: Path) -> None:
    assert not compat.structured_trace_enabled()
    program = (
        "from autodist.runtime import compat\n"
        "assert compat.structured_trace_enabled()\n"
        "compat.trace_structured('artifact', metadata_fn=lambda: {'name': 'mine', 'encoding': 'string'},"
        " payload_fn=lambda: 'the payload')"
    )
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
    (log,) = tmp_path.iterdir()
    assert '"artifact": {"name": "mine"' in log.read_text() and "\tthe payload" in log.read_text()


# --- sizes and fake tensors ------------------------------------------------------------------------


def test_symbolic_sizes() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    assert compat.size_hint(5) == 5
    unknown = ShapeEnv().create_unbacked_symint()
    assert compat.size_hint(unknown) == 1 and compat.size_hint(unknown, default=3) == 3
    torch._dynamo.reset()
    seen: list[int] = []
    expressions: list[Any] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        sizes = [i for i in inputs if isinstance(i, torch.SymInt)]
        seen.extend(compat.size_hint(s) for s in sizes)
        expressions.extend(tuple(map(compat.symbolic_expression, (s, 2 * s + 1))) for s in sizes)
        return graph.forward

    torch.compile(lambda x: x * 2, backend=keep, dynamic=True)(torch.ones(7))
    assert 7 in seen
    for size, made in expressions:
        assert size.is_Symbol and made == 2 * size + 1 and made.free_symbols == {size}


def test_fake_tensors_and_their_mode() -> None:
    mode = compat.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = torch.ones(2, 3)
        weight = nn.Parameter(torch.ones(3, 2))
        product = fake @ weight
    assert isinstance(fake, compat.FakeTensor) and isinstance(product, compat.FakeTensor)
    assert isinstance(weight, compat.FakeTensor) and isinstance(weight, nn.Parameter)
    assert product.shape == (2, 2)
    real = torch.ones(3, 4)
    with mode:
        assert isinstance(fake @ real, compat.FakeTensor)
    assert compat.fake_mode_of([3, real, product]) is mode
    assert compat.fake_mode_of([3, real]) is None


@pytest.mark.parametrize(
    "operation",
    [lambda x: x[0].item(), lambda x: bool((x > 0).all()), torch.nonzero, lambda x: x[x > 0]],
    ids=["item", "bool", "nonzero", "mask"],
)
def test_operations_that_need_data(operation: Callable[[torch.Tensor], Any]) -> None:
    with compat.FakeTensorMode():
        x = torch.ones(3)
        with pytest.raises(Exception) as caught:
            operation(x)
        assert compat.needs_data(caught.value)
        with pytest.raises(RuntimeError) as caught:
            x + torch.ones(2)
        assert not compat.needs_data(caught.value)


# --- operators -------------------------------------------------------------------------------------


def test_operators() -> None:
    assert isinstance(aten.mm.default, compat.OpOverload)
    assert not isinstance(aten.mm, compat.OpOverload) and not isinstance(torch.mm, compat.OpOverload)
    assert str(aten.mm.default) == "aten.mm.default" and aten.mm.default.overloadpacket is aten.mm


def test_which_operators_write() -> None:
    assert compat.is_mutating(aten.add_.Tensor) and compat.is_mutating(aten.mm.out)
    assert not compat.is_mutating(aten.add.Tensor) and not compat.is_mutating(torch.add)


def test_declared_arguments() -> None:
    found = compat.operator_arguments(aten.sum.dim_IntList)
    assert found == [
        ("self", "TensorType"), ("dim", "IntType"), ("keepdim", "BoolType"), ("dtype", "ScalarTypeType")
    ]
    assert compat.operator_arguments(aten.view.default) == [("self", "TensorType"), ("size", "SymIntType")]
    assert compat.operator_arguments(aten.cat.default) == [("tensors", "TensorType"), ("dim", "IntType")]
    assert compat.operator_arguments(aten.add.Scalar)[1] == ("other", "NumberType")
    assert compat.operator_arguments(torch.add) == []


def test_flop_formulas() -> None:
    formula = compat.flop_formula(aten.mm.default)
    assert formula is not None and formula((2, 3), (3, 4), out_val=(2, 4)) == 2 * 2 * 3 * 4
    formula = compat.flop_formula(aten.convolution.default)
    assert formula is not None
    sizes = (2, 3, 8, 8), (5, 3, 3, 3)
    given = (*sizes, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert formula(*given, out_val=(2, 5, 8, 8)) == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)
    assert compat.flop_formula(aten.add.Tensor) is None and compat.flop_formula(torch.mm) is None


def test_autocast_by_function_calls() -> None:
    x = torch.ones(2, 2)
    entered = compat.enter_autocast("cpu", torch.bfloat16, True, True)
    inside = (x @ x).dtype
    compat.exit_autocast(entered)
    assert inside is torch.bfloat16 and (x @ x).dtype is torch.float32


def test_dispatch_modes_see_every_operator() -> None:
    seen = []

    class Listener(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with compat.FakeTensorMode(), Listener():  # below it, the fake mode still makes the values
        result = torch.addmm(torch.ones(2), torch.ones(2, 2), torch.ones(2, 2))
    assert isinstance(result, compat.FakeTensor)
    assert aten.addmm.default in seen and aten.ones.default in seen


# --- tensors ---------------------------------------------------------------------------------------


def test_storage_keys() -> None:
    x, y = torch.ones(4), torch.ones(4)
    assert compat.storage_key(x) == compat.storage_key(x[2:]) == compat.storage_key(x.view(2, 2))
    assert compat.storage_key(x) != compat.storage_key(y)
    with compat.FakeTensorMode():
        fake, other = torch.ones(4), torch.ones(4)
        assert compat.storage_key(fake) == compat.storage_key(fake[2:]) != compat.storage_key(other)


def test_gradient_hooks_are_seen() -> None:
    def hook(_: torch.Tensor) -> None:
        pass

    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        parameter = nn.Parameter(torch.ones(2))
        assert not compat.has_gradient_hooks(parameter)
        handle = getattr(parameter, register)(hook)
        assert compat.has_gradient_hooks(parameter) and not compat.has_gradient_hooks(parameter, hook)
        handle.remove()
        assert not compat.has_gradient_hooks(parameter)


def test_plain_functions_do_not_ask_subclasses() -> None:
    class Refuses(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"asked about {func}")

    x = torch.ones(2).as_subclass(Refuses)
    with pytest.raises(AssertionError, match="asked about"):
        x + 1
    with compat.plain_functions():
        result = x + 1
    assert type(result) is torch.Tensor and result.tolist() == [2, 2]


def test_moved_parameters_keep_their_class_layout() -> None:
    from autodist.runtime.parameters import MovedParameter, MovedParameterError

    old = nn.Parameter(torch.ones(2))
    old.__class__ = MovedParameter
    vars(old).update(successor=nn.Parameter(torch.zeros(2)), moved_name="w")
    with pytest.raises(MovedParameterError, match="'w' was replaced"):
        _ = old.grad
    with pytest.raises(MovedParameterError):
        old.add_(1)
    assert not isinstance(old, DTensor)


# --- nested values ---------------------------------------------------------------------------------


Pair = namedtuple("Pair", ["first", "second"])


def test_trees() -> None:
    tree = {"a": [1, (2, None)], "b": Pair(3, OrderedDict(c=4))}
    assert [leaf for leaf in compat.tree_leaves(tree) if leaf is not None] == [1, 2, 3, 4]
    doubled = compat.tree_map(lambda leaf: leaf if leaf is None else 2 * leaf, tree)
    assert doubled == {"a": [2, (4, None)], "b": Pair(6, OrderedDict(c=8))}
    assert isinstance(doubled["b"], Pair) and isinstance(doubled["a"][1], tuple)
    assert compat.tree_any(lambda leaf: leaf == 4, tree) and not compat.tree_any(lambda leaf: leaf == 5, tree)
    sizes = torch.Size([2, 3])
    assert compat.tree_leaves([torch.ones(sizes), "text"])[1] == "text"


def test_trees_of_a_nodes_arguments() -> None:
    """What a node holds are lists and dicts of fx's own: leaves are found in them, and structures compare."""
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    first = graph.call_function(torch.cat, ([x, y],), {"dim": 0})
    second = graph.call_function(torch.cat, ([y, x],), {"dim": 1})
    third = graph.call_function(torch.cat, ([x, y, x],), {"dim": 0})
    leaves, structure = compat.tree_flatten((first.args, first.kwargs))
    assert leaves == [x, y, 0]
    assert str(structure) == str(compat.tree_flatten((second.args, second.kwargs))[1])
    assert str(structure) != str(compat.tree_flatten((third.args, third.kwargs))[1])


# --- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_checkpoints(tmp_path: Path) -> None:
    values = torch.arange(6.0)
    state = {"model": {"a.b": values, "c": torch.ones(2)}, "extra": {"step": 3, "list": [1, "two"]}}
    path = tmp_path / "inner"
    dcp.save(state, checkpoint_id=str(path), no_dist=True)
    metadata = dcp.FileSystemReader(path).read_metadata()

    paths = compat.checkpoint_paths(metadata)
    assert paths["model.a.b"] == ("model", "a.b") and paths["extra.step"] == ("extra", "step")
    assert set(paths) == set(metadata.state_dict_metadata)

    sizes = {p.name: p.stat().st_size for p in path.iterdir() if p.name != ".metadata"}
    assert compat.checkpoint_extents(metadata) == sizes

    moved = compat.move_checkpoint_files(metadata, "inner")
    assert set(compat.checkpoint_extents(moved)) == {f"inner/{name}" for name in sizes}
    assert compat.checkpoint_extents(metadata) == sizes  # the one given is as it was
    (tmp_path / ".metadata").write_bytes(pickle.dumps(moved))
    loaded = {"model": {"a.b": torch.zeros(6)}}
    dcp.load(loaded, checkpoint_id=str(tmp_path), no_dist=True)
    assert torch.equal(loaded["model"]["a.b"], values)

    found = compat.load_checkpoint_keys(str(path), {"extra", "model.c"})
    assert found["extra"] == state["extra"]
    assert set(found["model"]) == {"c"} and torch.equal(found["model"]["c"], torch.ones(2))


# --- captured programs -----------------------------------------------------------------------------


def _traced(function: Callable[..., Any], *shapes: tuple[int, ...]) -> torch.fx.GraphModule:
    with compat.FakeTensorMode():
        fakes = [torch.randn(s, requires_grad=True) for s in shapes]
    return compat.trace_before_autograd(function, fakes)


def _calls(graph: torch.fx.GraphModule) -> list[Any]:
    return [n.target for n in graph.graph.nodes if n.op == "call_function"]


def test_tracing_before_autograd_keeps_operators_whole_and_their_tags() -> None:
    def attends(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        y = torch.nn.functional.linear(x, weight)
        return [torch.nn.functional.scaled_dot_product_attention(y, y, y)]

    graph = _traced(attends, (1, 2, 4, 3), (3, 3))
    assert _calls(graph) == [aten.linear.default, aten.scaled_dot_product_attention.default]
    tags = compat.checkpoint_tags(7)
    for node in graph.graph.nodes:
        node.meta |= tags
    again = _traced(torch.fx.Interpreter(graph).run, (1, 2, 4, 3), (3, 3))
    calls = [n for n in again.graph.nodes if n.op == "call_function"]
    assert calls and all(n.meta["ac_graph_id"] == 7 and "recompute" in n.meta for n in calls)
    for node in graph.graph.nodes:
        compat.note(node, "autodist_test", 5)
    again = _traced(torch.fx.Interpreter(graph).run, (1, 2, 4, 3), (3, 3))
    calls = [n for n in again.graph.nodes if n.op == "call_function"]
    assert calls and all(compat.notes(n) == {"autodist_test": 5} for n in calls)


def test_plain_tracing() -> None:
    with compat.FakeTensorMode():
        graph = compat.trace_plain(lambda x, n: x.sum() * n, [torch.ones(3), 2])
    assert graph(torch.ones(3), 2) == 6
    # Inductor lowers what its decompositions leave, and refuses what they take apart.
    with compat.FakeTensorMode():
        graph = compat.trace_plain(lambda x: torch.arange(3) + x, [torch.ones(3)])
    assert any("prims.iota" in str(n.target) for n in graph.graph.nodes)


def test_functionalized_programs_return_what_they_wrote() -> None:
    def writes(x: torch.Tensor, buffer: torch.Tensor) -> list[torch.Tensor]:
        y = x.clone()
        y[0] += 1
        buffer.mul_(2)
        return [y]

    with compat.FakeTensorMode():
        fakes = [torch.randn(3), torch.randn(3)]
    graph = compat.trace_before_autograd(writes, fakes)
    changed = [n for n in graph.graph.nodes if compat.is_mutating(n.target)]
    assert [compat.written_arguments(n)[0].op for n in changed].count("placeholder") == 1
    functional = compat.functionalized(torch.fx.Interpreter(graph).run, (1,))
    graph = compat.trace_before_autograd(functional, fakes)
    assert not any(compat.is_mutating(t) for t in _calls(graph))
    y, buffer = graph(torch.zeros(3), torch.ones(3))
    assert y.tolist() == [1, 0, 0] and buffer.tolist() == [2, 2, 2]


def test_norms_write_what_their_schemas_do_not_say() -> None:
    def normed(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> list[torch.Tensor]:
        return [torch.nn.functional.batch_norm(x, mean, var, training=t) for t in (True, False)]

    with compat.FakeTensorMode():
        graph = compat.trace_before_autograd(normed, [torch.randn(4, 3), torch.zeros(3), torch.ones(3)])
    calls = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert [n.target for n in calls] == [aten.batch_norm.default] * 2
    assert [[a.op for a in compat.written_arguments(n)] for n in calls] == [["placeholder"] * 2, []]


def test_views_of_arguments() -> None:
    assert compat.aliases_input(aten.transpose.int) and not compat.aliases_input(aten.add.Tensor)
    assert not compat.aliases_input(len)


def test_sizes_known_to_be_equal() -> None:
    assert compat.known_equal(3, 3) and not compat.known_equal(3, 4)
    found: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        sizes = next(n.meta["example_value"].shape for n in graph.graph.nodes if n.name == "l_x_")
        found.extend([
            compat.known_equal(2 * sizes[0] // 2, sizes[0]),
            compat.known_equal(sizes[0], compat.size_hint(sizes[0])),  # true today, not certain
        ])
        return graph.forward

    x = torch.ones(6, 2)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(lambda x: x * 2, backend=backend)(x)
    assert found == [True, False]


def test_checkpoints_in_captured_programs() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    bodies: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found = [n for n in graph.graph.nodes if compat.is_checkpoint(n.target)]
        bodies.extend(getattr(graph, n.args[0].target) for n in found)
        returned = torch.fx.GraphModule(graph, graph.graph)
        compat.copy_sources(graph, returned)
        for old in graph.graph.find_nodes(op="placeholder"):
            new = torch.fx.Graph().node_copy(old)
            compat.copy_source(old, new)
            assert getattr(new, "_dynamo_source", None) is getattr(old, "_dynamo_source", None)
        return graph.forward

    def contexts() -> Any:
        return create_selective_checkpoint_contexts([aten.mm.default])

    def program(x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(torch.sin, x, use_reentrant=False)
        return checkpoint(lambda x: x @ x, x, use_reentrant=False, context_fn=contexts)

    torch._dynamo.reset()
    torch.compile(program, backend=backend)(torch.ones(2, 2, requires_grad=True))
    plain, selective = map(compat.checkpoint_policy, bodies)
    assert plain is None and selective is not None
    x = torch.ones(2, 2)
    assert selective(aten.mm.default, (x, x), {}) is CheckpointPolicy.MUST_SAVE
    assert selective(aten.sin.default, (x,), {}) is CheckpointPolicy.PREFER_RECOMPUTE


def test_calls_without_a_value() -> None:
    assert compat.returns_nothing(aten._assert_async.default)
    assert not compat.returns_nothing(aten.sin.default) and not compat.returns_nothing(len)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


def test_gradients_of_ones_own_are_seen() -> None:
    found: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.extend(compat.is_custom_gradient(t) for t in _calls(graph))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(_Doubled.apply, backend=backend)(torch.ones(2, requires_grad=True))
    torch.compile(lambda x: _Doubled.apply(x).sin(), backend=backend)(torch.ones(2, requires_grad=True))
    assert any(found) and not all(found)


def test_where_results_go() -> None:
    found: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(compat.returns_to_user())
        return graph.forward

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.sin()
            torch._dynamo.graph_break()
            return x.cos()

    torch._dynamo.reset()
    torch.compile(Broken(), backend=backend)(torch.ones(2))
    assert found == [False, True]
    found.clear()
    torch._dynamo.reset()
    torch.compile(Broken().forward, backend=backend)(torch.ones(2))
    torch.compile(torch.sin, backend=backend)(torch.ones(2))
    assert found == [False, True, True] and compat.returns_to_user()


# --- training steps ----------------------------------------------------------------------------------


def test_sizes_of_fakes_may_be_symbols() -> None:
    mode = compat.shape_tracing_mode()
    x = compat.fake_of(mode, torch.randn(4, 3), {0}, 0)
    assert isinstance(x.shape[0], torch.SymInt) and x.shape[1] == 3
    assert compat.fake_mode_of([x]) is mode
    with mode:
        if x.shape[0] > 2:  # becomes a guard
            x.sum()
        with pytest.raises(Exception) as refused:
            x.sum().item()
    assert compat.needs_data(refused.value)
    fits = compat.size_check(mode, [x])
    assert fits([torch.randn(7, 3)]) and not fits([torch.randn(7, 4)]) and not fits([torch.randn(2, 3)])
    assert int(x.shape[0]) == 4  # Python took the number: the program is for it alone
    fits = compat.size_check(mode, [x])
    assert fits([torch.randn(4, 3)]) and not fits([torch.randn(7, 3)])


def test_hooks_are_counted_and_found() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    registrations = [
        module.register_forward_hook,
        module.register_forward_pre_hook,
        module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
        module.weight.register_hook,
        module.weight.register_post_accumulate_grad_hook,
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
    ]
    for register in registrations:
        before = compat.hooks_registered()
        register(lambda *_: None)
        assert compat.hooks_registered() > before, register
    assert [len(hooks) for hooks in compat.forward_hooks(module)] == [1, 1, 1, 1]
    assert compat.has_gradient_hooks(module.weight) and not compat.has_gradient_hooks(module.bias)
    before = sum(map(len, compat.global_hooks()))
    handles = [
        torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
        register_optimizer_step_post_hook(lambda *_: None),
    ]
    assert sum(map(len, compat.global_hooks())) == before + 2
    for handle in handles:
        handle.remove()
    assert sum(map(len, compat.global_hooks())) == before


def test_what_torch_notes_on_an_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = dict(vars(optimizer))
    optimizer.step()
    changed = {k for k, v in vars(optimizer).items() if k not in before or before[k] is not v}
    assert changed and changed <= compat.OPTIMIZER_FLAGS


class _Watching(torch.overrides.TorchFunctionMode):
    """Records what is called, and writes it down below autograd if told to."""

    def __init__(self, below: bool = False) -> None:
        super().__init__()
        self.below, self.calls, self.graphs = below, [], []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        self.graphs.append(compat.recorded_graph())
        if not self.below:
            return func(*args, **(kwargs or {}))
        with compat.recording_below_autograd():
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("below", [False, True])
def test_a_step_is_recorded_before_autograd_or_below(below: bool) -> None:
    mode = compat.shape_tracing_mode()
    fakes = [compat.fake_of(mode, torch.randn(s), set(), i) for i, s in enumerate([(2, 3), (3, 3)])]
    watch = _Watching(below)

    def step(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        assert torch.compiler.is_compiling()
        return [torch.nn.functional.linear(x, weight)]

    graph = compat.trace_step(step, fakes, mode, watch)
    assert not torch.compiler.is_compiling() and compat.recorded_graph() is None
    assert torch.nn.functional.linear in watch.calls and None not in watch.graphs
    assert (aten.linear.default in _calls(graph)) is not below


def test_modes_and_profiling_are_known_by_their_calls() -> None:
    def step(x: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            x = x @ x
        with torch.profiler.record_function("part"):
            return [x + 1]

    mode = compat.shape_tracing_mode()
    fake = compat.fake_of(mode, torch.randn(3, 3), set(), 0)
    targets = _calls(compat.trace_step(step, [fake], mode, _Watching()))
    assert [compat.sets_grad_mode(t) for t in targets if compat.sets_mode(t)].count(True) == 2
    assert sum(map(compat.sets_mode, targets)) == 4
    literal = compat.trace_step(lambda x: [x + torch.tensor(1.0)], [fake], mode, _Watching())
    assert any(map(compat.copies_literal, _calls(literal)))
    assert any(map(compat.is_profiling, targets)) and compat.SET_GRAD_ENABLED in targets
    assert not any(map(compat.is_eager_collective, targets))
    assert compat.is_eager_collective(torch.ops.c10d.allreduce_.default)


def test_forward_and_backward_are_traced_together() -> None:
    mode = compat.shape_tracing_mode()
    x, weight = (compat.fake_of(mode, torch.randn(3), set(), i) for i in range(2))
    with mode:
        tangent = torch.ones(())
    graph = compat.trace_joint(lambda x, w: [(x * w).sin().sum(), x + 1], [x, weight], [1], [tangent])
    inputs = graph.graph.find_nodes(op="placeholder")
    assert [str(n.target).split("_")[0] for n in inputs] == ["primals", "primals", "tangents"]
    assert [compat.is_tangent(n) for n in inputs] == [False, False, True]
    x, weight = torch.randn(3), torch.randn(3, requires_grad=True)
    loss, plus, grad = graph([x, weight.detach()], [torch.ones(())])
    wanted = (x * weight).sin().sum()
    wanted.backward()
    assert weight.grad is not None
    assert torch.allclose(loss, wanted) and torch.allclose(grad, weight.grad) and torch.equal(plus, x + 1)
    assert compat.tree_unflatten(*compat.tree_flatten({"a": 1})) == {"a": 1}
    with compat.compiling_in(mode):
        assert torch._guards.TracingContext.get().fake_mode is mode


def test_inputs_are_described_as_autograd_describes_them() -> None:
    node = torch.fx.Graph().placeholder("x")
    node.meta["desc"] = compat.input_descriptor(3)
    assert compat.placeholder_index(node) == 3


def test_functions_with_a_backward_of_their_own_are_told_from_operators() -> None:
    from autodist.runtime import dialect

    x = torch.ones(2, requires_grad=True)
    assert compat.is_python_gradient(_Doubled.apply(x).grad_fn)
    assert not compat.is_python_gradient((x * 2).grad_fn)
    with compat.fake_ranks(2):
        group = dist.group.WORLD.group_name
        custom = dialect.unshard(x, 4, 2, torch.float32, group)
        assert custom.grad_fn is not None and not compat.is_python_gradient(custom.grad_fn)


def test_the_checkpoint_that_runs_is_known() -> None:
    import functools

    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    found: list[Any] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        found.append(compat.checkpoint_running())
        y = x.sin()
        found.append(compat.checkpoint_running())
        return y

    x = torch.ones(2, requires_grad=True)
    assert compat.checkpoint_running() == (None, None)
    checkpoint(body, x, use_reentrant=False)
    (first, policy), (again, _) = found
    assert first is not None and first is again and policy is None
    context = functools.partial(create_selective_checkpoint_contexts, [aten.sin.default])
    checkpoint(body, x, use_reentrant=False, context_fn=context)
    policy = found[-1][1]
    assert policy is not None and policy(aten.sin.default, (x,), {}) is not None
    saved, recomputed = compat.saved_tags(), compat.checkpoint_tags(1)
    assert policy(aten.sin.default, (x,), {}) == saved["recompute"] != recomputed["recompute"]


def test_parts_of_dtensors() -> None:
    with compat.fake_ranks(2):
        mesh = dist.init_device_mesh("cpu", (2,))
        whole = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False)
        part = compat.local_part(whole)
        assert part.shape == (2, 3) and compat.local_part(part) is part
        assert compat.same_parts([whole], [part]) and not compat.same_parts([whole], [part.clone()])
        again = compat.dtensor_of(part * 2, compat.specification(whole), True)
        assert again.shape == (4, 3) and again.requires_grad and isinstance(again, DTensor)
        assert isinstance(compat.mark_parameter(again), torch.nn.Parameter)
    x = torch.ones(2)
    before = compat.times_written(x)
    assert compat.times_written(x.mul_(2)) == before + 1


def test_operators_by_name() -> None:
    assert compat.operator_base(aten._foreach_mul.List) == "_foreach_mul" and compat.operator_base(len) == ""
    x = torch.fx.Graph().placeholder("x")
    x.meta["val"] = torch.ones(2)
    assert compat.overload_for(aten.mul, (x, 2.0), {}) is aten.mul.Tensor
    assert compat.overload_for(aten.pow, (0.9, x), {}) is aten.pow.Scalar
    assert compat.result_count(aten.max.dim) == 2
    assert compat.is_random(aten.bernoulli.p) and not compat.is_random(aten.mul.Tensor)


def test_terms_are_added_in_place() -> None:
    totals, terms = [torch.ones(2), torch.ones(3)], [torch.ones(2), 2 * torch.ones(3)]
    compat.add_each(totals, terms)
    compat.add_each([], [])
    assert totals[0].tolist() == [2, 2] and totals[1].tolist() == [3, 3, 3]


def test_gradient_scaling_asks_what_is_known() -> None:
    """A gradient of a kind of its own is asked, by the operator that compat names."""
    asked = []

    class Gradient(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            asked.append(func)
            with compat.plain_functions():
                return func(*args, **(kwargs or {}))

    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3).as_subclass(Gradient)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.unscale_(torch.optim.SGD([parameter], lr=0.1))
    assert compat.GRADIENT_SCALING.intersection(asked)


def test_clipping_takes_norms_by_the_list() -> None:
    asked = []

    class Asks(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            asked.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2).as_subclass(Asks)
    nn.utils.clip_grad_norm_([parameter], 1.0, foreach=True)
    assert compat.FOREACH_NORM in asked


def test_a_fake_is_made_again_on_another_device() -> None:
    mode = compat.FakeTensorMode()
    with mode:
        fake = torch.empty(3, 4).t()
    moved = compat.fake_like(mode, fake, torch.device("meta"))
    assert isinstance(moved, compat.FakeTensor) and moved.fake_mode is mode
    assert (moved.shape, moved.stride(), moved.device.type) == (fake.shape, fake.stride(), "meta")


def test_warnings_that_are_logged_once_break_no_graph() -> None:
    from transformers.utils import logging

    logger = logging.get_logger("autodist.tests")

    def warns(x: torch.Tensor) -> torch.Tensor:
        logger.warning_once("once")
        return x + 1

    before = set(torch._dynamo.config.ignore_logging_functions)
    try:
        first = compat.ignore_logged_warnings()
        assert first == (logging.warning_once not in before) and not compat.ignore_logged_warnings()
        torch.compile(warns, backend="eager", fullgraph=True)(torch.ones(2))
    finally:
        torch._dynamo.config.ignore_logging_functions.clear()
        torch._dynamo.config.ignore_logging_functions.update(before)
        torch._dynamo.reset()


def test_a_part_is_compiled_with_the_strides_of_its_values() -> None:
    """Forward and backward of a stage are compiled apart: the one must find what the other saves as told."""
    mode = compat.FakeTensorMode()
    with mode:
        x, w = torch.empty(4, 6), torch.empty(6, 8)
    graph = compat.trace_plain(lambda x, w: [(x @ w).t(), (x + 1).t().contiguous().t()], [x, w])
    compiled = compat.compile_part(graph, False, {"reorder_for_peak_memory": False})
    x, w = torch.randn(4, 6), torch.randn(6, 8)
    first, second = compiled([x, w])
    assert torch.allclose(first, (x @ w).t(), atol=1e-5) and torch.equal(second, x + 1)
    assert first.stride() == (1, 8) and second.stride() == (1, 4)
    assert "def call" in compat.emitted_program(compiled)


def test_gradients_may_be_none() -> None:
    mode = compat.FakeTensorMode()
    with mode:
        x, w, tangent = torch.empty(3), torch.empty(3), torch.ones(())
    graph = compat.trace_joint(lambda x, w: [x.sum()], [x, w], [0, 1], [tangent], [0], zeros=False)
    [results] = (n.args[0] for n in graph.graph.find_nodes(op="output"))
    assert results[2] is None and results[1] is not None


def test_a_dtensor_on_another_mesh() -> None:
    with compat.fake_ranks(4):
        one, other = (DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2, 3]))
        tensor = DTensor.from_local(torch.ones(2, 3), one, [Shard(0)], run_check=False)
        spec = compat.specification_on(tensor, other)
        moved = compat.dtensor_of(torch.ones(2, 3), spec, False)
        assert moved.device_mesh == other and moved.placements == tensor.placements
        assert moved.shape == tensor.shape == (4, 3) and moved.stride() == tensor.stride()
