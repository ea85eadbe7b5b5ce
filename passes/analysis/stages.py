"""Where a program is cut into pipeline stages.

A stage is a stretch of the program's chain (:mod:`autodist.passes.analysis.chain`), so ``S`` stages are
``S - 1`` boundaries. They are chosen by the exact programme of :mod:`autodist.passes.analysis.bottleneck`,

    minimise    T = sum_s (f_s + b_s + x_s + y_s + d_s) + (M - 1) * period
    subject to  state * parameters_s + constants_s + in_flight(s) * (saved_s + received_s) <= memory
                open and forced boundaries, and owners of parameters

with, for the stage of the positions ``[i, j)`` and everything they need that is off the chain, each once:

    f, b         the cost model's seconds (:mod:`autodist.passes.analysis.cost`) of forward and backward
    x, y         seconds for which what crosses boundary ``i``, and the gradients back, occupy both sides
    d            the delay of that, there and back
    parameters   bytes of the distinct parameters read, also through producers; ``state`` is how many bytes a
                 stage holds for each: weight, gradient, optimizer state
    saved        bytes that the backward reads: stored values that a differentiated node reads and no
                 checkpoint makes again. A bound from above: the memory plan saves less
    received     bytes that cross boundary ``i``

All of it comes from fake values. A plan names the node that each stage begins at, says what it costs and why
it is there, and can be written as JSON, edited and priced again (:func:`priced`).
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.fx import GraphModule, Node

from autodist.passes.analysis import bottleneck
from autodist.passes.analysis.bottleneck import Costs, Item, Pins, Prices, Terms
from autodist.passes.analysis.chain import Chain, Inputs
from autodist.passes.analysis.cost import (
    gradient_seconds,
    graph_seconds,
    is_blocking_collective,
    transfer_delay,
    transfer_seconds,
)
from autodist.passes.analysis.fusion import fuse, is_view, tensors
from autodist.passes.analysis.hardware import Hardware
from autodist.passes.base import size_text
from autodist.passes.graph import num_bytes, where
from autodist.runtime import compat

BLOCKS = 128
"""Boundaries tried at a time in long programs."""
_NEIGHBOURS = 16  # places on each side of a cut that are tried to say why it is where it is


class StageError(ValueError):
    """A program cannot be cut into stages as asked; names the node, its source line and what would do."""


@dataclass(frozen=True)
class Setting:
    """What stages are planned for.

    ``state``: bytes a stage holds for each byte of its parameters (4: weight, gradient and two moments).
    ``between_nodes``: neighbouring stages are on different nodes. ``fused``: Inductor runs the stages.
    """

    hardware: Hardware
    terms: Terms
    state: float = 4.0
    between_nodes: bool = False
    fused: bool = True


@dataclass(frozen=True)
class CutValue:
    """A value that one stage sends to the next for every microbatch; ``gradient``: one comes back."""

    name: str
    num_bytes: int
    gradient: bool


@dataclass(frozen=True)
class StageCost:
    """One stage: what it computes, and what a microbatch costs it.

    ``first`` and ``last`` name its first and last node on the chain, ``first_line`` and ``last_line`` the
    source lines they come from. ``forward`` and ``backward`` are seconds of computation,
    ``forward_transfer`` and ``backward_transfer`` those in which it sends and receives. ``memory`` is all
    that it is predicted to hold with ``in_flight`` microbatches, each of ``activation_bytes``, what it
    ``receives`` among them.
    """

    first: str
    last: str
    first_line: str
    last_line: str
    forward: float
    backward: float
    forward_transfer: float
    backward_transfer: float
    parameters: tuple[str, ...]
    parameter_bytes: int
    activation_bytes: int
    in_flight: int
    memory: int
    receives: tuple[CutValue, ...]

    @property
    def seconds(self) -> float:
        """What a microbatch occupies the stage."""
        return self.forward + self.backward + self.forward_transfer + self.backward_transfer


@dataclass(frozen=True)
class StagePlan:
    """``cuts`` name the nodes that stages 1, 2, ... begin at, ``why`` says why there.

    ``seconds`` is what the schedule of ``microbatches`` is predicted to take.
    """

    cuts: tuple[str, ...]
    stages: tuple[StageCost, ...]
    why: tuple[str, ...]
    microbatches: int
    seconds: float

    @property
    def balance(self) -> float:
        """The slowest stage's seconds over the mean's: 1 is even."""
        each = [s.seconds for s in self.stages]
        return max(each) * len(each) / sum(each) if sum(each) else 1.0

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "balance": self.balance}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> StagePlan:
        """A plan written by :meth:`to_json`, and edited perhaps: then only ``cuts`` hold, until
        :func:`priced` says what they cost. Raises :class:`StageError`."""
        try:
            given = json.loads(text)
            given.pop("balance", None)
            stages = tuple(_stage_of(s) for s in given.pop("stages", ()))
            cuts, why = (tuple(map(_text, given.pop(k, ()))) for k in ("cuts", "why"))
            return cls(cuts=cuts, stages=stages, why=why, **{"microbatches": 1, "seconds": 0.0, **given})
        except (json.JSONDecodeError, AttributeError, TypeError) as error:
            raise StageError(
                f"this is no plan of stages ({error}): it must be a JSON object as StagePlan.to_json writes "
                "it, or one with 'cuts', the names of the nodes that stages begin at"
            ) from None


def _stage_of(given: dict[str, Any]) -> StageCost:
    receives = tuple(CutValue(**v) for v in given.pop("receives"))
    return StageCost(**{**given, "parameters": tuple(given["parameters"]), "receives": receives})


def _text(given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError(f"{given!r} is not text")
    return given


def partition(
    graph: GraphModule,
    inputs: Inputs,
    num_stages: int,
    setting: Setting,
    *,
    forced: Collection[str] = (),
    forbidden: Collection[str] = (),
    owners: Mapping[str, Collection[int]] | None = None,
    blocks: int | None = BLOCKS,
) -> StagePlan:
    """The plan with the shortest schedule for a functional forward graph of one microbatch.

    ``forced`` and ``forbidden`` name nodes that a stage must, or may not, begin at. ``owners`` names, for
    some parameters, the stages that have them: what reads one lies there. ``blocks`` bounds how many places
    for cuts are tried at a time; None tries all at once, which is exact. Raises :class:`StageError`.
    """
    program = _Program(graph, inputs, num_stages, setting, owners or {})
    pins = program.pins(forced, forbidden)
    ends = bottleneck.solve(program.costs, pins, setting.terms, blocks)
    if ends is None:
        raise StageError(program.why_not(pins, blocks))
    return program.plan(ends, pins)


def priced(
    graph: GraphModule,
    inputs: Inputs,
    cuts: Sequence[str],
    setting: Setting,
    *,
    owners: Mapping[str, Collection[int]] | None = None,
) -> StagePlan:
    """The plan whose stages begin at the nodes ``cuts``, or at modules of these names. Raises
    :class:`StageError` where none can begin, or a stage takes more memory than there is."""
    program = _Program(graph, inputs, len(cuts) + 1, setting, owners or {})
    ends = boundaries(program.chain, cuts)
    pins = program.pins(cuts, ())
    only = dataclasses.replace(pins, open=_only(ends))
    if bottleneck.solve(program.costs, only, setting.terms) is None:
        raise StageError(program.why_not_these(ends, pins))
    return program.plan(ends, pins)


def boundaries(chain: Chain, cuts: Sequence[str]) -> list[int]:
    """The boundaries of stages that begin at the nodes or modules ``cuts``, with both ends of the chain.

    Raises :class:`StageError` for a node that is not there or that no stage can begin at, and for nodes out
    of order.
    """
    ends = [0, *(_boundary(chain, name) for name in cuts), len(chain.nodes)]
    for name, previous, a, b in zip(cuts[1:], cuts, ends[1:], ends[2:], strict=False):
        if b <= a:
            raise StageError(
                f"a stage cannot begin at '{name}' after one that begins at '{previous}': the program runs "
                f"'{name}' {'first' if b < a else 'there too'}. Give cuts in the order in which it runs."
            )
    return ends


def _boundary(chain: Chain, name: str) -> int:
    nodes = {n.name: n for n in chain.order}
    node = nodes.get(name)
    if node is None and (first := _before_module(chain, name)) is not None:
        node = chain.nodes[first]
    if node is None:
        close = difflib.get_close_matches(name, [n.name for n in chain.nodes], 3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise StageError(
            f"a stage cannot begin at '{name}': the program has no such node, and reads no parameter of a "
            f"module of this name{hint}"
        )
    if node not in chain.position:
        kind = "is made again in every stage that reads it" if node.op == "call_function" else "is an input"
        after = next((n.name for n in chain.nodes if chain.order[n] > chain.order[node]), None)
        hint = f" The next node at which one could is '{after}'." if after else ""
        raise StageError(f"a stage cannot begin at '{name}' ({where(node)}), which {kind}.{hint}")
    at = chain.position[node]
    if at == 0:
        raise StageError(f"a stage cannot begin at '{name}': the first stage does, and none may be empty")
    if at in chain.closed:
        raise StageError(f"a stage cannot begin at '{name}' ({where(node)}): {_tuple(chain.closed[at])}")
    return at


def _before_module(chain: Chain, name: str) -> int | None:
    """The boundary before the module (or parameter) ``name``: between the last use of another's parameter and
    the first use of one of its own, where the least crosses."""
    own: list[bool] = []
    for position in range(len(chain.nodes)):
        names = [n for n in map(chain.parameter, chain.needs(position)) if n is not None]
        mine = any(n == name or n.startswith(f"{name}.") for n in names)
        if mine:
            before = max((i + 1 for i, other in enumerate(own) if other), default=0)
            room = [b for b in range(before, position + 1) if b not in chain.closed]
            crossing = {b: sum(num_bytes(c.node) for c in chain.crossing(b)) for b in room}
            return min(crossing, key=crossing.__getitem__, default=position)
        own.append(bool(names))
    return None


def _tuple(node: Node) -> str:
    return (
        f"the results of '{node.name}' ({where(node)}) would have to be sent as a tuple, and only tensors "
        "can be sent"
    )


def _only(ends: Sequence[int]) -> np.ndarray:
    found = np.zeros(ends[-1] + 1, bool)
    found[list(ends)] = True
    return found


# --- a program's costs -----------------------------------------------------------------------------


class _Program:
    """A graph as the arrays that the programme takes, and its answers in the graph's terms."""

    def __init__(
        self,
        graph: GraphModule,
        inputs: Inputs,
        num_stages: int,
        setting: Setting,
        owners: Mapping[str, Collection[int]],
    ) -> None:
        if num_stages < 1:
            raise StageError(f"a program is cut into at least 1 stage, not {num_stages}")
        self.chain, self.setting, self.num_stages = Chain(graph, inputs), setting, num_stages
        self.needs = [self.chain.needs(k) for k in range(len(self.chain.nodes))]
        self.costs = self._costs(graph)
        self.owners = {name: frozenset(stages) for name, stages in owners.items()}

    def _costs(self, graph: GraphModule) -> Costs:
        chain, setting = self.chain, self.setting
        forward = graph_seconds(graph.graph, setting.hardware, fused=setting.fused)
        backward = gradient_seconds(graph.graph, setting.hardware, chain.followed, fused=setting.fused)
        for node in chain.followed:
            if compat.checkpoint_recomputes(node):
                backward[node] += forward[node]
        saved = _saved_bytes(chain, setting.fused)
        items, uses = self._items(forward, backward, saved)
        transfer, delay, received = self._transfers()

        def along(per: Mapping[Node, float]) -> np.ndarray:
            return np.array([per[n] for n in chain.nodes], float)

        return Costs(
            along(forward), along(backward), along(saved), transfer, delay, received, items, uses
        )

    def _items(
        self, forward: Mapping[Node, float], backward: Mapping[Node, float], saved: Mapping[Node, int]
    ) -> tuple[list[Item], list[list[int]]]:
        """What stages have once: parameters by their names, constants, producers that cost anything."""
        numbers: dict[str, int] = {}
        items: list[Item] = []
        of: dict[Node, int | None] = {}
        weights = self._weights()
        for node in dict.fromkeys(n for needed in self.needs for n in needed):
            name, held, kept = self.chain.parameter(node), 0.0, 0.0
            if node.op in ("placeholder", "get_attr") and node.name not in self.chain.inputs.batch:
                held = num_bytes(node) * (1.0 if name is None else self.setting.state)
            elif node not in weights:
                kept = saved[node]
            item = Item(f"parameter {name}" if name else node.name, forward[node], backward[node], held, kept)
            if not (item.forward or item.backward or held or kept or name):
                of[node] = None
                continue
            of[node] = numbers.setdefault(item.name, len(items))
            if of[node] == len(items):
                items.append(item)
        uses = [sorted({i for n in needed if (i := of[n]) is not None}) for needed in self.needs]
        return items, uses

    def _weights(self) -> set[Node]:
        """Parameters and producers made of them: gathered or cast anew rather than kept for a microbatch."""
        found: set[Node] = set()
        for node in self.chain.order:
            if self.chain.parameter(node) or any(n in found for n in node.all_input_nodes):
                found.add(node)
        return found

    def _transfers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each boundary: seconds forward and back, delay, and the bytes that cross it."""
        hardware, far = self.setting.hardware, self.setting.between_nodes
        length = len(self.chain.nodes)
        change = np.zeros((length + 2, 2, 2))  # (boundary, forward or back, bytes and messages)
        for crossing in self.chain.crossings:
            size = num_bytes(crossing.node)
            for way, end in enumerate((crossing.end, crossing.gradient_end)):
                if end > crossing.start:
                    change[crossing.start + 1, way] += (size, 1)
                    change[end + 1, way] -= (size, 1)
        total = np.cumsum(change, 0)[: length + 1]
        seconds = [[transfer_seconds(size, n, hardware, far) for size, n in both] for both in total]
        delay = (total[..., 1] > 0).sum(-1) * transfer_delay(hardware, far)
        return np.array(seconds), delay, total[:, 0, 0]

    # --- pins ------------------------------------------------------------------------------------------

    def pins(self, forced: Iterable[str], forbidden: Iterable[str]) -> Pins:
        chain, length = self.chain, len(self.chain.nodes)
        if length < self.num_stages:
            raise StageError(
                f"a program cannot be cut into {self.num_stages} stages: only {length} of its nodes depend "
                "on parameters and on the batch, and every stage needs one"
            )
        free = np.ones(length + 1, bool)
        free[list(chain.closed)] = False
        must = {name: _boundary(chain, name) for name in forced}
        for name in forbidden:
            if name in must:
                raise StageError(f"a stage must begin at '{name}', and may not: it is forced and forbidden")
            free[_boundary(chain, name)] = False
        if len(set(must.values())) > self.num_stages - 1:
            raise StageError(
                f"{self.num_stages} stages begin at {self.num_stages - 1} nodes beside the first, and "
                f"{len(must)} are forced: {', '.join(must)}"
            )
        room = int(free[1:-1].sum()) + 1
        if room < self.num_stages:
            raise StageError(self._no_room(room))
        return Pins(free, frozenset(must.values()), self._may(length))

    def _no_room(self, room: int) -> str:
        causes = list(dict.fromkeys(self.chain.closed.values()))
        count = {n: sum(c is n for c in self.chain.closed.values()) for n in causes}
        worst = max(causes, key=count.__getitem__, default=None)
        reason = "" if worst is None else (
            f" Most places are lost because {_tuple(worst)}; return tensors there, or use the tuple's items "
            "at once."
        )  # fmt: skip
        stages = "stage" if room == 1 else "stages"
        return f"this program can be cut into at most {room} {stages}, not {self.num_stages}.{reason}"

    def _may(self, length: int) -> np.ndarray:
        may = np.ones((self.num_stages, length), bool)
        for stages in self.owners.values():
            beyond = [s for s in stages if not 0 <= s < self.num_stages]
            if beyond:
                last = self.num_stages - 1
                raise StageError(f"owners name stage {beyond[0]}, and there are stages 0 to {last}")
        for k in range(length):
            owned = [p for p in self._parameters_at(k) if p in self.owners]
            for name in owned:
                may[[s for s in range(self.num_stages) if s not in self.owners[name]], k] = False
            if not may[:, k].any():
                texts = [f"'{p}' ({_stages(self.owners[p])})" for p in owned]
                raise StageError(f"{self._at(k)} reads {' and '.join(texts)}, which no stage has together")
        possible, conflict = bottleneck.reachable(may)
        if conflict is not None:
            raise StageError(self._out_of_order(may, conflict))
        return possible

    def _out_of_order(self, may: np.ndarray, k: int) -> str:
        """Why position ``k`` can be in none of its stages: what is before it is in a later one."""
        now, since = 0, 0
        for i in range(k):
            least = now + int(np.flatnonzero(may[now:, i])[0])
            now, since = (least, i) if least > now else (now, since)
        mine, theirs = (
            next(p for p in self._parameters_at(i) if p in self.owners and needs not in self.owners[p])
            for i, needs in ((k, now), (since, now - 1))
        )
        return (
            f"{self._at(k)} reads '{mine}' ({_stages(self.owners[mine])}), but runs after {self._at(since)}, "
            f"which reads '{theirs}' ({_stages(self.owners[theirs])}). Stages follow the order in which the "
            "program runs: cut it where both graphs of the model can be cut."
        )

    def _at(self, position: int) -> str:
        node = self.chain.nodes[position]
        return f"'{node.name}' ({where(node)})"

    def _parameters_at(self, position: int) -> list[str]:
        names = (self.chain.parameter(n) for n in self.needs[position])
        return sorted({n for n in names if n is not None})

    # --- answers ---------------------------------------------------------------------------------------

    def why_not(self, pins: Pins, blocks: int | None) -> str:
        terms = self.setting.terms
        least = bottleneck.least_memory(self.costs, pins, terms, blocks)
        if least is None:
            forced = ", ".join(f"'{self.chain.nodes[b].name}'" for b in sorted(pins.forced)) or "none"
            return (
                f"no {self.num_stages} stages keep all that is asked: stages that begin at {forced}, the "
                "places forbidden, and the owners of parameters leave some stage without a node"
            )
        return (
            f"no {self.num_stages} stages fit in {size_text(terms.memory or 0)} each. "
            f"{self._largest(least)} More stages, fewer microbatches in flight, or checkpoints would do with "
            "less."
        )

    def why_not_these(self, ends: Sequence[int], pins: Pins) -> str:
        terms = self.setting.terms
        if max(bottleneck.memory_of(self.costs, ends, terms)) > (terms.memory or np.inf):
            return f"these stages do not fit in {size_text(terms.memory or 0)} each. {self._largest(ends)}"
        for s, (a, b) in enumerate(itertools.pairwise(ends)):
            for k in range(a, b):
                if not pins.may[s, k]:
                    owned = [p for p in self._parameters_at(k) if s not in self.owners.get(p, {s})]
                    text = f" reads '{owned[0]}' ({_stages(self.owners[owned[0]])})" if owned else ""
                    return f"{self._at(k)} cannot lie in stage {s}{': it' if text else ''}{text}"
        raise AssertionError("these stages are possible")

    def _largest(self, ends: Sequence[int]) -> str:
        """What would do, and the stage that decides it."""
        plan = self.plan(ends, None)
        stage = max(range(self.num_stages), key=lambda s: plan.stages[s].memory)
        cost = plan.stages[stage]
        return (
            f"The least that would do is {size_text(cost.memory)} ({cost.memory} bytes), for stage {stage} "
            f"('{cost.first}' to '{cost.last}'): {size_text(self.setting.state * cost.parameter_bytes)} of "
            f"parameters and their state, {cost.in_flight} microbatches in flight of "
            f"{size_text(cost.activation_bytes)}."
        )

    def plan(self, ends: Sequence[int], pins: Pins | None) -> StagePlan:
        """The plan with these boundaries; reasons need the pins it was made under."""
        found = bottleneck.prices(self.costs, ends)
        stages = tuple(self._stage(s, found) for s in range(self.num_stages))
        cuts = tuple(self.chain.nodes[b].name for b in ends[1:-1])
        seconds = bottleneck.evaluate(self.costs, ends, self.setting.terms)
        why = () if pins is None else tuple(
            self._why(number, ends, pins, found, seconds) for number in range(1, self.num_stages)
        )  # fmt: skip
        return StagePlan(cuts, stages, why, self.setting.terms.microbatches, seconds)

    def _stage(self, number: int, found: Prices) -> StageCost:
        here, chain = (number, number + 1), self.chain
        start, end = (int(e) for e in found.ends[list(here)])
        first, last = chain.nodes[start], chain.nodes[end - 1]
        in_flight = self.setting.terms.in_flight(number, self.num_stages)
        used = {n for k in range(start, end) for n in self.needs[k]}
        read = sorted((n for n in used if chain.parameter(n)), key=chain.order.__getitem__)
        sizes = {chain.parameter(n): num_bytes(n) for n in read}
        forward, backward = found.transfer[number] + found.transfer[number + 1]
        return StageCost(
            first=first.name,
            last=last.name,
            first_line=where(first),
            last_line=where(last),
            forward=float(found.forward[here]),
            backward=float(found.backward[here]),
            forward_transfer=float(forward),
            backward_transfer=float(backward),
            parameters=tuple(name for name in sizes if name),
            parameter_bytes=sum(sizes.values()),
            activation_bytes=int(found.in_flight[here]),
            in_flight=in_flight,
            memory=int(found.memory(in_flight)[here]),
            receives=tuple(
                CutValue(c.node.name, num_bytes(c.node), c.carries_gradient(start))
                for c in (chain.crossing(start) if start else ())
            ),
        )

    def _why(self, cut: int, ends: Sequence[int], pins: Pins, found: Prices, seconds: float) -> str:
        """What a cut costs, and what the best place near it would cost instead."""
        at = ends[cut]
        crossing = self.chain.crossing(at)
        sent = sum(num_bytes(c.node) for c in crossing)
        back = sum(num_bytes(c.node) for c in crossing if c.carries_gradient(at))
        values = "1 value crosses" if len(crossing) == 1 else f"{len(crossing)} values cross"
        text = (
            f"{values}: {size_text(sent)} a microbatch, {size_text(back)} of gradients back, "
            f"{self.costs.transfer[at].sum() * 1e3:.3g} ms"
        )
        if at in pins.forced:
            text = f"asked for; {text}"
        place, other = self._next_best(cut, ends, pins)
        if place is None:
            return f"{text}; no place near it is possible"
        name, more = self.chain.nodes[place].name, other / seconds - 1
        return f"{text}; the next best place near it, '{name}', makes the schedule {more:.2%} longer"

    def _next_best(self, cut: int, ends: Sequence[int], pins: Pins) -> tuple[int | None, float]:
        """The best other place for a cut, among those near it and between its neighbours."""
        at = ends[cut]
        room = np.flatnonzero(pins.open[ends[cut - 1] + 1 : ends[cut + 1]]) + ends[cut - 1] + 1
        near = [*room[room < at][-_NEIGHBOURS:].tolist(), *room[room > at][:_NEIGHBOURS].tolist()]
        found = bottleneck.alternatives(self.costs, ends, cut, near, pins, self.setting.terms)
        best = min(found, key=found.__getitem__, default=None)
        return best, np.inf if best is None else found[best]


def _stages(numbers: Collection[int]) -> str:
    names = ", ".join(map(str, sorted(numbers)))
    return f"in stage {names}" if len(numbers) == 1 else f"in stages {names}"


def _saved_bytes(chain: Chain, fused: bool) -> dict[Node, int]:
    """Bytes that each node makes and the backward reads."""
    stored = fuse(chain.graph.graph).stored if fused else None
    found = dict.fromkeys(chain.order, 0)
    for node in chain.order:
        if node.op != "call_function" or is_view(node) or is_blocking_collective(node):
            continue
        has_memory = bool(tensors(node)) and (stored is None or node in stored)
        if has_memory and _is_read_back(node, chain):
            found[node] = num_bytes(node)
    return found


def _is_read_back(node: Node, chain: Chain) -> bool:
    """Whether a backward reads a node's value, and no checkpoint makes it again for that."""
    readers = [u for u in node.users if u.op == "call_function"]
    if compat.checkpoint_recomputes(node):
        region = node.meta.get("ac_graph_id")
        readers = [u for u in readers if u.meta.get("ac_graph_id") != region]
    return any(u in chain.followed for u in readers)
