"""Sharded training equals training on one process: loss, every gradient, parameters after five steps.

The eager lowering tests our passes on every family; Inductor, whose C++ compilation dominates the time,
is tested on two.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.models import CASES, VOCAB
from tests.parity import TOLERANCE, adamw, check_gradients, check_parameters, parity
from tests.ranks import run_ranks

EAGER = {"lowering": "eager"}
NEEDS_PREPARE = {"odds"}
FAMILIES_ON_FOUR = [("qwen3", "gpt2", "resnet"), ("bert", "t5"), ("mixtral", "vit")]


def several(cases: list[tuple[str, dict[str, Any]]]) -> dict[str, float]:
    return {c: parity(c, o, explicit=c in NEEDS_PREPARE) for c, o in cases}


@pytest.mark.parametrize(
    "names",
    [("llama", "llama_tied"), ("qwen3", "gpt2"), ("bert", "t5"), ("mixtral", "vit"), ("resnet", "odds")],
    ids="-".join,
)
def test_two_ranks(names: tuple[str, ...]) -> None:
    for errors in run_ranks(several, 2, [(n, EAGER) for n in names]):
        assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize(
    "names",
    [
        ("llama", "llama_tied", "odds"),
        *(pytest.param(names, marks=pytest.mark.thorough) for names in FAMILIES_ON_FOUR),
    ],
    ids="-".join,
)
def test_four_ranks(names: tuple[str, ...]) -> None:
    run_ranks(several, 4, [(n, EAGER) for n in names])


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_zero_stages(zero: int) -> None:
    options = {"lowering": "eager", "zero": zero}
    run_ranks(several, 2, [("llama_tied", options), ("odds", options)])


@pytest.mark.parametrize("name", ["llama_tied", "resnet"])
def test_inductor(name: str) -> None:
    run_ranks(several, 2, [(name, {"lowering": "inductor"})])


def weights_kept_whole() -> list[list[str]]:
    parity("llama", {"lowering": "eager", "memory": "1GB"}, steps=2)
    torch._dynamo.reset()
    model = CASES["llama"].build()
    compiled = torch.compile(model, backend="autodist", options={"lowering": "eager", "memory": "1GB"})
    batch = CASES["llama"].batch(torch.Generator().manual_seed(0))
    compiled(**batch).loss.backward()
    job = next(model.parameters())._autodist_job
    kept = [d.subject for r in job.reports[0].records for d in r.decisions if d.action == "kept whole"]
    return kept


def test_weights_are_kept_whole_within_the_memory_bound() -> None:
    first, second = run_ranks(weights_kept_whole, 2)
    assert first == second
    assert "model.layers.0.mlp.up_proj.weight" in first


# --- generated modules -----------------------------------------------------------------------------


class Generated(nn.Module):
    """A stack of layers drawn from a recipe: (kind, width, flag) each, with some weights shared."""

    def __init__(self, recipe: tuple[tuple[str, int, bool], ...], width: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.embed = nn.Embedding(VOCAB, width)
        layers: list[nn.Module] = []
        for kind, size, flag in recipe:
            if kind == "linear":
                layers.append(nn.Sequential(nn.Linear(width, size, bias=flag), nn.Linear(size, width)))
            elif kind == "norm":
                layers.append(nn.LayerNorm(width, elementwise_affine=flag))
            elif kind == "conv":
                layers.append(nn.Conv1d(width, width, 3, padding=1, bias=flag))
            else:
                layers.append(nn.Linear(width, width))
        self.layers = nn.ModuleList(layers)
        self.gain = nn.Parameter(torch.ones(()) * 0.7)
        shared = [m for (kind, _, _), m in zip(recipe, layers, strict=True) if kind == "shared"]
        for module in shared[1:]:
            module.weight = shared[0].weight
        frozen = [m for (_, _, flag), m in zip(recipe, layers, strict=True) if flag]
        for parameter in frozen[0].parameters() if len(frozen) > 1 else ():
            parameter.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for (kind, _, flag), layer in zip(self.recipe, self.layers, strict=True):
            y = layer(x.transpose(1, 2)).transpose(1, 2) if kind == "conv" else layer(x)
            x = x + self.gain * torch.tanh(y) if flag else nn.functional.silu(y)
        return torch.einsum("btd,vd->btv", x, self.embed.weight).logsumexp(-1).mean()


def generated_parity(recipes: list[tuple[tuple[tuple[str, int, bool], ...], int, int]]) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for recipe, width, seed in recipes:
        torch._dynamo.reset()
        torch.manual_seed(seed)
        model = Generated(recipe, width)
        reference = copy.deepcopy(model)
        zero = seed % 4
        compiled = torch.compile(model, backend="autodist", options={"lowering": "eager", "zero": zero})
        batches = [
            torch.randint(0, VOCAB, (1 + seed % 3, 5), generator=torch.Generator().manual_seed(seed + r))
            for r in range(ranks)
        ]
        steppers = [adamw(m.parameters()) for m in (model, reference)]
        for _ in range(2):
            losses = [reference(b) for b in batches]
            (sum(losses) / ranks).backward()
            loss = compiled(batches[rank])
            loss.backward()
            assert abs(loss.item() - losses[rank].item()) < 1e-5 * max(1, abs(loss.item()))
            check_gradients(model, reference)
            for stepper in steppers:
                stepper.step()
                stepper.zero_grad()
        check_parameters(model, reference)


LAYER = st.tuples(
    st.sampled_from(["linear", "norm", "conv", "shared"]), st.integers(1, 9), st.booleans()
)
RECIPE = st.tuples(
    st.lists(LAYER, min_size=1, max_size=4).map(tuple), st.integers(1, 9), st.integers(0, 1000)
)


@settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(st.lists(RECIPE, min_size=3, max_size=3))
def test_generated_modules(recipes: list[Any]) -> None:
    run_ranks(generated_parity, 2, recipes)


# --- a test must be able to fail -------------------------------------------------------------------


def wrong_reduction() -> str:
    """Parity with gradients summed where they should be averaged."""
    from autodist.runtime import dialect

    right = dialect.reduce_op
    dialect.reduce_op = lambda divisor, size: "sum"  # type: ignore[assignment]
    try:
        parity("resnet", {"lowering": "eager"}, steps=1)
    except AssertionError as error:
        return str(error)
    finally:
        dialect.reduce_op = right
    return ""


def test_a_wrong_reduction_is_noticed() -> None:
    for message in run_ranks(wrong_reduction, 2):
        assert message.startswith("gradient of")


