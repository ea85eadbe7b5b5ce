"""The longest sequence that trains within a plan's memory, and how the plan changes on the way there.

The training step is compiled for one length after the other, on fake tensors and fake ranks, and its plan
read: a plan is a function of the length, but no formula of it, because what is saved, computed again,
offloaded or made in tiles is a choice among whole values. From the first length the search doubles, then
halves the interval until it is as short as a sixteenth of the answer. What is compiled returns the loss
alone, as a captured step does: logits that were returned would have to be made whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from autodist.dry_run import DryRunError, dry_run
from autodist.passes.memory import MemoryBoundError
from autodist.plan import Plan

_FINEST = 16  # of the answer's length: the interval in which it is left
_SHORTEST, _LONGEST = 16, 2**26


@dataclass(frozen=True)
class Length:
    """What the plan is for sequences of ``length``: predicted ``peak`` bytes and ``seconds`` of a step.

    ``made`` counts the plan's decisions by what they are ("recomputed", "offloaded", "in 4 tiles").
    ``needed`` bytes would do where it does not fit; then the others are zero.
    """

    length: int
    fits: bool
    peak: int = 0
    seconds: float = 0.0
    made: tuple[tuple[str, int], ...] = ()
    needed: int = 0


def longest(
    make_model: Callable[[], nn.Module],
    make_batch: Callable[[int, int], Any],
    plan: Plan,
    num_ranks: int,
    rows: int,
    length: int,
) -> Iterator[Length]:
    """Each length that is tried, as soon as it is known; the longest that fits is the answer.

    ``make_batch(rows, length)`` as in :func:`~autodist.dry_run.dry_run`. Raises :class:`DryRunError` for a
    plan without a bound on memory, and where not even short sequences fit.
    """

    def tried(length: int) -> Length:
        return _planned(make_model, lambda: make_batch(rows, length), plan, num_ranks, length)

    found = tried(length)
    yield found
    fits, fails = (length, 0) if found.fits else (0, length)
    while not fits or not fails:
        length = 2 * length if fits else length // 2
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
    make_model: Callable[[], nn.Module],
    make_batch: Callable[[], Any],
    plan: Plan,
    num_ranks: int,
    length: int,
) -> Length:
    try:
        job = dry_run(make_model, make_batch, plan, num_ranks, None, loss_only=True)
    except MemoryBoundError as error:
        return Length(length, False, needed=error.least)
    if job.memory_bytes is None:
        raise DryRunError("the plan sets no bound on memory: give it one (memory='60GB', or 'device')")
    made: dict[str, int] = {}
    timelines = [t for report in job.reports for t in report.timelines.values()]
    for decision in (d for report in job.reports for record in report.records for d in record.decisions):
        made[decision.action] = made.get(decision.action, 0) + 1
    counts = tuple((how, n) for how, n in made.items() if how in _WAYS or how.endswith("tiles"))
    peak = max(r.resident + t.peak_bytes for r in job.reports for t in r.timelines.values())
    return Length(length, True, peak, sum(t.seconds for t in timelines), counts)


_WAYS = ("recomputed", "offloaded")
