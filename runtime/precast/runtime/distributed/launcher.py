"""Start the other ranks of a group as processes of this machine, and let none outlive another."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .. import child
from ..artifact.locks import LockedDirectory, old_ones, sweep
from ..errors import UsageError
from .shared_memory import GroupMemory

__all__ = ["Launched", "describe_status", "die_with_parent", "share_of_cores"]

_PR_SET_PDEATHSIG = 1
_PREFIX = "precast-ranks-"
_GRACE = 5.0
"""Seconds that a rank has to end after it was told to."""


class Launched:
    """The processes of ranks 1 and up, started by rank 0, which they end with, however it ends."""

    def __init__(
        self, memory: GroupMemory, arguments: Sequence[str], cores: Sequence[Sequence[int]], logs: Path | None = None
    ) -> None:
        """`cores` are those of each rank; `logs` is the user's own folder for what ranks write, if there is one."""
        folder = None
        if logs is None:
            folder = _make_folder()
            logs = folder.path
        else:
            _prepare_folder(logs, memory.ranks)
        self.memory, self.logs = memory, logs
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        started, ended = threading.Barrier(memory.ranks), threading.Event()
        threads = [
            # Each waits in the thread that started it: a child that dies with its parent dies with that very thread.
            # None of them knows this object, which ends them when nobody has it any more.
            threading.Thread(
                target=_run,
                args=(
                    memory,
                    rank,
                    [*arguments, "--cores", ",".join(map(str, cores[rank]))],
                    self.logs,
                    self._processes,
                    started,
                    ended,
                ),
                daemon=True,
            )
            for rank in range(1, memory.ranks)
        ]
        for thread in threads:
            thread.start()
        started.wait()
        self.end = weakref.finalize(self, _end, memory, self._processes, threads, ended, folder)


def _make_folder() -> LockedDirectory:
    """A folder for the logs of one group, to go away with it."""
    parent = Path(tempfile.gettempdir())
    sweep(old_ones(parent.glob(f"{_PREFIX}*")))
    return LockedDirectory(parent, _PREFIX, 0o700)


def _prepare_folder(path: Path, ranks: int) -> None:
    """Make the user's folder for logs, where it is not there. Raises UsageError where they cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        for rank in range(1, ranks):
            _log_of(path, rank).open("ab").close()
    except OSError as error:
        raise UsageError(f"log_dir={path} cannot be written into: {error.filename}: {error.strerror}.") from None


def _log_of(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank}.log"


def _run(
    memory: GroupMemory, rank: int, arguments: Sequence[str], logs: Path,
    processes: dict[int, subprocess.Popen[bytes]], started: threading.Barrier, ended: threading.Event,
) -> None:  # fmt: skip
    """Start a rank, wait for it, and let all others end with it."""
    log = _log_of(logs, rank)
    own = ["--rank", rank, "--ranks", memory.ranks, "--descriptor", memory.descriptor, "--parent", os.getpid()]
    with log.open("ab") as file:
        processes[rank] = process = subprocess.Popen(
            child.command("precast.runtime.distributed.worker", *arguments, *own),
            env=child.environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            pass_fds=[memory.descriptor], start_new_session=True,
        )  # fmt: skip
    started.wait()
    status = process.wait()
    if not ended.is_set():
        memory.stop(rank, f"{describe_status(status)}; see {log}")


def _end(
    memory: GroupMemory, processes: dict[int, subprocess.Popen[bytes]], threads: Sequence[threading.Thread],
    ended: threading.Event, folder: LockedDirectory | None,
) -> None:  # fmt: skip
    """Let all end, by force where that takes too long, and keep logs only of what went wrong, but for
    those in a folder of the user's."""
    ended.set()
    went_well = memory.stopped_by() is None
    memory.stop(0, "it is done")
    for process in processes.values():
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
    for thread in threads:
        thread.join(_GRACE)
    if folder:
        folder.close() if went_well else folder.release()


def describe_status(status: int) -> str:
    """How a process ended, by what Popen.wait() returned."""
    if status >= 0:
        return f"it ended with exit code {status}"
    with suppress(ValueError):
        return f"it was killed by {signal.Signals(-status).name}"
    return f"it was killed by signal {-status}"


def share_of_cores(rank: int, ranks: int) -> list[int]:
    """The cores of a rank: those that this process may use, divided into equal runs, which keep within a NUMA node
    where nodes do; one that several ranks share where there are fewer cores than ranks."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if len(cores) < ranks:
        return [cores[rank % len(cores)]]
    size = len(cores) // ranks
    return cores[rank * size : (rank + 1) * size]


def die_with_parent(parent: int) -> None:
    """Let this process be killed when the one that started it ends, or end it now if that is gone already."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(f"Process {parent}, which started this one, is gone.")
