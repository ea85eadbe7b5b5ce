"""The choice between saving, offloading and recomputing: against brute force, and on many layers."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodist.passes.analysis import budget as module
from autodist.passes.analysis.budget import BudgetError, Choice, How, Value, evaluate, solve


def brute_force(values: Sequence[Value], device: int, host: int) -> Choice | None:
    best = None
    for how in itertools.product(How, repeat=len(values)):
        try:
            found = evaluate(values, how)
        except ValueError:
            continue
        fits = found.device_bytes <= device and found.host_bytes <= host and math.isfinite(found.seconds)
        if fits and (best is None or found.seconds < best.seconds):
            best = found
    return best


@st.composite
def problems(draw: st.DrawFn) -> list[Value]:
    values: list[Value] = []
    for i in range(draw(st.integers(1, 6))):
        inputs = draw(st.sets(st.integers(0, i - 1), max_size=2)) if i else set()
        save = draw(st.sampled_from([0.0, 0.0, 0.1, math.inf]))
        values.append(
            Value(
                name=f"v{i}",
                num_bytes=draw(st.sampled_from([0, 1, 2, 3, 5, 8])),
                inputs=tuple(sorted(inputs)),
                needed=draw(st.booleans()),
                recompute=draw(st.sampled_from([0.0, 1.0, 2.0, 4.0, 9.0, math.inf])),
                save=save,
                offload=math.inf if math.isinf(save) else draw(st.sampled_from([math.inf, 1.0, 3.0])),
            )
        )
    return values


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 14), st.sampled_from([0, 3, 10]))
def test_few_values_are_chosen_exactly(values: list[Value], device: int, host: int) -> None:
    wanted = brute_force(values, device, host)
    try:
        found = solve(values, device, host)
    except ValueError:
        assert wanted is None
        return
    assert wanted is not None
    assert found.device_bytes <= device and found.host_bytes <= host
    assert found.seconds == pytest.approx(wanted.seconds, abs=1e-6)
    assert found.bound <= wanted.seconds + 1e-5


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 14), st.sampled_from([0, 3, 10]))
def test_prices_bound_what_any_choice_costs(values: list[Value], device: int, host: int) -> None:
    wanted = brute_force(values, device, host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEW", 0)  # prices and parts alone
        try:
            found = solve(values, device, host)
        except ValueError:
            return
    assert wanted is not None
    assert found.device_bytes <= device and found.host_bytes <= host
    assert found.bound - 1e-5 <= wanted.seconds <= found.seconds + 1e-9


def layers(count: int) -> list[Value]:
    """A residual stream with dear products and cheap pointwise values around it, layer by layer."""
    values: list[Value] = []
    stream: tuple[int, ...] = ()
    kinds = [("norm", 4, 0.01), ("query", 4, 1.0), ("key", 4, 1.0), ("attention", 4, 6.0), ("out", 4, 1.0)]
    kinds += [("up", 16, 4.0), ("gate", 16, 4.0), ("act", 16, 0.04), ("down", 4, 4.0)]
    for layer in range(count):
        before = stream
        for name, size, seconds in kinds:
            values.append(Value(f"{name}{layer}", size << 20, before, True, seconds, 0.02 * size, 0.3 * size))
            before = (len(values) - 1,)
        values.append(Value(f"stream{layer}", 4 << 20, (*stream, *before), True, 0.01, 0.08, 1.2))
        stream = (len(values) - 1,)
    return values


@pytest.mark.parametrize("part", [0.8, 0.4, 0.1])
@pytest.mark.parametrize("host", [0, 400 << 20])
def test_eighty_layers_are_within_a_hundredth_of_the_best_in_seconds(part: float, host: int) -> None:
    values = layers(80)
    start = time.thread_time()
    found = solve(values, int(part * sum(v.num_bytes for v in values)), host)
    assert time.thread_time() - start < 20
    assert found.gap < 0.01
    assert found.device_bytes <= part * sum(v.num_bytes for v in values) and found.host_bytes <= host


def test_nothing_is_offloaded_or_recomputed_when_all_fits() -> None:
    values = [replace(v, save=0.0) for v in layers(3)]
    found = solve(values, 1 << 40, 1 << 40)
    assert set(found.how) == {How.SAVE} and found.gap == 0.0


def test_the_cheap_is_recomputed_before_the_dear() -> None:
    values = layers(4)
    total = sum(v.num_bytes for v in values)
    found = solve(values, int(0.75 * total))
    again = {v.name[:-1] for v, h in zip(values, found.how, strict=True) if h is How.RECOMPUTE}
    assert "act" in again and "attention" not in again


def test_a_budget_that_is_too_small_says_the_least() -> None:
    values = [Value("seed", 3, (), True, math.inf), Value("mask", 8, (0,), True, 1.0)]
    with pytest.raises(BudgetError) as caught:
        solve(values, 2)
    assert caught.value.least == 3
    assert solve(values, 3).how == (How.SAVE, How.RECOMPUTE)


def test_a_value_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(ValueError, match="late is needed, and can be neither saved"):
        solve([Value("late", 1, (), True, math.inf, math.inf)], 10)
