"""A program's memory plan as a function of the length ``L`` of its sequences.

Sizes are polynomials in ``L`` (attention without a mask and all that is token-local: of degree 1; a mask or
scores: of degree 2), and so are floating-point operations and the bytes that a kernel moves. They are fitted
through three lengths and must hold, exactly, at a fourth. From them follow, as expressions in sympy,

    seconds of a value again    t_v(L) = Max(flops_v(L) / rate_v, moved_v(L) / bandwidth) + fixed_v
    added seconds of a choice   sum of t_v(L) over what is recomputed, and of what is saved and offloaded
    its peak                    Max, over the points of the program, of the sum of sizes that are alive there

and where a choice stops to fit a bound: the smallest root of one of these sums less the bound. Which choice
is best at some length is found by the search (:mod:`autodist.passes.analysis.search`) on the numbers that the
expressions give there, without compiling anything.

Not in the formulas: lengths that do not divide by the number of tiles are padded; what torch's min-cut saves
is that of the nearest length which was compiled; and the schedule's own share of the peak (the *correction*)
is read along a straight line between the lengths compiled. Whoever needs to be sure compiles at the lengths
that are named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction

import numpy as np
import sympy

from autodist.passes.analysis.budget import Choice, How, Value, evaluate
from autodist.passes.analysis.cost import Work, flops, is_attention
from autodist.passes.analysis.hardware import Hardware
from autodist.passes.analysis.replay import Replay
from autodist.passes.analysis.savable import READS, Savable
from autodist.passes.analysis.search import Search, Try

LENGTH = sympy.Symbol("L", integer=True, positive=True)
_QUARTERS = 4  # bytes moved are counted in quarters


class NoFormulaError(ValueError):
    """Something of a program is no polynomial in the length, or the programs of two lengths differ."""


class Kind(Enum):
    """What is done to save memory, beside what torch's min-cut does."""

    POINTWISE = "pointwise recomputed"
    PRODUCT = "products recomputed"
    ATTENTION = "attention recomputed"
    OFFLOAD = "offloaded"


@dataclass(frozen=True)
class Sample:
    """A program as it was compiled for one length.

    ``as_is`` is what torch's min-cut saves, whose measured peak exceeds the replay's by ``correction``;
    ``works`` are those of all nodes of the joint graph, the ``num_forward`` of the forward first.
    ``room`` bytes are there for what it holds, and ``host`` for what is offloaded.
    """

    found: Savable
    replay: Replay
    as_is: tuple[How, ...]
    correction: int
    works: tuple[Work, ...]
    num_forward: int
    room: int
    host: int


class ByLength:
    """One program's plans at all lengths, from ``samples`` at four of them, in equal steps from the first.

    Raises :class:`NoFormulaError`.
    """

    def __init__(self, lengths: Sequence[int], samples: Sequence[Sample], hardware: Hardware) -> None:
        self.lengths, self.samples, self.hardware = lengths, samples, hardware
        first = self.first = samples[0]
        for other in samples[1:]:
            if _structure(other) != _structure(first):
                raise NoFormulaError("programs of different lengths differ")
        self.buffers = self._fitted([s.replay.sizes for s in samples])
        self.sizes = self._fitted([[v.num_bytes for v in s.found.values] for s in samples])
        self.again = self._works([[w or Work() for w in s.found.again] for s in samples])
        self.all = self._works([s.works for s in samples])
        self.searches: dict[int, Search] = {}

    def _fitted(self, rows: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Coefficients of 1, L and L^2, a row for each number."""
        x = self.lengths[0]
        y1, y2, y3, y4 = (np.array([Fraction(int(y)) for y in row], dtype=object) for row in rows)
        square = (y3 - 2 * y2 + y1) / (2 * x * x)
        linear = (y2 - y1) / x - 3 * x * square
        found = np.stack([y1 - linear * x - square * x * x, linear, square], axis=1)
        if (_at(found, self.lengths[3]) != y4).any():
            raise NoFormulaError("a size is no polynomial in the length")
        return found

    def _works(self, rows: Sequence[Sequence[Work]]) -> tuple[np.ndarray, np.ndarray]:
        done = self._fitted([[w.flops for w in row] for row in rows])
        return done, self._fitted([[round(_QUARTERS * w.moved) for w in row] for row in rows])

    # --- numbers at a length -------------------------------------------------------------------------

    def values(self, length: int) -> list[Value]:
        """The candidates for sequences of ``length``."""
        sizes = _at(self.sizes, length)
        again = self._seconds(self.again, [w or Work() for w in self.first.found.again], length)
        found = []
        for v, size, seconds in zip(self.samples[-1].found.values, sizes, again, strict=True):
            larger = float(size / v.num_bytes) if v.num_bytes else 1.0
            recompute = float(seconds) if math.isfinite(v.recompute) else math.inf
            save, offload = v.save * larger, v.offload * larger
            found.append(replace(v, num_bytes=round(size), recompute=recompute, save=save, offload=offload))
        return found

    def _seconds(
        self, fitted: tuple[np.ndarray, np.ndarray], works: Sequence[Work], length: int
    ) -> np.ndarray:
        rates, fixed = (np.array([getattr(w, what) for w in works]) for what in ("rate", "fixed"))
        done, moved = (_at(f, length).astype(float) for f in fitted)
        return np.maximum(done / rates, moved / _QUARTERS / self.hardware.memory_bandwidth) + fixed

    def seconds_of_all(self, length: int) -> float:
        """Seconds that the program's kernels take, one by one, with nothing recomputed."""
        return float(self._seconds(self.all, self.first.works, length).sum())

    def correction(self, length: int) -> int:
        """By how much the replay misses the peak of the schedule."""
        at = min(max(int(np.searchsorted(self.lengths, length)), 1), len(self.lengths) - 1)
        (x, y), (low, high) = ((seq[at - 1], seq[at]) for seq in (self.lengths, self._corrections))
        return round(low + (high - low) * (length - x) / (y - x))

    @property
    def _corrections(self) -> list[int]:
        return [s.correction for s in self.samples]

    def as_is(self, length: int) -> Try:
        """What torch's min-cut does, which nothing is added to where it fits."""
        near = min(range(len(self.lengths)), key=lambda i: abs(self.lengths[i] - length))
        choice = evaluate(self.values(length), self.samples[near].as_is)
        return self._search(length).tried(choice)

    def best(self, length: int) -> tuple[Try, bool]:
        """The plan for sequences of ``length``, and whether it fits."""
        as_is = self.as_is(length)
        if as_is.peak <= self.first.room:
            return as_is, True
        return self._search(length).within(self.first.room, as_is)

    def _search(self, length: int) -> Search:
        if length not in self.searches:
            sizes = np.rint(_at(self.buffers, length).astype(float)).astype(np.int64)
            replayed = self.first.replay.resized(sizes)
            works, limit = self.first.works[: self.first.num_forward], self.first.host
            hosts = [limit]
            if self.hardware.copies_overlap:
                done, moved = self.all
                forward = (done[: len(works)], moved[: len(works)])
                hidden = self._seconds(forward, works, length).sum() * self.hardware.host_bandwidth
                hosts = [int(hidden), limit] if hidden < limit else [limit]
            search = Search(self.values(length), self.first.found.results, replayed.peak, hosts)
            search.correction = self.correction(length)
            self.searches[length] = search
        return self.searches[length]

    def kinds(self, length: int, choice: Choice) -> frozenset[Kind]:
        """What a choice does beyond torch's min-cut."""
        before, found = self.as_is(length).choice.how, set()
        for node, now, then in zip(self.first.found.nodes, choice.how, before, strict=True):
            if now is How.OFFLOAD:
                found.add(Kind.OFFLOAD)
            elif now is How.RECOMPUTE and then is How.SAVE and node.target not in READS:
                kind = Kind.PRODUCT if flops(node) else Kind.POINTWISE
                found.add(Kind.ATTENTION if is_attention(node) else kind)
        return frozenset(found)

    # --- formulas ------------------------------------------------------------------------------------

    def peak(self, how: Sequence[How], length: int) -> sympy.Expr:
        """Bytes that a choice holds at the most, as a function of the length; its correction is that of one
        ``length``."""
        rows = self.first.replay.resized(self.buffers.astype(float)).held(how)
        largest = _undominated(np.unique(rows, axis=0))
        return sympy.Max(*(_polynomial(row) for row in largest)) + self.correction(length)

    def seconds(self, how: Sequence[How]) -> sympy.Expr:
        """Seconds that a choice adds, as a function of the length."""
        total = sympy.Integer(0)
        last = self.samples[-1].found.values
        for i, h in enumerate(how):
            cost = {How.SAVE: last[i].save, How.OFFLOAD: last[i].offload}.get(h)
            if cost is not None and last[i].num_bytes:
                total += _polynomial(self.sizes[i]) * (cost / last[i].num_bytes)
            work = self.first.found.again[i]
            if h is How.RECOMPUTE and work is not None:
                done = _polynomial(self.again[0][i]) / work.rate if work.flops else sympy.Integer(0)
                moved = _polynomial(self.again[1][i]) / (_QUARTERS * self.hardware.memory_bandwidth)
                total += sympy.Max(done, moved) + work.fixed
        return total

    def until(self, how: Sequence[How], length: int) -> int:
        """The largest length for which a choice that fits at ``length`` still fits."""
        bound = self.first.room - self.correction(length)
        rows = self.first.replay.resized(self.buffers.astype(float)).held(how)
        roots = [
            root
            for row in _undominated(np.unique(rows, axis=0))
            for root in sympy.real_roots(sympy.Poly(_polynomial(row) - bound, LENGTH))
            if root >= length
        ]
        return int(sympy.floor(min(roots))) if roots else 2**62


def _structure(sample: Sample) -> tuple[object, ...]:
    nodes = tuple((n.name, n.target) for n in sample.found.nodes)
    inputs = tuple((v.inputs, v.needed, math.isfinite(v.recompute)) for v in sample.found.values)
    return nodes, inputs, len(sample.replay.sizes), len(sample.works), sample.num_forward


def _at(coefficients: np.ndarray, length: int) -> np.ndarray:
    constant, linear, square = coefficients.T
    found: np.ndarray = constant + linear * length + square * length * length
    return found


def _polynomial(row: Sequence[float | Fraction]) -> sympy.Expr:
    constant, linear, square = (sympy.Rational(*Fraction(c).as_integer_ratio()) for c in row)
    return constant + linear * LENGTH + square * LENGTH**2


def _undominated(rows: np.ndarray) -> np.ndarray:
    """Of polynomials those that no other exceeds at every positive length by its coefficients."""
    kept: list[np.ndarray] = []
    for row in rows[np.lexsort(rows.T)][::-1]:
        if not any((row <= other).all() for other in kept):
            kept.append(row)
    return np.array(kept)


__all__ = ["LENGTH", "ByLength", "Kind", "NoFormulaError", "Sample"]
