"""One run of a captured training step beside the function as it was written.

Both begin from the same parameters, moments, gradients, buffers and random state; the function runs eagerly
on the sharded model, whose weights are gathered as they are read, or, on a pipeline, on whole copies
(:mod:`autodist.step_whole`). What both leave behind is compared: results, parameters, gradients, buffers,
moments and tensors among the arguments. With ``x`` a tensor, ``r`` its reference and ``d`` what the reference
has changed in it,

    error = |x - r| / max(|r|, 1e-3)

and for parameters and arguments (an average of parameters, say) |x - r| / max(|d|, 1e-3 |r|), because one
that was not stepped at all is nearly right. Squares are summed over ranks.

Invariant: everything is left as it was, the objects that the function changes among it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autodist.job import Job
from autodist.runtime.compat import local_part, tree_leaves
from autodist.runtime.outputs import WithheldOutput
from autodist.step_changes import Snapshot, named_arguments
from autodist.step_state import State, roots_of
from autodist.step_whole import on_whole_tensors
from autodist.verify import Row


@dataclass(frozen=True)
class StepReport:
    """What :meth:`autodist.train_step.TrainStep.verify` found; ``rows`` has the worst tensors first.

    A row's ``kind`` is "result", "parameter", "gradient", "buffer", "argument" or the name of a moment.
    Parameters of the same name, of two models, are numbered.
    """

    passed: bool
    tolerance: float
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        if self.passed:
            return f"passed: the step does what the function does, within {self.tolerance:g}"
        wrong = [r for r in self.rows if not r.error <= self.tolerance]
        others = f", and {len(wrong) - 1} more are wrong" if len(wrong) > 1 else ""
        return (
            f"FAILED: the captured step does not do what the function does. The {wrong[0].kind} "
            f"'{wrong[0].name}' is off by {wrong[0].error:.1e}{others}; {self.tolerance:g} is allowed."
        )


Tensors = dict[tuple[str, str], Tensor]


def verify_step(
    captured: Callable[..., Any],
    function: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    tolerance: float,
    job: Job,
) -> StepReport:
    """Compare ``captured`` with ``function`` on ``arguments`` (positional, keyword), which ranks of a
    pipeline run on whole tensors."""
    args, kwargs = arguments
    leaves = tree_leaves(arguments)
    state = State.of(roots_of(function, leaves))
    own = set(map(id, state.tensors()))
    given = [x for x in leaves if isinstance(x, Tensor) and id(x) not in own]
    snapshot = Snapshot(named_arguments(function, arguments), [function])
    saved = _Saved(state, given)
    before = _tensors(state, given)
    outcomes = []
    reference = function if job.pipeline is None else on_whole_tensors(function, job)
    for run in (reference, captured):
        try:
            with torch.random.fork_rng([]):
                results = run(*args, **kwargs)
            found = _tensors(State.of(state.roots), given)
            kept = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
            withheld = {i for i, x in enumerate(kept) if isinstance(x, WithheldOutput)}
            made = {i: x for i, x in enumerate(kept) if i not in withheld}
            found |= {("result", str(i)): local_part(x.detach()).clone() for i, x in made.items()}
            outcomes.append(found)
        finally:
            snapshot.restore()
            saved.restore()
    wanted, found = outcomes
    for i in withheld:  # by the captured step, which runs last
        wanted.pop(("result", str(i)), None)
    keys = _of_all_ranks({**wanted, **found}, job)
    rows = [_row(k, found.get(k), wanted.get(k), before.get(k)) for k in keys]
    rows.sort(key=lambda r: -r.error)
    return StepReport(all(r.error <= tolerance for r in rows), tolerance, tuple(rows))


def _tensors(state: State, given: Sequence[Tensor]) -> Tensors:
    """Copies of everything that a step may change, by kind and name."""
    found: Tensors = {}
    names = _distinct(state.names)
    for name, parameter in zip(names, state.parameters, strict=True):
        found["parameter", name] = parameter.detach()
        if parameter.grad is not None:
            found["gradient", name] = parameter.grad
    found |= {("buffer", str(i)): b for i, b in enumerate(state.buffers)}
    found |= {(str(m.key), _of_optimizer(names[m.parameter], m.optimizer)): m.tensor for m in state.moments}
    found |= {("argument", str(i)): x.detach() for i, x in enumerate(given)}
    return {k: local_part(v).clone() for k, v in found.items()}


def _of_all_ranks(keys: Collection[tuple[str, str]], job: Job) -> list[tuple[str, str]]:
    """The keys of all ranks, in one order: those of a pipeline have tensors of other names."""
    if job.pipeline is None:
        return list(keys)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, list(keys))
    return sorted({key for one in told for key in one})


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered from the second time on."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _of_optimizer(name: str, number: int) -> str:
    return name if number == 0 else f"{name} (optimizer {number + 1})"


class _Saved:
    """The state and the tensors ``given`` as they are now, to be put back."""

    def __init__(self, state: State, given: Sequence[Tensor]) -> None:
        self.state = state
        live = [local_part(x).detach() for x in (*state.tensors(), *given)]
        self.values = [(x, x.clone()) for x in live]
        self.gradients = [(p, p.grad) for p in state.parameters]
        self.moments = [{p: dict(v) for p, v in o.state.items()} for o in state.roots.optimizers]
        self.settings = [{k: v for k, v in g.items() if k != "params"} for g in state.groups]
        self.schedules = [copy.deepcopy(s.state_dict()) for s in state.roots.schedulers]

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, value in self.values:
                if not torch.equal(tensor, value):  # an expanded tensor, say, cannot be written into
                    tensor.copy_(value)
        for places, buffer in zip(self.state.buffer_places, self.state.buffers, strict=True):
            for holder, key in places:
                holder[key] = buffer
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        for optimizer, held in zip(self.state.roots.optimizers, self.moments, strict=True):
            optimizer.state.clear()
            optimizer.state.update({p: dict(v) for p, v in held.items()})
        for group, settings in zip(self.state.groups, self.settings, strict=True):
            group.update(settings)
        for scheduler, schedule in zip(self.state.roots.schedulers, self.schedules, strict=True):
            scheduler.load_state_dict(copy.deepcopy(schedule))


def _row(
    key: tuple[str, str], found: Tensor | None, wanted: Tensor | None, before: Tensor | None
) -> Row:
    kind, name = key
    either = found if wanted is None else wanted
    nothing = torch.zeros_like(torch.zeros(()) if either is None else either, dtype=torch.double)
    wide = nothing if wanted is None else wanted.double()
    difference = wide - (nothing if found is None else found.double())
    by_change = kind in ("parameter", "argument")
    change = wide - before.double() if by_change and before is not None else wide
    squares = torch.stack([x.square().sum() for x in (difference, change, wide)]).cpu()
    if dist.is_initialized():
        dist.all_reduce(squares)
    off, moved, norm = squares.sqrt().tolist()
    floor = 1e-3 * norm if by_change else 1e-3
    return Row(name, kind, norm, off / max(moved, floor, 1e-12))
