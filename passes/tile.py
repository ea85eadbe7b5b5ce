"""Token-local regions in tiles: what is large inside of them exists for one piece of the sequence at a time.

    x (B, S, H) -> logits (B, S, V) -> loss         is made as        for each piece x_i (B, S/n, H) of x:
                                                                         logits_i, sum of losses_i, count_i
                                                                      loss = sum of sums / sum of counts

The regions, and how their operators run on pieces, are found by the placement analysis on an axis laid out in
time (:mod:`autodist.passes.analysis.chunks`): losses and MLPs without being told which they are. Tiles alone
make nothing smaller that the backward reads; they make it possible to compute one piece again at a time,
which the memory plan does where that pays. Uneven lengths are padded to equal pieces, and padding counts for
nothing. Random operators stay whole, so that the same numbers are drawn.

The number of pieces is one for a program, and a function of the whole program's sizes, so all ranks have the
same. Seeds: tiled logits and MLPs of ALST (arXiv:2506.13996).

What goes to the caller must be made whole, unless it is *withheld*: a result that would keep its region from
being made in tiles, of a program that returns a number (its loss) beside it. Then the program returns, in
its place, a tensor without elements that has its shape behind a dimension of size 0.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from autodist.passes.analysis.chunks import Places, Region, Regions
from autodist.passes.base import Context, Means, Pass, Phase, size_text
from autodist.passes.capture import Core, core_of, rebuilt, returned_to_user
from autodist.passes.graph import num_bytes, output_of, replace, tensor_bytes
from autodist.runtime import compat

_WORTH = 2  # times what comes in or goes out: what a region holds inside to be worth tiles
_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)

WITHHELD = "autodist_withheld"
"""Where the pass leaves, on the graph's meta, which outputs it has withheld."""

WITHHOLDABLE = "autodist_withholdable"
"""Where it leaves which it might."""


@dataclass(frozen=True)
class Tile(Pass):
    """Make a region in ``pieces``, or as many as make what is inside as small as what comes in or goes out.

    It is left whole where that makes little of it smaller, or where it holds less than a piece of the
    largest. Where no region wants more than ``pieces``, more of them make the same program. ``withhold``
    withholds results.
    """

    pieces: int
    withhold: bool = False
    name: ClassVar[str] = "tile"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.CAPTURED,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        core = core_of(graph)
        _without_idle_dropout(core.graph)
        named = set(core.parameters(context.parameters))
        regions, found = _regions(core, self.pieces, named)
        large = _returned(core, found, returned_to_user(graph, core.outputs))
        graph.meta[WITHHOLDABLE] = frozenset(large)
        withheld = large if self.withhold else {}
        shown = {i: _Shown(n.meta["val"], n.name) for i, n in withheld.items()}
        if withheld:
            _drop(core.graph, withheld)
            regions, found = _regions(core, self.pieces, named)
        worth = [r for r in found if r.inside >= _WORTH * r.border > 0]
        if not worth:
            return graph
        largest = max(worth, key=lambda r: r.inside)
        least = largest.inside / self._count(largest)
        counts = {r.nodes[0]: self._count(r) for r in worth if r.inside > least}
        draws = [n for n in regions.order if compat.is_random(n.target)]
        if draws != [n for n in core.graph.graph.nodes if compat.is_random(n.target)]:
            context.decide("program", "not tiled", "random numbers would be drawn in another order")
            return graph
        tiled = _Tiled(core.graph, regions.order, shown)
        for size in sorted(set(counts.values()), reverse=True):
            if size != self.pieces:
                regions, found = _regions(core, size, named)
            for region in found:
                if counts.get(region.nodes[0]) == size:
                    tiled.add(region, regions)
        made = rebuilt(graph, core, core.trace(tiled.run))
        made.graph.eliminate_dead_code()
        made.meta[WITHHELD] = frozenset(withheld)
        for node, places in tiled.places.items():
            region = places.region
            context.decide(
                node.name,
                f"in {counts[node]} tiles",
                f"{len(region.nodes)} token-local operators: what is inside takes up to "
                f"{size_text(region.inside)}, what comes in or goes out {size_text(region.border)}",
                Means.TILE,
                _wanted(region),
            )
        for output, result in shown.items():
            held = size_text(tensor_bytes(result.value))
            reason = f"output {output}: {held} that are returned and not needed for the loss, and do not fit"
            context.decide(result.name, "withheld", reason, Means.WITHHOLD)
        return made

    def _count(self, region: Region) -> int:
        return min(self.pieces, _wanted(region))


def _wanted(region: Region) -> int:
    """Tiles that make what is inside as small as what comes in or goes out."""
    return 2 ** round(math.log2(region.inside / region.border))


def _regions(core: Core, pieces: int, named: set[str]) -> tuple[Regions, list[Region]]:
    regions = Regions(core.graph, pieces, named)
    return regions, regions.found(*core.fakes)


@dataclass(frozen=True)
class _Shown:
    """The fake ``value`` of a result that is withheld."""

    value: Tensor
    name: str

    def stand_in(self) -> Tensor:
        return torch.empty([0, *self.value.shape], dtype=self.value.dtype, device=self.value.device)


def _returned(core: Core, found: list[Region], to_user: Collection[int]) -> dict[int, Node]:
    """Results for the caller alone that keep a region whole, by output.

    There are none where no number is returned: what is computed from them outside would be the loss.
    """
    outputs = list(output_of(core.graph).args[0])[: core.outputs]  # type: ignore[arg-type]
    if not any(isinstance(n, Node) and _is_number(n) for n in outputs):
        return {}
    chosen = {}
    for region in found:
        inside = {*region.nodes, output_of(core.graph)}
        own = [n for n in region.nodes if region.shards[n] is not None and inside.issuperset(n.users)]
        given = {u for n in region.nodes for u in n.all_input_nodes} - inside
        rest = max(map(num_bytes, [*(n for n in region.nodes if n not in own), *given]), default=0)
        for i in to_user:
            node = outputs[i]
            if node in own and num_bytes(node) >= _WORTH * rest:
                chosen[i] = node
    return chosen


def _is_number(node: Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def _drop(graph: GraphModule, outputs: Collection[int]) -> None:
    """Return None in the place of some outputs."""
    output = output_of(graph)
    output.args = ([None if i in outputs else n for i, n in enumerate(output.args[0])],)  # type: ignore[arg-type]
    graph.graph.eliminate_dead_code()


def _without_idle_dropout(graph: GraphModule) -> None:
    """Dropout that drops nothing draws nothing."""
    for node in graph.graph.find_nodes(op="call_function", target=_aten.dropout.default):
        if node.args[1] == 0 or not node.args[2]:
            replace(node, node.args[0])


class _Tiled(Interpreter):
    """Runs a graph on whole values, some of its regions in tiles; what is ``shown`` of outputs stands for
    them."""

    def __init__(self, graph: GraphModule, order: list[Node], shown: Mapping[int, _Shown]) -> None:
        super().__init__(graph)
        self.order, self.shown = order, shown
        self.places: dict[Node, Places] = {}
        self.inside: set[Node] = set()

    def add(self, region: Region, regions: Regions) -> None:
        """Run ``region``, one of ``regions``, in tiles."""
        self.places[region.nodes[0]] = Places(region, regions)
        self.inside.update(region.nodes)

    def run(self, *inputs: Any) -> list[Any]:  # type: ignore[override]
        self.args_iter = iter(inputs)
        self.env.clear()
        for node in self.order:
            if node in self.places:
                self.env.update(self.places[node].run(self.env))
            elif node not in self.inside:
                self.env[node] = self.run_node(node)
        results = list(self.env[node])
        return [self.shown[i].stand_in() if i in self.shown else x for i, x in enumerate(results)]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _VIEWS:  # what was put together from pieces may have other strides
            target = _aten.reshape.default
        return super().call_function(target, args, kwargs)
