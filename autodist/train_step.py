"""Door 2: ``@autodist.train_step``, a training step as one program.

    @autodist.train_step
    def step(model, optimizer, batch):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

The function's first call shards the models among its arguments; then forward, backward, clipping and
optimizer are captured (:mod:`autodist.step_capture`), transformed and compiled (:mod:`autodist.compiler`) as
one graph. A *program* is what comes of it. It holds for the Python values that it was made for: settings of
optimizers, plain attributes of modules, which parameters have gradients, arguments that are no tensors.
Called with others, the function makes another program. Learning rates and tensors are given anew to each run;
a tensor whose sizes change is given symbols in their place.

State that an optimizer makes in its first step is found after that step is captured. The program that makes
it runs once, so it is not lowered to kernels.

With ``pp`` what the step differentiates is run as a pipeline, and each rank has its share of the rest
(:mod:`autodist.step_pipeline`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autodist.compiler import CompiledStep, compile_step
from autodist.job import Job, num_ranks, start_job
from autodist.logs import log
from autodist.passes.base import StepError
from autodist.plan import Plan, PlanLike
from autodist.prepare import prepare, prepared_job, repoint
from autodist.runtime import compat, offload
from autodist.runtime.compat import tree_flatten, tree_leaves, tree_unflatten
from autodist.runtime.outputs import SameBatch
from autodist.runtime.parameters import MovedParameter
from autodist.runtime.stage_parameters import as_stage_gradient, owners
from autodist.step_capture import Captured, Result, capture, program_inputs
from autodist.step_guards import PLAIN, Surroundings, same_value, step_roots
from autodist.step_pipeline import StepPipelines, shard_by_step
from autodist.step_state import State, memory_of, roots_of
from autodist.verify_step import StepReport, verify_step

P = ParamSpec("P")
R = TypeVar("R")
_MANY_PROGRAMS = 8


@overload
def train_step(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def train_step(*, plan: PlanLike = None) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def train_step(function: Any = None, /, *, plan: PlanLike = None) -> Any:
    """Make one sharded, compiled program of a training step; a decorator, with or without ``plan``.

    The function takes models, optimizers, schedulers and a batch, in any order, nested or not, and uses them
    as in eager PyTorch; it returns tensors (detached), numbers, or containers of them. ``plan`` is a
    :class:`Plan`, a dict of its fields, a path to its JSON, or None. The function as it was written is
    ``step.function``.

    Raises :class:`~autodist.passes.base.StepError` for a function that cannot be captured, and what
    :func:`autodist.prepare` raises.
    """
    if function is None:
        return functools.partial(train_step, plan=plan)
    return functools.wraps(function)(TrainStep(function, plan))


_LATER = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)


class TrainStep:
    """A decorated training step. ``function`` is the undecorated one, ``programs`` what was made of it."""

    def __init__(self, function: Callable[..., Any], plan: PlanLike) -> None:
        self.function, self.plan = function, Plan.make(plan)
        if any(is_kind(function) for is_kind in _LATER):
            raise StepError(
                f"'{function.__name__}' is a generator or a coroutine: calling it runs nothing of it. Write "
                "the step as a function that returns what it makes."
            )
        self.job: Job | None = None
        self.programs: list[Program] = []
        self._state: State | None = None
        self._objects: list[Any] = []
        self._version = 0
        self._versions: list[list[Any]] = []
        self._changed: str | None = None
        self._said: set[str] = set()
        self._sizes: dict[int, list[set[int]]] = {}
        self._symbols = self.plan.pp == 1  # pipelines are made for sizes
        self._pipelines: StepPipelines | None = None
        self._fixed: list[Any] = []

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """A step of the instance's own, kept among its attributes: its models are others than its class's."""
        if instance is None:
            return self
        method = MethodType(self.function, instance)
        return vars(instance).setdefault(self._name, train_step(plan=self.plan)(method))

    def __reduce__(self) -> Any:
        """Copied and pickled, a step begins anew: by its name, or as its instance's."""
        owner = getattr(self.function, "__self__", None)
        return self.function.__qualname__ if owner is None else (getattr, (owner, self.function.__name__))

    @compat.not_alone
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            raise StepError(
                f"{self.function.__name__} is called under torch.no_grad() or torch.inference_mode(), where "
                "no gradients are recorded. Call the step outside of it."
            )
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        others = [None if isinstance(x, Tensor) else x for x in leaves]
        state = self._current_state(others)
        gradients = state.gradients()
        key = self._key(structure, others, tensors, state, gradients)
        program = self._program(key, tensors)
        if program is not None:
            return program.run(state, tensors, gradients)
        _refuse_views(state, tensors)
        self._prepare(state, (args, kwargs))
        program, state = self._make((args, kwargs), structure, others, tensors)
        if program.move_state(state):
            state = self._current_state(others, fresh=True)
            program.key = self._key(structure, others, tensors, state, state.gradients())
        return program.run(state, tensors, state.gradients())

    def _program(self, key: _Key, tensors: Sequence[Tensor]) -> Program | None:
        """The program that there is already, on all ranks of a pipeline."""
        fits = (p.holds(key, tensors) for p in self.programs)
        if self._pipelines is None:
            return next((p for p, fit in zip(self.programs, fits, strict=True) if fit), None)
        number = self._pipelines.common(list(fits))
        return None if number is None else self.programs[number]

    def _key(
        self, structure: Any, others: list[Any], tensors: Sequence[Tensor], state: State,
        gradients: Sequence[Tensor | None],
    ) -> _Key:  # fmt: skip
        plain = [x if isinstance(x, PLAIN) else None for x in others]
        rates = [(x.dtype, x.shape) for x in state.rates()]
        return _Key(
            self._version, structure, [_kind(x) for x in tensors], state.relations(tensors, gradients),
            _modes(tensors), rates, [g is None for g in gradients], state.trained(), plain,
        )  # fmt: skip

    def verify(self, *args: Any, tolerance: float = 1e-4, **kwargs: Any) -> StepReport:
        """Run the step on these arguments, and the function as it was written, and compare what they do.

        Everything is left as it was. Where a dropout draws other numbers than one process would (``sp``,
        ``pp``), put the model into evaluation mode first. With ``pp`` every rank must have room for the whole
        model and its optimizer's state.
        """
        state = State.of(roots_of(self.function, tree_leaves((args, kwargs))))
        self._prepare(state, (args, kwargs))
        assert self.job is not None
        report = verify_step(self, self.function, (args, kwargs), tolerance, self.job)
        log.info("%s: %s", self.function.__name__, report)
        return report

    def _current_state(self, others: list[Any], fresh: bool = False) -> State:
        objects = [x for x in others if not isinstance(x, PLAIN)]
        same = len(objects) == len(self._objects) and all(map(operator.is_, objects, self._objects))
        if fresh or not same or self._state is None or not self._state.stands():
            fixed = {id(g) for o in self._fixed for g in o.param_groups}
            around = Surroundings(step_roots(self.function, objects), fixed)
            old = self._state
            self._state = State.of(roots_of(self.function, objects), around, fixed)
            if old is not None:
                self._changed = old.around.difference(around) or self._changed
            self._objects = objects
            self._version = self._number(self._state.values)
        return self._state

    def _number(self, values: list[Any]) -> int:
        """Lists of the same values have the same number."""
        for number, known in enumerate(self._versions):
            if len(known) == len(values) and all(map(same_value, known, values)):
                return number
        self._versions.append(values)
        return len(self._versions) - 1

    def _prepare(self, state: State, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        """Shard the models, at the first call."""
        for optimizer in state.roots.optimizers:
            repoint(optimizer)
        if self.plan.pp > 1:
            state = State.of(state.roots)
            self.job = shard_by_step(self.function, arguments, state, self.plan)
            if self._pipelines is None or self._pipelines.job is not self.job:  # the step of other models
                self._pipelines = StepPipelines(self.job)
            return
        for module in state.roots.modules:
            if self.job is None or num_ranks() > 1:
                prepare(module, self.plan)
            self.job = self.job or prepared_job(module)
        if self.job is None:
            device = next((p.device for p in state.parameters), torch.device("cpu"))
            self.job = start_job(dataclasses.replace(self.plan, dp=None, sp=1), device, alone=True)

    def _make(
        self, arguments: tuple[tuple[Any, ...], dict[str, Any]], structure: Any, others: list[Any],
        tensors: Sequence[Tensor],
    ) -> tuple[Program, State]:  # fmt: skip
        assert self.job is not None
        dynamic = self._changing(tensors)
        try:
            with (self._pipelines or self.job).failing_together():
                captured, state = self._captured(arguments, others, dynamic)
            key = self._key(structure, others, tensors, state, state.gradients())
            if self._pipelines is not None:
                captured, compiled = self._pipelines.compile(captured, state, tensors)
            else:
                compiled = compile_step(captured, self.job, kernels=captured.lasts)
        except ZeroDivisionError as error:
            if all(x.numel() for x in tensors):
                raise
            raise StepError(
                "an argument is an empty tensor, and the step divides by its size. Leave such a batch out."
            ) from error
        program = Program(key, captured, compiled, self.job)
        if self.programs and self._changed and self._changed not in self._said:
            self._said.add(self._changed)
            log.info(
                "'%s' has changed: another program is made of %s, one for each of its values",
                self._changed, self.function.__name__,
            )  # fmt: skip
        if captured.lasts:
            self.programs.append(program)
        if len(self.programs) == _MANY_PROGRAMS:
            log.warning(
                "%d programs have been made of %s, one for each combination of its Python values%s; pass "
                "what changes from call to call as a tensor", _MANY_PROGRAMS, self.function.__name__,
                f" (lately of '{self._changed}')" if self._changed else "",
            )  # fmt: skip
        return program, state

    def _captured(
        self, arguments: tuple[tuple[Any, ...], dict[str, Any]], others: list[Any],
        dynamic: dict[int, set[int]],
    ) -> tuple[Captured, State]:  # fmt: skip
        """The step, captured with the learning rates as tensors; where an optimizer asks for the number, with
        that one's as constants."""
        state = self._current_state(others, fresh=True)
        try:
            return self._capture(arguments, state, dynamic), state
        except StepError as error:
            if error.optimizer is None or error.optimizer in self._fixed:
                raise
            self._fixed.append(error.optimizer)
            state = self._current_state(others, fresh=True)
            try:
                return self._capture(arguments, state, dynamic), state
            except StepError as other:
                self._fixed.pop()
                raise (other if other.optimizer is None else error) from None

    def _capture(
        self, arguments: tuple[tuple[Any, ...], dict[str, Any]], state: State, dynamic: dict[int, set[int]]
    ) -> Captured:
        """With symbols for sizes that change; where Python cannot do with symbols, with these sizes alone."""
        if self._pipelines is not None:
            return self._pipelines.capture(self.function, arguments, state)
        try:
            return capture(self.function, arguments, state, dynamic)
        except StepError:
            raise
        except Exception as error:
            if not dynamic:
                raise
            captured = capture(self.function, arguments, state, {})
            self._symbols = False
            log.warning(
                "%s needs a size that changes from call to call as a number (%s), so each makes a program",
                self.function.__name__, str(error).partition("\n")[0],
            )  # fmt: skip
            return captured

    def _changing(self, tensors: Sequence[Tensor]) -> dict[int, set[int]]:
        """Dimensions whose sizes have been seen to change, for each tensor by number."""
        if not self._symbols:
            return {}
        found: dict[int, set[int]] = {}
        for i, x in enumerate(tensors):
            seen = self._sizes.setdefault(i, [])
            seen.extend(set() for _ in range(x.dim() - len(seen)))
            for dim, size in enumerate(x.shape):
                seen[dim].add(size)
            found[i] = {d for d in range(x.dim()) if len(seen[d]) > 1 and x.shape[d] > 1}
        return {i: dims for i, dims in found.items() if dims}


@dataclasses.dataclass
class _Key:
    """What a program was made for: the number of what stands around it, the arguments and the gradients."""

    version: int
    structure: Any
    kinds: list[Any]
    relations: list[tuple[int, int]]
    modes: tuple[Any, ...]
    rates: list[Any]
    without_gradient: list[bool]
    trained: list[bool]
    plain: list[Any]

    def same(self, other: _Key) -> bool:
        return (
            self.version == other.version
            and self.kinds == other.kinds
            and self.relations == other.relations
            and self.modes == other.modes
            and self.rates == other.rates
            and self.without_gradient == other.without_gradient
            and self.trained == other.trained
            and self.structure == other.structure
            and all(map(same_value, self.plain, other.plain))
        )


def _modes(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Settings of torch that change what operators do."""
    devices = {"cpu", *(x.device.type for x in tensors)}
    casts = [(d, torch.get_autocast_dtype(d)) for d in sorted(devices) if torch.is_autocast_enabled(d)]
    deterministic = torch.are_deterministic_algorithms_enabled()
    return (
        casts, torch.get_default_dtype(), deterministic,
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )  # fmt: skip


def _refuse_views(state: State, tensors: Sequence[Tensor]) -> None:
    """What shares memory with a parameter that is now to be sharded would be left behind."""
    if num_ranks() == 1:
        return
    parameters = zip(state.names, state.parameters, strict=True)
    whole = {memory_of(p): n for n, p in parameters if not isinstance(p, (DTensor, MovedParameter))}
    for x in tensors:
        if not isinstance(x, (DTensor, torch.nn.Parameter)) and memory_of(x) in whole:
            raise StepError(
                f"an argument of shape {tuple(x.shape)} shares memory with '{whole[memory_of(x)]}', which is "
                "sharded by this call. Make it after autodist.prepare(model, plan), from model.parameters()."
            )


def _kind(x: Tensor) -> Any:
    return (x.dtype, x.device, x.dim(), type(x), x.requires_grad, None if x.is_contiguous() else _layout(x))


def _layout(x: Tensor) -> tuple[int, ...]:
    """The order of the dimensions in memory, which tensors of many sizes share; else the strides."""
    order = sorted(range(x.dim()), key=lambda d: (-x.stride(d), d))
    return tuple(order) if x.permute(order).is_contiguous() else x.stride()


class Program:
    """A captured and compiled step."""

    def __init__(
        self, key: _Key, captured: Captured, compiled: CompiledStep, job: Job
    ) -> None:
        self.key, self.captured, self.compiled, self.job = key, captured, compiled.run, job
        self.on_host = compiled.on_host
        self.fits = compat.size_check(captured.mode, captured.batch)
        self.sizes: dict[Any, bool] = {}
        shared = [mesh for mesh in (job.sequence, job.pipeline) if mesh is not None]
        self.batches = [SameBatch(mesh, job.device) for mesh in shared]

    def holds(self, key: _Key, tensors: Sequence[Tensor]) -> bool:
        """Whether this program is the step for these arguments and this state."""
        if not self.key.same(key):
            return False
        shapes = tuple(x.shape for x in tensors)
        if shapes not in self.sizes:
            self.sizes[shapes] = self.fits([compat.local_part(x) for x in tensors])
        return self.sizes[shapes]

    def run(self, state: State, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Any:
        for batch in self.batches:
            batch.check(tensors)
        with torch.no_grad():
            outputs = iter(self.compiled(*program_inputs(state, tensors, gradients)))
        if self.on_host or (self.captured.new_moments and self.job.memory_bytes is not None):
            offload.transfers(self.job.device).settle()  # Python may look at state on the host
        return self._finish(state, tensors, outputs)

    def move_state(self, state: State) -> bool:
        """Put the moments on the host that the program takes from there; whether any had to be."""
        moments = enumerate(self.captured.moments)
        moving = [i for i, m in moments if m.position in self.on_host and not m.on_host]
        state.keep_on_host(moving, self.job.host_bytes)
        return bool(moving)

    def _finish(self, state: State, tensors: Sequence[Tensor], outputs: Any) -> Any:
        """Put what the program has made where the step would have put it."""
        captured, specs = self.captured, iter(self.captured.specs)

        def made() -> Tensor:
            value, spec = next(outputs), next(specs)
            return value if spec is None else compat.dtensor_of(value, spec, False)

        tensors_made = iter([made() for result in captured.results if result.kind == "tensor"])
        for i in captured.new_gradients:
            state.parameters[i].grad = made()
            if owners(state.parameters[i]):
                as_stage_gradient(state.parameters[i])
        for i in captured.without_gradient:
            state.parameters[i].grad = None
        if captured.without_gradient:
            state.forget_gradients()
        for moment in captured.new_moments:
            owner = state.roots.optimizers[moment.optimizer].state
            owner[state.parameters[moment.parameter]][moment.key] = made()
        results = [  # before the buffers are replaced: what is returned is one that the step was given
            next(tensors_made) if r.kind == "tensor" else _known(r, state, tensors) for r in captured.results
        ]
        for i in captured.new_buffers:
            state.put_buffer(i, made())
        for call in captured.calls:
            call.scheduler.step(*call.args, **call.kwargs)
        return tree_unflatten(results, captured.structure)


def _known(result: Result, state: State, tensors: Sequence[Tensor]) -> Any:
    """A result that is no new tensor."""
    if result.kind == "constant":
        return result.what
    if result.kind == "gradient":
        return state.parameters[result.what].grad
    known: dict[str, Sequence[Any]] = {
        "parameter": state.parameters,
        "buffer": state.buffers,
        "batch": tensors,
        "rate": state.own_rates(),
    }
    return known[result.kind][result.what]


__all__ = ["TrainStep", "train_step"]
