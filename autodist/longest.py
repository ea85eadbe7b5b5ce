"""The longest sequence that trains within a plan's memory, and how the plan changes on the way there.

    formula     the program is compiled for four lengths, unplanned; polynomials in the length are fitted to
                its sizes and costs (:mod:`autodist.passes.analysis.lengths`), and other lengths' plans follow
    planned     at the lengths where, by the formula, the plan changes its means, and on both sides of where
                nothing fits any more, the training step is compiled on fake tensors and fake ranks, as it
                would be on the cluster, and its plan is read

What is reported was planned; the formula only says where to look. It knows the program without tiles and
with few of them, where the compiler may try more. Where it falls short, or where there is none (programs of
two lengths differ, as where a model is unrolled over its sequence), the search goes on in ever larger steps,
then halves the interval until it is as short as a sixteenth of the answer. What is compiled returns the loss
alone, as a captured step does: logits that were returned would have to be made whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from torch import nn

from autodist.dry_run import DryRunError, dry_run
from autodist.logs import log
from autodist.passes.analysis.budget import Choice
from autodist.passes.analysis.lengths import ByLength, Kind, NoFormulaError, Sample
from autodist.passes.memory import MemoryBoundError
from autodist.plan import Plan

_FINEST = 16  # of the answer's length: the interval in which it is left
_SHORTEST, _LONGEST = 16, 2**26
_GRID = 64  # lengths that the formula speaks of are multiples of this, and divide by most numbers of tiles
_FASTER, _CHEAP = 0.99, 0.02  # as in the compiler: what more tiles must gain, and what asks for none
_CHANGES = 8  # of the plan's means that are planned for
_ROOTS = 3  # what min-cut saves, and the correction, are others at the length found

Make = Callable[[], nn.Module]
Batch = Callable[[int, int], Any]


@dataclass(frozen=True)
class Length:
    """What the plan is for sequences of ``length``: predicted ``peak`` bytes and ``seconds`` of a step.

    ``made`` counts the plan's decisions by what they are ("recomputed", "offloaded", "in 4 tiles").
    ``needed`` bytes would do where it does not fit; then the others are zero. ``because`` says what the
    formula expects here.
    """

    length: int
    fits: bool
    peak: int = 0
    seconds: float = 0.0
    made: tuple[tuple[str, int], ...] = ()
    needed: int = 0
    because: str = ""


def longest(
    make_model: Make, make_batch: Batch, plan: Plan, num_ranks: int, rows: int, length: int
) -> Iterator[Length]:
    """Each length that is planned, as soon as it is known; the longest that fits is the answer.

    ``make_batch(rows, length)`` as in :func:`~autodist.dry_run.dry_run`. Raises :class:`DryRunError` for a
    plan without a bound on memory, and where not even short sequences fit.
    """

    def tried(length: int, because: str = "") -> Length:
        return _planned(make_model, lambda: make_batch(rows, length), plan, num_ranks, length, because)

    formula = _formula(make_model, make_batch, plan, num_ranks, rows, length)
    step = length
    if formula is not None:
        answer = formula.longest(length)
        for change, because in formula.changes(answer):
            yield tried(change, because)
        length, step = max(answer, _GRID), max(answer // _FINEST, _GRID)
    yield from _closing_in(tried, length, step)


def _closing_in(tried: Callable[[int], Length], length: int, step: int) -> Iterator[Length]:
    """From ``length`` on in ever larger steps, beginning with ``step``; then the interval is halved."""
    found = tried(length)
    yield found
    fits, fails = (length, 0) if found.fits else (0, length)
    while not fits or not fails:
        length = fits + step if fits else max(fails - step, fails // 2)
        step *= 2
        if not _SHORTEST <= length <= _LONGEST:
            break
        found = tried(length)
        yield found
        fits, fails = (length, fails) if found.fits else (fits, length)
    while fits and fails - fits > max(fits // _FINEST, 1):
        length = (fits + fails) // 2
        found = tried(length)
        yield found
        fits, fails = (length, fails) if found.fits else (fits, length)


def _planned(
    make_model: Make, make_batch: Callable[[], Any], plan: Plan, num_ranks: int, length: int, because: str
) -> Length:
    try:
        job = dry_run(make_model, make_batch, plan, num_ranks, None, loss_only=True)
    except MemoryBoundError as error:
        return Length(length, False, needed=error.least, because=because)
    if job.memory_bytes is None:
        raise DryRunError("the plan sets no bound on memory: give it one (memory='60GB', or 'device')")
    timelines = [t for report in job.reports for t in report.timelines.values()]
    decisions = (d for report in job.reports for record in report.records for d in record.decisions)
    counts = tuple(Counter(d.action for d in decisions if d.means).items())
    peak = max(r.resident + t.peak_bytes for r in job.reports for t in r.timelines.values())
    return Length(length, True, peak, sum(t.seconds for t in timelines), counts, because=because)


# --- the formula -------------------------------------------------------------------------------------


def _formula(
    make_model: Make, make_batch: Batch, plan: Plan, num_ranks: int, rows: int, length: int
) -> _Formula | None:
    """None where a program is no formula of its length."""
    first = max(length // _GRID, 1) * _GRID
    lengths = [first, 2 * first, 3 * first, 4 * first]
    compiled: list[list[Sample]] = []
    for one in lengths:
        samples: list[Sample] = []
        batch = partial(make_batch, rows, one)
        job = dry_run(make_model, batch, plan, num_ranks, None, loss_only=True, samples=samples)
        if job.memory_bytes is None or len(job.reports) != 1:
            return None
        compiled.append(samples)
    programs = []
    try:
        for tiles in range(min(map(len, compiled))):
            programs.append(ByLength(lengths, [samples[tiles] for samples in compiled], job.hardware))
    except NoFormulaError as error:
        log.info("formulas of %d programs: %s", len(programs), error)
    return _Formula(programs) if programs else None


class _Formula:
    """Plans by length, of one program with ever more tiles."""

    def __init__(self, programs: Sequence[ByLength]) -> None:
        self.programs = programs
        self.best = lru_cache(maxsize=None)(self._best)

    def _best(self, length: int) -> tuple[int, Choice] | None:
        """How tiled, and the choice, as the compiler would choose; None where nothing fits."""
        best: tuple[float, int, Choice] | None = None
        for number, program in enumerate(self.programs):
            tried, fits = program.best(length)
            if not fits:
                continue
            added = tried.choice.seconds - program.as_is(length).choice.seconds
            seconds = program.seconds_of_all(length) + max(added, 0.0)
            if best is not None and seconds >= _FASTER * best[0]:
                break
            best = seconds, number, tried.choice
            if added <= _CHEAP * seconds:
                break
        return None if best is None else best[1:]

    def longest(self, length: int) -> int:
        """The longest that fits, a multiple of the grid; 0 for none."""
        low, high = 0, max(length // _GRID, 1)
        while high * _GRID <= _LONGEST and self.best(high * _GRID) is not None:
            low, high = high, 2 * high
        while high - low > max(low // (4 * _FINEST), 1):
            middle = (low + high) // 2
            low, high = (low, middle) if self.best(middle * _GRID) is None else (middle, high)
        return low * _GRID

    def changes(self, answer: int) -> list[tuple[int, str]]:
        """Lengths, up to the answer, from which on the plan's means are others than before, and these means.

        The first is the last length at which nothing is done. Between two lengths with the same means there
        may be others that are not seen.
        """
        if answer < _GRID:
            return []
        free = min(self._untouched(), answer)
        found = [(free, "what min-cut saves fits up to here")] if free else []
        low = max(free, _GRID) // _GRID
        found += [(c, self._text(c)) for c in self._between(low, answer // _GRID)]
        return found[:_CHANGES]

    def _untouched(self) -> int:
        """Up to where nothing need be done; 0 where something must at any length."""
        program, at = self.programs[0], _GRID
        for _ in range(_ROOTS):
            as_is = program.as_is(at)
            if as_is.peak > program.first.room:
                return 0
            further = min(program.until(as_is.choice.how, at), _LONGEST) // _GRID * _GRID
            if further <= at or program.as_is(further).peak > program.first.room:
                break
            at = further
        return at

    def _between(self, low: int, high: int) -> list[int]:
        if low >= high or self._means(low * _GRID) == self._means(high * _GRID):
            return []
        if high - low <= max(high // (4 * _FINEST), 1):
            return [high * _GRID]
        middle = (low + high) // 2
        return self._between(low, middle) + self._between(middle, high)

    def _means(self, length: int) -> tuple[int, frozenset[Kind]]:
        found = self.best(length)
        if found is None:
            return -1, frozenset()
        number, choice = found
        return number, self.programs[number].kinds(length, choice)

    def _text(self, length: int) -> str:
        number, kinds = self._means(length)
        said = sorted(kind.value for kind in kinds) + ["tiles"] * (number > 0)
        return f"from here on: {', '.join(said) or 'nothing'}"
