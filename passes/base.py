"""What a pass is, and the runner that holds every pass to it.

A pass is a frozen dataclass: its fields are its options, ``apply`` does the work. The contract:

- before and after, the graph is lint-clean and every node carries its value's metadata (``meta["val"]``),
  so the graph can be printed, costed and executed; in between it need not be;
- the interface is kept: the same placeholders, the same number, shapes and types of outputs;
- what the pass decided, it records with its reason (:meth:`Context.decide`); what it cannot do, it
  refuses with an error naming node, value and remedy;
- nothing mutable is shared between compilations: all a pass knows of the world is its :class:`Context`.

``requires`` and ``provides`` name properties of graphs ("collectives", say). The runner refuses a list in
which a pass comes before what it requires.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from autodist.passes.analysis.hardware import Hardware
from autodist.passes.analysis.layers import folded_text, graph_text, operator_name
from autodist.runtime import compat
from autodist.runtime.compat import tree_leaves


class Phase(Enum):
    """Where a graph stands on its way from capture to kernels."""

    CAPTURED = "captured"
    """The forward program as Dynamo captured it; its values are in ``meta["example_value"]``."""
    JOINT = "joint"
    """Forward and backward in one graph (or the forward alone, when nothing needs a gradient)."""
    FORWARD_PART = "forward part"
    """The forward half after partitioning: inputs to outputs and saved values."""
    BACKWARD_PART = "backward part"
    """The backward half after partitioning: saved values and tangents to gradients."""
    STEP_CAPTURED = "captured step"
    """A training step, its forwards and backwards partitioned and back in place, optimizer as captured."""
    STEP = "step"
    """The same as one functional graph of forward, backward and optimizer, with its writes at the end."""


class PassError(RuntimeError):
    """A pass broke its contract, or the list of passes is out of order."""


class StepError(RuntimeError):
    """A training step does something that a captured program could not do again.

    ``optimizer`` is the one whose own code asks for a value that is not there, if that is the reason.
    """

    optimizer: Any = None


class Means(Enum):
    """By what a program takes less memory than torch's min-cut would leave it."""

    RECOMPUTE = "recomputed"
    OFFLOAD = "offloaded"
    TILE = "in tiles"
    WITHHOLD = "withheld"


@dataclass(frozen=True)
class Decision:
    """One thing a pass decided: of what (a parameter or node name), what, and why.

    ``means`` is by what memory is saved, where that is what it was about; of ``tiles`` no more are of use.
    """

    subject: str
    action: str
    reason: str
    means: Means | None = None
    tiles: int = 0


@dataclass(frozen=True)
class Text:
    """A graph as text: ``full``, and ``folded`` with repeated layers shown once."""

    full: str
    folded: str


@dataclass(frozen=True)
class Record:
    """One application of a pass; ``before`` and ``after`` are the graph's texts, where kept.

    ``seconds`` are those that the thread computed: other processes on a busy machine do not count.
    """

    name: str
    phase: Phase
    seconds: float
    decisions: tuple[Decision, ...]
    added: Mapping[str, int]
    removed: Mapping[str, int]
    before: Text | None = None
    after: Text | None = None


@dataclass
class Context:
    """All that a pass may know beside the graph.

    ``parameters`` maps an input's position to the parameter's name; ``group_sizes`` a process-group name
    to its number of ranks. ``memory`` is the bound, in bytes, within which the program should stay, or
    None for "as little as the plan's stage needs". ``resident`` counts the bytes that live outside the
    graph while it runs (optimizer state, gradients). ``fused`` says that Inductor will fuse the graph
    before it runs. ``agree(subject, make)`` is what ``make()`` gives on the first rank, on every rank, and
    ``largest(subject, value)`` the largest of the ranks' values; a subject is settled once, so it names
    everything the decision is about, and nothing that depends on the batch. ``samples``, where it is not
    None, collects what memory plans are made of (:class:`~autodist.passes.analysis.lengths.Sample`).
    """

    phase: Phase
    hardware: Hardware
    parameters: Mapping[int, str] = field(default_factory=dict)
    group_sizes: Mapping[str, int] = field(default_factory=dict)
    memory: int | None = None
    resident: int = 0
    fused: bool = True
    agree: Callable[[str, Callable[[], str]], str] = lambda subject, make: make()
    largest: Callable[[str, int], int] = lambda subject, value: value
    samples: list[Any] | None = None
    decisions: list[Decision] = field(default_factory=list)

    def decide(
        self, subject: str, action: str, reason: str, means: Means | None = None, tiles: int = 0
    ) -> None:
        self.decisions.append(Decision(subject, action, reason, means, tiles))


def size_text(num_bytes: float) -> str:
    """Bytes for people: "1.5 MiB"."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


class Pass(ABC):
    """A graph transformation; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    phase: ClassVar[tuple[Phase, ...]]
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        """Return the transformed graph; may change ``graph`` in place."""


def run_passes(
    graph: GraphModule,
    passes: Sequence[Pass],
    context: Context,
    records: list[Record],
    keep_text: bool = False,
) -> GraphModule:
    """Apply those of ``passes`` that are for ``context.phase``, in order, and append their records.

    Raises :class:`PassError` when a pass comes before something it requires, changes the graph's
    interface, or leaves a node without metadata.
    """
    check_order(passes)
    text = _text(graph, context) if keep_text else None
    for step in passes:
        if context.phase not in step.phase:
            continue
        before, interface, ops = text, _interface(step, graph), operators(graph)
        context.decisions = []
        start = time.thread_time()
        graph = step.apply(graph, context)
        graph.graph.lint()
        seconds = time.thread_time() - start
        _check(step, graph, interface)
        now = operators(graph)
        text = _text(graph, context) if keep_text else None
        records.append(
            Record(
                name=step.name,
                phase=context.phase,
                seconds=seconds,
                decisions=tuple(context.decisions),
                added=dict(now - ops),
                removed=dict(ops - now),
                before=before,
                after=text,
            )
        )
    graph.recompile()
    return graph


def check_order(passes: Sequence[Pass]) -> None:
    """Raise :class:`PassError` where a pass stands before what it requires."""
    have: set[str] = set()
    for step in passes:
        missing = step.requires - have
        if missing:
            raise PassError(
                f"pass '{step.name}' requires {sorted(missing)}, which no pass before it provides; "
                f"the order given is {[p.name for p in passes]}"
            )
        have |= step.provides


def _check(step: Pass, graph: GraphModule, interface: tuple[Any, ...]) -> None:
    # Dynamo leaves nodes that only set a mode (torch.set_grad_enabled) without a value.
    captured = Phase.CAPTURED in step.phase or Phase.STEP_CAPTURED in step.phase
    for node in graph.graph.nodes:
        if captured or compat.returns_nothing(node.target):  # an assertion has no value
            continue
        if node.op == "call_function" and "val" not in node.meta:
            raise PassError(f"pass '{step.name}' left node '{node.name}' without a value in its meta")
    after = _interface(step, graph)
    if after != interface:
        changed = next((a, b) for a, b in zip(interface, after, strict=True) if a != b)
        raise PassError(f"pass '{step.name}' changed the graph's interface: {changed[0]} -> {changed[1]}")


def _interface(step: Pass, graph: GraphModule) -> tuple[Any, ...]:
    inputs = tuple(n.name for n in graph.graph.find_nodes(op="placeholder"))
    outputs = tree_leaves(graph.graph.find_nodes(op="output")[0].args[0])
    if Phase.CAPTURED in step.phase:  # what Dynamo captures says nothing of values in "val"
        return inputs, len(outputs)
    return inputs, tuple(map(_kind, outputs))


def _kind(leaf: Any) -> Any:
    value = leaf.meta.get("val") if isinstance(leaf, Node) else leaf
    if isinstance(value, torch.Tensor):
        return tuple(str(s) for s in value.shape), value.dtype
    return type(value)


def operators(graph: GraphModule) -> Counter[str]:
    """How often each operator is called."""
    return Counter(operator_name(n) for n in graph.graph.nodes if n.op == "call_function")


def _text(graph: GraphModule, context: Context) -> Text:
    def name(node: Node) -> str:
        is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
        index = compat.placeholder_index(node) if is_tensor else None
        return "" if index is None else context.parameters.get(index, "")

    return Text(graph_text(graph, name), folded_text(graph, name))
