"""What would silently train something else is an error, or works."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autodist
from autodist.runtime.parameters import MixedReadError, MovedParameterError
from tests.parity import full
from tests.ranks import RankFailed, run_ranks

EAGER = {"lowering": "eager"}


class Branches(nn.Module):
    """Two layers; which of them is used is Python's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, ids: torch.Tensor, first: bool = True) -> torch.Tensor:
        x = _eagerly(self.table, ids)
        return (self.one(x) if first else self.two(x)).square().mean()


@torch._dynamo.disable
def _eagerly(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def mixed_reads() -> str:
    model = Branches()
    autodist.prepare(model, EAGER)
    try:
        model(torch.arange(4), first=dist.get_rank() == 0)
    except MixedReadError as error:
        return str(error)
    return ""


def test_ranks_that_read_different_weights_are_stopped() -> None:
    for message in run_ranks(mixed_reads, 2):
        assert re.search(r"reads '(one|two)\.weight' while ranks \[\d\] do something else", message)


def used_before_the_graph() -> str:
    model = Branches()
    compiled = torch.compile(model, backend="autodist", options=EAGER)
    loss = compiled(torch.arange(4))
    try:
        loss.backward()
    except MovedParameterError as error:
        return str(error)
    return ""


def test_a_weight_used_before_the_first_graph_is_not_lost() -> None:
    for message in run_ranks(used_before_the_graph, 2):
        assert "'table.weight' was used eagerly before the first compiled part" in message


def loads_and_copies() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    whole = {n: torch.randn_like(p) for n, p in model.state_dict().items()}
    compiled = torch.compile(model, backend="autodist", options=EAGER)
    x = torch.ones(2, 6)
    compiled(x).sum().backward()
    model.load_state_dict(whole)
    for name, parameter in model.named_parameters():
        assert torch.equal(full(parameter), whole[name]), name
    expected = full(compiled(x))
    average = copy.deepcopy(model)  # as an average of weights is kept
    moved = model.to("cpu")
    torch._dynamo.reset()
    for again in (average, moved):
        got = torch.compile(again, backend="autodist", options=EAGER)(x)
        torch.testing.assert_close(got, expected)


def test_whole_state_loads_and_copies_compile() -> None:
    run_ranks(loads_and_copies, 2)


def a_group_added_later() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    extra = nn.Parameter(torch.ones(5))
    autodist.prepare(model, EAGER)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": [extra]})
    (model(torch.ones(2, 6)) * extra).sum().backward()
    with pytest.raises(autodist.PrepareError, match="whose gradients are this rank's alone"):
        optimizer.step()


def test_a_plain_parameter_added_later_is_refused() -> None:
    run_ranks(a_group_added_later, 2)


class DataBranch(nn.Module):
    """Traced with a graph break: each side is a program of its own, with parameters of equal shape."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.one if x.sum() > 0 else self.two
        return layer(x).square().mean()


def branches(apart_from: int) -> str:
    model = DataBranch()
    autodist.prepare(model, EAGER)
    compiled = torch.compile(model, backend="autodist")
    try:
        for step in range(4):
            apart = step >= apart_from and dist.get_rank() == 1
            sign = -1.0 if (step % 2 == 0) != apart else 1.0
            compiled(sign * torch.ones(2, 6)).backward()
    except Exception as error:
        return str(error)
    return ""


def test_ranks_that_take_different_branches_are_stopped() -> None:
    for apart_from, words in ((0, "do not agree"), (2, "do something else")):
        for message in run_ranks(branches, 2, apart_from):
            assert words in message


def gradients_and_hooks() -> None:
    for prepare_late in ("grad", "hook"):
        model = nn.Sequential(nn.Linear(6, 5))
        if prepare_late == "grad":
            model(torch.ones(2, 6)).sum().backward()
        else:
            model[0].weight.register_hook(lambda grad: grad * 0)
        with pytest.raises(autodist.PrepareError, match=r"'0\.weight' has a gradient"):
            autodist.prepare(model, EAGER)


def test_earlier_gradients_and_hooks_are_refused() -> None:
    run_ranks(gradients_and_hooks, 2)


def lost_writes() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    model[0].weight.no_decay = True
    autodist.prepare(model, EAGER)
    assert dict(model.named_parameters())["0.weight"].no_decay
    weight = model[0].weight
    before = weight.clone()
    assert type(before) is torch.Tensor and type(weight @ weight.t()) is torch.Tensor
    writes: list[Callable[[], object]] = [
        lambda: weight.data.clamp_(-0.01, 0.01),
        lambda: nn.init.zeros_(model[0].weight),
        lambda: weight[0].zero_(),
        lambda: weight.__setitem__(0, 1.0),
        lambda: weight.detach().mul_(2),
        lambda: torch.mul(weight, 2, out=weight),
        lambda: weight.register_hook(print),
        lambda: setattr(weight, "grad", before),
        lambda: setattr(weight, "data", before),
        lambda: setattr(weight, "requires_grad", False),
        lambda: weight.view(-1).requires_grad_(False),
    ]
    for number, write in enumerate(writes):
        with torch.no_grad(), pytest.raises(autodist.LostWriteError, match=r"'0\.weight' is sharded"):
            print(f"write {number} returned {write()}")
    with torch.no_grad():
        weight += 0  # a new name for a new tensor would be wrong as well


def test_writes_into_a_copy_are_refused() -> None:
    with pytest.raises(RankFailed, match=r"LostWriteError: '0\.weight' is sharded"):
        run_ranks(lost_writes, 2)


def a_part_with_its_own_optimizer() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(6, 5)), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    model = Whole()
    model.body = torch.compile(model.body, backend="autodist", options=EAGER)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.body, model.head)]
    model(torch.ones(2, 6)).sum().backward()
    optimizers[0].step()
    with pytest.raises(autodist.PrepareError, match=r"'weight'|'head\.weight' of a Whole"):
        optimizers[1].step()


def test_the_uncompiled_rest_of_a_model_is_refused() -> None:
    run_ranks(a_part_with_its_own_optimizer, 2)
