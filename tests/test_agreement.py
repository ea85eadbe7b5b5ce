"""Ranks agree before they communicate: rounds over each kind of store, and the texts of graphs."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from autodist.runtime import compat
from autodist.runtime.agreement import (
    Agreement,
    DisagreementError,
    MissingRanksError,
    absent,
    collective_lines,
    graph_lines,
    ranks_text,
)
from tests.ranks import run_ranks

PROGRAM = {"torch": "2.13", "plan": "sp = 1\nmemory = 60GB", "graph": "%0 = placeholder()"}


def together(
    store: dist.Store,
    ranks: list[int],
    act: Callable[[Agreement, int], Any],
    present: list[int] | None = None,
    timeout: float = 20.0,
    handle: Callable[[], dist.Store] | None = None,
) -> dict[int, Any]:
    """``act`` on one thread a rank; what each returned or raised."""
    outcomes: dict[int, Any] = {}

    def live(rank: int) -> None:
        own = handle() if handle is not None else store
        try:
            outcomes[rank] = act(Agreement(own, ranks, rank, timeout, "test"), rank)
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=live, args=(r,)) for r in (present or ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def changed(**sections: str) -> dict[str, str]:
    return {**PROGRAM, **sections}


# --- rounds ---------------------------------------------------------------------------------------


def test_equal_fingerprints_agree_and_keys_of_past_rounds_are_deleted() -> None:
    store = dist.HashStore()

    def act(agreement: Agreement, rank: int) -> list[str]:
        for step in range(20):
            agreement.require(f"graph {step}", PROGRAM)
        return [agreement.lead("seed", f"from {rank}"), agreement.lead("plan", f"p{rank}")]

    outcomes = together(store, [4, 1, 7], act)
    assert outcomes == {rank: ["from 4", "p4"] for rank in (1, 4, 7)}
    assert store.num_keys() == 1  # the last verdict


def test_every_rank_raises_the_same_sentence_with_the_first_line_that_differs() -> None:
    odd = {
        2: changed(plan="sp = 1\nmemory = 80GB", graph="%0 = output()"),
        3: changed(graph="%0 = output()"),
    }
    outcomes = together(
        dist.HashStore(), [0, 1, 2, 3], lambda a, r: a.require("graph 5", odd.get(r, PROGRAM))
    )
    assert all(isinstance(error, DisagreementError) for error in outcomes.values())
    (sentence,) = {str(error) for error in outcomes.values()}
    assert sentence == (
        "Ranks do not agree on graph 5: ranks 2-3 differ from rank 0 in plan, graph.\n"
        "The first difference is in line 2 of 'plan':\n"
        "  rank 0: memory = 60GB\n"
        "  rank 2: memory = 80GB\n"
        "Give every rank the same program, model, plan and library versions, then start again."
    )


@pytest.mark.parametrize(
    ("theirs", "shown"),
    [
        (
            changed(graph="%0 = placeholder()\n%1 = output()"),
            "rank 0: (no more lines)\n  rank 1: %1",
        ),
        ({"torch": "2.13", "plan": PROGRAM["plan"]}, "rank 1: (no more lines)"),
        (changed(graph="%0 = placeholder()" + "x" * 900 + "end"), "xxx..."),
    ],
)
def test_texts_of_other_lengths_and_lines_too_long_to_show(
    theirs: dict[str, str], shown: str
) -> None:
    outcomes = together(
        dist.HashStore(), [0, 1], lambda a, r: a.require("graph 5", theirs if r else PROGRAM)
    )
    assert shown in str(outcomes[0])
    assert max(map(len, str(outcomes[0]).splitlines())) < 300
    assert str(outcomes[0]) == str(outcomes[1])


def test_ranks_at_different_rounds_disagree() -> None:
    def act(agreement: Agreement, rank: int) -> None:
        if rank:
            agreement.lead("the plan", None)
        else:
            agreement.require("graph 0", PROGRAM)

    outcomes = together(dist.HashStore(), [0, 1], act)
    assert isinstance(outcomes[0], DisagreementError)
    assert "rank 0: graph 0\n  rank 1: the plan" in str(outcomes[1])


@pytest.mark.parametrize("missing", [[0], [2, 3], [0, 2]])
def test_missing_ranks_are_named_on_every_rank_and_later_to_themselves(missing: list[int]) -> None:
    store = dist.HashStore()
    ranks = list(range(5))
    here = [r for r in ranks if r not in missing]
    start = time.monotonic()
    outcomes = together(store, ranks, lambda a, r: a.require("graph 1", PROGRAM), here, timeout=0.5)
    assert time.monotonic() - start < 5
    late = together(
        store, ranks, lambda a, r: a.require("graph 1", PROGRAM), missing[:1], timeout=0.5
    )
    assert all(isinstance(error, MissingRanksError) for error in (outcomes | late).values())
    (sentence,) = {str(error) for error in (outcomes | late).values()}
    assert sentence.startswith(f"{ranks_text(missing).capitalize()} did not come within 0.5 s")
    assert "agree on graph 1" in sentence
    assert "raise the timeout" in sentence


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_fails_between_rounds_is_not_waited_for(failing: int) -> None:
    def act(agreement: Agreement, rank: int) -> None:
        if rank == failing:
            agreement.fail("MemoryBoundError: too large")
        else:
            agreement.require("graph 1", PROGRAM)

    start = time.monotonic()
    outcomes = together(dist.HashStore(), [0, 1, 2], act, timeout=30)
    assert time.monotonic() - start < 5
    for rank in {0, 1, 2} - {failing}:
        assert isinstance(outcomes[rank], MissingRanksError)
        assert str(outcomes[rank]) == f"Rank {failing} failed: MemoryBoundError: too large"


def test_ranks_that_all_failed_meet_again() -> None:
    def act(agreement: Agreement, rank: int) -> None:
        agreement.fail("too large")
        agreement.require("graph 1", PROGRAM)

    assert not any(together(dist.HashStore(), [0, 1], act).values())


class Slow(Agreement):
    """Takes its time to read why it fails."""

    def _part(self) -> None:
        time.sleep(0.3)
        super()._part()


def test_the_leader_leaves_last() -> None:
    """Its process may host the store: what is unread when it ends is lost."""
    store = dist.HashStore()

    def act(_: Agreement, rank: int) -> bool:
        agreement = (Slow if rank == 2 else Agreement)(store, [0, 1, 2], rank, 20.0, "test")
        with pytest.raises(DisagreementError):
            agreement.require("graph 1", changed(torch=f"2.{rank}"))
        return dist.PrefixStore("test", store).check(["1/read/1", "1/read/2"])

    assert together(store, [0, 1, 2], act)[0] is True


def test_a_lost_store_is_a_named_error() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = server.clone()  # type: ignore[attr-defined]
    threading.Timer(0.5, lambda: servers.clear()).start()
    servers = [server]
    del server
    with pytest.raises(MissingRanksError, match=r"Lost the key-value store .* graph 1"):
        Agreement(client, [0, 1], 1, 20.0, "test").require("graph 1", PROGRAM)


def test_ranks_with_their_own_connections() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = list(range(12))

    def act(agreement: Agreement, rank: int) -> str:
        agreement.require("graph 0", PROGRAM)
        return agreement.lead("the plan", "sp = 1" if rank == 0 else None)

    outcomes = together(server, ranks, act, handle=server.clone)  # type: ignore[attr-defined]
    assert outcomes == dict.fromkeys(ranks, "sp = 1")
    assert server.num_keys() <= 3  # the last verdict, and the store's own


def test_one_rank_agrees_with_itself() -> None:
    agreement = Agreement(dist.HashStore(), [3], 3, 1.0, "test")
    agreement.require("graph 0", PROGRAM)
    assert agreement.lead("the plan", "sp = 1") == "sp = 1"
    with pytest.raises(ValueError, match="Rank 3 leads the plan"):
        agreement.lead("the plan", None)
    with pytest.raises(ValueError, match="Rank 2 is not one of"):
        Agreement(dist.HashStore(), [3], 2, 1.0, "test")


def agree_in_a_process(timeout: float) -> tuple[str, str, str]:
    rank = dist.get_rank()
    agreement = Agreement(compat.default_store(), [0, 1], rank, timeout, "mesh")
    agreement.require("graph 0", PROGRAM)
    led = agreement.lead("the plan", "sp = 2" if rank == 0 else None)
    with pytest.raises(DisagreementError) as differs:
        agreement.require("graph 1", changed(torch="2.11") if rank == 1 else PROGRAM)
    missing = "away"
    if rank != 1:
        with pytest.raises(MissingRanksError) as error:
            agreement.require("graph 2", PROGRAM)
        missing = str(error.value)
    return led, str(differs.value), missing


@pytest.mark.distributed
def test_processes_agree_over_a_file() -> None:
    results = run_ranks(agree_in_a_process, 2, 1.0, seconds=60)
    assert {led for led, _, _ in results} == {"sp = 2"}
    assert len({differs for _, differs, _ in results}) == 1
    assert "rank 1 differs from rank 0 in torch" in results[1][1]
    assert results[0][2].startswith("Rank 1 did not come within 1 s to agree on graph 2")


def test_ranks_for_people() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([7, 1, 2, 0]) == "ranks 0-2, 7"
    assert ranks_text(range(0, 1000, 2)) == "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 492 more"


def test_absent_keys_are_found() -> None:
    store = dist.HashStore()
    keys = [str(i) for i in range(50)]
    for key in keys:
        if key not in ("0", "17", "18", "49"):
            store.set(key, "")
    assert absent(store, keys) == ["0", "17", "18", "49"]


# --- texts of graphs ------------------------------------------------------------------------------


def traced(function: Callable[..., Any], *inputs: Tensor, symbolic: bool = False) -> Any:
    return make_fx(function, tracing_mode="symbolic" if symbolic else "fake")(*inputs)


def step(x: Tensor, w: Tensor) -> Tensor:
    y = torch.cat([x @ w, x.new_ones(x.shape[0], 2)], dim=1)
    return (y[1:].sum(0, keepdim=True) / y.shape[0]).to(torch.bfloat16)


def test_text_of_a_graph() -> None:
    graph = traced(step, torch.ones(6, 3), torch.ones(3, 4))
    assert graph_lines(graph, {}, mask_sizes=False) == [
        "%0 = placeholder() -> float32[6, 3]",
        "%1 = placeholder() -> float32[3, 4]",
        "%2 = aten.mm.default(%0, %1) -> float32[6, 4]",
        "%3 = aten.new_ones.default(%0, [6, 2], pin_memory=False) -> float32[6, 2]",
        "%4 = aten.cat.default([%2, %3], 1) -> float32[6, 6]",
        "%5 = aten.slice.Tensor(%4, 0, 1, 9223372036854775807) -> float32[5, 6]",
        "%6 = aten.sum.dim_IntList(%5, [0], True) -> float32[1, 6]",
        "%7 = aten.div.Tensor(%6, 6) -> float32[1, 6]",
        "%8 = aten._to_copy.default(%7, dtype=bfloat16) -> bfloat16[1, 6]",
        "%9 = output(%8)",
    ]


def test_masked_text_forgets_sizes_and_nothing_else() -> None:
    def text(function: Callable[..., Any], rows: int) -> list[str]:
        return graph_lines(traced(function, torch.ones(rows, 3), torch.ones(3, 4)), {}, True)

    assert text(step, 6) == text(step, 8)
    assert "%4 = aten.cat.default([%2, %3], 1) -> float32[#, #]" in text(step, 6)
    assert "%5 = aten.slice.Tensor(%4, 0, #, #) -> float32[#, #]" in text(step, 6)
    assert "%6 = aten.sum.dim_IntList(%5, [0], True) -> float32[#, #]" in text(step, 6)
    others = [
        lambda x, w: step(x, w).float(),
        lambda x, w: step(x, w.t().t()),
        lambda x, w: step(x, w + w),
    ]
    assert all(text(other, 6) != text(step, 6) for other in others)


def test_symbols_are_called_by_their_order() -> None:
    def scaled(x: Tensor, y: Tensor) -> Tensor:
        return x.reshape(-1) * (x.shape[0] * y.shape[0])

    first = traced(scaled, torch.ones(6, 3), torch.ones(5), symbolic=True)
    # In the second trace the symbols of other tensors come before: the same program, other names.
    second = make_fx(lambda z, x, y: scaled(x, y), tracing_mode="symbolic")(
        torch.ones(9), torch.ones(6, 3), torch.ones(5)
    )
    second.graph.erase_node(next(iter(second.graph.nodes)))
    lines = graph_lines(first, {}, False)
    assert str(first.graph.find_nodes(op="placeholder")[0].meta["val"].shape) != str(
        second.graph.find_nodes(op="placeholder")[0].meta["val"].shape
    )
    assert lines == graph_lines(second, {}, False)
    assert lines[0] == "%0 = placeholder() -> float32[s0, s1]"
    assert any("-> s0*s2" in line or "-> s2*s0" in line for line in lines)


def communicating(rows: int, group: str, local: int) -> torch.fx.GraphModule:
    """What a rank with a batch of ``rows`` and ``local`` rows of a weight might run."""
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder(f"w_{local}")
    x.meta["val"], w.meta["val"] = torch.empty(rows, 3), torch.empty(local, 3)
    collectives = torch.ops._c10d_functional
    whole = graph.call_function(
        torch.ops.autodist.unshard.default,
        (w, 7),
        {"divisor": 2, "dtype": torch.bfloat16, "group": group},
    )
    sizes = [rows // 2] * 2
    mixed = graph.call_function(collectives.all_to_all_single.default, (x, sizes, sizes, group))
    mixed.meta["val"] = torch.empty(rows, 3)
    waited = graph.call_function(collectives.wait_tensor.default, (mixed,))
    waited.meta["val"] = mixed.meta["val"]
    half = graph.call_function(torch.ops.aten._to_copy.default, (waited,), {"dtype": torch.half})
    half.meta["val"] = mixed.meta["val"].half()
    parts = graph.call_function(
        collectives.reduce_scatter_tensor_coalesced.default, ([waited, half], "sum", 2, group)
    )
    graph.output((whole, parts))
    return torch.fx.GraphModule({}, graph)


def test_text_of_collectives() -> None:
    lines = collective_lines(communicating(8, "group 11", local=4), {"group 11": "dp"})
    assert lines == [
        "autodist.unshard.default(shard=float32, rows=7, divisor=2, dtype=bfloat16, group='dp')",
        "_c10d_functional.all_to_all_single.default(input=float32, output_split_sizes=[#, #], "
        "input_split_sizes=[#, #], group_name='dp')",
        "_c10d_functional.reduce_scatter_tensor_coalesced.default(inputs=[float32, float16], "
        "reduce_op='sum', group_size=2, group_name='dp')",
    ]
    # Another rank: other group names, another batch, a smaller shard.
    elsewhere = communicating(4, "group 12", local=3)
    assert collective_lines(elsewhere, {"group 12": "dp"}) == lines
    assert graph_lines(elsewhere, {"group 12": "dp"}, True) == graph_lines(
        communicating(8, "group 11", local=4), {"group 11": "dp"}, True
    )
    assert collective_lines(elsewhere, {}) != lines


def test_graphs_within_graphs_and_constants() -> None:
    inner = torch.fx.Graph()
    inner.output(inner.call_function(torch.ops.aten.neg.default, (inner.placeholder("a"),)))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    body = graph.get_attr("body")
    out = graph.call_function(torch.ops.higher_order.invoke_subgraph, (body, "name", x))
    seen = graph.call_function(
        torch.ops.aten.full.default,
        ([2], 1.5),
        {"device": torch.device("cuda", 3), "layout": torch.strided},
    )
    picked = graph.call_function(operator.getitem, (out, 0))
    graph.output({"a": picked, "b": (seen, None, True, slice(1, None))})
    module = torch.fx.GraphModule({"body": torch.fx.GraphModule({}, inner)}, graph)
    assert graph_lines(module, {}, mask_sizes=True) == [
        "%0 = placeholder()",
        "%1 = get_attr body()",
        "  %0 = placeholder()",
        "  %1 = aten.neg.default(%0)",
        "  %2 = output(%1)",
        "%2 = invoke_subgraph(%1, 'name', %0)",
        "%3 = aten.full.default([#], 1.5, device=cuda, layout=torch.strided)",
        "%4 = _operator.getitem(%2, 0)",
        "%5 = output({a: %4, b: [%3, None, True, #:None:None]})",
    ]


def sections_under_conditions() -> str:
    """Programs differ: allowed for another batch, not for the same one."""
    rank = dist.get_rank()
    agreement = Agreement(compat.default_store(), [0, 1], rank, 20, "conditions")
    sections = {"program": f"program of rank {rank}", "collectives": "gather"}
    agreement.require("a step", sections, {"program": f"batch of {rank} rows"})
    try:
        agreement.require("a step", sections, {"program": "batch of 2 rows"})
    except DisagreementError as error:
        return str(error)
    return ""


def test_a_section_is_compared_under_its_condition_only() -> None:
    for message in run_ranks(sections_under_conditions, 2):
        assert "rank 1 differs from rank 0 in program" in message
        assert "program of rank 1" in message
