"""Ranks that somebody else has started: the environment that torchrun sets, and the memory in which they meet."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import HostError, UsageError
from ..hosts.machine import installed_version
from .shared_memory import GroupMemory

__all__ = ["Place", "find_place", "leave", "meet"]

_FOLDER = Path("/dev/shm")  # noqa: S108  (names there are this user's, and opened as such)
_SECONDS = 120.0
"""How long a rank waits for rank 0, which may still be importing."""


@dataclass(frozen=True)
class Place:
    """This process among those that were started together."""

    rank: int
    ranks: int
    name: str


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that torchrun, or who sets the same variables, gave to this process; None where nobody did. Raises
    UsageError where they contradict each other."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    try:
        rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except ValueError:
        rank = ranks = -1
    if not 0 <= rank < ranks:
        raise UsageError(
            f"The environment has RANK={environment['RANK']!r} and WORLD_SIZE={environment['WORLD_SIZE']!r}: a rank is "
            f"a number from 0 to one less than their count. Start all with torchrun, or unset both."
        )
    if (local := environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])) != environment["WORLD_SIZE"]:
        raise UsageError(
            f"{local} of {ranks} ranks were started on this machine, and they meet in its memory: start all on one."
        )
    given = "-".join(environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"))
    # One launcher starts all of them, and another one that has taken over its port is another process.
    return Place(rank, ranks, re.sub(r"\W+", "-", f"precast-{os.getuid()}-{os.getppid()}-{given}")[:200])


def meet(place: Place) -> GroupMemory:
    """The memory of the group, made by rank 0, in which it stays until all have come (`leave`). Raises HostError where
    rank 0 does not come."""
    path = _FOLDER / place.name
    if place.rank == 0:
        path.unlink(missing_ok=True)
        return GroupMemory.create(place.ranks, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        if (found := _open(path, place.ranks)) is not None:
            return found
        time.sleep(0.05)
    raise HostError(f"Rank 0 did not come within {_SECONDS:.0f} seconds: see what it says, or whether it runs at all.")


def leave(place: Place) -> None:
    """Take away the name of the memory, once nobody looks for it any more."""
    (_FOLDER / place.name).unlink(missing_ok=True)


def _open(path: Path, ranks: int) -> GroupMemory | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    found = os.fstat(descriptor)
    if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise HostError(f"{path} is not this user's, so that ranks cannot meet there.")
    own, first = installed_version("precast"), GroupMemory.version(descriptor)
    if first not in ("", own):
        os.close(descriptor)
        raise HostError(f"Rank 0 runs precast {first}, and this rank precast {own}: start all with one of them.")
    if found.st_size != GroupMemory.size(ranks):
        os.close(descriptor)
        return None
    memory = GroupMemory(descriptor, ranks)
    return memory if memory.is_ready else None
