"""The one door to torch's private API.

Everything autodist uses that torch does not promise is imported here, nowhere else; each name has a test
in ``tests/test_compat.py`` that fails loudly when it moves or changes its signature. Supported: torch
2.11 and newer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._dynamo.eval_frame import set_code_exec_strategy
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import RestartAnalysis, TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.types import FrameAction, FrameExecStrategy
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._logging import trace_structured
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "CustomPartitionerFn",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "TorchDispatchMode",
    "aot_autograd",
    "compile_fx",
    "compile_fx_inner",
    "enter_autocast",
    "exit_autocast",
    "min_cut_rematerialization_partition",
    "trace_structured",
    "tree_any",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
]


def plain_functions() -> contextlib.AbstractContextManager[None]:
    """Within, subclasses' ``__torch_function__`` is not asked; results are plain tensors."""
    return torch._C.DisableTorchFunctionSubclass()  # type: ignore[no-any-return]


# --- captured programs -----------------------------------------------------------------------------


def trace_before_autograd(function: Callable[..., Any], fakes: Sequence[Any]) -> torch.fx.GraphModule:
    """``function(*fakes)`` as ATen operators, before autograd and decompositions take them apart.

    The fakes keep their own mode and symbolic sizes. Stack traces and checkpoint tags of the nodes that
    ``function`` interprets go over to the nodes traced.
    """
    import torch.fx.traceback
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = fake_mode_of(fakes)
    assert mode is not None
    trace = make_fx(function, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)
    with mode, torch.enable_grad(), torch.fx.traceback.preserve_node_meta():
        return trace(*fakes)


def trace_plain(function: Callable[..., Any], values: Sequence[Any]) -> torch.fx.GraphModule:
    """``function(*values)`` as the ATen operators that Inductor takes, without gradients.

    ``values`` are fakes and symbolic sizes.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    trace = make_fx(function, select_decomp_table(), tracing_mode="real", _allow_non_fake_inputs=True)
    with fake_mode_of(values) or contextlib.nullcontext(), torch.no_grad():
        return trace(*values)


def shape_tracing_mode() -> FakeTensorMode:
    """A mode for fake tensors whose sizes may be symbols; asked for a value, they raise."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    return FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)


def fake_of(mode: FakeTensorMode, real: torch.Tensor, dynamic: set[int], number: int) -> torch.Tensor:
    """A fake of ``real`` in ``mode``, with symbols for the sizes of the dimensions ``dynamic``."""
    if real.dim() == 0:  # with a source, torch would give the integer it holds out as a symbol
        return mode.from_tensor(real, static_shapes=True)
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sizes = [DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(real.dim())]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(real, source=ConstantSource(f"input{number}"), symbolic_context=context)


def fake_like(mode: FakeTensorMode, fake: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same on another device."""
    with mode:
        return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=device)


def size_check(
    mode: FakeTensorMode, fakes: Sequence[torch.Tensor]
) -> Callable[[Sequence[torch.Tensor]], bool]:
    """What tells whether tensors have the sizes that a program made with ``fakes`` holds for."""
    env = mode.shape_env
    assert env is not None
    guards = env.produce_guards_expression(fakes)  # says nothing of symbols that became numbers
    known = [[_known_size(a) for a in fake.shape] for fake in fakes]

    def fits(tensors: Sequence[torch.Tensor]) -> bool:
        static = all(
            a is None or a == b
            for sizes, real in zip(known, tensors, strict=True)
            for a, b in zip(sizes, real.shape, strict=True)
        )
        return static and (guards is None or bool(env.evaluate_guards_expression(guards, tensors)))

    return fits


def _known_size(size: int | torch.SymInt) -> int | None:
    """A size that is a number, or a symbol that can only be this number; None for another symbol."""
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size


def dtensor_of(
    local: torch.Tensor, spec: Any, requires_grad: bool, kind: type[DTensor] = DTensor
) -> DTensor:
    """A DTensor of this rank's part and the specification of another one."""
    return kind(local, spec, requires_grad=requires_grad)  # type: ignore[call-arg]


def specification(tensor: DTensor) -> Any:
    """What :func:`dtensor_of` needs to make a DTensor like this one."""
    return tensor._spec


def specification_on(tensor: DTensor, mesh: DeviceMesh) -> Any:
    """The same, were the tensor on another mesh."""
    spec = tensor._spec
    return type(spec)(mesh, spec.placements, tensor_meta=spec.tensor_meta)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, without a record for autograd."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


_part = operator.attrgetter("_local_tensor")


def same_parts(tensors: Sequence[DTensor], parts: Sequence[torch.Tensor]) -> bool:
    """Whether ``parts`` still are what this rank holds of ``tensors``, object by object."""
    return all(map(operator.is_, map(_part, tensors), parts))


def mark_parameter(tensor: torch.Tensor) -> torch.Tensor:
    """Make ``isinstance(tensor, nn.Parameter)`` true of a tensor that stands for one."""
    tensor._is_param = True  # type: ignore[attr-defined]
    return tensor


def times_written(tensor: torch.Tensor) -> int:
    """How often a tensor has been changed in place."""
    return tensor._version


SET_GRAD_ENABLED = torch._C._set_grad_enabled


def trace_step(
    function: Callable[..., Any], fakes: Sequence[Any], mode: FakeTensorMode, watch: Any
) -> torch.fx.GraphModule:
    """``function(*fakes)`` as operators before autograd; ``watch``, a TorchFunctionMode, sees every call."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def watched(*args: Any) -> Any:
        with watch:
            return function(*args)

    trace = make_fx(watched, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)
    # What has been compiled already is captured as what it was made of.
    with mode, torch.enable_grad(), _compiling(), torch.compiler.set_stance("force_eager"):
        return trace(*fakes)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Within, ``torch.compiler.is_compiling()``: optimizers then keep to operators on tensors."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@contextlib.contextmanager
def recording_below_autograd() -> Iterator[None]:
    """Within a trace before autograd: record what operators do, not what is called.

    Operators on DTensors are then recorded as those on their local parts.
    """
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_mode

    mode = get_proxy_mode()
    if mode is None or not mode.pre_dispatch:
        yield
        return
    with ProxyTorchDispatchMode(mode.tracer, "real", pre_dispatch=False):
        yield


def recorded_graph() -> torch.fx.Graph | None:
    """The graph that a trace is writing, or None outside of one."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


def is_python_gradient(node: Any) -> bool:
    """Whether a node of autograd's graph is a user's ``torch.autograd.Function``, not a custom operator."""
    generated = type(node).__name__.startswith("GeneratedBackwardFor_")
    return isinstance(node, torch.autograd.function.BackwardCFunction) and not generated


def checkpoint_running() -> tuple[Any, Callable[..., Any] | None]:
    """The activation checkpoint whose body runs now (something that is the same throughout), its policy."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    from torch.utils.checkpoint import _CachingTorchDispatchMode, _CheckpointFrame

    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    cells = getattr(hooks[0], "__closure__", None) or () if hooks else ()
    frame = next((c.cell_contents for c in cells if isinstance(c.cell_contents, _CheckpointFrame)), None)
    if frame is None:
        return None, None
    stack = reversed(_get_current_dispatch_mode_stack())
    caching = next((m for m in stack if isinstance(m, _CachingTorchDispatchMode)), None)
    return frame, None if caching is None else _asked(caching.policy_fn)


def trace_joint(
    function: Callable[..., Sequence[Any]],
    primals: Sequence[Any],
    leaves: Sequence[int],
    tangents: Sequence[torch.Tensor],
    losses: Sequence[int] = (0,),
    zeros: bool = True,
) -> torch.fx.GraphModule:
    """Forward and backward of ``function`` as one functional graph of (primals, tangents).

    It returns what ``function(*primals)`` does, then the gradients of the results ``losses``, given
    theirs, with respect to the primals ``leaves``: where there is none, ``zeros`` or None. Operators are
    those that Inductor takes, but that random ones are left whole: taken apart they draw other numbers.
    """
    import torch.fx.traceback
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    def differentiated(primals: list[Any], tangents: list[Any]) -> list[Any]:
        own = [p.detach().requires_grad_() if i in leaves else p for i, p in enumerate(primals)]
        results = function(*own)
        wanted = [own[i] for i in leaves]
        of = [results[i] for i in losses]
        found = torch.autograd.grad(of, wanted, tangents, allow_unused=True, materialize_grads=zeros)
        return [*(r.detach() if isinstance(r, torch.Tensor) else r for r in results), *found]

    functional = dispatch_functionalize(differentiated, FunctionalTensorMode())

    def joint(primals: list[Any], tangents: list[Any]) -> Any:
        return functional(primals, tangents)

    table = {op: rule for op, rule in select_decomp_table().items() if not is_random(op)}
    trace = make_fx(joint, table, tracing_mode="real", _allow_non_fake_inputs=True)
    with (
        fake_mode_of([*tangents, *primals]) or contextlib.nullcontext(),
        torch.enable_grad(),
        torch.fx.traceback.preserve_node_meta(),
        torch.autograd.set_multithreading_enabled(False),
    ):
        return trace(list(primals), list(tangents))


@contextlib.contextmanager
def taken_apart_for_training(target: Any) -> Iterator[None]:
    """Within, a composite operator is traced as operators whose backward can be traced too.

    Of an LSTM on a CPU torch makes calls of a kernel for inference, unless its input requires a gradient,
    though its weights may; run without autograd, that kernel leaves out what its backward asks for.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled and target not in _LSTMS)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


_LSTMS = (torch.ops.aten.lstm.input, torch.ops.aten.lstm.data)


def input_descriptor(number: int) -> Any:
    """AOTAutograd's note on a placeholder that is an input, read by :func:`placeholder_index`."""
    from torch._functorch._aot_autograd.descriptors import PlainAOTInput

    return PlainAOTInput(number)


@contextlib.contextmanager
def compiling_in(mode: FakeTensorMode) -> Iterator[None]:
    """Compile programs whose example inputs are fakes of ``mode``."""
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        yield


def sets_grad_mode(target: Any) -> bool:
    """Whether a captured call turns gradients on or off."""
    return target is SET_GRAD_ENABLED


def sets_mode(target: Any) -> bool:
    """Whether a captured call is there for the mode it sets: gradients, autocast."""
    return target in (SET_GRAD_ENABLED, enter_autocast, exit_autocast)


def copies_literal(target: Any) -> bool:
    """Whether a recorded call makes a tensor of a number written in the program (``torch.tensor(1.0)``)."""
    return target in (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default)


def is_eager_collective(target: Any) -> bool:
    """Whether a recorded call is a collective of torch.distributed that writes into its arguments."""
    return isinstance(target, OpOverload) and target.namespace == "c10d"


def is_profiling(target: Any) -> bool:
    """Whether a captured call tells the profiler where the program is."""
    return isinstance(target, OpOverload) and target.namespace == "profiler"


def functionalized(function: Callable[..., Sequence[Any]], written: Sequence[int]) -> Callable[..., Any]:
    """``function`` without writes; it returns the new values of its arguments at ``written`` as well."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize

    def run(*args: Any) -> list[Any]:
        return [*function(*args), *(args[i] for i in written)]

    # With export, attention and cross-entropy stay whole.
    return dispatch_functionalize(run, FunctionalTensorMode(pre_dispatch=True, export=True))


def written_arguments(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes an operator's call writes into."""
    if not isinstance(node.target, OpOverload):
        return []
    found: list[torch.fx.Node] = []
    for place, argument in enumerate(node.target._schema.arguments):
        declared = argument.alias_info is not None and argument.alias_info.is_write
        if declared or (argument.name in _RUNNING and _updates_statistics(node)):
            given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            found += [a for a in tree_leaves(given) if isinstance(a, torch.fx.Node)]
    return found


_RUNNING = ("running_mean", "running_var")


def _updates_statistics(node: torch.fx.Node) -> bool:
    """Whether a norm changes its running statistics, which the schemas of norms keep to themselves."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    modes = [names.index(m) for m in ("training", "use_input_stats") if m in names]
    return any(m < len(node.args) and node.args[m] is True for m in modes)


def aliases_input(target: Any) -> bool:
    """Whether an operator's result is a view of its first argument, or that argument."""
    return isinstance(target, OpOverload) and any(r.alias_info for r in target._schema.returns)


def is_checkpoint(target: Any) -> bool:
    """Whether a captured call is the body of a ``torch.utils.checkpoint.checkpoint``."""
    return target is torch.ops.higher_order.tag_activation_checkpoint


_PLAIN_HIGHER_ORDER = ("tag_activation_checkpoint", "cond", "flex_attention", "while_loop")


def is_custom_gradient(target: Any) -> bool:
    """Whether a captured call says something of gradients that its operators do not.

    A ``torch.autograd.Function`` with a backward of its own, a hook on an intermediate value; and any other
    call of functions that is not known to say nothing.
    """
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name() not in _PLAIN_HIGHER_ORDER
    return target == "register_hook"


def checkpoint_tags(number: int) -> dict[str, Any]:
    """The metadata that makes the partitioner recompute a node of a checkpoint's body."""
    from torch.utils.checkpoint import CheckpointPolicy

    return {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": number}


def saved_tags() -> dict[str, Any]:
    """The metadata that keeps the partitioner from recomputing a node."""
    from torch.utils.checkpoint import CheckpointPolicy

    return {"recompute": CheckpointPolicy.MUST_SAVE, "ac_graph_id": 0}


def note(node: torch.fx.Node, key: str, value: Any) -> None:
    """Note something on a node that goes over to what is traced of it."""
    node.meta["custom"] = {**notes(node), key: value}


def notes(node: torch.fx.Node) -> dict[str, Any]:
    return node.meta.get("custom") or {}


def checkpoint_saves(node: torch.fx.Node) -> bool:
    """Whether a user's checkpoint, or torch, wants a node's value saved and not computed again."""
    from torch.utils.checkpoint import CheckpointPolicy

    policy = node.meta.get("recompute")
    return policy in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)


def checkpoint_recomputes(node: torch.fx.Node) -> bool:
    """Whether a user's checkpoint wants a node's value computed again and not saved."""
    from torch.utils.checkpoint import CheckpointPolicy

    policy = node.meta.get("recompute")
    return policy in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def must_be_in_forward(node: torch.fx.Node) -> bool:
    """Whether torch's partitioner may not compute a node in the backward."""
    from torch._functorch.partitioners import _must_be_in_forward

    return bool(_must_be_in_forward(node))


def must_be_in_backward(node: torch.fx.Node) -> bool:
    """Whether torch's partitioner may not compute a node in the forward."""
    from torch._functorch.partitioners import _must_be_in_backward

    return bool(_must_be_in_backward(node))


def mutated_inputs(output: torch.fx.Node, count: int) -> set[str]:
    """Names of the inputs that a joint graph's first ``count`` outputs are the new values of."""
    from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput

    descriptors = output.meta.get("desc", [])[:count]
    changed = [d.mutated_input for d in descriptors if isinstance(d, InputMutationAOTOutput)]
    inputs = output.graph.find_nodes(op="placeholder")
    return {n.name for n in inputs if n.meta.get("desc") in changed}


def extract_parts(
    joint: torch.fx.GraphModule,
    saved: Sequence[torch.fx.Node],
    sizes: Sequence[torch.fx.Node],
    opaque: Sequence[torch.fx.Node],
    num_outputs: int,
    lasting: Sequence[int],
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """The forward and the backward part of a joint graph with exactly these values saved between them.

    The joint graph is one that torch's min-cut has prepared. ``sizes`` are numbers and ``opaque`` other
    objects that the backward may need; inputs that it needs are found. ``lasting`` are positions of inputs
    that live longer than the program.
    """
    import inspect

    from torch._functorch.compile_utils import raise_getitems
    from torch._functorch.partitioners import (
        _extract_fwd_bwd_modules,
        _is_primal,
        reordering_to_mimic_autograd_engine,
        thread_graphsafe_rng_from_hops,
    )
    from torch.utils._ordered_set import OrderedSet

    inputs = [n for n in joint.graph.find_nodes(op="placeholder") if _is_primal(n)]
    options: dict[str, Any] = {"num_fwd_outputs": num_outputs}
    options["static_lifetime_input_nodes"] = OrderedSet(inputs[i] for i in lasting if i < len(inputs))
    taken = [*(n for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)), *saved]
    if "saved_opaque_nodes" in inspect.signature(_extract_fwd_bwd_modules).parameters:
        options["saved_opaque_nodes"] = list(opaque)
    else:
        taken += opaque
    parts = _extract_fwd_bwd_modules(joint, taken, saved_sym_nodes=list(sizes), **options)
    forward, backward = parts[0], reordering_to_mimic_autograd_engine(parts[1])
    forward, backward = raise_getitems(forward), raise_getitems(backward)
    forward = thread_graphsafe_rng_from_hops(forward, is_backward=False)
    backward = thread_graphsafe_rng_from_hops(backward, is_backward=True)
    return forward, backward


def lazy_module(root: torch.fx.GraphModule, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A module of ``graph``, with what it takes from ``root``; compiled to Python only when it is called."""
    from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

    with _use_lazy_graph_module(True):
        module: torch.fx.GraphModule = _make_graph_module(root, graph)
        return module


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements fill its memory, each once."""
    return torch._prims_common.is_non_overlapping_and_dense_or_false(tensor)


def is_symbolic(tensor: torch.Tensor) -> bool:
    """Whether any of a tensor's sizes is a symbol."""
    return any(isinstance(size, torch.SymInt) for size in tensor.shape)


def checkpoint_policy(body: torch.fx.GraphModule) -> Callable[[Any, Any, Any], Any] | None:
    """What a user's selective checkpoint wants done with an operator's result, or None.

    Called with (operator, arguments, keyword arguments); the answer is a ``CheckpointPolicy``.
    """
    context_fn = body.meta.get("_checkpoint_context_fn")
    return None if context_fn is None else _asked(context_fn()[0].policy_fn)


def _asked(asked: Callable[..., Any]) -> Callable[[Any, Any, Any], Any]:
    from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

    def policy(target: Any, args: Any, kwargs: Any) -> Any:
        answer = asked(SelectiveCheckpointContext(is_recompute=False), target, *args, **kwargs)
        if isinstance(answer, bool):
            return CheckpointPolicy.MUST_SAVE if answer else CheckpointPolicy.PREFER_RECOMPUTE
        return answer

    return policy


def copy_source(old: torch.fx.Node, new: torch.fx.Node) -> None:
    """Keep what Dynamo knows of an input: where in the user's program it comes from."""
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]


def copy_sources(old: torch.fx.GraphModule, new: torch.fx.GraphModule) -> None:
    """Keep Dynamo's map from parameter names to sources."""
    if hasattr(old, "_param_name_to_source"):
        new._param_name_to_source = old._param_name_to_source  # type: ignore[assignment]


def returns_to_user() -> bool:
    """Whether the results of the program Dynamo is handing over go to whoever called the compiled model.

    Otherwise they go on in Python: after a graph break, or in a function that the model calls.
    """
    try:
        current = InstructionTranslator.current_tx()
    except AttributeError:
        current = None
    if current is None:
        return True
    if current.output.compile_subgraph_reason.graph_break:
        return False
    roots = [compiled_module(f.f_locals.get("self")) for f in python_frames()]
    known = [r for r in roots if r is not None]
    translator = current.output.root_tx
    own = _owner(translator)
    return not known or (any(own is r for r in known) and _function(translator) in _forward_names(own))


def ignore_logged_warnings() -> bool:
    """Have Dynamo skip the warnings that libraries log once, which break a graph; whether it did not
    before."""
    ignored = torch._dynamo.config.ignore_logging_functions
    module = sys.modules.get("transformers.utils.logging")
    warn = getattr(module, "warning_once", None)
    if warn is None or warn in ignored:
        return False
    ignored.add(warn)
    return True


def _function(translator: Any) -> str:
    """The name of the function being captured, or of the one that goes on after a graph break."""
    resumed = re.fullmatch(r"torch_dynamo_resume_in_(.+)_at_\d+", translator.f_code.co_name)
    return resumed[1] if resumed is not None else translator.f_code.co_name


def _forward_names(module: torch.nn.Module) -> set[str]:
    """What the functions are called that a call of the module goes through: forward and its wrappers."""
    names = {"_wrapped_call_impl", "_call_impl", "__call__"}
    function: Any = module.forward
    while function is not None:
        function = getattr(function, "__func__", function)
        names |= {function.__code__.co_name} if hasattr(function, "__code__") else set()
        function = getattr(function, "__wrapped__", None)
    return names


def _owner(translator: Any) -> Any:
    """The module whose function is captured: its first argument, which after a graph break is gone."""
    code = translator.f_code
    first = code.co_varnames[0] if code.co_argcount else "self"
    own = translator.f_locals.get(first, translator.f_locals.get("self"))
    if not isinstance(own, torch.nn.Module) and code.co_name != _function(translator):
        frames = [f for f in python_frames() if f.f_code.co_name == _function(translator)]
        held = frames[-1] if frames else None
        own = held.f_locals.get(held.f_code.co_varnames[0]) if held and held.f_code.co_argcount else None
    return own


# --- process groups --------------------------------------------------------------------------------


def process_group(name: str) -> dist.ProcessGroup:
    """The process group a functional collective's group name stands for."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def group_size(name: str) -> int:
    return process_group(name).size()


def group_rank(name: str) -> int:
    return process_group(name).rank()


def group_ranks(name: str) -> list[int]:
    """Global ranks of a group, in group order."""
    return dist.get_process_group_ranks(process_group(name))


def default_store() -> dist.Store:
    """The key-value store the default process group was made with."""
    return dist.distributed_c10d._get_default_store()


def mesh_group_name(mesh: DeviceMesh) -> str:
    """The functional-collective name of a one-dimensional mesh's group."""
    return mesh.get_group().group_name


def set_group_timeout(group: dist.ProcessGroup, seconds: float) -> None:
    """Bound how long a collective of ``group`` may wait for its peers.

    Collectives started from now on obey it, functional ones too. The group of a mesh over all
    ranks is the default group itself, so its other users are bounded as well. Where groups are
    wrapped for debugging (TORCH_DISTRIBUTED_DEBUG=DETAIL), torch warns and bounds nothing.
    """
    # torch 2.15 made this public and warns about the old name.
    setter = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    setter(timedelta(seconds=seconds), group)


def second_store_handle(store: dist.Store, seconds: float) -> dist.Store:
    """A handle on the same store for another thread, whose operations give up after ``seconds``.

    It has its own connection (TCPStore) or file position (FileStore), so a blocking wait on
    ``store`` does not hold it up, and its timeout is its own. A HashStore lives in one process and
    is its own second handle; its timeout is left alone.
    """
    handle = store.clone()  # type: ignore[attr-defined]
    bottom = handle
    if isinstance(handle, dist.PrefixStore):
        bottom = handle._underlying_non_prefix_store  # type: ignore[attr-defined]
    if not isinstance(bottom, dist.HashStore):
        handle.set_timeout(timedelta(seconds=seconds))
    return handle


# --- Dynamo ----------------------------------------------------------------------------------------


def dynamo_frame_locals() -> dict[str, Any]:
    """Locals of the outermost frame Dynamo is tracing; empty when it is not tracing."""
    current = InstructionTranslator.current_tx
    # Outside of a trace, torch 2.11 answers None once the thread has traced anything; else it is an error.
    try:
        translator = current()
    except AttributeError:
        translator = None
    return {} if translator is None else dict(translator.output.root_tx.f_locals)


def python_frames() -> Iterator[Any]:
    """Python frames on the stack, outermost first, the caller's last."""
    # Without a frame to start from, how many walk_stack leaves out depends on Python's version.
    frames = [frame for frame, _ in traceback.walk_stack(sys._getframe(1))]
    return reversed(frames)  # type: ignore[return-value]


def retrace() -> None:
    """Called inside a Dynamo backend: forget this trace and trace the frame again.

    Never returns. The exception is Dynamo's own for restarting an analysis; it passes through the
    backend call unwrapped and is caught by the frame converter.
    """
    InstructionTranslator.current_tx().output.root_tx.speculation_log.clear()
    raise TensorifyScalarRestartAnalysis


def restarts_tracing(error: BaseException) -> bool:
    """Whether ``error`` is how Dynamo starts a trace again, and no failure."""
    return isinstance(error, RestartAnalysis)


def placeholder_index(node: torch.fx.Node) -> int | None:
    """Which input of the captured function an AOTAutograd placeholder stands for.

    None for placeholders that are not inputs of the captured function (tangents, effect tokens).
    """
    descriptor = node.meta.get("desc")
    while hasattr(descriptor, "base"):
        descriptor = descriptor.base
    return getattr(descriptor, "idx", None) if type(descriptor).__name__ == "PlainAOTInput" else None


# --- compilers -------------------------------------------------------------------------------------


def boxed(graph: torch.fx.GraphModule) -> Callable[[list[Any]], Any]:
    """``graph`` as AOTAutograd calls it: all arguments in one list, which it empties, so that each dies with
    its last use."""
    from torch.fx.graph import _BoxedCodeGen

    graph.graph.set_codegen(_BoxedCodeGen())
    graph.recompile()
    return takes_list(lambda arguments: graph.forward(arguments))


def takes_list(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tell AOTAutograd that ``function`` has that calling convention already."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def inductor_mode_options(mode: str | None) -> dict[str, Any]:
    """The Inductor options a ``torch.compile(mode=...)`` stands for."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode)) if mode else {}


def inductor_modes() -> list[str]:
    from torch._inductor import list_mode_options

    return sorted(list_mode_options())


@contextlib.contextmanager
def functorch_patch(**options: Any) -> Iterator[None]:
    with torch._functorch.config.patch(**options):  # type: ignore[attr-defined]
        yield


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode | None:
    """The fake mode that made any of ``values``."""
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


def size_hint(size: Any, default: int = 1) -> int:
    """A size as a number: symbolic sizes at the value they had when traced."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint if size.node.has_hint() else None
        return default if hint is None else int(hint)
    return int(size)


def known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are certainly equal; asks without adding a guard to the program being captured."""
    if not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt):
        return bool(a == b)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def is_fake_group(name: str) -> bool:
    """Whether a group belongs to the fake backend, whose collectives do nothing."""
    return dist.get_backend(process_group(name)) == "fake"


def compiled_module(candidate: Any) -> torch.nn.Module | None:
    """The module a ``torch.compile`` region belongs to, given a ``self`` found on the stack.

    ``torch.compile(model)`` runs through an ``OptimizedModule``; ``model.compile()`` leaves its compiled
    call on the module itself.
    """
    if isinstance(candidate, torch._dynamo.OptimizedModule):
        return candidate._orig_mod
    if isinstance(candidate, torch.nn.Module) and candidate._compiled_call_impl is not None:
        return candidate
    return None


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoint_paths(metadata: Metadata) -> dict[str, tuple[str | int, ...]]:
    """Where each flat key of a checkpoint lies in the nested dictionary that was saved."""
    nested = metadata.planner_data or {}
    return {key: tuple(nested.get(key, (key,))) for key in metadata.state_dict_metadata}


def checkpoint_extents(metadata: Metadata) -> dict[str, int]:
    """Bytes each data file of a checkpoint has at least, by its path below the checkpoint's."""
    extents: dict[str, int] = {}
    for place in metadata.storage_data.values():
        end = place.offset + place.length
        extents[place.relative_path] = max(end, extents.get(place.relative_path, 0))
    return extents


def move_checkpoint_files(metadata: Metadata, folder: str) -> Metadata:
    """The same checkpoint seen from one folder up: its data files lie in ``folder``."""
    moved = {
        index: dataclasses.replace(place, relative_path=f"{folder}/{place.relative_path}")
        for index, place in metadata.storage_data.items()
    }
    return dataclasses.replace(metadata, storage_data=moved)


def load_checkpoint_keys(path: str, keys: set[str]) -> dict[str, Any]:
    """The values under dotted ``keys`` of the checkpoint at ``path``, nested as they were saved.

    A collective: every rank reads all of them.
    """
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    return _load_state_dict_from_keys(keys, checkpoint_id=path)


def compile_backend(module: torch.nn.Module) -> Callable[..., Any] | None:
    """The backend function a module was compiled with, or None."""
    wrapped = _asked_backend(module)
    return getattr(wrapped, "compiler_fn", wrapped)


def compile_options(module: torch.nn.Module) -> Any:
    """The ``options`` a module was compiled with, or None."""
    return getattr(_asked_backend(module), "kwargs", {}).get("options")


def _asked_backend(module: torch.nn.Module) -> Any:
    """What ``torch.compile`` made of its arguments: a function, or an object that binds options to one."""
    if isinstance(module, torch._dynamo.OptimizedModule):
        wrapped: Any = module.dynamo_ctx.callback
    else:
        cells = getattr(module._compiled_call_impl, "__closure__", None) or ()
        contents = (cell.cell_contents for cell in cells)
        wrapped = next((c for c in contents if hasattr(c, "_torchdynamo_orig_backend")), None)
    while hasattr(wrapped, "_torchdynamo_orig_backend"):
        wrapped = wrapped._torchdynamo_orig_backend
    return wrapped


GRADIENT_SCALING = frozenset({torch._amp_foreach_non_finite_check_and_unscale_})
"""What ``torch.amp.GradScaler`` asks of gradients: to unscale them and say whether one is not finite."""


FOREACH_NORM = torch._foreach_norm
"""What ``torch.nn.utils.clip_grad_norm_`` takes the norms of gradients with."""


def has_gradient_hooks(tensor: torch.Tensor, beside: Callable[..., Any] | None = None) -> bool:
    """Whether anything ``beside`` one function is to be called with, or after, a tensor's gradient."""
    held = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
    return any(hook is not beside for hooks in held for hook in (hooks or {}).values())


def hooks_registered() -> int:
    """A count that grows with every hook put on a module, a parameter, an optimizer or on all modules."""
    return torch.utils.hooks.RemovableHandle.next_id


def forward_hooks(module: torch.nn.Module) -> list[dict[int, Any]]:
    """The hooks of a module that are called with its forward or its backward."""
    own = vars(module)
    return [own[name] for name in _HOOKS]


def global_hooks() -> list[dict[int, Any]]:
    """The hooks that all modules, and all optimizers, call."""
    from torch.nn.modules import module
    from torch.optim import optimizer

    step = (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks)
    return [*(getattr(module, f"_global{name}") for name in _HOOKS), *step]


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

# What torch itself notes on an optimizer while it steps.
OPTIMIZER_FLAGS = frozenset(
    ("_opt_called", "_need_device_dtype_check_for_fused", "_warned_capturable_if_run_uncaptured")
)


# --- memory and costs ------------------------------------------------------------------------------


def storage_key(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common; unique among tensors that are alive."""
    return tensor.untyped_storage()._cdata


def flop_formula(target: Any) -> Callable[..., Any] | None:
    """torch's own count of an operator's floating-point operations.

    Called with the operator's arguments, sizes in place of tensors, and ``out_val``, its result's sizes.
    None where torch has no formula, or one that cannot do with sizes alone.
    """
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(getattr(target, "overloadpacket", target))
    return formula if hasattr(formula, "__wrapped__") else None


def returns_nothing(target: Any) -> bool:
    """Whether an operator is called for what it does alone, as an assertion is."""
    return isinstance(target, OpOverload) and not target._schema.returns


def result_count(target: OpOverload) -> int:
    """How many values an operator returns."""
    return len(target._schema.returns)


def operator_base(target: Any) -> str:
    """An operator's name without its namespace and overload; empty for anything else."""
    return target._schema.name.split("::")[-1] if isinstance(target, OpOverload) else ""


def overload_for(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpOverload:
    """The overload of an operator that takes these arguments; nodes stand for tensors."""

    def shown(value: Any) -> Any:
        return value.meta["val"] if isinstance(value, torch.fx.Node) else value

    named = tree_map(shown, kwargs)
    name = torch._C._jit_resolve_packet(packet._qualified_op_name, *map(shown, args), **named)
    return getattr(packet, name)


def is_random(target: Any) -> bool:
    """Whether an operator draws random numbers."""
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def is_seed(target: Any) -> bool:
    """Whether an operator makes seeds for Inductor's random numbers."""
    return target in (torch.ops.prims.inductor_seeds.default, torch.ops.prims.inductor_seed.default)


def is_mutating(target: Any) -> bool:
    """Whether an operator writes to one of its arguments."""
    return isinstance(target, OpOverload) and target._schema.is_mutable


# --- what a graph's nodes hold ---------------------------------------------------------------------


def operator_arguments(target: Any) -> list[tuple[str, str]]:
    """(name, kind) of each argument an operator declares; nothing for a plain Python function.

    Kinds are TorchScript's, seen through optionals and lists: ``IntType`` for a declared ``int``,
    ``SymIntType`` for ``SymInt`` (a size), ``TensorType``, ``NumberType``, ...
    """

    def kind(declared: Any) -> str:
        while hasattr(declared, "getElementType"):
            declared = declared.getElementType()
        return declared.kind()

    if not isinstance(target, OpOverload):
        return []
    return [(a.name, kind(a.real_type)) for a in target._schema.arguments]


def symbolic_expression(value: torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
    """The sympy expression a symbolic number stands for."""
    return value.node.expr


def not_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep Dynamo from compiling ``function`` as a program of its own.

    Inside a captured program it is traced as ever. In a frame that Dynamo has given up on, the functions
    called, and what they call, would each be captured: a graph for every read of a weight.
    """
    strategy = FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, strategy)
    return function


def add_each(totals: Sequence[torch.Tensor], terms: Sequence[torch.Tensor]) -> None:
    """Add each term to its total, in place; on an accelerator in few kernels."""
    if totals:
        torch._foreach_add_(list(totals), list(terms))


def compile_part(graph: torch.fx.GraphModule, is_backward: bool, options: dict[str, Any]) -> Any:
    """A functional graph of Inductor's operators as a function that takes and returns a list.

    Its results have the strides of the graph's values; it may empty the list it is given.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner, record_original_output_strides

    inputs = [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")]
    output = graph.graph.find_nodes(op="output")[0]
    results = output.args[0]
    tensors = [i for i, n in enumerate(results) if isinstance(n, torch.fx.Node)]
    output.meta["user_visible_output_idxs"] = tensors
    record_original_output_strides(graph)
    mode = fake_mode_of(inputs) or fake_mode_of([n.meta.get("val") for n in graph.graph.nodes])
    assert mode is not None
    with compiling_in(mode), torch.no_grad(), config.patch(**options):
        return compile_fx_inner(graph, inputs, is_backward=is_backward)


def emitted_program(compiled: Any) -> str:
    """The Python wrapper Inductor emitted, given what ``compile_fx_inner`` returned."""
    return compiled.source_code


# --- showing what was done -------------------------------------------------------------------------


def structured_trace_enabled() -> bool:
    """Whether torch's structured trace (``TORCH_TRACE=DIR``, read by tlparse) is written."""
    from torch._logging._internal import LazyTraceHandler, trace_log

    # torch installs its handler always; without a folder it writes nothing.
    writers = (h for h in trace_log.handlers if isinstance(h, LazyTraceHandler))
    return any(h.root_dir is not None for h in writers)


def is_tangent(node: torch.fx.Node) -> bool:
    """Whether a placeholder of a backward is a gradient that comes in."""
    return "tangents" in str(node.target)


def gradient_index(descriptor: Any) -> int | None:
    """Which input of the captured function a backward output is the gradient of.

    ``descriptor`` is one of AOTAutograd's, from ``meta["desc"]`` of the output node; None for others.
    """
    while hasattr(descriptor, "base"):
        descriptor = descriptor.base
    return getattr(getattr(descriptor, "grad_of", None), "idx", None)


@contextlib.contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """Be the first of ``count`` ranks that do not exist: collectives return at once, without data."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for others, inside of ``torch.func``: in ``vmap`` for the rows of a batch."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def needs_data(error: BaseException) -> bool:
    """Whether an operator failed because a fake tensor has no values."""
    from torch._subclasses import fake_tensor

    kinds = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
    return isinstance(error, kinds)
