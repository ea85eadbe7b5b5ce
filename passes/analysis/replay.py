"""What a choice of saved values holds at its peak, read off the joint graph, without extracting its parts.

The parts run the joint graph's nodes in its order:

    forward     what its results, and the values chosen to be saved or offloaded, are computed from
    backward    what gradients are computed from, each recomputed value just before its first reader, as
                torch's partitioner arranges them

and a buffer lives from the first node that makes it, or from the start of the part if it is given, to the
last node that reads it, or to the end if it is handed on. That takes milliseconds for a graph of thousands
of nodes; to extract and schedule parts takes seconds. Collectives that are grouped and started ahead of
their use hold more than this: the difference is about the same for all choices of one graph, so whoever
searches measures it once and reads the choice that is found properly.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from torch.fx import GraphModule, Node

from autodist.passes.analysis.budget import How
from autodist.passes.analysis.fusion import fuse, tensors
from autodist.passes.analysis.liveness import shared_storages
from autodist.passes.graph import output_of
from autodist.runtime import compat


class Replay:
    """Peaks of a joint graph whose first ``num_outputs`` outputs are the forward's.

    ``nodes`` are those a choice speaks of, ``backward`` those that only the backward can run. ``fused`` as
    in :func:`~autodist.passes.analysis.liveness.liveness`.
    """

    def __init__(
        self,
        joint: GraphModule,
        num_outputs: int,
        nodes: Sequence[Node],
        backward: Collection[Node],
        fused: bool,
    ) -> None:
        graph = self.nodes = [n for n in joint.graph.nodes if n.op != "output"]
        place = {n: i for i, n in enumerate(graph)}
        stored = fuse(joint.graph).stored if fused else None
        self.inputs = [[place[u] for u in n.all_input_nodes] for n in graph]
        self.given = [n.op in ("placeholder", "get_attr") for n in graph]
        self.lasts = [self.given[i] and compat.placeholder_index(n) is not None for i, n in enumerate(graph)]
        self.is_stored = [stored is None or n in stored for n in graph]
        self.is_backward = [n in backward for n in graph]
        tangents = {i for i, n in enumerate(graph) if n.op == "placeholder" and compat.is_tangent(n)}
        self.reads_tangent = [not tangents.isdisjoint(inputs) for inputs in self.inputs]
        self.chosen = [place[n] for n in nodes]
        outputs: Sequence[object] = output_of(joint).args[0]  # type: ignore[assignment]
        self.results, self.gradients = (
            [place[n] for n in found if isinstance(n, Node)]
            for found in (outputs[:num_outputs], outputs[num_outputs:])
        )
        same, number = shared_storages(joint.graph), dict[int, int]()
        sizes: list[int] = []
        self.buffers: list[list[int]] = []
        for i, node in enumerate(graph):
            mine = []
            for tensor in tensors(node):
                key = same.get(compat.storage_key(tensor), compat.storage_key(tensor))
                if key not in number:
                    number[key] = len(sizes)
                    held = compat.size_hint(tensor.untyped_storage().nbytes())
                    sizes.append(held if self.is_stored[i] or self.given[i] else 0)
                mine.append(number[key])
            self.buffers.append(mine)
        self.sizes = np.array(sizes, dtype=np.int64)

    def resized(self, sizes: np.ndarray) -> Replay:
        """The same program with other ``sizes`` of its buffers."""
        other = copy.copy(self)
        other.sizes = sizes
        return other

    def peak(self, how: Sequence[How]) -> int:
        """Bytes that the parts hold at the most when ``how`` becomes of the nodes."""
        return int(self.held(how).max(initial=0))

    def held(self, how: Sequence[How]) -> np.ndarray:
        """Bytes that are held at each point of the parts: sums of ``sizes``, also where these are rows."""
        kept = self.kept(how)
        moved = {i for i, h in zip(self.chosen, how, strict=True) if h is How.OFFLOAD}
        forward = self._held(self.forward(kept), set(), (kept | set(self.results)) - moved, True)
        backward = self._held(self.backward(kept, moved), kept - moved, set(self.gradients), False)
        return np.concatenate([forward, backward])

    def kept(self, how: Sequence[How]) -> set[int]:
        """The nodes whose values are saved or offloaded, by their numbers."""
        return {i for i, h in zip(self.chosen, how, strict=True) if h in (How.SAVE, How.OFFLOAD)}

    def forward(self, kept: set[int]) -> list[int]:
        """The nodes of the forward part, in order, its inputs among them."""
        needed = self._needed(kept | set(self.results), set())
        return [i for i, n in enumerate(needed) if (n or self.given[i]) and not self.is_backward[i]]

    def backward(self, kept: set[int], moved: Collection[int] = ()) -> list[int]:
        """The nodes of the backward part, in order: what it is given first, then from the first that reads a
        tangent on each after what it needs that has not been made. Those ``moved`` come back when needed."""
        needed = self._needed(self.gradients, kept)
        order = [i for i, n in enumerate(needed) if n and (self.given[i] or i in kept) and i not in moved]
        done = bytearray(len(needed))
        for i in order:
            done[i] = 1
        wanted = [i for i, n in enumerate(needed) if n and not done[i]]
        first = next((k for k, i in enumerate(wanted) if self.reads_tangent[i]), 0)
        for i in wanted[first:]:
            if not done[i]:
                self._run([i], moved, done, order)
        self._run(self.gradients, moved, done, order)
        return order

    def _needed(self, ends: Iterable[int], kept: set[int]) -> list[bool]:
        """What ``ends`` are computed from, as far as what is ``kept``."""
        needed = [False] * len(self.inputs)
        for i in ends:
            needed[i] = True
        for i in reversed(range(len(needed))):
            if needed[i] and i not in kept:
                for u in self.inputs[i]:
                    needed[u] = True
        return needed

    def _run(self, nodes: list[int], moved: Collection[int], done: bytearray, order: list[int]) -> None:
        """Append what is not ``done`` of ``nodes`` and all that they are computed from, in order."""
        missing, frontier = set[int](), set(nodes)
        while frontier:
            missing |= frontier
            made = (i for i in frontier if i not in moved)
            frontier = {u for i in made for u in self.inputs[i] if not done[u] and u not in missing}
        for i in sorted(missing):
            if not done[i]:
                done[i] = 1
                order.append(i)

    def _held(self, order: list[int], early: set[int], ends: set[int], forward: bool) -> np.ndarray:
        """What is alive while ``order`` runs; inputs and ``early`` values are there before it."""
        end, count = len(order), len(self.sizes)
        last = [-1] * len(self.inputs)
        for at in reversed(range(end)):
            i = order[at]
            if last[i] < 0:
                last[i] = at
            # What is not stored is computed where it is read, and what it reads must live as long.
            until = at if self.is_stored[i] or not self.buffers[i] else last[i]
            if i not in early:
                for u in self.inputs[i]:
                    if last[u] < until:
                        last[u] = until
        born, dies = [end] * count, [-1] * count
        for at, i in enumerate(order):
            until = end if i in ends or self.lasts[i] or (forward and self.given[i]) else last[i]
            start = 0 if self.given[i] or i in early else at
            for b in self.buffers[i]:
                if start < born[b]:
                    born[b] = start
                if until > dies[b]:
                    dies[b] = until
        starts, stops = np.array(born), np.array(dies) + 1
        lives = stops > 0
        change = np.zeros((end + 2, *self.sizes.shape[1:]), dtype=self.sizes.dtype)
        np.add.at(change, starts[lives], self.sizes[lives])
        np.subtract.at(change, stops[lives], self.sizes[lives])
        return change.cumsum(axis=0)


__all__ = ["Replay"]
