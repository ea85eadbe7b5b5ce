"""Ranks agree on what they will run before the first collective runs.

A collective that one rank enters and another does not, or enters with another group or shape, hangs
or mixes up numbers. So before a compiled graph is used its ranks meet in a *round* over the
key-value store:

    every rank            posts a digest of each section of its fingerprint
    first rank            reads all digests, posts the verdict
    every other rank      waits for the verdict, and for nothing else

which is O(ranks) traffic in all. A *fingerprint* maps the name of a section ("plan", "graph") to a
text of lines. Only when digests differ does a text travel: the first differing rank's, for the
first rank to find the line in which it parts from its own.

Invariants:
- a round has one verdict, written once (compare-and-set), and every rank obeys it. A rank that
  waited in vain proposes the verdict "missing", so a rank that arrives later ends in the same
  error;
- ranks that fail in a round fail with the same sentence; a rank that fails between rounds says so in the
  next one, so that nobody waits for it;
- a round's keys are deleted when the next one shows that every rank has read them.

:func:`graph_lines` and :func:`collective_lines` write the texts of graphs in a form that does not
depend on the rank.
"""

from __future__ import annotations

import hashlib
import json
import operator
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import sympy
import torch
import torch.distributed as dist
from torch import Tensor, fx

from autodist.runtime import compat

# Seconds to wait for a rank that is known to be alive: it has posted to this round already.
_GRACE = 10.0
_LOOK = 3.0  # seconds between two looks at where ranks are that have not come

_FAILED = "failed"  # posted for digests by a rank that will not come
_NUMBER = "number"  # posted beside digests, where ranks look for the largest

_REMEDY = "Give every rank the same program, model, plan and library versions, then start again."


class DisagreementError(RuntimeError):
    """Ranks would run different programs. All of ``agreement``'s, if it was found there, have this error."""

    agreement: Agreement | None = None


class MissingRanksError(RuntimeError):
    """Ranks did not come to a round in time, or failed before it. All of ``agreement``'s have this error, but
    where their store is lost: then there is none."""

    agreement: Agreement | None = None


@dataclass(frozen=True)
class _Verdict:
    """``kind``: "agreed" (``text`` is the leader's value), "differs", "elsewhere", "missing" (it says how).
    """

    kind: str
    text: str
    witness: int = -1  # "differs": the first rank that differs from the leader


class Agreement:
    """The rounds of one group of ranks.

    ``ranks`` are the group's global ranks, ``rank`` this one, ``timeout`` the seconds a rank waits
    for the others. All ranks make the same calls in the same order. ``scope`` prefixes the keys:
    the group's own, and not used before on this store. ``elsewhere`` says what others do that cannot come,
    if there are such.
    """

    def __init__(
        self, store: dist.Store, ranks: Sequence[int], rank: int, timeout: float, scope: str,
        elsewhere: Callable[[], str | None] | None = None,
    ) -> None:  # fmt: skip
        if rank not in ranks:
            raise ValueError(f"Rank {rank} is not one of the ranks that agree: {list(ranks)}.")
        self._store = dist.PrefixStore(scope, store)
        self._ranks = list(ranks)
        self._rank = rank
        self._leader = self._ranks[0]
        self._timeout = timeout
        self._elsewhere = elsewhere
        self._round = 0

    def require(
        self,
        subject: str,
        fingerprint: Mapping[str, str],
        conditions: Mapping[str, str] | None = None,
    ) -> None:
        """Return when every rank has the same ``fingerprint`` of ``subject``.

        Sections are compared in the order given, so causes should stand before consequences. A
        section named in ``conditions`` is compared only with ranks whose condition is the leader's:
        what follows from a batch's shape, say, when ranks may have batches of different shapes. Raises
        :class:`DisagreementError` on every rank when any differs, :class:`MissingRanksError` when
        ranks stay away longer than the timeout.
        """
        self._agree(subject, fingerprint, "", conditions or {})

    def lead(self, subject: str, value: str | None) -> str:
        """The first rank's ``value``, on every rank; the others' is not looked at.

        Raises as :meth:`require` does; ranks that call it for another ``subject`` disagree.
        """
        if value is None and self._rank == self._leader:
            raise ValueError(f"Rank {self._rank} leads {subject} and must have a value for it.")
        return self._agree(subject, {}, value or "", {})

    def largest(self, subject: str, value: int) -> int:
        """The largest of the ranks' ``value``. Raises as :meth:`require` does."""
        if len(self._ranks) == 1:
            return value
        return int(self._agree(subject, {}, "", {}, value))

    def fail(self, reason: str) -> None:
        """Ranks that come to the next round, or wait there, fail with this rank's ``reason``.

        Does not wait for them. A rank that goes on nevertheless goes on with the round after it.
        """
        if len(self._ranks) == 1:
            return
        self._round += 1
        text = f"{ranks_text([self._rank]).capitalize()} failed: {reason}"
        self._store.set(self._key("read", self._rank), "")
        self._store.set(self._key("digest", self._rank), json.dumps({_FAILED: text}))
        if self._rank == self._leader:
            verdict = json.dumps(asdict(_Verdict("missing", text)))
            self._store.compare_set(self._key("verdict"), "", verdict)

    def _agree(
        self,
        subject: str,
        fingerprint: Mapping[str, str],
        value: str,
        conditions: Mapping[str, str],
        number: int | None = None,
    ) -> str:
        if len(self._ranks) == 1:
            return value
        self._round += 1
        sections = {"subject": subject, **fingerprint}
        try:
            verdict = self._settle(subject, sections, value, conditions, number)
            if verdict.kind == "agreed":
                self._forget()
                return verdict.text
            differs = verdict.kind == "differs"
            sentence = self._compare(verdict, sections, conditions) if differs else verdict.text
            self._part()
        except dist.DistNetworkError as error:
            raise MissingRanksError(
                f"Lost the key-value store while ranks were to agree on {subject}. The process "
                "that hosts it (rank 0, or torchrun) has ended: look at its output."
            ) from error
        raised = (MissingRanksError if verdict.kind == "missing" else DisagreementError)(sentence)
        raised.agreement = self
        raise raised

    def _settle(
        self,
        subject: str,
        sections: Mapping[str, str],
        value: str,
        conditions: Mapping[str, str],
        number: int | None,
    ) -> _Verdict:
        """Post this rank's digests, each with its condition's, and return the round's verdict."""
        digests: dict[str, Any] = {
            n: [_digest(conditions.get(n, "")), _digest(text)] for n, text in sections.items()
        }
        if number is not None:
            digests[_NUMBER] = number
        self._store.set(self._key("digest", self._rank), json.dumps(digests))
        leads = self._rank == self._leader
        came, elsewhere = self._wait_for_ranks(self._keys("digest") if leads else [self._key("verdict")])
        if came and not leads:
            return _Verdict(**json.loads(self._store.get(self._key("verdict"))))
        if came:
            proposal = self._judge(subject, value)
        elif elsewhere is not None:
            here = f"Ranks do not agree on {subject}: {ranks_text([self._rank])} has made it, and"
            proposal = _Verdict("elsewhere", f"{here} {elsewhere}.\n{_REMEDY}")
        else:
            proposal = self._missing(subject)
        word = self._store.compare_set(self._key("verdict"), "", json.dumps(asdict(proposal)))
        return _Verdict(**json.loads(word))

    def _wait_for_ranks(self, keys: Sequence[str]) -> tuple[bool, str | None]:
        """Whether all ``keys`` appear in time; if not, what ranks do that cannot come, if there are such."""
        end = time.monotonic() + self._timeout
        while (left := end - time.monotonic()) > 0:
            if self._wait(keys, left if self._elsewhere is None else min(left, _LOOK)):
                return True, None
            found = None if self._elsewhere is None else self._elsewhere()
            if found is not None:
                return False, found
        return False, None

    def _judge(self, subject: str, value: str) -> _Verdict:
        posted = [json.loads(digests) for digests in self._store.multi_get(self._keys("digest"))]
        failed = [digests[_FAILED] for digests in posted if _FAILED in digests]
        if failed:
            return _Verdict("missing", failed[0])
        numbers = [digests.pop(_NUMBER) for digests in posted if _NUMBER in digests]
        names = list(dict.fromkeys(name for digests in posted for name in digests))
        differing = {
            rank: found
            for rank, digests in zip(self._ranks, posted, strict=True)
            if (found := [n for n in names if _differ(digests.get(n), posted[0].get(n))])
        }
        if not differing:
            return _Verdict("agreed", str(max(numbers)) if numbers else value)
        sections = [name for name in names if any(name in found for found in differing.values())]
        verb = "differs" if len(differing) == 1 else "differ"
        text = (
            f"Ranks do not agree on {subject}: {ranks_text(differing)} {verb} from rank "
            f"{self._leader} in {', '.join(sections)}."
        )
        return _Verdict("differs", text, next(iter(differing)))

    def _missing(self, subject: str) -> _Verdict:
        keys = self._keys("digest")
        gone = set(absent(self._store, keys))
        # A leader that has arrived and is silent is what this rank waited for.
        missing = [r for r, k in zip(self._ranks, keys, strict=True) if k in gone] or [self._leader]
        here = [r for r in self._ranks if r not in missing]
        return _Verdict(
            "missing",
            f"{ranks_text(missing).capitalize()} did not come within {self._timeout:g} s to agree "
            f"on {subject}, where {ranks_text(here)} waited. Either they have ended, or they are "
            "stuck, or they run another program: look at their output. If they are only slow, wait "
            "longer: raise the timeout.",
        )

    def _compare(
        self, verdict: _Verdict, sections: Mapping[str, str], conditions: Mapping[str, str]
    ) -> str:
        """The sentence all ranks raise: the verdict with the first line that differs."""
        if self._rank == verdict.witness:
            packed = zlib.compress(json.dumps([dict(sections), dict(conditions)]).encode())
            self._store.set(self._key("text", self._rank), packed)  # type: ignore[arg-type]
        if self._rank == self._leader:
            shown = ""
            if self._wait([self._key("text", verdict.witness)], _GRACE):
                packed = self._store.get(self._key("text", verdict.witness))
                theirs, under = json.loads(zlib.decompress(packed))
                mine = {n: t for n, t in sections.items() if conditions.get(n) == under.get(n)}
                theirs = {n: t for n, t in theirs.items() if conditions.get(n) == under.get(n)}
                shown = _first_difference(self._rank, mine, verdict.witness, theirs)
            self._store.set(self._key("sentence"), f"{verdict.text}{shown}\n{_REMEDY}")
        if self._wait([self._key("sentence")], 2 * _GRACE):
            return self._store.get(self._key("sentence")).decode()
        return f"{verdict.text}\n{_REMEDY}"

    def _part(self) -> None:
        """Leave a failed round. The leader goes last, as its process may host the store."""
        self._store.set(self._key("read", self._rank), "")
        if self._rank == self._leader:
            gone = set(absent(self._store, self._keys("digest")))
            here = [r for r in self._ranks if self._key("digest", r) not in gone]
            self._wait([self._key("read", r) for r in here], _GRACE)

    def _forget(self) -> None:
        self._store.delete_key(self._key("digest", self._rank))
        if self._rank == self._leader:  # All have come here, so all have read the round before.
            self._store.delete_key(f"{self._round - 1}/verdict")

    def _wait(self, keys: Sequence[str], seconds: float) -> bool:
        """Whether all ``keys`` appear in time. Raises DistNetworkError when the store is lost."""
        try:
            self._store.wait(list(keys), timedelta(seconds=seconds))
        except dist.DistNetworkError:
            raise
        except RuntimeError:  # FileStore's timeout has no type of its own.
            return False
        return True

    def _key(self, name: str, rank: int | None = None) -> str:
        return f"{self._round}/{name}" if rank is None else f"{self._round}/{name}/{rank}"

    def _keys(self, name: str) -> list[str]:
        return [self._key(name, rank) for rank in self._ranks]


def absent(store: dist.Store, keys: Sequence[str]) -> list[str]:
    """Those of ``keys`` the store does not hold, in O(absent x log keys) requests."""
    if not keys or store.check(list(keys)):
        return []
    if len(keys) == 1:
        return list(keys)
    middle = len(keys) // 2
    return absent(store, keys[:middle]) + absent(store, keys[middle:])


def ranks_text(ranks: Collection[int]) -> str:
    """Ranks for people: "rank 3", "ranks 0-3, 7"; past eight runs only their number."""
    runs: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1] = (runs[-1][0], rank)
        else:
            runs.append((rank, rank))
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:8]]
    left = sum(b - a + 1 for a, b in runs[8:])
    text = ", ".join(shown) + (f" and {left} more" if left else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"


def _differ(one: list[str] | None, other: list[str] | None) -> bool:
    """Whether two digests of a section, under the same condition, are not the same."""
    if one is None or other is None:
        return True
    return one[0] == other[0] and one[1] != other[1]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _first_difference(
    rank: int, mine: Mapping[str, str], other: int, theirs: Mapping[str, str]
) -> str:
    """The first line in which two ranks' sections differ, in both wordings."""
    for name in dict.fromkeys((*mine, *theirs)):
        here, there = mine.get(name, "").splitlines(), theirs.get(name, "").splitlines()
        for i in range(max(len(here), len(there))):
            a, b = (lines[i] if i < len(lines) else "(no more lines)" for lines in (here, there))
            if a != b:
                a, b = _clip(a, b)
                return (
                    f"\nThe first difference is in line {i + 1} of '{name}':"
                    f"\n  rank {rank}: {a}\n  rank {other}: {b}"
                )
    return ""


def _clip(a: str, b: str, width: int = 240) -> tuple[str, str]:
    """Both lines cut to a window that shows where they part."""
    pairs = enumerate(zip(a, b, strict=False))
    common = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
    start = max(0, common - width // 2) if max(len(a), len(b)) > width else 0

    def window(line: str) -> str:
        rest = "..." if len(line) > start + width else ""
        return f"{'...' if start else ''}{line[start : start + width]}{rest}"

    return window(a), window(b)


# --- the texts of graphs --------------------------------------------------------------------------

# Here a declared ``int`` is never a size (that would be ``SymInt``): it is a dimension, a count of
# ranks.
_DECLARES_SIZES = frozenset({"aten", "prims", "_c10d_functional", "autodist"})
_COMMUNICATES = frozenset({"_c10d_functional", "autodist"})


def graph_lines(
    graph_module: fx.GraphModule, group_labels: Mapping[str, str], mask_sizes: bool
) -> list[str]:
    """One line per node of a graph: number, target, arguments, type of the result.

    The text is the same on ranks that run the same program. Nodes are called by their number,
    symbols by the order in which they appear (s0, s1, ...), devices by their type, process groups
    by their label in ``group_labels``, functions by their qualified name. Graphs that a node holds
    follow it, indented.

    Ranks may have batches of different sizes, and shards of parameters whose rows do not divide:
    their graphs then differ in sizes and in nothing else. ``mask_sizes`` writes '#' for every size:
    for the shapes of results (only their number of dimensions and type is left) and for integer
    arguments, except where the operator's schema shows that an integer is not a size (a dimension,
    say).
    """
    return _Text(group_labels, mask_sizes).graph(graph_module)


def collective_lines(graph_module: fx.GraphModule, group_labels: Mapping[str, str]) -> list[str]:
    """One line per collective, in order: operator, types of the tensors, other arguments, group.

    Waits are left out, since they involve no peer, and so are the sizes of tensors.
    """
    text = _Text(group_labels, mask_sizes=True)
    return [text.collective(node) for node in _nodes(graph_module) if _is_collective(node)]


def _nodes(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """Nodes of a graph and of the graphs inside it, in order."""
    for node in graph_module.graph.nodes:
        yield node
        inner = _inner_graph(graph_module, node)
        if inner is not None:
            yield from _nodes(inner)


def _inner_graph(graph_module: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    if node.op not in ("get_attr", "call_module"):
        return None
    held = operator.attrgetter(str(node.target))(graph_module)
    return held if isinstance(held, fx.GraphModule) else None


def _is_collective(node: fx.Node) -> bool:
    if getattr(node.target, "namespace", None) not in _COMMUNICATES:
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return packet is not torch.ops._c10d_functional.wait_tensor


class _Text:
    """Writes nodes; remembers the order in which symbols have appeared."""

    def __init__(self, group_labels: Mapping[str, str], mask_sizes: bool) -> None:
        self._labels = group_labels
        self._mask = mask_sizes
        self._symbols: dict[Any, Any] = {}

    def graph(self, graph_module: fx.GraphModule) -> list[str]:
        numbers = {node: f"%{i}" for i, node in enumerate(graph_module.graph.nodes)}
        lines = []
        for node, number in numbers.items():
            arguments = ", ".join(
                prefix + self._argument(value, exact, numbers)
                for prefix, exact, value in _arguments(node)
            )
            result = self._result(node.meta.get("val"))
            arrow = " -> " if result else ""
            lines.append(f"{number} = {_target(node)}({arguments}){arrow}{result}")
            inner = _inner_graph(graph_module, node)
            if inner is not None:
                lines += [f"  {line}" for line in self.graph(inner)]
        return lines

    def collective(self, node: fx.Node) -> str:
        numbers = {n: self._tensor_type(n.meta.get("val")) for n in node.all_input_nodes}
        declared = [name for name, _ in compat.operator_arguments(node.target)]
        arguments = ", ".join(
            f"{prefix or f'{name}='}{self._argument(value, exact, numbers)}"
            for name, (prefix, exact, value) in zip(declared, _arguments(node), strict=False)
        )
        return f"{_target(node)}({arguments})"

    def _tensor_type(self, value: Any) -> str:
        return _dtype(value.dtype) if isinstance(value, Tensor) else "#"

    def _argument(self, value: Any, exact: bool, numbers: Mapping[fx.Node, str]) -> str:
        """One argument; ``exact``: its integers are no sizes. ``numbers``: how to call nodes."""
        if isinstance(value, fx.Node):
            return numbers[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._argument(v, exact, numbers) for v in value)}]"
        if isinstance(value, dict):
            items = (f"{k}: {self._argument(v, exact, numbers)}" for k, v in value.items())
            return f"{{{', '.join(items)}}}"
        if isinstance(value, slice):
            ends = (value.start, value.stop, value.step)
            return ":".join(self._argument(v, exact, numbers) for v in ends)
        if isinstance(value, dist.ProcessGroup):
            value = value.group_name
        return self._constant(value, exact)

    def _constant(self, value: Any, exact: bool) -> str:
        if isinstance(value, str):
            return repr(self._labels.get(value, value))
        if isinstance(value, torch.device):
            return value.type
        if isinstance(value, torch.dtype):
            return _dtype(value)
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            return "#" if self._mask and not exact else self._number(value)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            return "#" if self._mask else self._number(value)
        if value is None or value is Ellipsis or isinstance(value, (bool, float, complex)):
            return str(value)
        if isinstance(value, (torch.layout, torch.memory_format)):
            return str(value)
        return _name(value)

    def _number(self, value: Any) -> str:
        if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return str(value)
        expression = compat.symbolic_expression(value)
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self._symbols:
                name = f"s{len(self._symbols)}"
                self._symbols[symbol] = sympy.Symbol(name, integer=symbol.is_integer)
        return str(expression.xreplace(self._symbols))

    def _result(self, value: Any) -> str:
        if isinstance(value, Tensor):
            sizes = ("#" if self._mask else self._number(size) for size in value.shape)
            return f"{_dtype(value.dtype)}[{', '.join(sizes)}]"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(self._result(v) for v in value)})"
        if isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return "#" if self._mask else self._number(value)
        return ""


def _arguments(node: fx.Node) -> Iterator[tuple[str, bool, Any]]:
    """(``name=`` or nothing, whether integers in it are certainly no sizes, value) per argument."""
    declared = []
    if getattr(node.target, "namespace", None) in _DECLARES_SIZES:
        declared = compat.operator_arguments(node.target)
    kinds = dict(declared)
    is_item = node.target is operator.getitem
    for i, value in enumerate(node.args):
        yield "", is_item or (i < len(declared) and declared[i][1] == "IntType"), value
    for name, value in node.kwargs.items():
        yield f"{name}=", kinds.get(name) == "IntType", value


def _target(node: fx.Node) -> str:
    """What a node does, without the name it has on this rank."""
    if node.op in ("placeholder", "output"):
        return node.op
    if node.op != "call_function":
        return f"{node.op} {node.target}"
    if getattr(node.target, "namespace", None) is not None:
        return str(node.target)
    return f"{getattr(node.target, '__module__', '')}.{_name(node.target)}"


def _name(value: Any) -> str:
    """A name for an object that has no text of its own; never its address."""
    return getattr(value, "__qualname__", type(value).__qualname__)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
