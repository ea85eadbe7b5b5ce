"""What is counted of an optimizer that a program does not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autodist.resident import resident_bytes

SHAPE = (3, 41)  # no other test's
BYTES = 4 * 3 * 41


class Own(torch.optim.Adam):
    """Not one of torch's."""

    def step(self, closure: Any = None) -> Any:
        raise AssertionError


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
KEEPS: dict[str, tuple[Make, int, str]] = {
    "sgd": (lambda p: torch.optim.SGD(p), 0, "the state of SGD"),
    "momentum": (lambda p: torch.optim.SGD(p, momentum=0.9), 1, "the state of SGD"),
    "adamw": (lambda p: torch.optim.AdamW(p), 2, "the state of AdamW"),
    "amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), 3, "the state of AdamW"),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True), 3, "the state of RMSprop"),
    "one's own": (Own, 2, "Own, taken for Adam"),
    "with a closure": (lambda p: torch.optim.LBFGS(p), 2, "LBFGS, taken for Adam"),
}


@pytest.mark.parametrize("name", KEEPS)
def test_state_is_counted_before_it_is_made(name: str) -> None:
    make, times, reason = KEEPS[name]
    parameter, called = nn.Parameter(torch.ones(SHAPE)), []
    optimizer = make([parameter])
    optimizer.register_step_pre_hook(lambda *_: called.append(1))
    found = resident_bytes([parameter, torch.ones(5)], search=True)
    assert found.num_bytes == (1 + times) * BYTES and reason in found.reason
    assert torch.equal(parameter, torch.ones(SHAPE)) and not optimizer.state and not called


def test_the_one_that_keeps_most_counts() -> None:
    parameter = nn.Parameter(torch.ones(SHAPE))
    optimizers = [torch.optim.SGD([parameter]), torch.optim.Adam([parameter])]
    assert resident_bytes([parameter], search=True).num_bytes == 3 * BYTES
    assert len(optimizers) == 2


def test_without_an_optimizer_adam_is_assumed() -> None:
    parameter, frozen = nn.Parameter(torch.ones(SHAPE)), nn.Parameter(torch.ones(9), requires_grad=False)
    other = torch.optim.SGD([nn.Parameter(torch.ones(43, 3))])
    found = resident_bytes([parameter, frozen], search=True)
    assert found.num_bytes == 3 * BYTES and "no optimizer has been found" in found.reason
    assert resident_bytes([parameter], search=False).num_bytes == 3 * BYTES
    assert other.param_groups
