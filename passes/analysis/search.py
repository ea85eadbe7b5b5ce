"""The choice of the fewest added seconds whose peak meets a bound.

The bound is on the *peak* of a program, which is more than what it saves. So the bytes that may be saved are
searched for: each try is a choice (:mod:`autodist.passes.analysis.budget`), of which the peak is read off the
graph. Between a try that fits and one that does not, the next is where a straight line through their peaks
meets the bound.

The search is made over several ways to cut the forward (:mod:`autodist.passes.analysis.narrow`), because
bytes saved do not tell how much is alive while a long chain is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from autodist.passes.analysis.budget import BudgetError, Choice, How, Solver, Value
from autodist.passes.analysis.narrow import crossing

_BEST = 3  # ways to cut the forward, of those that fit, that are looked at more closely
_TRIES = 8
_SEGMENTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
_SHARES = (0.15, 0.35, 0.6, 0.85)  # of the way between two choices
_CLOSE = 0.01  # of the bound: near enough to stop searching


@dataclass(frozen=True)
class Try:
    """A choice and its peak, with the search's correction."""

    choice: Choice
    peak: int


class Search:
    """Choices among ``values``, of which those at ``results`` are for the forward's own results.

    ``peak(how)`` reads the peak of a choice, and misses it by ``correction`` bytes. ``hosts`` are budgets for
    what is offloaded, in the order in which they are tried.
    """

    def __init__(
        self,
        values: Sequence[Value],
        results: Sequence[int],
        peak: Callable[[Sequence[How]], int],
        hosts: Sequence[int],
    ) -> None:
        self.peak, self.hosts = peak, hosts
        self.correction = 0
        self.ways = [Solver(way) for way in _ways(values, results)]
        self.read: dict[tuple[How, ...], int] = {}
        self.solved: dict[tuple[int, int, int], Choice | None] = {}

    def within(self, room: int, loose: Try) -> tuple[Try, bool]:
        """The choice of the fewest added seconds that fits ``room``, over ways to cut the forward.

        Where none does, the one that needs least, and False. ``loose`` saves the most that is asked for.
        """
        found: list[Try] = []
        tries: list[Try] = []
        for host in self.hosts:
            ways = []
            for way in range(len(self.ways)):
                tight = self._least(way, host)
                ways.append((way, tight))
                if len(ways) > 2 and all(t.peak < tight.peak for _, t in ways[-3:-1]):
                    break  # ever more cuts cost ever more
            tries += [tight for _, tight in ways]
            fitting = sorted((w for w in ways if w[1].peak <= room), key=lambda w: w[1].choice.seconds)
            found = [self._most(way, host, room, tight, loose) for way, tight in fitting[:_BEST]]
            for way, tight in () if found else ways:
                tried = self._between(way, host, tight, loose)
                tries += tried
                found += [t for t in tried if t.peak <= room]
            if found:
                return min(found, key=lambda t: t.choice.seconds), True
        return min(tries, key=lambda t: t.peak), False

    def _between(self, way: int, host: int, tight: Try, loose: Try) -> list[Try]:
        """Some choices that save more than the least: to compute much again at a time takes memory, too."""
        low, high = tight.choice.device_bytes, loose.choice.device_bytes
        tried = (self._try(way, int(low + share * (high - low)), host) for share in _SHARES if high > low)
        return [t for t in tried if t is not None]

    def _most(self, way: int, host: int, room: int, tight: Try, loose: Try) -> Try:
        """Between saving the least and saving all that min-cut does, the most that fits."""
        low, high = tight.choice.device_bytes, max(loose.choice.device_bytes, tight.choice.device_bytes)
        over = loose
        for _ in range(_TRIES):
            spare = room - tight.peak
            if spare <= _CLOSE * room or high - low <= _CLOSE * max(high, 1):
                break
            slope = (over.peak - tight.peak) / max(high - low, 1)
            step = spare / slope if slope > 0 else (high - low) / 2
            # A straight line is a guess: keep away from both ends, so that the interval shrinks.
            aim = int(min(max(low + step, low + 0.1 * (high - low)), high - 0.1 * (high - low)))
            tried = self._try(way, aim, host)
            if tried is None:
                low = aim
            elif tried.peak <= room:
                better = tried.choice.seconds <= tight.choice.seconds
                low, tight = aim, tried if better else tight
            else:
                high, over = aim, tried
        return tight

    def _least(self, way: int, host: int) -> Try:
        """The cheapest choice that saves the fewest bytes."""
        found = self._try(way, self.ways[way].least(host).device_bytes, host)
        assert found is not None
        return found

    def _try(self, way: int, num_bytes: int, host: int) -> Try | None:
        """None where no choice is found: with a host budget the least is only nearly the least."""
        key = way, num_bytes, host
        if key not in self.solved:
            try:
                self.solved[key] = self.ways[way].solve(num_bytes, host)
            except BudgetError:
                self.solved[key] = None
        choice = self.solved[key]
        return None if choice is None else self.tried(choice)

    def tried(self, choice: Choice) -> Try:
        if choice.how not in self.read:
            self.read[choice.how] = self.peak(choice.how)
        return Try(choice, self.read[choice.how] + self.correction)


def _ways(values: Sequence[Value], results: Sequence[int]) -> Iterator[Sequence[Value]]:
    """The candidates as they are, and with what crosses ever more cuts of the forward not recomputed."""
    place = {i: k for k, i in enumerate(results)}
    forward = [replace(values[i], inputs=tuple(place[u] for u in values[i].inputs)) for i in results]
    before: set[int] = set()
    yield values
    for segments in _SEGMENTS:
        kept = {results[i] for i in crossing(forward, segments) if math.isfinite(forward[i].save)}
        if kept and kept != before:
            before = kept
            yield [replace(v, recompute=math.inf) if i in kept else v for i, v in enumerate(values)]


__all__ = ["Search", "Try"]
