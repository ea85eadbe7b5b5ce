"""A rank that dies or stalls ends the others in bounded time, with an error that names it.

What ends a rank that waits for a lost peer is the collective itself: at once when the peer's
connection closes, at the group's timeout when it only stalls
(:func:`autodist.runtime.compat.set_group_timeout`). But such an error names an address, or nothing.
This module adds who and where.

Terms. A rank's *place* is a few words on what its program is doing ("graph 3 step 17"). Its *beat*
is a record in the key-value store, written by a thread every ``interval`` seconds: a count, the
place, and the seconds spent there. A rank is *silent* when its count stands still for more than
three intervals.

    beat = (count, state, place, seconds, begun, inside)
    state: runs | lost (a peer)  | failed (with an error of its own) | ended

``begun`` counts the programs that a rank has begun to run, of those that all ranks run together because
they communicate; ``inside`` says whether it is still in the last one. Who has begun fewer is waited for.

Invariants:
- no clock of another machine is read: silence is two equal counts, seen more than three intervals
  apart;
- a rank that fails writes its beat before it goes, so the others can name the first cause rather
  than each other;
- the store is read only after an error, or when this rank has stood still for several intervals, at
  intervals that double; all that happens in a healthy run is one small write per interval;
- the thread never outlives the interpreter: it is joined before the interpreter goes down, since a
  thread that wakes inside the store's C++ code after that aborts the process.
"""

from __future__ import annotations

import atexit
import itertools
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import torch.distributed as dist

from autodist.runtime import compat
from autodist.runtime.agreement import absent, ranks_text

_SILENCE = 3  # intervals; a look takes one more
_PATIENCE = 4  # intervals at one place before a rank looks at the others

# gloo raises plain RuntimeErrors: these are what its transport says when a peer is gone or late.
_GLOO_SAYS = (
    "gloo/transport",
    "Application timeout caused pair closure",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",
    "failed to pass monitoredBarrier",
)

_log = logging.getLogger(__name__)


class PeerError(RuntimeError):
    """A collective failed because of another rank."""


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself; ``seconds`` are those it had been at ``place``."""

    count: int
    state: str
    place: str
    seconds: float
    begun: int = 0
    inside: bool = False


class RankMonitor:
    """Says where this rank is, and knows where the others are.

    ``ranks`` are the global ranks of the group, ``rank`` this one; ``interval`` is in seconds.
    ``scope`` prefixes the keys: the group's own, and not used before on this store. The monitor
    uses a handle of its own on the store, so waiting on ``store`` elsewhere does not hold it up.
    Ends with :meth:`stop`, with the interpreter, or when the store is gone.
    """

    def __init__(
        self, store: dist.Store, ranks: Sequence[int], rank: int, interval: float, scope: str
    ) -> None:
        # A lost file or host must not hold up stop() for long.
        handle = compat.second_store_handle(store, max(1.0, interval))
        self._store = dist.PrefixStore(scope, handle)
        self._rank = rank
        self._peers = [r for r in ranks if r != rank]
        self._interval = interval
        self._counts = itertools.count()
        self._stopping = threading.Event()
        self._begun, self._inside = 0, False
        self.at("start")
        self._publish()
        self._thread = threading.Thread(target=self._run, name="autodist-monitor", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def at(self, place: str) -> None:
        """This rank's program is now at ``place``. Cheap: the thread does the telling."""
        self._now = ("runs", place, time.monotonic())

    def elsewhere(self) -> str | None:
        """What ranks do that wait, in a program, for this rank, which is in none: they can wait for ever."""
        beats = {r: b for r, b in self._read().items() if b is not None and b.inside and b.state == "runs"}
        ahead = [r for r, b in beats.items() if b.begun > self._begun]
        if not ahead:
            return None
        found = f"{ranks_text(ahead)} {'runs' if len(ahead) == 1 else 'run'} {beats[ahead[0]].place}"
        self._now = ("failed", f"{self._now[1]}, while {found}", time.monotonic())
        self._publish()
        return found

    @contextmanager
    def guard(self, doing: str, together: bool = False) -> Iterator[None]:
        """Within, this rank is at ``doing``, perhaps a program that all ranks run ``together``; an error of
        communication becomes a :class:`PeerError`.

        The error says which ranks are silent, have failed or are elsewhere; it comes at most four
        intervals after the original, which is its cause. Other errors pass untouched, and the other
        ranks learn of them.
        """
        self.at(doing)
        self._begun += together
        self._inside = together
        try:
            yield
        except BaseException as error:
            lost = is_communication_error(error)
            place = doing if lost else f"{doing} with {type(error).__name__}: {_first_line(error)}"
            self._now = ("lost" if lost else "failed", place, time.monotonic())
            with suppress(RuntimeError):  # The store may be what is lost.
                self._publish()
            if lost:
                raise PeerError(self._explain(doing, error)) from error
            raise
        finally:
            self._inside = False
        self.at(f"the program, after {doing}")

    def stop(self) -> None:
        """End the thread and tell the others that this rank has ended. May be called twice."""
        atexit.unregister(self.stop)
        self._stopping.set()
        if self._thread.is_alive():  # Not so in a forked child, nor when the store is gone.
            self._thread.join(timeout=5 * max(1.0, self._interval))
            state, place, since = self._now
            self._now = ("ended" if state == "runs" else state, place, since)
            with suppress(RuntimeError):
                self._publish()

    def _run(self) -> None:
        looks = 0
        earlier: Mapping[int, Beat | None] = {}
        while not self._stopping.wait(self._interval):
            try:
                self._publish()
                _, place, since = self._now
                waited = (time.monotonic() - since) / self._interval
                if waited < _PATIENCE:
                    looks, earlier = 0, {}
                elif waited >= _PATIENCE * 2**looks:
                    later = self._read()
                    self._report(place, waited * self._interval, earlier, later)
                    looks, earlier = looks + 1, later
            except RuntimeError as error:
                # Its host has ended, or the file is deleted: nobody is left to tell.
                _log.debug("Rank %d tells of itself no more: %s", self._rank, error)
                return

    def _report(
        self,
        place: str,
        seconds: float,
        earlier: Mapping[int, Beat | None],
        later: Mapping[int, Beat | None],
    ) -> None:
        """Log what is odd about the others while this rank stands still.

        With NCCL it is the only explanation there will be: its watchdog ends the process at the
        group's timeout, and no exception reaches the program. Of ranks that stand at one place only
        the first speaks.
        """
        found = _findings(earlier, later, place) if earlier else []
        here = [r for r, b in later.items() if b and b.state == "runs" and b.place == place]
        if found and self._rank < min(here, default=self._rank + 1):
            what = "; ".join(found)
            _log.warning("Rank %d has been in: %s for %.0f s; %s", self._rank, place, seconds, what)

    def _publish(self) -> None:
        state, place, since = self._now
        seconds = time.monotonic() - since
        beat = Beat(next(self._counts), state, place, seconds, self._begun, self._inside)
        self._store.set(str(self._rank), json.dumps(asdict(beat)))

    def _read(self) -> dict[int, Beat | None]:
        """Every peer's beat; None for those that never wrote one. Never waits for a key."""
        gone = set(absent(self._store, [str(r) for r in self._peers]))
        here = [r for r in self._peers if str(r) not in gone]
        beats: dict[int, Beat | None] = dict.fromkeys(self._peers)
        if here:
            texts = self._store.multi_get([str(r) for r in here])
            beats |= {r: Beat(**json.loads(t)) for r, t in zip(here, texts, strict=True)}
        return beats

    def _look(self) -> tuple[dict[int, Beat | None], dict[int, Beat | None]]:
        """Two readings: so far apart that silence is proved, or with every peer heard between."""
        earlier = later = self._read()
        for _ in range(_SILENCE + 1):
            if not any(_is_silent(earlier[r], later[r]) for r in self._peers):
                break
            time.sleep(self._interval)
            later = self._read()
        return earlier, later

    def _explain(self, doing: str, error: BaseException) -> str:
        try:
            found = _findings(*self._look(), doing)
        except RuntimeError:
            found = [
                "the key-value store is gone too, so the process that hosts it (rank 0, or "
                "torchrun) has ended"
            ]
        if not found:
            found = [
                "all other ranks are alive and at the same place, which leaves the network, or a "
                "collective that takes longer than the group's timeout"
            ]
        return (
            f"Rank {self._rank} lost contact with its peers in {doing}: {'; '.join(found)}. Look "
            "first at the output of the ranks named here. The collective said: "
            f"{_first_line(error)}"
        )


def is_communication_error(error: BaseException) -> bool:
    """Whether ``error`` is a collective's, or the store's, about a peer or the way to it."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(phrase in str(error) for phrase in _GLOO_SAYS)


def _is_silent(earlier: Beat | None, later: Beat | None) -> bool:
    if earlier is None or later is None:
        return later is None
    return later.state == "runs" and later.count == earlier.count


def _findings(
    earlier: Mapping[int, Beat | None], later: Mapping[int, Beat | None], place: str
) -> list[str]:
    """What sets peers apart from a rank at ``place``, likely causes first, one phrase per kind."""
    groups: dict[tuple[int, str], list[int]] = {}
    for rank, beat in later.items():
        finding = _finding(earlier[rank], beat, place)
        if finding is not None:
            groups.setdefault(finding, []).append(rank)
    phrases = [f"{ranks_text(ranks)} {what}" for (_, what), ranks in sorted(groups.items())]
    return phrases[:8] + ([f"and {len(phrases) - 8} more like these"] if len(phrases) > 8 else [])


def _finding(earlier: Beat | None, beat: Beat | None, place: str) -> tuple[int, str] | None:
    """(order, what to say of a rank), or None when nothing sets it apart."""
    if beat is None:
        return 1, "gave no sign of life at all"
    if beat.state == "failed":
        return 0, f"stopped in {beat.place}"
    if beat.state == "ended":
        return 2, f"ended its program (last heard in: {beat.place})"
    if _is_silent(earlier, beat):
        return 1, f"gives no sign of life (dead, frozen or cut off; last heard in: {beat.place})"
    if beat.state == "runs" and beat.place != place:
        # Rounded, so that ranks that came there together are named together.
        return 3, f"still in: {beat.place} (for {_rounded(beat.seconds)} s)"
    return None


def _rounded(seconds: float) -> int:
    return round(seconds) if seconds < 10 else 10 * round(seconds / 10)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:300]
