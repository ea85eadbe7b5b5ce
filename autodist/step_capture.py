"""A training step, run once without data, becomes a program.

The step's Python runs on fake tensors while its operators are written down: the forward before autograd, an
operator ``gradients`` where it calls ``loss.backward()``, then whatever it does with gradients, parameters
and state, on this rank's shards. What an optimizer, ``clip_grad_norm_`` or a moving average does to
DTensors has been written down as what it does to shards, with the collectives that it needs.

    inputs    parameters' shards, gradients, buffers, moments, learning rates, the batch's tensors
    outputs   what the step returns; then gradients, moments and buffers that it made; and it writes into
              the inputs that it changes

Nothing here depends on data, so what does cannot be captured: a branch on a tensor's value, a number taken
out of one, a tensor printed. It is refused with the line it stands on (:class:`StepError`). So are changes
to Python values of the models, which a program would not make again.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import operator
import os
import random
import sys
import sysconfig
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CellType, FunctionType, GeneratorType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule, Node
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from autodist.passes.base import StepError
from autodist.passes.graph import innermost, where, writers
from autodist.runtime import compat, dialect
from autodist.runtime.compat import local_part, tree_flatten, tree_leaves, tree_map, tree_unflatten
from autodist.runtime.gradients import gradients
from autodist.runtime.parameters import captured_parameter, is_captured, unshard
from autodist.runtime.stage_parameters import as_stage_gradient
from autodist.step_changes import Globals, Record, Snapshot, iterators, named_arguments, outer_names
from autodist.step_guards import REGISTRIES, Scheduler, Surroundings, named_objects, step_roots
from autodist.step_layout import Layout
from autodist.step_state import State, hyperparameters, memory_of

_NOT_THE_USERS = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__, compat.__file__))
_PYTHONS = f"{sysconfig.get_path('stdlib')}{os.sep}"
_INSTALLED = tuple(f"{sysconfig.get_path(kind)}{os.sep}" for kind in ("purelib", "platlib"))
_FRAMES = 8
_AS_THEY_ARE = Layout()


@dataclass(frozen=True)
class Result:
    """Something that the step returns: ``kind`` is "tensor" (the program's next output), "constant" (``what``
    itself), or "parameter", "gradient", "buffer", "rate" or "batch": the one with number ``what``."""

    kind: str
    what: Any = None


@dataclass(frozen=True)
class NewMoment:
    """State that the step makes: the optimizer's and the parameter's numbers, its key, and the bytes that all
    ranks together have of it."""

    optimizer: int
    parameter: int
    key: Any
    whole_bytes: int = 0


@dataclass(frozen=True)
class Call:
    """A call that the step makes of a scheduler, to be made after each run."""

    scheduler: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class KnownMoment:
    """State that the step is given as its input number ``position``; ``on_host``, it lies there."""

    name: str
    position: int
    whole_bytes: int
    on_host: bool


@dataclass
class Captured:
    """A step as a program.

    ``graph`` takes ``inputs`` (fakes, in the order of the module's text; the first are ``parameters`` in
    number, the last are the ``batch``; ``names`` has those of parameters and of what belongs to them). It
    returns the tensors among ``results``, then gradients of the parameters ``new_gradients``, then
    ``new_moments``, then buffers ``new_buffers``; ``specs`` has, for each of these, what makes a DTensor of
    it, or None. ``without_gradient`` are the parameters that the step leaves without one. ``moments`` are in
    the state's order. One that does not ``last`` makes optimizer state: it runs once.
    """

    inputs: list[Tensor]
    names: dict[int, str]
    mode: compat.FakeTensorMode
    parameters: int
    batch: list[Tensor]
    moments: list[KnownMoment] = field(default_factory=list)
    graph: GraphModule = field(init=False)
    structure: Any = None
    results: list[Result] = field(default_factory=list)
    specs: list[Any] = field(default_factory=list)
    new_gradients: list[int] = field(default_factory=list)
    without_gradient: list[int] = field(default_factory=list)
    new_moments: list[NewMoment] = field(default_factory=list)
    new_buffers: list[int] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    lasts: bool = True
    policies: dict[int, Any] = field(default_factory=dict)


def capture(
    function: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    state: State,
    dynamic: dict[int, set[int]],
    layout: Layout = _AS_THEY_ARE,
) -> Captured:
    """Run ``function`` on its arguments (positional, keyword) without data.

    ``dynamic`` gives, for tensors among the arguments by number, the dimensions whose sizes are symbols;
    ``layout`` says what of sharded tensors the step is shown. Raises :class:`StepError`.
    """
    return _Capture(function, arguments, state, dynamic, layout).run()


class _Capture:
    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        state: State,
        dynamic: dict[int, set[int]],
        layout: Layout,
    ) -> None:
        self.function, self.arguments, self.state, self.layout = function, arguments, state, layout
        self.leaves, self.structure = tree_flatten(arguments)
        self.tensors = [x for x in self.leaves if isinstance(x, Tensor)]
        _refuse_inputs(state, self.tensors, self.leaves)
        mode = compat.shape_tracing_mode()
        real = _given(state, self.tensors)
        first = len(real) - len(self.tensors)
        fakes = [layout.fake(mode, x, dynamic.get(i - first, set()), i) for i, x in enumerate(real)]
        for fake, parameter in zip(fakes, state.parameters, strict=False):
            fake.requires_grad_(parameter.requires_grad)
        moments = _known_moments(state, first - len(state.rates()) - len(state.moments))
        for known, moment in zip(moments, state.moments, strict=True):
            device = state.parameters[moment.parameter].device
            if known.on_host and fakes[known.position].device != device:
                fakes[known.position] = compat.fake_like(mode, fakes[known.position], device)
        self.made = Captured(fakes, _names(state), mode, len(state.parameters), fakes[first:], moments)
        self.watch = Watch()
        self.given: set[int] = set()
        self.snapshot = Snapshot(named_arguments(function, arguments), [function])
        self.stand_ins: dict[int, Any] = {
            id(s): Later(s, self.made.calls, self.watch) for s in state.roots.schedulers
        }

    def run(self) -> Captured:
        _refuse_iterators(self.function, self.arguments)
        outside = self._outside()
        theirs = self._python_generators()
        drawn, passed = _random_states(theirs), [_passed(x) for x in self._iterators()]
        self.watch.generators = self._generators()
        states = [g.get_state() for g in self.watch.generators]
        try:
            self.watch.seed()
            self.made.graph = compat.trace_step(self._traced, self.made.inputs, self.made.mode, self.watch)
            if self.watch.refused is not None:  # and the step, or a logger, has caught the error
                raise self.watch.refused
            _refuse_changes(self.snapshot, self.stand_ins)
        except Exception as error:
            _explain(error, self.watch.refused)
            raise
        finally:
            for generator, seeded in zip(self.watch.generators, states, strict=True):
                generator.set_state(seeded)
            self.snapshot.restore()
        self._refuse_constants()
        self._refuse_writes()
        name = outside.difference(self._outside())
        if name is not None:
            raise StepError(
                f"the step changes '{name}', a Python value outside of it. A captured step runs its Python "
                "only once: return what changes, or change it outside of the step."
            )
        if [_passed(x) for x in self._iterators()] != passed:
            raise StepError(
                "the step takes from an iterator that an object holds, which a captured step would not do "
                "again. Take from it outside, and pass what it gave."
            )
        if _random_states(theirs) != drawn:
            raise StepError(
                "the step draws numbers from Python's or numpy's generator, which a captured step would not "
                "draw again. Draw them outside and pass them as tensors, or use torch's generator."
            )
        self.made.policies = self.watch.policies
        self.made.lasts = not self.made.new_moments
        return self.made

    def _python_generators(self) -> list[Any]:
        """Random generators of Python's and numpy's that the step can reach, beside those of the modules."""
        numpy = sys.modules.get("numpy")
        kinds: tuple[type, ...] = (random.Random,)
        if numpy is not None:
            kinds += (numpy.random.Generator, numpy.random.RandomState)
        found = {id(x): x for x in self._reachable() if isinstance(x, kinds)}
        return [x for x in found.values() if not isinstance(x, random.SystemRandom)]

    def _iterators(self) -> list[Any]:
        return [x for x in self._reachable() if isinstance(x, Iterator) and not isinstance(x, io.IOBase)]

    def _reachable(self) -> Iterator[Any]:
        yield from self.leaves
        for record in self.snapshot.records:
            yield from record.saved.values()

    def _generators(self) -> list[torch.Generator]:
        """Those that torch draws from unless it is given another, and those that the step is given."""
        ours = [torch.default_generator]
        if torch.cuda.is_initialized():
            ours += torch.cuda.default_generators
        given = [*self.leaves, *named_objects(self.function).values()]
        return [*ours, *(x for x in given if isinstance(x, torch.Generator))]

    def _outside(self) -> Surroundings:
        return Surroundings(step_roots(self.function, self.leaves))

    def _traced(self, *flat: Any) -> list[Any]:
        state, given, shown = self.state, iter(flat), self.layout.shown
        leaves = [next(given) for _ in state.parameters]
        specs = map(self.layout.spec, state.parameters)
        parameters = list(map(captured_parameter, state.parameters, leaves, specs))
        gradients_given = []
        for old, new in zip(state.gradients(), parameters, strict=True):
            if old is not None:
                new.grad = shown(old, next(given))
                gradients_given.append(new.grad)
        self.given.update(map(id, gradients_given))
        buffers = [next(given) for _ in state.buffers]
        moments = [shown(m.tensor, next(given)) for m in state.moments]
        rates = [next(given) for _ in state.rates()]
        tensors = [shown(x, next(given)) for x in self.tensors]
        self.watch.owners = {id(x): p for x, p in zip(leaves, parameters, strict=True)}
        own = zip(state.tensors(), [*parameters, *gradients_given, *buffers, *moments], strict=True)
        self.stand_ins |= {id(real): fake for real, fake in own}
        given_tensors = zip(self.tensors, tensors, strict=True)
        tensors = [self.stand_ins.setdefault(id(x), fake) for x, fake in given_tensors]
        with state.holding(parameters, buffers, moments, rates):
            _refuse_sets(self.snapshot, self.stand_ins)
            self.snapshot.stand_in(self.stand_ins)
            args, kwargs = self._arguments()
            containers = Snapshot(named_arguments(self.function, (args, kwargs)), objects=False)
            settings = [hyperparameters(g, state.fixed) for g in state.groups]
            kept = _optimizer_states(state)
            written = [(r, compat.times_written(r)) for r in rates]
            with self.watch.of(state):
                result = self.function(*args, **kwargs)
                self.watch.refuse_seeds("in its last lines")
            _refuse_settings(settings, written, state, self.watch.stale)
            for leaf, parameter in zip(leaves, parameters, strict=True):
                if leaf is not parameter and leaf.grad is not None:
                    raise StepError("the step calls torch.autograd.backward; call loss.backward()")
            _refuse_replaced(state, parameters)
            _refuse_changes(containers, {})
            made: list[Tensor] = []
            known = {id(x): Result("buffer", i) for i, x in enumerate(buffers)}
            known |= {id(x): Result("batch", i) for i, x in enumerate(tensors)}
            known |= {id(x): Result("rate", i) for i, x in enumerate(rates)}
            self._results(result, parameters, known, made)
            self._gradients(parameters, made)
            self._moments(parameters, moments, kept, made)
            self._buffers(buffers, made)
        return made

    def _arguments(self) -> Any:
        return tree_unflatten([self.stand_ins.get(id(x), x) for x in self.leaves], self.structure)

    def _results(
        self, result: Any, parameters: Sequence[Any], known: dict[int, Result], made: list[Tensor]
    ) -> None:
        known |= {id(p): Result("parameter", i) for i, p in enumerate(parameters)}
        known |= {id(p.grad): Result("gradient", i) for i, p in enumerate(parameters) if p.grad is not None}
        leaves, self.made.structure = tree_flatten(result)
        for leaf in leaves:
            found = known.get(id(leaf))
            if id(leaf) in self.watch.stale:
                self.watch.refuse_stale_rate("among its results")
            if found is None and isinstance(leaf, Tensor):
                found = Result("tensor")
                made.append(self._output(leaf))
            elif found is None:
                _refuse_result(leaf)
                leaf = _as_number(leaf)
                found = Result("constant", leaf)
            self.made.results.append(found)

    def _gradients(self, parameters: Sequence[Any], made: list[Tensor]) -> None:
        for i, parameter in enumerate(parameters):
            if parameter.grad is None:
                self.made.without_gradient.append(i)
            elif id(parameter.grad) not in self.given:
                self.made.new_gradients.append(i)
                made.append(self._output(parameter.grad))

    def _moments(
        self, parameters: Sequence[Any], moments: Sequence[Any], before: dict[Any, Any], made: list[Tensor]
    ) -> None:
        number = {id(p): i for i, p in enumerate(parameters)}
        known = set(map(id, moments))
        for o, optimizer in enumerate(self.state.roots.optimizers):
            kind = type(optimizer).__name__
            for parameter, values in optimizer.state.items():
                if id(parameter) not in number:
                    raise StepError(
                        f"{kind} keeps state that belongs to no parameter (state[{parameter!r}]), which a "
                        "captured step does not carry on. Keep it with the parameters."
                    )
                old = before.get((o, id(parameter)), {})
                for key, value in values.items():
                    if isinstance(value, Tensor):
                        if id(value) not in known:
                            whole = value.numel() * value.element_size() if value.dim() else 0
                            self.made.new_moments.append(NewMoment(o, number[id(parameter)], key, whole))
                            made.append(self._output(value))
                    elif value is not old.get(key):
                        raise StepError(
                            f"{kind} keeps '{key}' in its state as a {type(value).__name__} and changes it, "
                            "which a captured step would do only once. Make it a tensor (as torch's own "
                            "optimizers do with capturable=True), or use another optimizer."
                        )

    def _buffers(self, buffers: Sequence[Any], made: list[Tensor]) -> None:
        for i, (places, buffer) in enumerate(zip(self.state.buffer_places, buffers, strict=True)):
            holder, key = places[0]
            if holder[key] is not buffer:
                self.made.new_buffers.append(i)
                made.append(self._output(holder[key]))

    def _output(self, value: Tensor) -> Tensor:
        self.made.specs.append(compat.specification(value) if isinstance(value, DTensor) else None)
        return local_part(value)

    # --- what could not be done again ---------------------------------------------------------------

    def _refuse_constants(self) -> None:
        """Tensors that are no input; numbers written in the program are copied before they are used."""
        graph = self.made.graph
        for node in graph.graph.nodes:
            if node.op == "call_function" and compat.is_eager_collective(node.target):
                raise StepError(
                    f"the step calls a collective of torch.distributed: {where(node)}. A program cannot put "
                    "in order what such a call writes. Call it outside, on what the step returns."
                )
            value = getattr(graph, node.target, None) if node.op == "get_attr" else None
            if isinstance(value, Tensor) and not all(compat.copies_literal(u.target) for u in node.users):
                reader = next(iter(node.users))
                raise StepError(
                    f"the step uses a tensor of shape {tuple(value.shape)} that it is not given "
                    f"({where(reader)}){self._origin(value)}"
                )

    def _origin(self, value: Tensor) -> str:
        """Where a tensor comes from that is no input, and what to do about it."""

        def same(x: Any) -> bool:
            return isinstance(x, Tensor) and memory_of(local_part(x)) == memory_of(local_part(value))

        if isinstance(value, compat.FakeTensor):
            return (
                ": it was computed where nothing is written down, by torch.autograd.backward (call "
                "loss.backward() instead), or in code that hides from torch what it does."
            )
        for optimizer in self.state.roots.optimizers:
            name = next((k for k, v in vars(optimizer).items() if same(v)), None)
            if name is not None:
                kind = type(optimizer).__name__
                return f": '{name}', an attribute of {kind}. Keep it in the optimizer's state of a parameter."
        record, key = self.snapshot.find(same) or (None, None)
        if record is None:
            return (
                ". Pass it, or the model it belongs to, as an argument: by itself, or in a list, tuple or "
                "dict (of another mapping, pass dict(batch))."
            )
        if isinstance(record.owner, torch.nn.Module):
            kind, name = type(record.owner).__name__, key if record.holder is record.owner else record.name
            return f": '{name}', an attribute of a {kind}. Make it a buffer there (register_buffer)."
        if isinstance(record.holder, (CellType, Globals)):
            return f": '{key}', which stands around it. Pass it as an argument."
        name = record.name if isinstance(record.holder, (list, dict, set, deque)) else f"{record.name}.{key}"
        return f": '{name}'. Pass it by itself, or in a list, tuple or dict."

    def _refuse_writes(self) -> None:
        """Writes that would be lost, or that another input should see."""
        graph, names = self.made.graph, self.made.names
        nodes = graph.graph.find_nodes(op="placeholder")
        gathers = [n for n in graph.graph.nodes if n.target in (dialect.unshard, dialect.replica)]
        for read, writer in writers(graph, gathers).items():
            name = names.get(nodes.index(read.args[0]), "")
            raise StepError(
                f"the step writes into the weight '{name}' as its module's attribute: {where(writer)}. With "
                "several ranks the attribute is a gathered copy, and the write would be lost. Write into the "
                "parameter itself, from model.parameters() or named_parameters()."
            )
        written, places = writers(graph, nodes), dict[int, int]()
        real = program_inputs(self.state, self.tensors)
        for i, x in enumerate(real):
            first = places.setdefault(memory_of(x), i)
            by = written.get(nodes[i]) or written.get(nodes[first])
            if real[first] is not x and by is not None:
                one, other = (names.get(k) or f"a tensor of shape {tuple(real[k].shape)}" for k in (first, i))
                raise StepError(
                    f"the step writes into memory that two of its tensors share, {one} and {other}: "
                    f"{where(by)}. To a captured step each is memory of its own. Give it a copy of one "
                    "(clone()), or the same tensor object twice."
                )


def program_inputs(
    state: State, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """What a program takes: see the module's text for the order. ``gradients`` are the state's, if known."""
    gradients = state.gradients() if gradients is None else gradients
    parameters, moments = state.kept_parts
    return [
        *parameters,
        *(local_part(g) for g in gradients if g is not None),
        *state.buffers,
        *moments,
        *state.rates(),
        *map(local_part, tensors),
    ]


def _given(state: State, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a program takes the parts of."""
    held = [g for g in state.gradients() if g is not None]
    moments = [m.tensor for m in state.moments]
    return [*state.parameters, *held, *state.buffers, *moments, *state.rates(), *tensors]


def _names(state: State) -> dict[int, str]:
    held = [n for n, g in zip(state.names, state.gradients(), strict=True) if g is not None]
    names = [*state.names, *(f"{n}.grad" for n in held), *[""] * len(state.buffers)]
    names += [f"{state.names[m.parameter]}.{m.key}" for m in state.moments]
    return {i: n for i, n in enumerate(names) if n}


def _known_moments(state: State, first: int) -> list[KnownMoment]:
    """Numbers have no bytes: they stay where they are."""
    return [
        KnownMoment(
            f"{state.names[m.parameter]}.{m.key}", first + i,
            m.tensor.numel() * m.tensor.element_size() if m.tensor.dim() else 0,
            state.is_on_host(m),
        )
        for i, m in enumerate(state.moments)
    ]  # fmt: skip


# --- while the step runs ---------------------------------------------------------------------------


_SEED = 0x5EED_0F_A_57E9  # and what follows: not a user's


class Watch(TorchFunctionMode):
    """Sees every call of torch that the step makes.

    ``owners`` maps the id of a leaf (what the program differentiates for) to its parameter; ``policies`` are
    those of selective checkpoints, by number. ``replaced`` has the names of parameters with stand-ins by id,
    ``stale`` the learning rates that a scheduler would have changed. ``refused`` is the first refusal, which
    the step's own code may have caught.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[int, Any] = {}
        self.policies: dict[int, Any] = {}
        self.regions: dict[int, tuple[int, Any]] = {}
        self.rescheduled = False
        self.generators: list[torch.Generator] = []
        self.seeded = _SEED
        self.replaced: dict[int, str] = {}
        self.stale: dict[int, Tensor] = {}
        self.refused: StepError | None = None
        self.seen: Node | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        try:
            self.refuse_seeds()
            self._refuse_use(func, given)
            result = self._called(func, types, args, kwargs, given)
        except Exception as error:
            if isinstance(error, StepError) or compat.needs_data(error):
                self.refused = self.refused or _refusal(error)
            raise
        if func in _SETS_REQUIRES_GRAD and hasattr(args[0], "_autodist_leaf"):
            args[0]._autodist_leaf.requires_grad_(args[0].requires_grad)
        self._describe()
        self.seed()
        return result

    def seed(self) -> None:
        """Seed generators with another number at every call of torch: what sets one, or puts it back to what
        it was, is seen. Without data nothing is drawn from them."""
        self.seeded += 1
        for generator in self.generators:
            generator.manual_seed(self.seeded)

    def refuse_seeds(self, place: str = "") -> None:
        """Refuse a generator that the step has set since :meth:`seed`."""
        if any(g.initial_seed() != self.seeded for g in self.generators):
            raise StepError(
                "the step seeds one of torch's random generators, or puts its state back (fork_rng), "
                f"{place or 'before ' + line_of_user()}. A captured step runs its Python only once, so later "
                "runs would draw other numbers. Seed outside of the step."
            )

    def _called(
        self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Any]
    ) -> Any:
        if func is Tensor.backward:
            return self.backward(*args, **kwargs)
        if func == _DATA.__get__:
            return self.__torch_function__(Tensor.detach, types, args)
        if func in _REFUSED:
            raise StepError(f"{_REFUSED[func]}: {line_of_user()}")
        if any(isinstance(x, DTensor) for x in given):
            if _is_followed(func, (args, kwargs)):
                args, kwargs = tree_map(_whole, (args, kwargs))
                return func(*args, **kwargs)
            with compat.recording_below_autograd():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _refuse_use(self, func: Any, given: Sequence[Any]) -> None:
        real = next((self.replaced[id(x)] for x in given if id(x) in self.replaced), None)
        if real is not None:
            selves = (f.f_locals.get("self") for f in compat.python_frames())
            optimizer = next((x for x in selves if isinstance(x, torch.optim.Optimizer)), None)
            if optimizer is not None:
                raise StepError(
                    f"the step calls a {type(optimizer).__name__} that it neither is given nor names: "
                    f"{line_of_user()}. Pass the optimizer as an argument."
                )
            raise StepError(
                f"the step reaches the parameter '{real}' through an object that is not looked into: "
                f"{line_of_user()}. Take it from the model, or pass it in a list, tuple or dict."
            )
        if any(id(x) in self.stale for x in given):
            self.refuse_stale_rate(line_of_user())
        if any(isinstance(x, Tensor) and compat.is_transformed(x) for x in given):
            raise StepError(
                f"the step goes through a transform of torch.func (vmap, grad, jvp): {line_of_user()}. It "
                "cannot be written down. Compute with whole batches, and call loss.backward()."
            )
        if func in _OF_PARAMETERS and hasattr(given[0], "_autodist_gathered"):
            raise StepError(
                f"the step uses {_OF_PARAMETERS[func]} of a weight that it reads as its module's attribute: "
                f"{line_of_user()}. With several ranks the attribute is a gathered copy, without a gradient. "
                "Take the parameter itself from model.parameters() or named_parameters()."
            )

    def refuse_stale_rate(self, line: str) -> None:
        raise StepError(
            f"the step uses a learning rate that it has read after the scheduler's step: {line}. Schedulers "
            "are called after each run, so read it before scheduler.step(), or after the step."
        )

    @contextlib.contextmanager
    def of(self, state: State) -> Iterator[None]:
        """Within, see the steps of optimizers, and what is done to the parameters that have stand-ins."""
        handles = [o.register_step_pre_hook(self._refuse_late_step) for o in state.roots.optimizers]
        self.replaced = {id(p): n for p, n in zip(state.parameters, state.names, strict=True)}
        try:
            yield
        finally:
            self.replaced = {}
            for handle in handles:
                handle.remove()

    def _refuse_late_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.rescheduled:
            raise StepError(
                f"{type(optimizer).__name__} steps after the scheduler has: {line_of_user()}. Schedulers are "
                "called after each run, so call optimizer.step() first."
            )

    def backward(
        self, loss: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False,
        inputs: Any = None,
    ) -> None:  # fmt: skip
        """Write ``gradients`` down, and add what it gives to the parameters' gradients, as autograd would."""
        if create_graph or gradient is not None or inputs is not None or loss.numel() != 1:
            raise StepError(
                f"backward is called with arguments or on a tensor of shape {tuple(loss.shape)}: "
                f"{line_of_user()}. A step differentiates numbers: loss.backward()."
            )
        leaves = self._leaves(loss)
        with torch.no_grad():
            for leaf, found in zip(leaves, gradients(loss, leaves), strict=True):
                owner = self.owners.get(id(leaf), leaf)
                with compat.recording_below_autograd():
                    found = _AS_THEY_ARE.shown(owner, found)
                    if owner.grad is None:
                        owner.grad = found
                    else:
                        owner.grad.add_(found)

    def _leaves(self, loss: Tensor) -> list[Tensor]:
        """What the loss depends on and gradients are kept for; parameters first, in their order."""
        if loss.grad_fn is None:
            raise StepError(f"backward is called on a tensor that depends on no parameter: {line_of_user()}")
        found: dict[int, Tensor] = {}
        seen: set[Any] = set()
        frontier: list[Any] = [loss.grad_fn]
        while frontier:
            node = frontier.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if compat.is_python_gradient(node):
                raise StepError(
                    f"the loss goes through {type(node).__name__}, a torch.autograd.Function (a module's "
                    "backward hook is one too): its backward is Python that a captured step does not run. "
                    "Write it in operators that autograd knows, or as a torch.library.custom_op."
                )
            variable = getattr(node, "variable", None)
            if variable is not None:
                found[id(variable)] = variable
            frontier += [n for n, _ in node.next_functions]
        order = {leaf: i for i, leaf in enumerate(self.owners)}
        return sorted(found.values(), key=lambda x: order.get(id(x), len(order)))

    def _describe(self) -> None:
        """Tell the nodes just written down which line and which checkpoint they come from."""
        graph = compat.recorded_graph()
        if graph is None:
            return
        fresh = []
        for node in reversed(graph.nodes):
            if node is self.seen:
                break
            fresh.append(node)
        if not fresh:
            return
        self.seen = fresh[0]
        tags = self._tags()
        trace = stack_of_user()
        for node in fresh:
            node.meta |= tags
            node.meta.setdefault("stack_trace", trace)

    def _tags(self) -> dict[str, Any]:
        region, policy = compat.checkpoint_running()
        if region is None:
            return {}
        number, _ = self.regions.setdefault(id(region), (len(self.regions) + 1, region))
        if policy is not None:
            self.policies[number] = policy
        return compat.checkpoint_tags(number)


def _is_followed(func: Any, arguments: Any) -> bool:
    """Whether autograd follows a call: it computes with a parameter, or with what was computed of one."""
    if not torch.is_grad_enabled() or func in _ON_SHARDS:
        return False
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__") and func not in _VIEWS:
        return False
    if name.endswith("_") and not name.endswith("__"):  # in place: what a parameter is left with
        return False
    tensors = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
    return any(x.requires_grad and (is_captured(x) or not isinstance(x, DTensor)) for x in tensors)


def _whole(value: Any) -> Any:
    """A DTensor's whole value; of a parameter, differentiable with respect to it."""
    if not isinstance(value, DTensor):
        return value
    if is_captured(value):
        return unshard(value)
    with compat.recording_below_autograd():
        return value.full_tensor()


_VIEWS = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
_ON_SHARDS = {
    Tensor.detach, Tensor.size, Tensor.stride, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.new_zeros,
    Tensor.new_ones, Tensor.new_empty, Tensor.new_full, torch.zeros_like, torch.ones_like, torch.empty_like,
    torch.full_like, torch.rand_like, torch.randn_like,
}  # fmt: skip
"""What says nothing of a parameter's value that a gradient would go through."""

_DATA, _GRAD, _REQUIRES_GRAD = (getattr(Tensor, n) for n in ("data", "grad", "requires_grad"))
_OF_PARAMETERS = {
    _GRAD.__get__: "the gradient",
    _GRAD.__set__: "the gradient",
    Tensor.requires_grad_: "requires_grad",
    _REQUIRES_GRAD.__set__: "requires_grad",
}
_SETS_REQUIRES_GRAD = (Tensor.requires_grad_, _REQUIRES_GRAD.__set__)
_REFUSED = {
    _DATA.__set__: "the step sets .data of a tensor; write into it instead, p.data.copy_(value)",
    Tensor.__format__: "the step formats a tensor, which has no value while captured; return it instead",
    Tensor.numpy: "the step makes an array of a tensor, which has no value while captured; return it instead",
    Tensor.__array__: "the step makes an array of a tensor, which has no value yet; return it instead",
    torch.autograd.grad: "the step calls torch.autograd.grad, whose results may be differentiated again",
    Tensor.register_hook: "the step registers a hook on a value, which would run only while it is captured",
    Tensor.retain_grad: "the step retains the gradient of a value that is no parameter",
    Tensor.__repr__: "the step prints a tensor, which has no value while it is captured; return it instead",
}


class Later:
    """Stands for a scheduler among a step's arguments: its ``step`` is called after each run."""

    def __init__(self, scheduler: Any, calls: list[Call], watch: Watch) -> None:
        self._scheduler, self._calls, self._watch = scheduler, calls, watch

    def step(self, *args: Any, **kwargs: Any) -> None:
        if any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs))):
            raise StepError(
                f"{type(self._scheduler).__name__}.step is given a tensor, whose value it needs: "
                f"{line_of_user()}. Return it from the step and call the scheduler then."
            )
        self._watch.rescheduled = True
        for group in self._scheduler.optimizer.param_groups:
            if isinstance(group.get("lr"), Tensor):
                group["lr"] = group["lr"].detach()
                self._watch.stale[id(group["lr"])] = group["lr"]
        self._calls.append(Call(self._scheduler, args, kwargs))

    def get_last_lr(self) -> list[Any]:
        if self._watch.rescheduled:
            raise StepError(f"get_last_lr is asked for after the scheduler's step: {line_of_user()}")
        return [g["lr"] for g in self._scheduler.optimizer.param_groups]

    def __getattr__(self, name: str) -> Any:
        raise StepError(
            f"the step reads '{name}' of a {type(self._scheduler).__name__}, which changes from step to "
            f"step: {line_of_user()}. Inside of a step only step() and get_last_lr() can be used."
        )


# --- where the user's program is -------------------------------------------------------------------


def stack_of_user() -> str:
    """The innermost lines of the program being captured that are neither torch's nor ours."""
    return _formatted([f for f in compat.python_frames() if _is_users(f.f_code.co_filename)][-_FRAMES:])


def line_of_user() -> str:
    return innermost(stack_of_user())


def _is_users(filename: str) -> bool:
    pythons = filename.startswith(_PYTHONS) and not filename.startswith(_INSTALLED)
    return not (pythons or filename.startswith((*_NOT_THE_USERS, "<")))


def _formatted(frames: Sequence[Any]) -> str:
    lines = [(f, f.f_lineno) for f in frames]
    return "".join(traceback.format_list(traceback.StackSummary.extract(iter(lines))))


def _explain(error: Exception, refused: StepError | None) -> None:
    """Raise :class:`StepError` in the place of an error that comes of there being no data: ``refused``, what
    the first such error was given as, where there is one."""
    if isinstance(error, StepError):
        return
    frames = list(traceback.walk_tb(error.__traceback__))
    optimizer = _optimizer_of(frames)
    if optimizer is not None:
        reason = str(error)
        if compat.needs_data(error):
            inside = [(f, n) for f, n in frames if f.f_locals.get("self") is optimizer or _is_optimizers(f)]
            reason = f"it needs the value of a tensor, of which there is none yet ({_place(inside)})"
        refusal = StepError(
            f"{type(optimizer).__name__}.step cannot be captured: {reason}. Use another optimizer, or call "
            "its step outside, after a backward through a model compiled with backend='autodist'."
        )
        refusal.optimizer = optimizer if compat.needs_data(error) else None
        raise refusal from error
    if compat.needs_data(error):
        line = _place([(f, n) for f, n in frames if _is_users(f.f_code.co_filename)])
        raise (refused or _needs_value(line)) from error


def _place(frames: Sequence[tuple[Any, int]]) -> str:
    lines = traceback.format_list(traceback.StackSummary.extract(iter(frames[-1:])))
    return innermost("".join(lines))


def _needs_value(line: str) -> StepError:
    return StepError(
        f"the step needs the value of a tensor: {line}. It is captured once, without data, so it cannot "
        "branch on a tensor, take a number out of one or print one. Use torch.where, pass a number (each "
        "makes a program of its own), or return the tensor and look at it after the step."
    )


def _refusal(error: Exception) -> StepError:
    """What to say of an error of the call of torch that is being made."""
    if isinstance(error, StepError):
        return error
    selves = (f.f_locals.get("self") for f in compat.python_frames())
    if any(isinstance(x, AveragedModel) for x in selves):
        return StepError(
            f"the step averages with an AveragedModel, which looks at how often it has: {line_of_user()}. "
            "Call update_parameters after the step, or write the average with operators, under "
            "torch.no_grad(): a.lerp_(p, 0.1) for a, p in zip(average.parameters(), model.parameters())."
        )
    return _needs_value(line_of_user())


def _is_optimizers(frame: Any) -> bool:
    return f"optim{os.sep}" in frame.f_code.co_filename


def _optimizer_of(frames: Sequence[tuple[Any, int]]) -> torch.optim.Optimizer | None:
    """The optimizer in whose code an error arose."""
    inside = [f.f_locals.get("self") for f, _ in frames if _is_optimizers(f)]
    return next((x for x in inside if isinstance(x, torch.optim.Optimizer)), None)


def _refuse_inputs(state: State, tensors: Sequence[Tensor], leaves: Sequence[Any]) -> None:
    for optimizer in state.roots.optimizers:
        if any(g.get("differentiable") for g in optimizer.param_groups):
            raise StepError(
                f"{type(optimizer).__name__} was made with differentiable=True, but a captured step does not "
                "differentiate through an update. Leave it out."
            )
    for tensor in tensors:
        if tensor.is_inference():
            raise StepError(
                f"an argument of shape {tuple(tensor.shape)} was made under torch.inference_mode(), and "
                "autograd does not take it. Make it under torch.no_grad(), or pass a copy (clone())."
            )
        if tensor.requires_grad and not any(tensor is p for p in state.parameters):
            raise StepError(
                f"an argument of shape {tuple(tensor.shape)} requires a gradient; a step gives gradients to "
                "parameters. Pass it detached, or make it a parameter."
            )
    for leaf in leaves:
        if isinstance(leaf, torch.amp.GradScaler):
            raise StepError(
                "a GradScaler looks at gradients to decide whether to step, which a captured step cannot. "
                'Train in bfloat16, which needs none: precision="bf16" in the plan, or torch.autocast.'
            )
    for name, parameter in zip(state.names, state.parameters, strict=True):
        if compat.has_gradient_hooks(parameter, as_stage_gradient):
            raise StepError(f"'{name}' has a gradient hook, which a captured step would not run; remove it.")


def _as_number(leaf: Any) -> Any:
    """A size that is returned, as the number that it is in this program, which holds for that size alone."""
    kinds = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
    return kinds[type(leaf)](leaf) if type(leaf) in kinds else leaf


def _refuse_settings(
    before: Sequence[dict[str, Any]], rates: Sequence[tuple[Tensor, int]], state: State,
    stale: dict[int, Tensor],
) -> None:  # fmt: skip
    """``rates`` are the learning rates and how often each had been written into."""
    left = iter(rates)
    for old, group in zip(before, state.groups, strict=True):
        now = hyperparameters(group, state.fixed)
        changed = [k for k, v in now.items() if k not in old or not _kept(old[k], v)]
        if "lr" in group and "lr" not in old:
            rate, written = next(left)
            kept = group["lr"] is rate or id(group["lr"]) in stale
            changed += [] if kept and compat.times_written(rate) == written else ["lr"]
        if changed:
            raise StepError(
                f"the step changes '{changed[0]}' of a parameter group, which a captured step would not do "
                "again. Pass a scheduler to the step, or change the group outside of it."
            )


def _kept(before: Any, now: Any) -> bool:
    """Whether a setting is what it was; tensors have values that are not known."""
    return before is now or (not isinstance(now, Tensor) and bool(before == now))


def _optimizer_states(state: State) -> dict[tuple[int, int], dict[Any, Any]]:
    """What optimizers keep for parameters now, by the optimizer's number and the parameter's id."""
    optimizers = enumerate(state.roots.optimizers)
    return {(i, id(p)): dict(values) for i, o in optimizers for p, values in o.state.items()}


def _refuse_replaced(state: State, parameters: Sequence[Tensor]) -> None:
    for name, real, places, parameter in zip(
        state.names, state.parameters, state.places, parameters, strict=True
    ):
        if any(holder.get(key) is not parameter for holder, key in places):
            raise StepError(
                f"the step replaces or deletes '{name}', a parameter, which a captured step would not do "
                "again. Write new values into it (copy_, under torch.no_grad()), or replace it outside."
            )
        if parameter.requires_grad != real.requires_grad:
            raise StepError(
                f"the step sets requires_grad of '{name}', and leaves it so; a captured step would not do "
                "that again. Set it outside of the step, or set it back at the step's end."
            )


def _refuse_sets(snapshot: Snapshot, stand_ins: dict[int, Any]) -> None:
    """A set of tensors has another order on each rank, and so would what is done to them."""
    for record in snapshot.records:
        stands = [stand_ins.get(i) for i in record.saved] if isinstance(record.holder, set) else []
        if sum(isinstance(x, DTensor) for x in stands) > 1:
            raise StepError(
                f"'{record.name}' holds sharded parameters in a set, whose order differs from rank to rank. "
                "Use a list, or dict.fromkeys(parameters), which keep their order."
            )


def _refuse_changes(snapshot: Snapshot, stand_ins: dict[int, Any]) -> None:
    found = snapshot.changed(stand_ins)
    if found is not None:
        what, remedy = _change(*found)
        raise StepError(f"the step changes {what}. A captured step runs its Python only once. {remedy}")


def _change(record: Record, key: Any) -> tuple[str, str]:
    """What a step has changed, and what to do instead."""
    holder, owner, outside = record.holder, record.owner, "Change it outside of the step."
    name = f"'{key}'" if isinstance(key, str) else f"element {key}" if isinstance(key, int) else "an element"
    kind = type(owner).__name__
    if isinstance(holder, Scheduler):
        remedy = "Pass it to the step, which then calls it after each run; or call it after the step."
        return f"a {kind} that is not one of its arguments", remedy
    if isinstance(owner, torch.nn.Module):
        registry = next((k for k in REGISTRIES if vars(owner).get(k) is holder), None)
        if registry == "_buffers" and record.saved.get(key) is None:
            remedy = f"Give {name} a tensor of the right shape when it is registered (register_buffer)."
            return f"{name}, a buffer of a {kind} that is None", remedy
        if registry is not None:
            name = name if isinstance(key, str) else "an entry"
            return f"{name} in the {registry.strip('_').replace('_', ' ')} of a {kind}", outside
        if holder is owner:
            remedy = "Keep what changes in a buffer (register_buffer), or change it outside of the step."
            return f"{name}, a Python value of a {kind}", remedy
    if isinstance(holder, (list, dict, set, deque)):
        remedy = "Leave it as it is: return what is new, or make a copy and change that (dict(batch))."
        return f"{name} of the {type(holder).__name__} '{record.name}'", remedy
    whole = key if isinstance(holder, (CellType, Globals)) else f"{record.name}.{key}"
    return f"'{whole}', a Python value outside of it", "Return what changes, or change it outside."


def _refuse_iterators(
    function: Callable[..., Any], arguments: tuple[tuple[Any, ...], dict[str, Any]]
) -> None:
    names = iterators({**outer_names(function), **named_arguments(function, arguments)})
    if names:
        raise StepError(
            f"the step takes from '{names[0]}', an iterator, which a captured step would do only once. Call "
            "next() outside of the step and pass what it gives."
        )


def _random_states(generators: Sequence[Any]) -> list[Any]:
    """The states of ``generators``, and of those of Python's and numpy's modules."""
    numpy = sys.modules.get("numpy")
    theirs = [] if numpy is None else list(map(str, numpy.random.get_state()))
    return [random.getstate(), theirs, *map(_random_state, generators)]


def _random_state(generator: Any) -> str:
    if isinstance(generator, random.Random):
        return str(generator.getstate())
    if hasattr(generator, "bit_generator"):
        return str(generator.bit_generator.state)
    return str(list(map(str, generator.get_state())))


def _passed(iterator: Any) -> Any:
    """What tells whether something has been taken from ``iterator``, as far as one can tell."""
    if isinstance(iterator, GeneratorType):
        return None if iterator.gi_frame is None else iterator.gi_frame.f_lasti
    if isinstance(iterator, itertools.count):
        return repr(iterator)
    return operator.length_hint(iterator, -1)


def _refuse_result(leaf: Any) -> None:
    if isinstance(leaf, (Iterator, FunctionType, set)):
        raise StepError(
            f"the step returns a {type(leaf).__name__}, which would be the same one after every call. Return "
            "tensors, numbers, and lists, tuples or dictionaries of them."
        )
    inside = tree_leaves(dict(vars(leaf))) if hasattr(leaf, "__dict__") else []
    if any(isinstance(x, Tensor) for x in inside) and not isinstance(leaf, torch.nn.Module):
        raise StepError(
            f"the step returns a {type(leaf).__name__} that holds tensors. Return tensors, numbers, and "
            "lists, tuples or dictionaries of them."
        )
