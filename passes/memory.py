"""One memory plan: what the backward needs is saved, offloaded or computed again, within a budget.

The candidates and their costs are those of :mod:`autodist.passes.analysis.savable`, the choice among them is
made by :mod:`autodist.passes.analysis.budget`, and the parts are extracted with exactly the chosen values
between them.

The budget is on the *peak* of a part: choices are searched for the cheapest that meets it
(:mod:`autodist.passes.analysis.search`), each replayed on the joint graph
(:mod:`autodist.passes.analysis.replay`). Parts of the choice found are drafted
(:mod:`autodist.passes.drafts`) and scheduled, and their peak read off the schedule; where the replay was off
by some bytes, the search is made again with that correction. The choice taken is extracted.

When what torch's min-cut saves fits, that is taken: nothing is offloaded, nor recomputed beyond it, and room
that is left goes to weights kept from forward to backward, those first that save the most gather time a byte.

*State.* A captured step knows what its optimizer keeps: tensors that lie beside the forward and the backward
and are read and written once a step. Each is one more value of the same problem, which is saved (on the
device) or offloaded (its place is the host: a copy there and a copy back), and never computed again:

    minimise    seconds added  =  sum over values  +  sum over state on the host  2 b_s / bandwidth
    subject to  peak of the parts  +  b of the state on the device  <=  room
                b offloaded  +  b of the state on the host          <=  host

so a byte of state is freed when that is cheaper than a byte of activations, by the same prices and as exactly
as the rest. Not exact is the price, an upper bound (copies may hide behind the update of another parameter);
that of several backwards in one step, which are planned in turn, each keeps the state that those before it
moved where it is; and what the update itself holds: it is read off the whole step afterwards, and corrected
for. State once moved stays on the host.

What is computed again decides which weights are gathered again, so the choice is made once: by the first
rank, for the rank that holds the most.

Where copies run beside the computation, as much is offloaded as can be copied while the forward runs; more,
only when nothing else fits.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from autodist.passes.analysis.budget import Choice, How, Value, evaluate
from autodist.passes.analysis.cost import node_seconds, node_work
from autodist.passes.analysis.fusion import is_view as shares_memory
from autodist.passes.analysis.hardware import Hardware
from autodist.passes.analysis.lengths import Sample
from autodist.passes.analysis.replay import Replay
from autodist.passes.analysis.savable import READS, Rules, Savable, backward_nodes, is_number, savable
from autodist.passes.analysis.search import Search, Try
from autodist.passes.base import Context, Means, PassError, size_text
from autodist.passes.drafts import Parts, drafted, names
from autodist.passes.graph import (
    insert,
    is_copy,
    is_view,
    num_bytes,
    output_of,
    parameter_of,
    positions,
    source,
)
from autodist.runtime import compat, dialect, offload

_ATTEMPTS = 3
_CORRECTIONS = 6
_NEAR = 0.02  # of the room: as close as it is worth to come
_DOUBT = 0.3  # of a guessed peak


class MemoryBoundError(PassError):
    """A memory bound that no choice keeps. ``least`` bytes are the least that would do. ``alone``: ranks have
    agreed on a plan before, and only this one's batch is too large for it."""

    def __init__(self, message: str, least: int, alone: bool = False) -> None:
        super().__init__(message)
        self.least, self.alone = least, alone


@dataclass(frozen=True)
class Peak:
    """The most bytes that a program's parts hold, and the largest buffers then: (name, bytes)."""

    num_bytes: int
    top: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Budget:
    """``device`` bytes for what parts hold at their peak, ``host`` bytes for what is offloaded.

    ``keep_weights``: gathered weights are saved, whatever they cost (ZeRO-1 and ZeRO-2). Where kernels are
    still to be fused peaks are guesses, and somebody will read the program: then ``as_is`` gives what torch's
    min-cut saves the benefit of the doubt, and ``least`` the tightest choice, where they seem a little too
    large. Once a program has been read, and has missed, the tightest choice is taken ``anyway``: what is
    made of it will be read, too.
    """

    device: int
    host: int
    keep_weights: bool
    as_is: bool = False
    least: bool = False
    anyway: bool = False


@dataclass(frozen=True)
class Beside:
    """Bytes that live on the device beside a program, and could on the host: optimizer state."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class Program:
    """A joint graph that torch's min-cut has prepared, and what it saves of it, by name.

    ``lasting`` are positions of inputs that live longer than the program. ``subject`` is what ranks that plan
    the same program call it, and does not depend on sizes. ``state`` lives beside it.
    """

    joint: GraphModule
    num_outputs: int
    lasting: Sequence[int]
    saved: frozenset[str]
    subject: str
    state: Sequence[Beside] = ()


@dataclass(frozen=True)
class Fitted:
    """The parts, the seconds that their plan adds, the bytes at their peak, state among them, and the numbers
    of the state that it wants on the host."""

    parts: Parts
    seconds: float
    peak: int
    on_host: frozenset[int]


def fit(program: Program, budget: Budget, context: Context, measure: Callable[[Parts], Peak]) -> Fitted:
    """The two parts of ``program``, within ``budget`` by the fewest added seconds.

    ``measure`` schedules two parts, which it may change, and says what they hold at the peak. Where the
    context collects samples one is added to them, and nothing is fitted. Raises :class:`MemoryBoundError`,
    which says the least that would do and what dominates there.
    """
    return _Fit(program, budget, context, measure).run()


class _Fit:
    def __init__(
        self, program: Program, budget: Budget, context: Context, measure: Callable[[Parts], Peak]
    ) -> None:
        self.program, self.budget, self.context, self.measure = program, budget, context, measure
        rules = Rules(program.saved, budget.keep_weights, budget.host > 0, dict(context.group_sizes))
        self.found: Savable = savable(program.joint, program.num_outputs, rules, context.hardware)
        backward = backward_nodes(program.joint)
        forward = [n for n in program.joint.graph.nodes if n not in backward and n.op != "output"]
        self.sizes = [n for n in forward if is_number(n) and n.op in ("call_function", "placeholder")]
        plain = (torch.Tensor, tuple, list)
        self.opaque = [
            n for n in forward
            if n.name in program.saved and not is_number(n) and not isinstance(n.meta["val"], plain)
        ]  # fmt: skip
        self.forward = [node_work(n, context.hardware) for n in forward]
        self.seconds = sum(work.seconds(context.hardware) for work in self.forward)
        self.backward = [node_work(n, context.hardware) for n in program.joint.graph.nodes if n in backward]
        copies = context.hardware.host_bandwidth
        self.values = (*self.found.values, *(_value_of(k, budget.host > 0, copies) for k in program.state))
        self.room = budget.device
        self.peaks: dict[tuple[How, ...], Peak] = {}
        self.drafts: dict[tuple[How, ...], tuple[tuple[str, ...], ...]] = {}
        self.drafting = all(n.op == "placeholder" for n in (*self.sizes, *self.opaque))
        nodes, fused = self.found.nodes, context.fused
        self.replay = Replay(program.joint, program.num_outputs, nodes, backward, fused)
        self.correction = 0

    def run(self) -> Fitted:
        as_is = self._try_as_is()
        if self.context.samples is not None:
            self.context.samples.append(self._sample(as_is))
            return Fitted(self._parts(as_is.choice), 0.0, as_is.peak, frozenset())
        subject, most = self.program.subject, self.context.largest
        # Seen from the first rank, which chooses, the room is that of the rank with the least.
        self.room -= most(f"what {subject} lacks", as_is.peak - self.budget.device) - (
            as_is.peak - self.budget.device
        )
        for attempt in range(_ATTEMPTS):
            label = f"memory plan {attempt} of {subject}"
            choice = self._read(self.context.agree(label, lambda: self._written_choice(as_is)))
            parts = self._made(choice)
            peak = self._measured(choice).num_bytes
            over = peak - self.budget.device
            worst = most(f"what {label} lacks", over)
            if max(over, worst) <= 0 or self.budget.least or self.budget.anyway:
                self._tell(choice, as_is)
                added = max(choice.seconds - as_is.choice.seconds, 0.0)
                state = enumerate(self._of_state(choice.how))
                moved = frozenset(i for i, h in state if h is How.OFFLOAD)
                return Fitted(parts, added, peak, moved)
            alone = over > worst  # settled before, with smaller batches
            if alone:
                break
            self.room -= worst
        bound, lacks = self.context.memory or 0, max(over, worst)
        raise MemoryBoundError(
            f"the plan's memory bound is {size_text(bound)}, and the plan that ranks made together lacks "
            f"{size_text(lacks)}. Raise 'memory', or begin with the largest batch.",
            bound + lacks,
            alone,
        )

    def _choose(self, as_is: Try) -> Choice:
        doubt = _DOUBT if self.budget.as_is else 0.0
        if as_is.peak * (1 - doubt) <= self.room:
            return self._with_weights(as_is)
        return self._search(as_is).choice

    def _written_choice(self, as_is: Try) -> str:
        """The choice, or why there is none, for all ranks."""
        try:
            choice = self._choose(as_is)
        except MemoryBoundError as error:
            return json.dumps([str(error), error.least])
        return json.dumps([choice.bound, [h.value for h in choice.how]])

    def _read(self, text: str) -> Choice:
        bound, how = json.loads(text)
        if isinstance(bound, str):
            raise MemoryBoundError(bound, how)
        return replace(evaluate(self.values, [How(h) for h in how]), bound=bound)

    # --- what fits anyway -----------------------------------------------------------------------------

    def _try_as_is(self) -> Try:
        """What torch's min-cut chose; weights are gathered again, and what happens once is saved."""
        reads = {n for n in self.found.nodes if n.target in READS and not self.budget.keep_weights}
        of_weights = {n for n in self.found.nodes if source(n, _is_of_weight) in reads}
        # In a checkpoint min-cut draws random numbers again, from generators whose states it saves.
        kept = {
            n for n, v in zip(self.found.nodes, self.found.values, strict=True)
            if math.isinf(v.recompute) and math.isfinite(v.save)
        }  # fmt: skip
        kept |= {n for n in self.found.nodes if n.name in self.program.saved and n not in of_weights}
        how = [How.SAVE if n in kept else How.RECOMPUTE for n in self.found.nodes]
        how += [How.SAVE] * len(self.program.state)
        choice = evaluate(self.values, how)
        measured = self._measured(choice).num_bytes
        self.correction = measured - self._replayed(choice.how)
        return Try(choice, measured)

    def _with_weights(self, as_is: Try) -> Choice:
        """What min-cut chose, with weights saved that there is room for."""
        left, how = self.room - as_is.peak, list(as_is.choice.how)
        for i in sorted(self._gathers(as_is.choice), key=self._seconds_per_byte, reverse=True):
            size = self.found.values[i].num_bytes
            if size <= left:
                left -= size
                how[i] = How.SAVE
        return evaluate(self.values, how)

    def _gathers(self, choice: Choice) -> list[int]:
        """Weights that are gathered again."""
        nodes = enumerate(self.found.nodes)
        return [i for i, n in nodes if n.target is dialect.unshard and choice.how[i] is How.RECOMPUTE]

    def _seconds_per_byte(self, i: int) -> float:
        value = self.found.values[i]  # to recompute a weight is to gather it
        return value.recompute / max(value.num_bytes, 1)

    def _sample(self, as_is: Try) -> Sample:
        works, room, host = (*self.forward, *self.backward), self.room, self.budget.host
        how, count = as_is.choice.how, len(self.forward)
        return Sample(self.found, self.replay, how, self.correction, works, count, room, host)

    # --- what does not ------------------------------------------------------------------------------------

    def _search(self, loose: Try) -> Try:
        """The choice of the fewest added seconds whose measured peak fits."""
        measured: dict[Choice, Peak] = {}
        hosts = self._host_budgets()
        search = Search(self.values, self.found.results, self._replayed, hosts)
        search.correction = self.correction
        for _ in range(_CORRECTIONS):
            tried, fits = search.within(self.room, loose)
            if tried.choice in measured:
                break
            peak = measured[tried.choice] = self._measured(tried.choice)
            spare = self.room - peak.num_bytes
            if (fits and 0 <= spare <= _NEAR * self.room) or (not fits and spare < 0):
                break
            search.correction += peak.num_bytes - tried.peak
        fitting = [c for c, p in measured.items() if p.num_bytes <= self.room]
        if fitting:
            choice = min(fitting, key=operator.attrgetter("seconds"))
            return Try(choice, measured[choice].num_bytes)
        least = min(measured, key=lambda c: measured[c].num_bytes)
        doubt = _DOUBT if self.budget.least else 0.0
        if measured[least].num_bytes * (1 - doubt) > self.room and not self.budget.anyway:
            raise self._refusal(measured[least])
        return Try(least, measured[least].num_bytes)

    def _host_budgets(self) -> list[int]:
        """Bytes to offload at the most: first what hides behind the forward, then all that is allowed."""
        hardware, limit = self.context.hardware, self.budget.host
        hidden = int(self.seconds * hardware.host_bandwidth) if hardware.copies_overlap else limit
        return [hidden, limit] if hidden < limit else [limit]

    def _replayed(self, how: Sequence[How]) -> int:
        parts = self.replay.peak(self._of_parts(how))
        return parts + sum(k.num_bytes for k in self._beside(how))

    def _measured(self, choice: Choice) -> Peak:
        of_parts = self._of_parts(choice.how)
        if of_parts not in self.peaks:
            draft = self._draft(choice) if self.drafting else self._parts(choice)
            self.drafts[of_parts] = names(draft)
            self.peaks[of_parts] = self.measure(draft)
        found, beside = self.peaks[of_parts], [(k.name, k.num_bytes) for k in self._beside(choice.how)]
        top = sorted([*found.top, *beside], key=operator.itemgetter(1), reverse=True)
        return Peak(found.num_bytes + sum(size for _, size in beside), tuple(top))

    def _of_parts(self, how: Sequence[How]) -> tuple[How, ...]:
        return tuple(how[: len(self.found.nodes)])

    def _of_state(self, how: Sequence[How]) -> Sequence[How]:
        return how[len(self.found.nodes) :]

    def _beside(self, how: Sequence[How]) -> list[Beside]:
        """State that stays on the device."""
        state = zip(self.program.state, self._of_state(how), strict=True)
        return [k for k, h in state if h is How.SAVE]

    def _refusal(self, least: Peak) -> MemoryBoundError:
        context = self.context
        top = ", ".join(f"{name} ({size_text(size)})" for name, size in least.top[:5])
        asked, peak, outside = context.memory or 0, least.num_bytes, context.resident
        peak += self.budget.device - self.room
        return MemoryBoundError(
            f"the plan's memory bound is {size_text(asked)}, and the least that this program can do with is "
            f"{size_text(peak + outside)}: {size_text(outside)} of gradients and optimizer state, and "
            f"{size_text(peak)} at the peak, of which the largest are {top}. Raise 'memory', shard over more "
            f"ranks, split sequences ('sp'), or make the batch smaller.{self._hint()}",
            peak + outside,
        )

    def _hint(self) -> str:
        if self.program.state or self.context.resident == 0:
            return ""
        return " Of a captured step (autodist.train_step) the optimizer's state can be kept on the host."

    def _tell(self, choice: Choice, as_is: Try) -> None:
        bound, values, nodes = size_text(self.context.memory or 0), self.values, len(self.found.nodes)
        for i in self._gathers(as_is.choice):
            name = parameter_of(source(self.found.nodes[i].args[0]), self.context.parameters)  # type: ignore[arg-type]
            if choice.how[i] is How.SAVE:
                self.context.decide(name, "kept whole", f"there is room for it within {bound}")
            else:
                self.context.decide(name, "regathered in backward", f"{bound} leave no room to keep it")
        before = as_is.choice.how
        again = [i for i, h in enumerate(choice.how) if h is How.RECOMPUTE and before[i] is How.SAVE]
        moved = [i for i, h in enumerate(choice.how) if h is How.OFFLOAD]
        if not again and not moved:
            return
        self.context.decide(
            "memory",
            "planned",
            f"{size_text(as_is.peak)} unplanned; {size_text(choice.device_bytes)} are saved, "
            f"{size_text(choice.host_bytes)} offloaded, about {choice.seconds * 1e3:.2f} ms added, "
            f"within {choice.gap:.1%} of the best",
        )
        for i in moved:
            costs = f"{size_text(values[i].num_bytes)}; {values[i].offload * 1e3:.3f} ms of copies"
            action = "offloaded" if i < nodes else "on the host"
            self.context.decide(values[i].name, action, f"{costs}, to stay in {bound}", Means.OFFLOAD)
        for i in again:
            costs = f"{size_text(values[i].num_bytes)}; {values[i].recompute * 1e3:.3f} ms again"
            reason = f"{costs}, to stay in {bound}"
            self.context.decide(values[i].name, "recomputed", reason, Means.RECOMPUTE)

    # --- parts ------------------------------------------------------------------------------------------

    def _parts(self, choice: Choice) -> Parts:
        kept = dict(zip(self.found.nodes, self._of_parts(choice.how), strict=True))
        saved = [n for n, h in kept.items() if h in (How.SAVE, How.OFFLOAD) and n.op == "call_function"]
        program = self.program
        parts = compat.extract_parts(
            program.joint, saved, self.sizes, self.opaque, program.num_outputs, program.lasting
        )
        self._offload(parts, choice)
        return parts

    def _draft(self, choice: Choice) -> Parts:
        """What :meth:`_parts` will be, for its peak."""
        kept = self.replay.kept(self._of_parts(choice.how))
        parts = drafted(self.program.joint, self.program.num_outputs, self.replay, kept)
        self._offload(parts, choice)
        return parts

    def _made(self, choice: Choice) -> Parts:
        """The parts of a choice. Where they are not what its peak was read from, it is read again from them,
        and those of later choices, too."""
        parts = self._parts(choice)
        self._measured(choice)
        if names(parts) != self.drafts[self._of_parts(choice.how)]:
            self.drafting = False
            self.peaks.clear()
        return parts

    def _offload(self, parts: Parts, choice: Choice) -> None:
        chosen = zip(self.found.nodes, choice.how, strict=False)  # what follows is state
        moved = {n.name for n, h in chosen if h is How.OFFLOAD}
        if moved:
            _offload(parts, moved, self.program.num_outputs, self.budget.host, self.context.hardware)


def _value_of(kept: Beside, can_move: bool, bandwidth: float) -> Value:
    copies = 2 * kept.num_bytes / bandwidth if can_move else math.inf
    return Value(kept.name, kept.num_bytes, (), True, math.inf, 0.0, copies)


def _is_of_weight(node: Node) -> bool:
    return is_view(node) or is_copy(node)


# --- offloading ---------------------------------------------------------------------------------------


def _offload(parts: Parts, names: set[str], num_outputs: int, limit: int, hardware: Hardware) -> None:
    """Copy the saved values ``names`` to the host in the forward part, and back in the backward part."""
    forward, backward = parts
    output = output_of(forward)
    results = list(output.args[0])  # type: ignore[arg-type]
    for i in range(num_outputs, len(results)):
        node = results[i]
        if node.name in names:
            results[i] = _copied_out(forward, node, limit)
    output.args = (tuple(results),)
    for node in backward.graph.find_nodes(op="placeholder"):
        if node.name in names:
            _copied_back(backward, node, hardware)
    for part in parts:
        part.graph.lint()
        part.recompile()


def _copied_out(forward: GraphModule, node: Node, limit: int) -> Node:
    """The host's copy of a value, begun where the value is made and waited for after its last reader."""
    order, value = positions(forward.graph), node.meta["val"]
    last = max(_reads(node), key=order.__getitem__, default=node)
    with forward.graph.inserting_after(node):
        token = insert(forward.graph, offload.offload_start, (node, list(value.stride()), limit), node)
    with forward.graph.inserting_after(token if last is node else last):
        return insert(forward.graph, offload.offload_wait, (token, node), node)


def _reads(node: Node) -> list[Node]:
    """What computes with a node's value or a view of it, the output of the graph left out."""
    found: list[Node] = []
    for user in node.users:
        if user.op == "output":
            continue
        found.append(user)
        if shares_memory(user):
            found += _reads(user)
    return found


def _copied_back(backward: GraphModule, node: Node, hardware: Hardware) -> None:
    """Let a placeholder be the host's copy; it is asked for early enough to be there when it is read."""
    graph, value = backward.graph, node.meta["val"]
    order = positions(graph)
    readers = list(node.users)
    first = min(readers, key=order.__getitem__)
    start = _early(graph, first, num_bytes(node), hardware)
    layout = (list(value.shape), list(value.stride()), value.device)
    with compat.fake_mode_of([value]) or contextlib.nullcontext():
        node.meta["val"] = torch.empty((value.numel(),), dtype=value.dtype, device="cpu")
    node.meta["host"] = True
    with graph.inserting_before(start):
        token = insert(graph, offload.reload_start, (node, *layout), node)
    with graph.inserting_before(first):
        back = insert(graph, offload.reload_wait, (token, node, *layout), node)
    for reader in readers:
        reader.replace_input_with(node, back)


def _early(graph: torch.fx.Graph, first: Node, size: int, hardware: Hardware) -> Node:
    """The node before which a copy of ``size`` bytes begins, to be done when ``first`` runs."""
    if not hardware.copies_overlap:
        return first
    left, at = size / hardware.host_bandwidth, first
    while left > 0 and at.prev.op == "call_function":
        at = at.prev
        left -= node_seconds(at, hardware)
    return at


__all__ = ["Beside", "Budget", "Fitted", "MemoryBoundError", "Parts", "Peak", "Program", "fit"]
