"""Run one variant once: a fresh process a rank, torchrun's environment, a cold compile cache."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.worker import Measurement
from benchmarks.workload import Workload

_ROOT = Path(__file__).parent.parent
_LOG_LINES = 25  # of a failed rank's output, enough for the end of a traceback


class RunFailedError(RuntimeError):
    """A rank ended badly, or the run outlasted its time. ``output`` is the rank's last lines."""

    def __init__(self, reason: str, output: list[str]) -> None:
        super().__init__(f"{reason}; its last line: {output[-1] if output else '(nothing)'}")
        self.output = output


def run_once(variant: str, workload: Workload, allocator: Path | None, timeout: float) -> Measurement:
    """Measure ``variant``. ``allocator`` is the counting allocator's library, needed on a CPU.

    Raises :class:`RunFailedError`, also when the run takes more than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = folder / "result.json"
        arguments = [variant, json.dumps(asdict(workload)), str(result)]
        arguments += [str(allocator)] if allocator else []
        port = _free_port()
        ranks = [
            _start(rank, arguments, _environment(rank, port, workload, folder), folder)
            for rank in range(workload.ranks)
        ]
        try:
            failed = _wait(ranks, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                _kill(rank)
        # Written after the last step: how a rank fares while it closes is not what is measured.
        if result.exists():
            return Measurement(**json.loads(result.read_text()))
        if failed is None:
            raise RunFailedError(f"no result within {timeout:.0f} s", _tail(folder, 0))
        raise RunFailedError(f"rank {failed} ended without a result", _tail(folder, failed))


def _environment(rank: int, port: int, workload: Workload, folder: Path) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workload.ranks),
        "LOCAL_WORLD_SIZE": str(workload.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(workload.threads),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


def _start(
    rank: int, arguments: list[str], environment: dict[str, str], folder: Path
) -> subprocess.Popen[bytes]:
    with open(_log(folder, rank), "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            cwd=_ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its compile workers can be ended with it
        )


def _wait(ranks: list[subprocess.Popen[bytes]], deadline: float) -> int | None:
    """Wait for all ranks. Returns the number of one that ended badly, 0 if none, None when late."""
    while time.monotonic() < deadline:
        codes = [rank.poll() for rank in ranks]
        bad = [number for number, code in enumerate(codes) if code not in (None, 0)]
        if bad:
            return bad[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)
    return None


def _kill(rank: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _tail(folder: Path, rank: int) -> list[str]:
    lines = _log(folder, rank).read_text(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-_LOG_LINES:]
