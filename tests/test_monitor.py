"""A rank that dies, stalls or fails ends the others in bounded time, with an error that names it.

Some of these ranks are meant to die, so they are processes of their own, forked from a server that
has imported torch once; the test hosts their key-value store, as torchrun does.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from autodist.runtime import compat
from autodist.runtime.monitor import PeerError, RankMonitor, is_communication_error

INTERVAL = 0.3  # seconds between beats
TIMEOUT = 2.0  # seconds a collective may wait
BOUND = 15.0  # seconds from the trouble to the last survivor's error

_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(["autodist.runtime.monitor"])


# --- what the ranks do ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Met:
    """What ended a rank's training."""

    error: str
    text: str
    cause: str
    seconds: float


def train(monitor: RankMonitor, steps: range) -> None:
    assert dist.group.WORLD is not None
    group = dist.group.WORLD.group_name
    for step in steps:
        with monitor.guard(f"step {step}"):
            collectives = torch.ops._c10d_functional
            total = collectives.all_reduce(torch.ones(8), "sum", group)
            collectives.wait_tensor(total)


def be_a_rank(
    rank: int, world: int, port: int, hosts: bool, trouble: str, results: Connection
) -> None:
    """Train for three steps, get into ``trouble``, or train on until the others' trouble is met."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=hosts, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    compat.set_group_timeout(dist.group.WORLD, TIMEOUT)
    monitor = RankMonitor(compat.default_store(), range(world), rank, INTERVAL, "test")
    train(monitor, range(3))
    start = time.monotonic()
    try:
        if trouble == "death":
            os._exit(1)
        elif trouble == "stall":
            monitor.at("loading data")
            time.sleep(600)
        elif trouble == "failure":
            with monitor.guard("step 3"):
                raise ValueError("the loss is NaN\nand so are the gradients")
        elif trouble == "end":
            monitor.stop()
            dist.destroy_process_group()
        else:
            train(monitor, range(3, 1000))
    except Exception as error:
        cause = type(error.__cause__).__name__
        results.send(Met(type(error).__name__, str(error), cause, time.monotonic() - start))


def survivors(troubles: list[str], host: int | None = None) -> dict[int, Met]:
    """Run one rank per entry, which is its trouble, if any; what those without one met.

    The rank ``host`` hosts the store, or this process where it is None.
    """
    if host is None:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = server.port
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    processes, ranks = [], {}
    for rank, trouble in enumerate(troubles):
        here, there = _START.Pipe(duplex=False)
        arguments = (rank, len(troubles), port, rank == host, trouble, there)
        process = _START.Process(target=be_a_rank, args=arguments, daemon=True)
        process.start()
        there.close()
        processes.append(process)
        if not trouble:
            ranks[here] = rank
    met: dict[int, Met] = {}
    try:
        while len(met) < len(ranks):
            ready = wait([pipe for pipe, rank in ranks.items() if rank not in met], timeout=60)
            assert ready, f"ranks {set(ranks.values()) - set(met)} met nothing in 60 s"
            met |= {ranks[pipe]: pipe.recv() for pipe in ready}  # type: ignore
    finally:
        for process in processes:
            process.kill()
            process.join()
    return met


# --- ranks and their peers ------------------------------------------------------------------------


@pytest.mark.distributed
def test_a_death_and_a_stall_are_named() -> None:
    (met,) = survivors(["", "death", "stall"]).values()
    assert (met.error, met.cause) == ("PeerError", "RuntimeError")
    assert "Rank 0 lost contact with its peers in step 3: rank 1 gives no sign of life" in met.text
    assert "rank 2 still in: loading data (for " in met.text
    assert "The collective said: [" in met.text
    assert met.seconds < BOUND


@pytest.mark.distributed
def test_a_stall_ends_the_others_at_the_timeout() -> None:
    (met,) = survivors(["", "stall"]).values()
    assert (met.error, met.cause) == ("PeerError", "RuntimeError")
    assert "in step 3: rank 1 still in: loading data (for " in met.text
    assert TIMEOUT <= met.seconds < BOUND


@pytest.mark.distributed
def test_the_first_failure_is_named_and_not_those_it_caused() -> None:
    met = survivors(["", "", "failure"])
    for rank, other in ((0, 1), (1, 0)):
        assert met[rank].error == "PeerError"
        assert "rank 2 stopped in step 3 with ValueError: the loss is NaN." in met[rank].text
        assert f"rank {other}" not in met[rank].text
        assert met[rank].seconds < BOUND


@pytest.mark.distributed
def test_a_rank_that_ended_early_is_named() -> None:
    (met,) = survivors(["", "end"]).values()
    assert "rank 1 ended its program (last heard in: the program, after step 2)" in met.text


@pytest.mark.distributed
def test_the_death_of_the_store_is_no_reason_to_hang() -> None:
    (met,) = survivors(["", "death"], host=1).values()
    assert met.error == "PeerError"
    assert "the key-value store is gone too" in met.text
    assert met.seconds < BOUND


# --- one monitor ----------------------------------------------------------------------------------


def beats(store: dist.Store, rank: int) -> dict[str, object]:
    return json.loads(dist.PrefixStore("test", store).get(str(rank)))


def test_beats_go_on_and_tell_the_place() -> None:
    store = dist.HashStore()
    monitor = RankMonitor(store, [0, 1], 0, 0.02, "test")
    try:
        with monitor.guard("graph 1"):
            time.sleep(0.3)
            first = beats(store, 0)
            time.sleep(0.2)
            second = beats(store, 0)
        assert first["place"] == second["place"] == "graph 1"
        assert second["count"] > first["count"]  # type: ignore[operator]
        assert second["seconds"] > first["seconds"] > 0.2  # type: ignore[operator]
    finally:
        monitor.stop()
    monitor.stop()
    last = beats(store, 0)
    assert (last["state"], last["place"]) == ("ended", "the program, after graph 1")
    time.sleep(0.1)
    assert beats(store, 0) == last


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (dist.DistNetworkError("Connection reset by peer"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:1"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("Connection closed by peer"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_only_communication_errors_are_translated(error: BaseException, lost: bool) -> None:
    assert is_communication_error(error) == lost
    store = dist.HashStore()
    monitor = RankMonitor(store, [0], 0, 0.05, "test")
    try:
        with pytest.raises(BaseException) as raised, monitor.guard("graph 1"):
            raise error
    finally:
        monitor.stop()
    if lost:
        assert isinstance(raised.value, PeerError)
        assert raised.value.__cause__ is error
        assert "all other ranks are alive and at the same place" in str(raised.value)
    else:
        assert raised.value is error
    assert beats(store, 0)["state"] == ("lost" if lost else "failed")


def test_a_long_wait_is_explained_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The only explanation where a collective raises nothing, as NCCL's do not."""
    store = dist.HashStore()
    dist.PrefixStore("test", store).set(
        "1", json.dumps({"count": 7, "state": "runs", "place": "graph 0", "seconds": 2.0})
    )
    monitors = [RankMonitor(store, [0, 1, 2, 3], rank, 0.2, "test") for rank in (0, 2, 3)]
    said: dict[str, str] = {}
    try:
        with caplog.at_level(logging.WARNING, logger="autodist"):
            for monitor, place in zip(monitors, ("graph 1", "compiling", "graph 1"), strict=True):
                monitor.at(place)
            deadline = time.monotonic() + 20
            while len(said) < 2 and time.monotonic() < deadline:
                time.sleep(0.1)
                said = {r.getMessage()[:6]: r.getMessage() for r in caplog.records}
            caplog.clear()
            for _ in range(40):  # Progress: nothing to say.
                monitors[0].at("graph 1")
                time.sleep(0.05)
            assert not [r for r in caplog.records if r.getMessage().startswith("Rank 0")]
    finally:
        for monitor in monitors:
            monitor.stop()
    assert said.keys() == {"Rank 0", "Rank 2"}  # rank 3 stands beside rank 0, which speaks for it
    assert (
        "rank 1 gives no sign of life (dead, frozen or cut off; last heard in: graph 0)"
        in said["Rank 0"]
    )
    assert "rank 2 still in: compiling" in said["Rank 0"]
    assert "rank 3" not in said["Rank 0"]


def test_a_store_that_is_gone_ends_the_monitor_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monitor = RankMonitor(dist.FileStore(str(folder / "store"), 1), [0, 1], 0, 0.1, "test")
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    other = RankMonitor(server, [0, 1], 0, 0.1, "test")
    (folder / "store").unlink()
    folder.rmdir()
    del server
    start = time.monotonic()
    time.sleep(0.3)
    with monitor.guard("graph 1"):
        other.at("graph 1")
    monitor.stop()
    other.stop()
    assert time.monotonic() - start < 8


_EXITING = """
import sys, torch, torch.distributed as dist
from autodist.runtime.monitor import RankMonitor
stores = dist.FileStore(sys.argv[1], 3), dist.TCPStore(
    "127.0.0.1", 0, is_master=True, wait_for_workers=False
)
monitors = [RankMonitor(store, [0], 0, 0.001, "test") for store in stores]
monitors[0].at("graph 1")
del stores
"""


def test_the_interpreter_ends_cleanly_without_stop(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    keep = dist.FileStore(path, 3)  # The last handle to go deletes the file.
    done = subprocess.run(
        [sys.executable, "-c", _EXITING, path], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert beats(keep, 0)["state"] == "ended"
