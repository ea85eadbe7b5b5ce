"""Programs cut into stages: what they compute, where they are cut, and what is refused."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from autodist.passes.analysis.bottleneck import Terms
from autodist.passes.analysis.chain import Chain, Inputs
from autodist.passes.analysis.hardware import hardware
from autodist.passes.analysis.layers import graph_text
from autodist.passes.analysis.stages import Setting, StageError, StagePlan, partition, priced
from autodist.passes.stages import cut
from tests.models import CASES
from tests.staged import Program, assert_same, captured, plan_of, traced

CPU = hardware("cpu")


def in_flight(stage: int, num_stages: int) -> int:
    return num_stages - stage


def setting(microbatches: int = 4, memory: float | None = None, **options: Any) -> Setting:
    return Setting(CPU, Terms(microbatches, in_flight, memory=memory), **options)


# --- what stages compute ---------------------------------------------------------------------------

ROWS, WIDTH = 3, 4
STEPS = ("linear", "add", "tanh", "split", "slice", "turn", "flat", "scale", "mask", "quiet", "detach", "sort",
         "drop", "double", "weights")  # fmt: skip


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Random programs of skips, ties, tuples, views, constants, gradients turned off and random numbers."""
    steps = draw(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 99), st.integers(0, 99)),
                          min_size=2, max_size=14))  # fmt: skip

    def function(*given: Tensor) -> list[Tensor]:
        *weights, table, mask, x = given
        values = [x @ weights[0]]
        for kind, first, second in steps:
            # The last one more often than not, or one from long before.
            a = values[first % len(values)] if first < 30 else values[-1]
            b, w = values[second % len(values)], weights[second % len(weights)]
            if kind == "linear":
                values.append(nn.functional.linear(a, w))
            elif kind == "add":
                values.append(a + b)
            elif kind == "tanh":
                values.append(a.tanh())
            elif kind == "split":
                left, right = a.chunk(2, -1)
                values += [torch.cat([right, left.exp().clamp(max=2)], -1), torch.cat([left, left], -1)]
            elif kind == "slice":
                values.append(a[:, 1:].sum(1, keepdim=True) + a)
            elif kind == "turn":
                values.append((a.t() @ b).t() @ w)
                values[-1] = values[-1][:1] + a
            elif kind == "flat":
                values.append(a.t().reshape(-1)[:ROWS].view(ROWS, 1) * b)
            elif kind == "scale":
                values.append(a * (torch.arange(WIDTH) + table.sum()).cos())
            elif kind == "mask":
                values.append(a.masked_fill(mask > second % 3, 0.5))
            elif kind == "quiet":
                with torch.no_grad():
                    size = a.norm(dim=-1, keepdim=True) + 1
                    shown = size.expand(ROWS, WIDTH)
                values.append(b / size + shown)
            elif kind == "detach":
                values.append(a.detach() * b)
            elif kind == "sort":
                top, places = a.topk(2, -1)
                values.append(torch.cat([top, places.to(a.dtype)], -1))
            elif kind == "drop":
                values.append(nn.functional.dropout(a, 0.5) + torch.rand(WIDTH))
            elif kind == "double":
                values.append(a + nn.functional.linear(b, w).view(WIDTH, ROWS).t().reshape(ROWS, WIDTH))
            else:
                values.append(a @ (w.t() @ weights[0]).tanh())
        loss = values[-1].square().mean() + values[0].sum() / 8
        return [mask + 1, loss, values[len(values) // 2], values[-1].t(), values[0]]

    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(WIDTH, WIDTH, generator=generator).requires_grad_(i != 2) for i in range(4)]
    batch = [torch.randint(0, 4, (ROWS, WIDTH), generator=generator), torch.randn(ROWS, WIDTH, generator=generator)]
    table = torch.randn(3, generator=generator)
    return traced(function, [*weights, table, *batch], [f"w{i}" for i in range(4)], constants=1)


@settings(max_examples=60, deadline=None)
@given(programs(), st.randoms(use_true_random=False), st.integers(1, 6))
def test_random_programs(program: Program, rng: random.Random, count: int) -> None:
    chain = Chain(program.graph, program.inputs)
    room = [b for b in range(1, len(chain.nodes)) if b not in chain.closed]
    places = sorted(rng.sample(room, min(count - 1, len(room))))
    stages = cut(program.graph, program.inputs, plan_of([chain.nodes[b].name for b in places]))
    for before, after in zip(stages, stages[1:], strict=False):
        assert [(p.name, p.gradient) for p in before.sent] == [(p.name, p.gradient) for p in after.received]
    assert_same(program, stages)


MODELS = ("llama", "llama_tied", "gpt2", "bert", "t5", "qwen3")


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model = case.build()
    batch = {k: v for k, v in case.batch(torch.Generator().manual_seed(1)).items() if isinstance(v, Tensor)}
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    program = captured(model, batch)
    for count in (2, 4):
        plan = partition(program.graph, program.inputs, count, setting())
        stages = cut(program.graph, program.inputs, plan)
        for stage, cost in zip(stages, plan.stages, strict=True):
            assert stage.parameters == cost.parameters
            assert [(p.name, p.gradient) for p in stage.received] == [(v.name, v.gradient) for v in cost.receives]
        assert_same(program, stages)
