"""What a choice of saved values holds at its peak, read off the joint graph, without extracting its parts.

The parts run the joint graph's nodes in its order:

    forward     what its results, and the values chosen to be saved or offloaded, are computed from
    backward    what gradients are computed from, each recomputed value just before its first reader

and a buffer lives from the first node that makes it, or from the start of the part if it is given, to the
last node that reads it, or to the end if it is handed on. That takes milliseconds for a graph of thousands
of nodes; to extract and schedule parts takes seconds. Collectives that are grouped and started ahead of
their use hold more than this: the difference is about the same for all choices of one graph, so whoever
searches measures it once and reads the choice that is found properly.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

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
        graph = [n for n in joint.graph.nodes if n.op != "output"]
        place = {n: i for i, n in enumerate(graph)}
        stored = fuse(joint.graph).stored if fused else None
        self.inputs = [[place[u] for u in n.all_input_nodes] for n in graph]
        self.given = [n.op in ("placeholder", "get_attr") for n in graph]
        self.lasts = [self.given[i] and compat.placeholder_index(n) is not None for i, n in enumerate(graph)]
        self.is_stored = [stored is None or n in stored for n in graph]
        self.is_backward = [n in backward for n in graph]
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
        kept = {i for i, h in zip(self.chosen, how, strict=True) if h in (How.SAVE, How.OFFLOAD)}
        moved = {i for i, h in zip(self.chosen, how, strict=True) if h is How.OFFLOAD}
        return np.concatenate([self._forward(kept, moved), self._backward(kept, moved)])

    def _forward(self, kept: set[int], moved: set[int]) -> np.ndarray:
        ends = kept | set(self.results)
        needed = [i in ends for i in range(len(self.inputs))]
        for i in reversed(range(len(needed))):
            if needed[i]:
                for u in self.inputs[i]:
                    needed[u] = True
        order = [i for i, n in enumerate(needed) if (n or self.given[i]) and not self.is_backward[i]]
        return self._held(order, set(), ends - moved, True)

    def _backward(self, kept: set[int], moved: set[int]) -> np.ndarray:
        needed = [False] * len(self.inputs)
        for i in self.gradients:
            needed[i] = True
        for i in reversed(range(len(needed))):
            if needed[i] and i not in kept:
                for u in self.inputs[i]:
                    needed[u] = True
        order: list[int] = []
        done: set[int] = set()
        for i, wanted in enumerate(needed):
            if wanted and self.is_backward[i]:
                self._run(i, kept, done, order)
        for i in self.gradients:
            self._run(i, kept, done, order)
        return self._held(order, kept - moved, set(self.gradients), False)

    def _run(self, node: int, kept: set[int], done: set[int], order: list[int]) -> None:
        """``node`` after what it needs that has not been made."""
        stack = [node]
        while stack:
            i = stack[-1]
            missing = [] if i in kept or i in done else [u for u in self.inputs[i] if u not in done]
            if missing:
                stack += reversed(missing)
                continue
            stack.pop()
            if i not in done:
                done.add(i)
                order.append(i)

    def _held(self, order: list[int], early: set[int], ends: set[int], forward: bool) -> np.ndarray:
        """What is alive while ``order`` runs; inputs and ``early`` values are there before it."""
        end = len(order)
        last = dict[int, int]()
        for at in reversed(range(end)):
            i = order[at]
            read = last.setdefault(i, at)
            # What is not stored is computed where it is read, and what it reads must live as long.
            until = at if self.is_stored[i] or not self.buffers[i] else read
            if i not in early:
                for u in self.inputs[i]:
                    last[u] = max(last.get(u, 0), until)
        born, dies = dict[int, int](), dict[int, int]()
        for at, i in enumerate(order):
            until = end if i in ends or self.lasts[i] or (forward and self.given[i]) else last[i]
            start = 0 if self.given[i] or i in early else at
            for b in self.buffers[i]:
                born[b] = min(born.get(b, start), start)
                dies[b] = max(dies.get(b, 0), until)
        change = np.zeros((end + 2, *self.sizes.shape[1:]), dtype=self.sizes.dtype)
        alive = self.sizes[np.fromiter(born, int)]
        np.add.at(change, np.fromiter(born.values(), int), alive)
        np.subtract.at(change, np.fromiter((dies[b] + 1 for b in born), int), alive)
        return change.cumsum(axis=0)


__all__ = ["Replay"]
