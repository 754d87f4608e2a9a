"""A forked child that runs cases, and may crash, hang or run out of memory without taking its parent along."""

from __future__ import annotations

import os
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from precast.runtime.errors import PrecastError

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Outcome:
    """What became of a case. `kind` tells failures of one kind from those of another."""

    is_good: bool
    text: str
    kind: str = ""


class Worker:
    """Runs `run(case)` in a child of its own, which is replaced when it dies.

    Good is an answer or a PrecastError. Anything else that is raised, the end of the child and an answer that takes it
    longer than `seconds` are not; nor is memory of more than `memory` bytes beyond what the child begins with, since
    that raises MemoryError or ends it.
    """

    def __init__(
        self,
        run: Callable[[bytes], object],
        prepare: Callable[[], object] = lambda: None,
        seconds: float = 20,
        memory: int = 3 * 2**29,
    ) -> None:
        self._run, self._prepare, self._seconds, self._memory = run, prepare, seconds, memory
        self._pid = 0
        self._done = 0
        self._said = tempfile.TemporaryFile()  # noqa: SIM115

    def outcome(self, case: bytes) -> Outcome:
        """Run one case."""
        if self._done == 2000:
            # What libraries keep from case to case is no fault of a case.
            self.close()
        if not self._pid:
            self._start()
        self._done += 1
        try:
            _write(self._into, case)
            if not self._has_answered():
                os.kill(self._pid, signal.SIGKILL)
                self._ended()
                return Outcome(False, f"no answer in {self._seconds} s", "hang")
            answer = _read(self._out).decode("utf-8", "replace")
        except (BrokenPipeError, EOFError):
            status = self._ended()
            reason = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
            return Outcome(False, f"crash: {reason} {self._last_words()}".strip(), "crash")
        verdict, kind, text = answer.split("\0", 2)
        return Outcome(verdict == "good", text, kind)

    def outcome_alone(self, case: bytes) -> Outcome:
        """Run one case in a fresh child: what fails after others alone, or on a busy machine, is no finding."""
        self.close()
        return self.outcome(case)

    def close(self) -> None:
        """End the child."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self._ended()

    def _has_answered(self) -> bool:
        """Wait for so many seconds of the child's own time, which a busy machine does not shorten, or of many more."""
        begun, end = _seconds_of(self._pid), time.monotonic() + 10 * self._seconds
        while time.monotonic() < end and _seconds_of(self._pid) - begun < self._seconds:
            if select.select([self._out], [], [], 1)[0]:
                return True
        return False

    def _ended(self) -> int:
        _, status = os.waitpid(self._pid, 0)
        os.close(self._into)
        os.close(self._out)
        self._pid = self._done = 0
        return status

    def _last_words(self) -> str:
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - 300))
        return self._said.read().decode("utf-8", "replace").strip().replace("\n", " ")

    def _start(self) -> None:
        self._said.truncate(0)
        cases, self._into = os.pipe()
        self._out, answers = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._into)
                os.close(self._out)
                os.dup2(self._said.fileno(), 1)
                os.dup2(self._said.fileno(), 2)
                self._prepare()
                _limit(self._memory)
                while True:
                    _write(answers, _answer(self._run, _read(cases)).encode("utf-8", "replace"))
            finally:
                os._exit(0)
        os.close(cases)
        os.close(answers)


def _seconds_of(pid: int) -> float:
    """What a process has computed for."""
    with open(f"/proc/{pid}/stat") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _limit(memory: int) -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(run: Callable[[bytes], object], case: bytes) -> str:
    try:
        run(case)
    except PrecastError as error:
        return f"good\0\0{type(error).__name__}: {error}"
    except BaseException as error:
        ours = [each for each in traceback.extract_tb(error.__traceback__) if "precast" in each.filename]
        where = f"{os.path.basename(ours[-1].filename)}:{ours[-1].name}" if ours else "the fuzzer itself"
        return f"bad\0{type(error).__name__} in {where}\0{type(error).__name__}: {str(error)[:300]} (in {where})"
    return "good\0\0done"


def _write(into: int, data: bytes) -> None:
    whole = memoryview(_LENGTH.pack(len(data)) + data)
    while whole:
        whole = whole[os.write(into, whole) :]


def _read(source: int) -> bytes:
    return _exactly(source, _LENGTH.unpack(_exactly(source, _LENGTH.size))[0])


def _exactly(source: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (more := os.read(source, size - len(data))):
            raise EOFError
        data += more
    return data
