"""Run a function on several gloo ranks and collect what each returns.

Workers are kept between tests (importing torch costs seconds), but every call makes and destroys its own
process group, so tests do not see each other's collectives. A call that fails or overruns its time kills its
workers, and so does one that leaves many threads (those of process groups that torch's caches keep wake a
hundred times a second); the next call starts fresh ones.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

_GRACE = 30.0  # seconds that the others have, once a rank has failed
_THREADS = 60  # of a worker between two calls
_START = multiprocessing.get_context("spawn")
_POOLS: dict[int, list[tuple[Any, Connection]]] = {}


class RankFailed(AssertionError):
    """A rank raised; the message holds every failed rank's traceback."""


def _serve(rank: int, world_size: int, pipe: Connection) -> None:
    os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            store_path, function, args, seconds = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store_path, world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=seconds),
            )
            result: tuple[bool, Any] = (True, function(*args))
            dist.barrier()
        except BaseException:
            result = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            torch._dynamo.reset()
        pipe.send((*result, _count_threads()))


def _count_threads() -> int:
    """Python's own count leaves out those of process groups. Unknown but on Linux."""
    tasks = "/proc/self/task"
    return len(os.listdir(tasks)) if os.path.isdir(tasks) else 0


def _pool(world_size: int) -> list[tuple[Any, Connection]]:
    if world_size not in _POOLS:
        workers = []
        for rank in range(world_size):
            here, there = _START.Pipe()
            process = _START.Process(target=_serve, args=(rank, world_size, there), daemon=True)
            process.start()
            there.close()
            workers.append((process, here))
        _POOLS[world_size] = workers
    return _POOLS[world_size]


def _discard(world_size: int) -> None:
    for process, pipe in _POOLS.pop(world_size, []):
        pipe.close()
        process.kill()
        process.join()


@atexit.register
def _discard_all() -> None:
    for world_size in list(_POOLS):
        _discard(world_size)


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, seconds: float = 600
) -> list[Any]:
    """``function(*args)`` on every rank; its results by rank.

    ``function`` must be importable (module level). Raises :class:`RankFailed` with the tracebacks of the
    ranks that raised, died, or did not finish within ``seconds``, or soon after another had failed.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a store may still write
        workers = _pool(world_size)
        for _, pipe in workers:
            pipe.send((os.path.join(folder, "store"), function, args, seconds))
        results: dict[int, tuple[bool, Any, int]] = {}
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(workers)}
        while len(results) < world_size:
            waiting = [p for p, r in ranks.items() if r not in results]
            alone = any(not ok for ok, *_ in results.values())
            ready = wait(waiting, timeout=min(seconds, _GRACE) if alone else seconds)
            if not ready:
                break
            for pipe in ready:
                try:
                    results[ranks[pipe]] = pipe.recv()  # type: ignore[index, union-attr]
                except EOFError:
                    results[ranks[pipe]] = (False, "the process died", 0)  # type: ignore[index]
    missing = [r for r in range(world_size) if r not in results]
    failed = {r: text for r, (ok, text, _) in results.items() if not ok}
    failed |= {r: "no result in time" for r in missing}
    if failed:
        _discard(world_size)
        raise RankFailed("\n".join(f"rank {r}:\n{text}" for r, text in sorted(failed.items())))
    if max(threads for *_, threads in results.values()) > _THREADS:
        _discard(world_size)
    return [results[r][1] for r in range(world_size)]
