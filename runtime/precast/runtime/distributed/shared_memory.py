"""The memory that all ranks of a group share: for collectives within a step, and for what rank 0 asks of the others.

Compiled code reads and writes the first part; its layout is that of standalone/cpp/ranks.cpp. The second part holds one
command at a time: rank 0 writes it and counts up, the others read it and count up after it. Behind it, in as many bytes
as it takes, lies what stages of a pipeline pass to each other.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import HostError
from ..hosts.machine import installed_version

__all__ = ["TIME_LIMIT", "GroupMemory", "StoppedError"]

TIME_LIMIT = 60.0
"""Seconds that a rank waits for another within a step, or to begin one, where nobody says how many."""

CHUNK_BYTES = 256 * 2**10
"""What a rank shows the others at a time: it stays in a core's cache."""
FIRST_CHUNK = 4096
COMMAND_BYTES = 64 * 2**20
"""The largest command. Memory that nobody touches is none."""
REASON_BYTES = 2048
_PAGES = 2**16
"""What an offset in a file that is mapped is a multiple of, on any machine."""
_NEVER = 2**62
_LINE, _VERSION_AT = 64, 16
_MOST_RANKS = FIRST_CHUNK // _LINE - 1
_SPINS = 2000
"""Looks at a counter before waiting for it costs no core: about as long as rank 0 chooses a token."""
_NAP, _LONGEST_NAP = 0.0002, 0.002
"""Seconds between looks after that, ever more up to the second: ranks of a model that rests take next to nothing."""

_Array = np.ndarray[Any, Any]


class StoppedError(Exception):
    """Another rank has ended, or a time limit was passed; the text says which and why."""


class GroupMemory:
    """The shared memory of `ranks` ranks, as one of them has it mapped.

    Attributes:
        descriptor: of the file that it is, which children inherit.
        address: of its first byte in this process.
    """

    def __init__(self, descriptor: int, ranks: int) -> None:
        if ranks > _MOST_RANKS:
            raise HostError(f"{ranks} ranks are more than the {_MOST_RANKS} that one machine's memory is laid out for.")
        self.descriptor, self.ranks = descriptor, ranks
        weakref.finalize(self, os.close, descriptor)
        self._command_at = FIRST_CHUNK + 2 * ranks * CHUNK_BYTES
        self._map = mmap.mmap(descriptor, self.size(ranks))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._header = np.frombuffer(self._map, np.int32, 2)
        counters = np.frombuffer(self._map, np.int64, (1 + ranks) * _LINE // 8, self._command_at)
        self._sent, self._done = counters[0:1], counters[_LINE // 8 :: _LINE // 8]
        self._length = counters[1:2]
        self._turns, self._beats = counters[_LINE // 8 + 1 :: _LINE // 8], counters[_LINE // 8 + 2 :: _LINE // 8]
        self._passed_at = -(-self.size(ranks) // _PAGES) * _PAGES
        at = self._command_at + (1 + ranks) * _LINE
        self._reasons = [(at + rank * REASON_BYTES, at + (rank + 1) * REASON_BYTES) for rank in range(ranks)]
        self._content_at = at + ranks * REASON_BYTES

    @staticmethod
    def size(ranks: int) -> int:
        """The bytes of a group's memory."""
        return FIRST_CHUNK + ranks * (2 * CHUNK_BYTES + REASON_BYTES) + (1 + ranks) * _LINE + COMMAND_BYTES

    @classmethod
    def create(cls, ranks: int, descriptor: int | None = None) -> GroupMemory:
        """Make the memory of a group, in a file without a name, or in one that is open and empty."""
        if descriptor is None:
            descriptor = os.memfd_create("precast-ranks")
        os.ftruncate(descriptor, cls.size(ranks))
        made = cls(descriptor, ranks)
        np.frombuffer(made._map, np.int64, 1, 8)[:] = CHUNK_BYTES
        version = (installed_version("precast") or "").encode()[: _LINE - _VERSION_AT]
        made._map[_VERSION_AT : _VERSION_AT + len(version)] = version
        made._header[:] = ranks, 0
        return made

    @staticmethod
    def version(descriptor: int) -> str:
        """The version of precast that has laid out this memory, wherever else it lays out things; "" before that."""
        return os.pread(descriptor, _LINE, 0)[_VERSION_AT:].rstrip(b"\0").decode("ascii", "replace")

    @property
    def is_ready(self) -> bool:
        """Whether rank 0 has laid it out."""
        return int(self._header[0]) == self.ranks

    def stop(self, rank: int, reason: str) -> None:
        """Let every rank give up, now or at its next collective; the first reason counts."""
        if self._header[1] == 0:
            begin, end = self._reasons[rank]
            text = reason.encode()[: end - begin - 1]
            self._map[begin : begin + len(text)] = text
            self._header[1] = 1 + rank

    def stopped_by(self) -> tuple[int, str] | None:
        """The rank that gave up first, and why."""
        rank = int(self._header[1]) - 1
        if rank < 0:
            return None
        begin, end = self._reasons[rank]
        return rank, self._map[begin:end].split(b"\0")[0].decode("utf-8", "replace")

    def send(self, kind: str, content: Mapping[str, Any], arrays: tuple[_Array, ...], seconds: float) -> None:
        """Give all other ranks a command, once they have taken the one before. Raises StoppedError."""
        done, beats = self._done[1:], self._beats[1:]

        def slowest() -> int:
            """The beats of the rank that has shown the least life, of those that are waited for."""
            return int(beats[done < self._sent[0]].min(initial=_NEVER))

        self._wait(lambda: bool((done >= self._sent[0]).all()), seconds, sign=slowest)
        text = json.dumps([kind, content]).encode()
        at = self._content_at
        if len(text) + sum(array.nbytes for array in arrays) > COMMAND_BYTES:
            raise HostError(f"A step's inputs are more than the {COMMAND_BYTES:,} bytes that ranks are given at once.")
        self._map[at : at + len(text)] = text
        at += len(text)
        for array in arrays:
            self._map[at : at + array.nbytes] = array.tobytes()
            at += array.nbytes
        self._length[0] = len(text)
        self._sent[0] += 1

    @contextmanager
    def receive(self, rank: int, is_wanted: Callable[[], bool]) -> Iterator[tuple[str, dict[str, Any], memoryview]]:
        """The next command: its kind, its content, and the bytes of arrays after it, to be used within this block.
        Raises StoppedError, also where `is_wanted` says no."""
        self._wait(lambda: bool(self._sent[0] > self._done[rank]), None, is_wanted)
        begin, end = self._content_at, self._content_at + int(self._length[0])
        kind, content = json.loads(self._map[begin:end])
        with memoryview(self._map) as whole:
            yield kind, content, whole[end:]
        self._done[rank] += 1

    def map_shared(self, size: int, *, is_first: bool) -> mmap.mmap:
        """The first `size` bytes of further memory that all ranks share, for what they pass to each other in a step;
        the rank that is first makes room for it. Raises HostError where there is none."""
        try:
            if is_first:
                os.posix_fallocate(self.descriptor, self._passed_at, size)
            return mmap.mmap(self.descriptor, size, offset=self._passed_at)
        except OSError as error:
            raise HostError(
                f"There is no shared memory for the {size:,} bytes that ranks pass to each other in a step: "
                f"{error.strerror}."
            ) from error

    def wait_for_turn(self, rank: int, seconds: float) -> None:
        """Wait until the rank before has passed its turn. Raises StoppedError, also where it shows no life."""
        self._wait_for(rank - 1, lambda: bool(self._turns[rank - 1] > self._turns[rank]), seconds)

    def pass_turn(self, rank: int) -> None:
        """Let the next rank have its turn."""
        self._turns[rank] += 1

    def wait_for_last(self, seconds: float) -> None:
        """Wait until the last rank has passed the turn that rank 0 has. Raises StoppedError as `wait_for_turn`."""
        self._wait_for(self.ranks - 1, lambda: bool(self._turns[-1] >= self._turns[0]), seconds)

    def beat(self, rank: int) -> None:
        """Give a sign of life."""
        self._beats[rank] += 1

    def _wait_for(self, rank: int, is_done: Callable[[], bool], seconds: float) -> None:
        self._wait(is_done, seconds, sign=lambda: int(self._beats[rank]), late=f"rank {rank} gave no sign of life")

    def _wait(
        self, is_done: Callable[[], bool], seconds: float | None, is_wanted: Callable[[], bool] | None = None,
        sign: Callable[[], int] = lambda: 0, late: str = "the other ranks took no command",
    ) -> None:  # fmt: skip
        """Wait until something is so, and for no longer than so many seconds after the last change of `sign`."""
        looks, nap, until = 0, _NAP, None if seconds is None else time.monotonic() + seconds
        seen = sign()
        while not is_done():
            looks += 1
            if looks < _SPINS:
                os.sched_yield()
                continue
            time.sleep(nap)
            nap = min(1.05 * nap, _LONGEST_NAP)
            if found := self.stopped_by():
                raise StoppedError(f"rank {found[0]}: {found[1]}")
            if until is not None and seconds is not None:
                if (now := sign()) != seen:
                    seen, until = now, time.monotonic() + seconds
                elif time.monotonic() > until:
                    raise StoppedError(f"{late} within {seconds:g} seconds")
            if is_wanted is not None and not is_wanted():
                raise StoppedError("nobody asks any more")
