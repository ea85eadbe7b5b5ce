"""What lives beside a compiled forward and backward: gradients, and what an optimizer keeps.

An optimizer steps outside of what ``torch.compile`` sees, and makes its state when the program has long been
planned. So it is looked for: one that holds parameters of the shapes and types of the program's. What it will
make is found by letting a copy of it step a parameter of one element, and counting bytes of state a byte of
parameter; of several such optimizers, the one that keeps most counts. Where there is none, or it is not one
of torch's, Adam's two moments are assumed. A captured step (:mod:`autodist.train_step`) knows its state, and
needs none of this.

Gradients count once here and once as results of the backward: a loop that accumulates holds both at once,
and whether it will, cannot be seen when the first batch comes.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from autodist.prepare import optimizers
from autodist.runtime import compat
from autodist.runtime.compat import local_part

_ASSUMED = 2.0  # times the parameters: Adam


@dataclass(frozen=True)
class Resident:
    """``num_bytes`` beside the program, and what was counted."""

    num_bytes: int
    reason: str


def resident_bytes(inputs: Sequence[Any], search: bool) -> Resident:
    """Gradients and optimizer state for this rank's parts of the parameters among ``inputs``.

    Without ``search`` no optimizer is looked for.
    """
    trained = [x for x in inputs if isinstance(x, (nn.Parameter, DTensor)) and x.requires_grad]
    size = sum(compat.size_hint(x.numel()) * x.element_size() for x in map(local_part, trained))
    kinds = Counter(map(_kind, trained))
    found = [o for o in optimizers() if not kinds - Counter(map(_kind, _held(o)))] if search and kinds else []
    known = [(_state(o, kinds), type(o).__name__) for o in found]
    if not known or any(ratio is None for ratio, _ in known):
        whose = f"{known[0][1]}, taken for Adam" if known else "Adam, as no optimizer has been found"
        return Resident(size + int(_ASSUMED * size), f"gradients and the state of {whose}")
    ratio, name = max((ratio, name) for ratio, name in known if ratio is not None)
    return Resident(size + int(ratio * size), f"gradients and the state of {name}")


def _kind(x: Tensor) -> tuple[torch.Size, torch.dtype]:
    return x.shape, x.dtype


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _state(optimizer: Optimizer, kinds: Counter[Any]) -> float | None:
    """Bytes of state a byte of parameter, at the most in any of its groups; None where that is not known."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    groups = [g for g in optimizer.param_groups if any(_kind(p) in kinds for p in g["params"])]
    ratios = [_of_group(optimizer, group) for group in groups]
    return None if None in ratios else max((r for r in ratios if r is not None), default=0.0)


def _of_group(optimizer: Optimizer, group: dict[str, Any]) -> float | None:
    """Let a copy of ``optimizer`` step a parameter of one element, with the settings of ``group``."""
    like = local_part(group["params"][0])
    probe = nn.Parameter(torch.zeros(1, 1, dtype=like.dtype, device=like.device))
    probe.grad = torch.zeros_like(probe)
    twin = copy.copy(optimizer)
    twin.__dict__ |= {name: OrderedDict() for name in vars(optimizer) if name.endswith("_hooks")}
    twin.state, twin.param_groups = defaultdict(dict), [{**group, "params": [probe]}]
    step = type(optimizer).step
    try:
        getattr(step, "__wrapped__", step)(twin)  # without the hooks that are for every optimizer
    except Exception:  # it needs a closure, or more than one element
        return None
    kept = [x for x in twin.state[probe].values() if isinstance(x, Tensor) and x.dim() > 0]
    return sum(x.nbytes for x in kept) / probe.nbytes


__all__ = ["Resident", "resident_bytes"]
