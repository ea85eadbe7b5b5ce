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
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Interpreter, Node

from autodist.passes.analysis.chunks import Places, Region, Regions
from autodist.passes.base import Context, Means, Pass, Phase, size_text
from autodist.passes.capture import core_of, rebuilt
from autodist.passes.graph import replace
from autodist.runtime import compat

_WORTH = 2  # times what comes in or goes out: what a region holds inside to be worth tiles
_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)


@dataclass(frozen=True)
class Tile(Pass):
    """Make a region in ``pieces``, or as many as make what is inside as small as what comes in or goes out.

    It is left whole where that makes little of it smaller, or where it holds less than a piece of the
    largest. Where no region wants more than ``pieces``, more of them make the same program.
    """

    pieces: int
    name: ClassVar[str] = "tile"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.CAPTURED,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        core = core_of(graph)
        _without_idle_dropout(core.graph)
        named = set(core.parameters(context.parameters))
        regions = Regions(core.graph, self.pieces, named)
        found = regions.found(*core.fakes)
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
        tiled = _Tiled(core.graph, regions.order)
        for size in sorted(set(counts.values()), reverse=True):
            if size != self.pieces:
                regions = Regions(core.graph, size, named)
                found = regions.found(*core.fakes)
            for region in found:
                if counts.get(region.nodes[0]) == size:
                    tiled.add(region, regions)
        made = rebuilt(graph, core, core.trace(tiled.run))
        made.graph.eliminate_dead_code()
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
        return made


    def _count(self, region: Region) -> int:
        return min(self.pieces, _wanted(region))


def _wanted(region: Region) -> int:
    """Tiles that make what is inside as small as what comes in or goes out."""
    return 2 ** round(math.log2(region.inside / region.border))


def _without_idle_dropout(graph: GraphModule) -> None:
    """Dropout that drops nothing draws nothing."""
    for node in graph.graph.find_nodes(op="call_function", target=_aten.dropout.default):
        if node.args[1] == 0 or not node.args[2]:
            replace(node, node.args[0])


class _Tiled(Interpreter):
    """Runs a graph on whole values, some of its regions in tiles."""

    def __init__(self, graph: GraphModule, order: list[Node]) -> None:
        super().__init__(graph)
        self.order = order
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
        return list(self.env[node])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _VIEWS:  # what was put together from pieces may have other strides
            target = _aten.reshape.default
        return super().call_function(target, args, kwargs)
