"""Which ranks of a pipeline do what of a captured training step, and what they tell each other.

The parameters, gradients and optimizer state of a step lie at *places* of the pipeline: those of the stages
that use the parameter. The step's forwards and backwards (its regions) are the pipeline's. Of the rest every
node runs where what it reads is:

    places(node) = intersection of places(operand)      owner computes; each owner, where there are several
                 = all places, where that is empty      the node *mixes* places (a total norm)

What a mixing node reads of one place is *exchanged*: sent from its first owner to all places, which then
compute the same of the same. So is what an output of the step needs at more places than it is computed at.
Only numbers and small tensors are exchanged; a large one is refused by its name and line.

Time is cut by *barriers*: the run of a region, and an exchange of all values that are known by then. What
depends on a barrier runs in the first interval in which its operands are there: gradients are added up as
they come. What depends on the step's inputs alone runs in the interval of its first reader, as until then it
would only take memory.

Invariants: everything here follows from the step of the whole model and from where its parameters lie, so it
is the same on all ranks of a pipeline; a value that is at several places is the same at each.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from autodist.passes.base import StepError, size_text
from autodist.passes.graph import behind, num_bytes, output_of, where
from autodist.passes.regions import Region
from autodist.runtime import compat

_LARGEST = 2**16  # bytes of a value that is exchanged
Places = frozenset[int]


@dataclass(frozen=True)
class Run:
    """A barrier: the pipeline runs the region with this number."""

    region: int


@dataclass(frozen=True)
class Exchange:
    """A barrier: each of these values goes from its first place to all."""

    values: tuple[Node, ...]


Barrier = Run | Exchange
Reading = tuple[Node, bool]
"""A value that is read, and whether it is what an exchange has brought."""


@dataclass
class StepPlaces:
    """See the module's text.

    ``readings`` are those of each node that runs, and under None those of the outputs, in order;
    ``interval`` says in which, counted from before the first barrier, a node runs; ``made_by`` gives the
    barrier that makes a value: a run for results and gradients, an exchange for what it brings.
    """

    step: GraphModule
    places: dict[Node, Places] = field(default_factory=dict)
    readings: dict[Node | None, list[Reading]] = field(default_factory=dict)
    barriers: list[Barrier] = field(default_factory=list)
    interval: dict[Node, int] = field(default_factory=dict)
    made_by: dict[Reading, int] = field(default_factory=dict)

    def text(self) -> str:
        """What ranks of a pipeline do together."""
        lines = []
        for barrier in self.barriers:
            if isinstance(barrier, Run):
                lines.append(f"run region {barrier.region}")
            else:
                shown = (f"{n.name} {_shape(n)} from {min(self.places[n])}" for n in barrier.values)
                lines.append(f"exchange {'; '.join(shown)}")
        return "\n".join(lines)


def step_places(
    step: GraphModule,
    regions: Sequence[Region],
    inputs: Sequence[Places],
    outputs: Sequence[Places],
    everywhere: Places,
    parameters: Sequence[Collection[Node]],
    names: Mapping[int, str],
) -> StepPlaces:
    """The places of a functional step of ``regions``.

    ``inputs`` are the places of its inputs, ``names`` what they are called; ``outputs`` are the places at
    which its outputs are needed; ``parameters`` are, for each region, those of its inputs that are
    parameters: the pipeline takes them where they lie. Raises :class:`~autodist.passes.base.StepError`.
    """
    return _Finder(step, regions, inputs, everywhere, parameters, names).found(outputs)


class _Finder:
    def __init__(
        self,
        step: GraphModule,
        regions: Sequence[Region],
        inputs: Sequence[Places],
        everywhere: Places,
        parameters: Sequence[Collection[Node]],
        names: Mapping[int, str],
    ) -> None:
        self.made = StepPlaces(step)
        self.regions, self.everywhere, self.parameters = regions, everywhere, parameters
        placeholders = step.graph.find_nodes(op="placeholder")
        self.names = {n: names.get(i) for i, n in enumerate(placeholders)}
        self.inside = {n for r in regions for n in r.body}
        self.markers = {r.marker: number for number, r in enumerate(regions)}
        self.results = {n: number for number, r in enumerate(regions) for n in r.outputs}
        self.given = dict(zip(placeholders, inputs, strict=True))
        self.live = behind([*_outputs(step), *(n for r in regions for n in (*r.inputs, r.marker))])
        self.glue: list[Node] = []
        self.taken: list[list[Reading]] = []
        """What each region takes beside parameters, wherever it runs."""

    def found(self, outputs: Sequence[Places]) -> StepPlaces:
        for node in self.made.step.graph.nodes:
            self._place(node)
        for region, parameters in zip(self.regions, self.parameters, strict=True):
            others = [n for n in region.inputs if n not in parameters and n.op != "get_attr"]
            self.taken.append([self._read(n, region.marker, self.everywhere) for n in others])
        wanted = zip(_outputs(self.made.step), outputs, strict=True)
        self.made.readings[None] = [self._read(n, n, places) for n, places in wanted]
        self._order()
        return self.made

    def _place(self, node: Node) -> None:
        places = self.made.places
        if node.op == "placeholder":
            places[node] = self.given[node]
        elif node.op == "get_attr" or node in self.results:
            places[node] = self.everywhere
        elif node.target is operator.getitem and node.args[0] in self.markers:
            leaf = node.args[0].args[1][node.args[1]]  # type: ignore[union-attr, index]
            places[node] = places[leaf]  # type: ignore[index]
        elif node.op == "call_function" and self._is_glue(node):
            self._place_call(node)

    def _is_glue(self, node: Node) -> bool:
        if node in self.inside or node in self.markers or node not in self.live:
            return False
        return not (compat.sets_mode(node.target) or compat.is_profiling(node.target))

    def _place_call(self, node: Node) -> None:
        places = self.made.places
        operands = node.all_input_nodes
        common = self.everywhere.intersection(*(places[n] for n in operands))
        mixes = not common
        places[node] = common or self.everywhere
        self.made.readings[node] = [
            self._read(n, node, self.everywhere) if mixes else (n, False) for n in operands
        ]
        self.glue.append(node)
        if compat.is_random(node.target) and len(places[node]) > 1:
            raise StepError(
                f"'{node.name}' ({where(node)}) draws random numbers outside of the forward, which the ranks "
                "of a pipeline would each draw anew. Draw them outside of the step and pass them."
            )

    def _read(self, node: Node, reader: Node, needed: Places) -> Reading:
        """``node`` where it is ``needed``."""
        if needed <= self.made.places[node]:
            return node, False
        if num_bytes(node) > _LARGEST:
            at = ", ".join(map(str, sorted(self.made.places[node])))
            what = "is returned" if reader is node else f"is read by '{reader.name}' ({where(reader)})"
            name = self.names.get(node)
            raise StepError(
                f"'{name or node.name}'{'' if name else f' ({where(node)})'}, "
                f"{size_text(num_bytes(node))} of parameters, gradients or "
                f"state of one place of the pipeline ({at}), {what} at others. Numbers and small tensors are "
                "sent there, and this is too large: compute what is needed of it for each parameter alone (a "
                "norm, a mean), or outside of the step."
            )
        return node, True

    # --- time --------------------------------------------------------------------------------------------

    def _order(self) -> None:
        """Barriers, and the nodes between them."""
        made = self.made
        given = [n for n in made.step.graph.nodes if n.op in ("placeholder", "get_attr")]
        there: set[Reading] = {(n, False) for n in given}
        left = list(self.glue)
        while True:
            late = []
            for node in left:
                if there.issuperset(made.readings[node]):
                    made.interval[node] = len(made.barriers)
                    there.add((node, False))
                else:
                    late.append(node)
            left = late
            barrier = self._next(there, left)
            if barrier is None:
                break
            number = len(made.barriers)
            for reading in self._makes(barrier):
                made.made_by[reading] = number
                there.add(reading)
            made.barriers.append(barrier)
        self._refuse_later_losses()
        self._delay()

    def _refuse_later_losses(self) -> None:
        done = sum(isinstance(b, Run) for b in self.made.barriers)
        if done < len(self.regions):
            raise StepError(
                f"the loss that is differentiated at {where(self.regions[done].marker)} needs what is "
                "computed of a loss that is differentiated later, and a pipeline runs each forward with its "
                "backward. Call backward in the order in which the losses need each other."
            )

    def _delay(self) -> None:
        """Have what no barrier precedes run in the interval of its first reader."""
        made, last = self.made, len(self.made.barriers)
        first: dict[Node, int] = {}

        def read(readings: Sequence[Reading], interval: int) -> None:
            for node, sent in readings:
                if not sent:
                    first[node] = min(first.get(node, last), interval)

        for number, barrier in enumerate(made.barriers):
            if isinstance(barrier, Exchange):
                read([(n, False) for n in barrier.values], number)
            else:
                region = self.regions[barrier.region]
                read([*self.taken[barrier.region], *((n, False) for n in region.inputs)], number)
        for node in reversed(self.glue):
            if made.interval[node] == 0:
                made.interval[node] = first.get(node, last)
            read(made.readings[node], made.interval[node])

    def _next(self, there: set[Reading], left: Sequence[Node]) -> Barrier | None:
        done = sum(isinstance(b, Run) for b in self.made.barriers)
        if done < len(self.regions):
            region = self.regions[done]
            own = [(n, False) for n in region.inputs if n in self.parameters[done]]
            if there.issuperset([*own, *self.taken[done]]):
                return Run(done)
        waiting: list[Reading] = [r for taken in self.taken[done:] for r in taken]
        waiting += [r for node in left for r in self.made.readings[node]]
        waiting += self.made.readings[None]
        values = [n for n, sent in waiting if sent and (n, True) not in there and (n, False) in there]
        return Exchange(tuple(dict.fromkeys(values))) if values else None

    def _makes(self, barrier: Barrier) -> list[Reading]:
        if isinstance(barrier, Exchange):
            return [(n, True) for n in barrier.values]
        region = self.regions[barrier.region]
        gradients = [u for u in region.marker.users if u.target is operator.getitem]
        return [(n, False) for n in (*region.outputs, *gradients)]


def related_places(
    step: GraphModule, inputs: Sequence[Places | None], everywhere: Places
) -> list[Places | None]:
    """Places for inputs that have none yet: those of what they are computed with, node by node.

    So an average of parameters lies where the parameters do.
    """
    found = list(inputs)
    while _relate(step, found, everywhere):
        pass
    return found


def _relate(step: GraphModule, found: list[Places | None], everywhere: Places) -> bool:
    """Go through the step once; whether any input has got its places."""
    known: dict[Node, Places] = {}
    unknown: dict[Node, frozenset[int]] = {}
    settled = False
    for number, node in enumerate(step.graph.find_nodes(op="placeholder")):
        known[node] = found[number] or everywhere
        unknown[node] = frozenset() if found[number] else frozenset({number})
    for node in step.graph.nodes:
        if node.op == "placeholder":
            continue
        operands = node.all_input_nodes if node.op == "call_function" else []
        common = everywhere.intersection(*(known[n] for n in operands))
        among = frozenset[int]().union(*(unknown[n] for n in operands))
        known[node] = common or everywhere
        unknown[node] = among if common == everywhere else frozenset()
        if common and common != everywhere:
            for number in among:
                settled = settled or found[number] is None
                found[number] = found[number] or common
    return settled


def _outputs(step: GraphModule) -> list[Node]:
    """A step returns tensors."""
    return list(output_of(step).args[0])  # type: ignore[arg-type]


def _shape(node: Node) -> str:
    value = node.meta["val"]
    return f"{tuple(value.shape)} {value.dtype}"


__all__ = ["Exchange", "Run", "StepPlaces", "related_places", "step_places"]
