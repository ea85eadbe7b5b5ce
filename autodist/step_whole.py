"""A step of a pipeline as it was written, run eagerly on whole tensors: what one process would do.

No rank of a pipeline has all parameters, and what it reads of others' cannot be differentiated. So every
rank is given whole copies of parameters, gradients and optimizer state, and runs the function on those; then
it keeps the rows that it has. Gradients are averaged over data-parallel coordinates as they are made, by
hooks on the copies; ranks that share a batch have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autodist.job import Job
from autodist.runtime import compat
from autodist.runtime.compat import local_part, tree_leaves, tree_map
from autodist.runtime.parameters import distribute
from autodist.runtime.stage_parameters import is_here
from autodist.step_changes import Snapshot, named_arguments
from autodist.step_pipeline import of_all_places, places_of_tensor
from autodist.step_state import State, roots_of


def on_whole_tensors(function: Callable[..., Any], job: Job) -> Callable[..., Any]:
    """``function``, run on whole copies; collective."""

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        state = of_all_places(State.of(roots_of(function, leaves)), job)
        known = set(map(id, state.tensors()))
        given = [x for x in leaves if isinstance(x, DTensor) and id(x) not in known]
        copies = _Copies(state, given, job)
        snapshot = Snapshot(named_arguments(function, (args, kwargs)), [function])
        try:
            with state.holding(copies.parameters, state.buffers, copies.moments, state.own_rates(), {}):
                snapshot.stand_in(copies.stand_ins)
                mine, named = tree_map(lambda x: copies.stand_ins.get(id(x), x), (args, kwargs))
                with torch.compiler.set_stance("force_eager"):
                    results = function(*mine, **named)
                kept = [dict(o.state) for o in state.roots.optimizers]
        finally:
            snapshot.restore()
        copies.write_back(kept)
        back = {id(new): old for old, new in copies.pairs}
        return tree_map(lambda x: back.get(id(x), x), results)

    return run


@dataclass
class _Copies:
    """Whole copies of a state's tensors, and of others that a step is ``given``."""

    state: State
    given: Sequence[DTensor]
    job: Job

    def __post_init__(self) -> None:
        state = self.state
        self.parameters = [
            nn.Parameter(self._whole(p, p), requires_grad=p.requires_grad) for p in state.parameters
        ]
        for old, new, real in zip(state.gradients(), self.parameters, state.parameters, strict=True):
            if old is not None:
                new.grad = self._whole(old, real)
            if new.requires_grad and self.job.stages[0].size() > 1:
                new.register_hook(self._averaged)
        self.moments = [self._whole(m.tensor, state.parameters[m.parameter]) for m in state.moments]
        self.others = [self._whole(x, x) for x in self.given]
        self.pairs = [*zip(state.parameters, self.parameters, strict=True)]
        self.pairs += zip(self.given, self.others, strict=True)  # type: ignore[arg-type]
        self.stand_ins = {id(old): new for old, new in self.pairs}

    def _whole(self, x: Tensor, owner: Tensor) -> Tensor:
        """A copy of ``x``, which lies where ``owner`` does."""
        places = places_of_tensor(owner, self.job)
        mine = None
        if self.job.place in places:
            mine = x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()
        value = torch.empty(x.shape, dtype=x.dtype, device=x.device) if mine is None else mine.clone()
        assert self.job.pipeline is not None
        name = compat.mesh_group_name(self.job.pipeline)
        sent = value.to(self.job.device)
        dist.broadcast(sent, compat.group_ranks(name)[min(places)], group=compat.process_group(name))
        return sent.to(value.device)

    def _averaged(self, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=self.job.stages[self.job.place].get_group())
        return total / self.job.stages[0].size()

    def write_back(self, kept: Sequence[dict[Any, dict[Any, Any]]]) -> None:
        """Put this rank's rows of the copies where they belong; ``kept`` are the optimizers' states."""
        with torch.no_grad():
            for old, new in self.pairs:
                if self._is_here(old):
                    local_part(old).copy_(_rows(new, old))
            for old, new in zip(self.state.parameters, self.parameters, strict=True):
                if self._is_here(old):
                    old.grad = None if new.grad is None else self._like(new.grad, old)
            for optimizer, states in zip(self.state.roots.optimizers, kept, strict=True):
                for old, new in zip(self.state.parameters, self.parameters, strict=True):
                    if new in states and self._is_here(old):
                        values = {k: self._like(v, old) for k, v in states[new].items()}
                        optimizer.state[old] = values

    def _is_here(self, x: Tensor) -> bool:
        return not isinstance(x, DTensor) or is_here(x)

    def _like(self, value: Any, parameter: Tensor) -> Any:
        """A gradient, or what an optimizer keeps: sharded as the parameter is, if it has its shape."""
        if not (isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.dim()):
            return value
        if value.shape != parameter.shape:
            return value
        return compat.dtensor_of(_rows(value, parameter), compat.specification(parameter), False)


def _rows(whole: Tensor, of: Tensor) -> Tensor:
    if not isinstance(of, DTensor):
        return whole
    return local_part(distribute(whole.detach(), of.device_mesh, of.placements[0].is_shard()))


__all__ = ["on_whole_tensors"]
