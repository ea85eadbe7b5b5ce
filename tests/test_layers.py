"""Repeated structure: found by what nodes do and read, never by names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from autodist.passes.analysis.layers import (
    Repeat,
    common_text,
    fold,
    fold_graph,
    folded_text,
    graph_text,
)

Items = Sequence["int | Repeat"]


def trace(function: Any, *args: Any) -> GraphModule:
    return make_fx(function, tracing_mode="fake")(*args)


def weights(count: int) -> list[torch.Tensor]:
    return [torch.randn(8, 8) for _ in range(count)]


def layers(graph: GraphModule) -> list[tuple[int, int]]:
    """(count, period) of the repeats among the calls, the inputs left out."""
    repeats = [item for item in fold_graph(graph) if isinstance(item, Repeat)]
    nodes = list(graph.graph.nodes)
    return [(r.count, r.period) for r in repeats if nodes[r.start].op == "call_function"]


def test_golden_text() -> None:
    def network(x: torch.Tensor, ws: list[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        x = x.exp()
        for w in ws:
            y = x @ w
            for _ in range(3):
                y = (y * scale).sin()
            x = x + y
        return x.tanh()

    graph = trace(network, torch.randn(4, 8), weights(5), torch.randn(8))
    names = {f"ws_{i + 1}": f"blocks.{i}.attention.0.weight" for i in range(5)}
    assert_expected_inline(
        folded_text(graph, lambda node: names.get(node.name, "")),
        """\
     0  x_1: float32[4, 8]
        x 5: nodes 1 to 5, 1 each
     1    ws_1: float32[8, 8]  # blocks.*.attention.0.weight
     6  scale_1: float32[8]
     7  exp: float32[4, 8] = aten.exp(x_1)
        x 5: nodes 8 to 47, 8 each
     8    mm: float32[4, 8] = aten.mm(exp, ws_1)
          x 3: nodes 9 to 14, 2 each
     9      mul: float32[4, 8] = aten.mul.Tensor(mm, scale_1)
    10      sin: float32[4, 8] = aten.sin(mul)
    15    add: float32[4, 8] = aten.add.Tensor(exp, sin_2)
    48  tanh: float32[4, 8] = aten.tanh(add_4)
    49  return [tanh]
""",
    )
    assert graph_text(graph).count("\n") == len(graph.graph.nodes)


def test_layers_that_are_wired_differently_are_not_one() -> None:
    def skips_to(third: int) -> GraphModule:
        """Six layers, each adding what came in; the third adds what layer ``third`` took in."""

        def network(x: torch.Tensor, ws: list[torch.Tensor]) -> torch.Tensor:
            seen = [x]
            for i, w in enumerate(ws):
                base = seen[third] if i == 2 else seen[-1]
                seen.append((seen[-1] @ w).relu().sin().cos() + base)
            return seen[-1]

        return trace(network, torch.randn(8, 8), weights(6))

    assert layers(skips_to(2)) == [(6, 5)]
    assert layers(skips_to(1)) == [(2, 5), (4, 5)]


def test_layers_of_other_sizes_are_not_alike() -> None:
    def network(x: torch.Tensor, ws: list[torch.Tensor]) -> torch.Tensor:
        for w in ws:
            x = (x @ w).relu().sin()
        return x

    sizes = [8, 8, 8, 8, 4, 4, 4, 4]
    ws = [torch.randn(a, b) for a, b in zip([8, *sizes], sizes, strict=False)]
    # The first layer of the second size reads the first size, so it is like no other.
    assert layers(trace(network, torch.randn(2, 8), ws)) == [(4, 3), (3, 3)]


def test_values_shared_by_all_layers() -> None:
    def network(x: torch.Tensor, ws: list[torch.Tensor]) -> torch.Tensor:
        mask = x.sum(0).sign()
        for w in ws:
            x = (x @ w).relu() * mask
        return x

    assert layers(trace(network, torch.randn(8, 8), weights(4))) == [(4, 3)]


def test_sequences() -> None:
    assert fold("xyabcabcabcz") == (0, 1, Repeat(2, 3, 3, (2, 3, 4)), 11)
    inner = Repeat(0, 1, 5, (0,))
    assert fold("aaaaab" * 3) == (Repeat(0, 6, 3, (inner, 5)),)
    assert fold("abab") == (0, 1, 2, 3)  # a heading would save nothing
    assert fold("") == ()


def unfold(items: Items, offset: int = 0) -> list[tuple[int, int]]:
    """(place, place in the first copy) of everything, in order."""
    found = []
    for item in items:
        if isinstance(item, Repeat):
            for i in range(item.count):
                moved = offset + i * item.period
                found += [(place, shown) for place, shown in unfold(item.body, moved)]
        else:
            found.append((item + offset, item))
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.text("abc", max_size=5), st.integers(1, 6)), max_size=6))
def test_folding_loses_nothing(pieces: list[tuple[str, int]]) -> None:
    keys = "".join(text * count for text, count in pieces)
    places = unfold(fold(keys))
    assert [place for place, _ in places] == list(range(len(keys)))
    assert all(keys[place] == keys[shown] for place, shown in places)


def test_common_text() -> None:
    assert common_text(["layers.0.w", "layers.1.w"]) == "layers.*.w"
    assert common_text(["layers.3.w", "layers.3.w"]) == "layers.3.w"
    assert common_text(["layers.0.w", "norm.weight"]) == "layers.0.w, ..."
