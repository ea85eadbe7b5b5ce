"""One run of a captured training step beside the function as it was written.

Both begin from the same parameters, moments, gradients, buffers and random state; the function runs eagerly
on the sharded model, whose weights are gathered as they are read. What both leave behind is compared:
results, parameters, gradients, buffers and moments. With ``x`` a tensor, ``r`` its reference and ``d`` what
the reference has changed in it,

    error = |x - r| / max(|r|, 1e-3)        and for parameters  |x - r| / max(|d|, 1e-3 |r|)

because a parameter that was not stepped at all is nearly right. Squares are summed over ranks.

Invariant: everything is left as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autodist.runtime.compat import local_part, tree_leaves
from autodist.step_state import State, roots_of
from autodist.verify import Row


@dataclass(frozen=True)
class StepReport:
    """What :meth:`autodist.train_step.TrainStep.verify` found; ``rows`` has the worst tensors first.

    A row's ``kind`` is "result", "parameter", "gradient", "buffer" or the name of a moment.
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
) -> StepReport:
    """Compare ``captured`` with ``function`` on ``arguments`` (positional, keyword)."""
    args, kwargs = arguments
    state = State.of(roots_of(function, tree_leaves(arguments)))
    saved = _Saved(state)
    before = _tensors(state)
    outcomes = []
    for run in (function, captured):
        with torch.random.fork_rng([]):
            results = run(*args, **kwargs)
        found = _tensors(State.of(state.roots))
        kept = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
        found |= {("result", str(i)): local_part(x.detach()).clone() for i, x in enumerate(kept)}
        outcomes.append(found)
        saved.restore()
    wanted, found = outcomes
    rows = [_row(key, found.get(key), x, before.get(key)) for key, x in wanted.items()]
    rows.sort(key=lambda r: -r.error)
    return StepReport(all(r.error <= tolerance for r in rows), tolerance, tuple(rows))


def _tensors(state: State) -> Tensors:
    """Copies of everything that a step may change, by kind and name."""
    found: Tensors = {}
    for name, parameter in zip(state.names, state.parameters, strict=True):
        found["parameter", name] = parameter.detach()
        if parameter.grad is not None:
            found["gradient", name] = parameter.grad
    found |= {("buffer", str(i)): b for i, b in enumerate(state.buffers)}
    found |= {(str(m.key), state.names[m.parameter]): m.tensor for m in state.moments}
    return {k: local_part(v).clone() for k, v in found.items()}


class _Saved:
    """The state as it is now, to be put back."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.values = [(x, local_part(x).detach().clone()) for x in self._live()]
        self.gradients = [(p, p.grad) for p in state.parameters]
        self.moments = [{p: dict(v) for p, v in o.state.items()} for o in state.roots.optimizers]
        self.settings = [{k: v for k, v in g.items() if k != "params"} for g in state.groups]
        self.schedules = [copy.deepcopy(s.state_dict()) for s in state.roots.schedulers]

    def _live(self) -> list[Tensor]:
        state = self.state
        return [*state.parameters, *state.gradients(), *state.buffers, *(m.tensor for m in state.moments)]

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, value in self.values:
                local_part(tensor).copy_(value)
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


def _row(key: tuple[str, str], found: Tensor | None, wanted: Tensor, before: Tensor | None) -> Row:
    kind, name = key
    wide = wanted.double()
    difference = wide - (torch.zeros_like(wide) if found is None else found.double())
    change = wide - before.double() if kind == "parameter" and before is not None else wide
    squares = torch.stack([x.square().sum() for x in (difference, change, wide)]).cpu()
    if dist.is_initialized():
        dist.all_reduce(squares)
    off, moved, norm = squares.sqrt().tolist()
    floor = 1e-3 * norm if kind == "parameter" else 1e-3
    return Row(name, kind, norm, off / max(moved, floor, 1e-12))
