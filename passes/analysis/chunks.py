"""The axis laid out in time: one process makes the pieces of a sequence one after the other.

On an axis of ranks a value that is needed whole is communicated. Here nobody else has anything, so wherever
a rule asks the axis for more than the piece at hand there is a *boundary*: what is needed whole must have
been made for all pieces before. Between boundaries operators are *token-local*: piece ``i`` of what they
make is computed from pieces ``i`` alone. Sums over the axis are the one exception, and the end of a region:

    depth(n)    the most boundaries on a way from the program's inputs to n
    region d    the token-local operators of depth d, and the sums that they end in

A way out of a region leads through a boundary, so it does not come back: all pieces of a region can be made
one after the other, each from its first operator to its last. Placements and rules are those of
:mod:`autodist.passes.analysis.placement`; W and R are the same here, because nobody else adds to a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from autodist.passes.analysis.placement import (
    Axis,
    PlacementError,
    Propagation,
    R,
    Shard,
    Value,
    W,
)
from autodist.passes.graph import num_bytes
from autodist.runtime import compat
from autodist.runtime.axis import padded


class Boundary(Exception):
    """A rule wants more than the piece at hand."""


class Pending(Exception):
    """A rule wants a sum that is known once all pieces have been made; ``partial`` is this one's part."""

    def __init__(self, partial: Tensor) -> None:
        super().__init__()
        self.partial = partial


@dataclass(frozen=True)
class Chunks(Axis):
    """``size`` pieces, of which the one at hand is number ``place``.

    ``totals`` are the sums of one operator that are known already, in the order in which its rule asks for
    them. ``cut`` holds what has been cut into pieces, for all places to share.
    """

    place: int = 0
    totals: list[Tensor] = field(default_factory=list)
    asked: list[None] = field(default_factory=list)
    cut: dict[Any, Any] = field(default_factory=dict)

    def whole(self, value: Value) -> Tensor:
        if value.sharded:
            raise Boundary
        return value.tensor

    def beside(self, value: Value) -> Tensor:
        return self.whole(value)

    def sharded(self, value: Value, to: Shard) -> Tensor:
        if not value.sharded:
            return self._pieces_of(value.tensor, to)[self.place]
        if value.shard.same(to):
            return value.tensor
        raise Boundary

    def total(self, partial: Tensor) -> Tensor:
        self.asked.append(None)
        if len(self.asked) > len(self.totals):
            raise Pending(partial)
        return self.totals[len(self.asked) - 1]

    def agreed(self, tensor: Tensor) -> Tensor:
        raise Boundary

    def keep(self, like: Tensor, seed: Tensor, number: int, p: float, sharded: bool) -> Tensor:
        raise Boundary  # in pieces other numbers would be drawn than for the whole

    def last(self, tensor: Tensor, shard: Shard) -> Tensor:
        raise Boundary

    def valid(self, like: Tensor, shard: Shard) -> Tensor:
        at = torch.arange(shard.chunk, device=like.device) + self.place * shard.chunk
        return (at < shard.length).repeat(shard.outer)

    def _pieces_of(self, whole: Tensor, to: Shard) -> list[Tensor]:
        """All pieces at once, so that their gradients are put together once."""
        key = (id(whole), to.dim, str(to))
        if key not in self.cut:
            before, after = whole.shape[: to.dim], whole.shape[to.dim + 1 :]
            seen = whole.reshape([*before, to.outer, to.length, *after])
            seen = padded(seen, to.dim + 1, self.size * to.chunk, True)
            pieces = torch.split(seen, to.chunk, to.dim + 1)
            self.cut[key] = (whole, [p.reshape([*before, to.local, *after]) for p in pieces])
        return list(self.cut[key][1])


def joined(pieces: list[Tensor], shard: Shard) -> Tensor:
    """The whole value that ``pieces`` are of."""
    before, after = pieces[0].shape[: shard.dim], pieces[0].shape[shard.dim + 1 :]
    apart = [p.reshape([*before, shard.outer, shard.chunk, *after]) for p in pieces]
    whole = torch.cat(apart, shard.dim + 1).narrow(shard.dim + 1, 0, shard.length)
    return whole.reshape([*before, shard.outer * shard.length, *after])


# --- regions ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """Token-local ``nodes``, in order; ``shards`` of their results, None for a sum over the axis.

    ``inside`` counts the bytes of the largest value that is made and used inside only, ``border`` those of
    the largest that comes in or goes out.
    """

    nodes: tuple[Node, ...]
    shards: dict[Node, Shard | None]
    inside: int
    border: int


class Regions(Propagation):
    """Run on fake values of the whole, says which operators are token-local for ``size`` pieces."""

    def __init__(self, graph: GraphModule, size: int, weights: set[str]) -> None:
        super().__init__(graph, Chunks("chunks", size, ""), weights)
        self.shards: dict[Node, Shard | None] = {}
        self.placements: dict[Node, Any] = {}
        self.order: list[Node] = []
        """The graph's nodes, so that those of a region stand together."""

    def found(self, *inputs: Any) -> list[Region]:
        """The regions of the graph on ``inputs``, in order."""
        with compat.fake_mode_of(inputs) or contextlib.nullcontext(), torch.no_grad():
            super(Propagation, self).run(*inputs)
        depth: dict[Node, int] = {}
        by_depth: dict[int, list[Node]] = {}
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            depth[node] = max((depth[n] + self._waits(n) for n in node.all_input_nodes), default=0)
            if node in self.shards:
                by_depth.setdefault(depth[node], []).append(node)
        # At each depth first what needs no region, then the region, then what needs all of its pieces.
        turn = {n: 1 if n in self.shards else 2 * self._waits(n) for n in depth}
        self.order = sorted(depth, key=lambda n: (n.op == "output", depth[n], turn[n]))
        return [self._region(nodes) for _, nodes in sorted(by_depth.items())]

    def _waits(self, node: Node) -> bool:
        """Whether ``node`` is made only when all pieces of something have been."""
        if node in self.shards:
            return self.shards[node] is None
        return any(self.shards.get(n) is not None for n in node.all_input_nodes)

    def _region(self, nodes: list[Node]) -> Region:
        mine = set(nodes)
        own = {n for n in nodes if self.shards[n] is not None and mine.issuperset(n.users)}
        given = {u for n in nodes for u in n.all_input_nodes if u in self._from_batch}
        shards = {n: self.shards[n] for n in nodes}
        return Region(tuple(nodes), shards, _largest(own), _largest((mine - own) | (given - mine)))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        given = super().placeholder(target, args, kwargs)
        self._note(given)
        return given

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if compat.is_random(target):
            return self._whole_result()
        axis = self.axis
        assert isinstance(axis, Chunks)
        axis.asked.clear()
        axis.totals.clear()
        try:
            for _ in range(_MAX_SUMS):
                try:
                    result = super().call_function(target, args, kwargs)
                except Pending as pending:
                    axis.asked.clear()
                    axis.totals.append(pending.partial)
                    continue
                self._note(result)
                shard = _shard_of(result)
                if shard is not None or axis.totals:
                    self.shards[self.node] = shard
                return result
        except (Boundary, PlacementError):
            pass
        return self._whole_result()

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._whole_result()

    def _whole(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._whole_result()

    def _whole_result(self) -> Any:
        """What the node makes of whole operands."""
        val = self.node.meta["val"]
        if isinstance(val, Tensor):
            placement = R if self.node in self._from_batch else W
            result = Value(val, placement, tuple(val.shape))
            self._note(result)
            return result
        return self.result(val, R) if isinstance(val, (tuple, list)) else val

    def _note(self, result: Any) -> None:
        if isinstance(result, Value):
            self.placements[self.node] = result.placement

    def _gathers(self, target: Any, values: Any) -> None:
        raise Boundary


def _largest(nodes: Iterable[Node]) -> int:
    return max((num_bytes(n) for n in nodes if isinstance(n.meta["val"], Tensor)), default=0)


_MAX_SUMS = 4  # that one operator makes over the axis


def _shard_of(result: Any) -> Shard | None:
    """Where a result stands in pieces; the results of one operator all stand alike."""
    values = [v for v in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(v, Value)]
    if not any(v.sharded for v in values):
        return None
    if not all(v.sharded and v.shard.same(values[0].placement) for v in values):
        raise Boundary
    return values[0].shard


class Places:
    """The places of one region's nodes: runs each of its pieces, and puts them together."""

    def __init__(self, region: Region, regions: Regions) -> None:
        self.region, self.regions = region, regions
        size = regions.axis.size
        cut: dict[Any, Any] = {}
        self.places = []
        for place in range(size):
            axis = Chunks("chunks", size, "", place, cut=cut)
            self.places.append(Propagation(regions.module, axis, regions.weights))  # type: ignore[arg-type]

    def run(self, whole: dict[Node, Any]) -> dict[Node, Any]:
        """The whole results that others use of the region, from ``whole`` values of its inputs."""
        shards, inside = self.region.shards, set(self.region.nodes)
        inputs = {n for m in self.region.nodes for n in m.all_input_nodes} - inside
        partials: dict[Node, list[Tensor]] = {}
        for place in self.places:
            place.env = {n: self._given(place, n, whole) for n in whole if n in inputs}
            for node in self.region.nodes:
                try:
                    place.env[node] = place.run_node(node)
                except Pending as pending:
                    partials.setdefault(node, []).append(pending.partial)
        results = {n: self._total(n, partials[n]) for n in partials}
        for node in self.region.nodes:
            shard = shards[node]
            if shard is not None and not inside.issuperset(node.users):
                results[node] = joined([p.env[node].tensor for p in self.places], shard)
        return results

    def _given(self, place: Propagation, node: Node, whole: dict[Node, Any]) -> Any:
        value = whole[node]
        if not isinstance(value, Tensor):
            return value
        placement, shape = self.regions.placements.get(node, R), tuple(value.shape)
        if placement in (R, W):
            return Value(value, placement, shape)
        return place.to(Value(value, R, shape), placement)

    def _total(self, node: Node, partials: list[Tensor]) -> Tensor:
        """The result of an operator that sums over all pieces: each sum in turn, then what follows."""
        totals: list[Tensor] = []
        while True:
            totals.append(sum(partials[1:], partials[0]))
            partials = []
            for place in self.places:
                assert isinstance(place.axis, Chunks)
                place.axis.totals[:] = totals
                place.axis.asked.clear()
                try:
                    result = place.run_node(node)
                except Pending as pending:
                    partials.append(pending.partial)
            if not partials:
                return result.tensor

