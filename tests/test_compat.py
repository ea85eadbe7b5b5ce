"""Every private torch API autodist uses, held to the signature it relies on.

When a torch release moves or changes one, the failing test here names it; the rest of the suite need not be
read to find out. Quick: run on every supported torch version.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import autodist.backend
from autodist.runtime import compat


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
    assert hasattr(torch._functorch.config, "enable_autograd_cache")


def test_inductor_modes() -> None:
    assert "max-autotune" in compat.inductor_modes()
    assert compat.inductor_mode_options(None) == {}
    assert compat.inductor_mode_options("max-autotune")["max_autotune"] is True


class Recorder:
    """A backend that keeps what a backend may ask for while Dynamo calls it."""

    def __init__(self) -> None:
        self.calls = 0
        self.root: nn.Module | None = None
        self.joint_inputs: list[int | None] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.calls += 1
        self.root = compat.dynamo_frame_locals().get("self")
        if self.calls == 1:
            compat.retrace()

        def partition(joint: torch.fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
            holders = joint.graph.find_nodes(op="placeholder")
            self.joint_inputs = [compat.placeholder_index(p) for p in holders]
            return compat.min_cut_rematerialization_partition(joint, joint_inputs, **options)

        def compiler(gm: torch.fx.GraphModule, example: Any) -> Any:
            return compat.boxed(gm.forward)

        backend = compat.aot_autograd(
            fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition
        )
        return backend(graph, inputs)


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))
        self.bias = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def test_retrace_and_placeholders() -> None:
    torch._dynamo.reset()
    recorder, model = Recorder(), Affine()
    out = torch.compile(model, backend=recorder)(torch.ones(4, 2))
    out.sum().backward()
    assert recorder.calls == 2  # asked to trace again, and did
    assert recorder.root is model
    assert sorted(i for i in recorder.joint_inputs if i is not None) == [0, 1, 2]
    assert None in recorder.joint_inputs  # the tangent


def test_compiled_module_and_backend() -> None:
    model = nn.Linear(2, 2)
    assert compat.compiled_module(model) is None
    wrapped = torch.compile(model, backend="autodist")
    assert compat.compiled_module(wrapped) is model
    assert compat.compile_backend(wrapped) is autodist.backend.autodist
    model.compile(backend="autodist")
    assert compat.compiled_module(model) is model
    assert compat.compile_backend(model) is autodist.backend.autodist
    assert compat.compile_backend(torch.compile(nn.Linear(1, 1), backend="eager")) is not (
        autodist.backend.autodist
    )


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


def test_size_hints() -> None:
    assert compat.size_hint(5) == 5
    torch._dynamo.reset()
    seen: list[int] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(compat.size_hint(i) for i in inputs if isinstance(i, (int, torch.SymInt)))
        return graph.forward

    torch.compile(lambda x: x * 2, backend=keep, dynamic=True)(torch.ones(7))
    assert 7 in seen


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
