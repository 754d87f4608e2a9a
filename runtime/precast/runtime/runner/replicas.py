"""Replicas: processes of this machine that answer batches side by side, each with the model and its share of the cores.

This process plans the batches, hands them out, and is the only one that writes. A row's answer depends on its batch
alone, so that whoever computes it is the same, and a batch whose replica died is computed once more.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from heapq import heapify, heappop, heappush
from queue import Full, Queue
from typing import IO, Any

from .. import child
from ..distributed.launcher import describe_status, share_of_cores
from ..errors import PrecastError, PrecastWarning, UsageError
from ..hosts.machine import usable_cores
from .batches import Answers, Portable, Prepared, Worker
from .jobs import as_request, error_of

__all__ = ["DEATHS", "Replicas"]

DEATHS = 3
"""So often replicas may die at one batch, and one replica without having answered a batch."""
_GRACE = 5.0
"""Seconds that a replica has to end after its input has."""
_TICK = 0.1


class Replicas:
    """Answers batches in so many processes of this machine: an Asker.

    A replica that dies is started again, and its batch is given to whoever is free. What dies again and again ends the
    work. Replicas die with this process, however it ends.

    Raises:
        UsageError: there cannot be so many.
    """

    def __init__(self, count: int) -> None:
        if not isinstance(count, int) or count < 1:
            raise UsageError(f"replicas={count!r} must be a whole number from 1.")
        self._count = count

    def __call__(
        self, batches: Sequence[list[Prepared]], worker: Worker, fail_fast: bool
    ) -> Generator[Answers, None, None]:
        """See Asker. Raises PrecastError where replicas die again and again, or cannot open the model."""
        if not isinstance(worker, Portable):
            raise UsageError(
                f"replicas={self._count} makes the worker in other processes, and {type(worker).__name__} says nothing "
                f"by which they could. Leave it out, or give a GeneratingWorker or PredictingWorker."
            )
        job = worker.as_job(f"replicas={self._count}")
        if not batches:
            return
        if self._count > (cores := usable_cores()):
            warnings.warn(
                f"{self._count} replicas share the {cores} cores that this process may use, and take turns there; "
                f"{cores} would have one each.", PrecastWarning, stacklevel=2,
            )  # fmt: skip
        crew = _Crew(job, batches, self._count, fail_fast)
        try:
            yield from crew.answers()
        finally:
            crew.end()


class _DiedError(Exception):
    """A replica is gone; the message says how."""


class _Crew:
    """The batches, and the threads that have replicas answer them.

    A thread starts its replica itself: a child that dies with its parent dies with the thread that started it.
    """

    def __init__(self, job: dict[str, Any], batches: Sequence[list[Prepared]], count: int, fail_fast: bool) -> None:
        self._batches, self._fail_fast = batches, fail_fast
        self._lock = threading.Lock()
        self._waiting = list(range(len(batches)))
        heapify(self._waiting)
        self._deaths: Counter[int] = Counter()
        self._failures: list[tuple[int, PrecastError]] = []
        self._ended, self._is_done = threading.Event(), False
        # What is not written yet is not asked for: answers wait here, and replicas for room.
        self._found: Queue[Answers | BaseException | None] = Queue(2 * count)
        self._replicas = [_Replica(job, place, count) for place in range(min(count, len(batches)))]
        self._threads = [threading.Thread(target=self._run, args=(each,), daemon=True) for each in self._replicas]
        for thread in self._threads:
            thread.start()

    def answers(self) -> Iterator[Answers]:
        """The answers as they come. Raises the failure of the first batch, in the order of the plan, that failed."""
        running = len(self._threads)
        while running:
            found = self._found.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                running -= 1
            else:
                yield found
        self._is_done = True
        if self._failures:
            raise min(self._failures, key=lambda failure: failure[0])[1]

    def end(self) -> None:
        """End all replicas: at once, where work is left."""
        self._ended.set()
        for replica in self._replicas:
            replica.end(_GRACE if self._is_done else 0.0)
        for thread, replica in zip(self._threads, self._replicas, strict=True):
            thread.join()
            replica.close()

    def _run(self, replica: _Replica) -> None:
        """Hand batches to a replica until there are none, or something failed."""
        try:
            while (number := self._take()) is not None:
                self._ask(replica, number)
        except BaseException as error:
            self._put(error)
        finally:
            replica.close_input()
            self._put(None)

    def _take(self) -> int | None:
        with self._lock:
            # A batch before the first that failed may fail, too, and is then what one process had told of.
            end = min((number for number, _ in self._failures), default=len(self._batches))
            if self._ended.is_set() or not self._waiting or self._waiting[0] > end:
                return None
            return heappop(self._waiting)

    def _ask(self, replica: _Replica, number: int) -> None:
        try:
            self._put(replica.ask(as_request(self._batches[number], self._fail_fast)))
        except _DiedError as death:
            self._give_back(number, replica.deaths, death)
        except PrecastError as error:
            with self._lock:
                self._failures.append((number, error))

    def _give_back(self, number: int, in_a_row: int, death: _DiedError) -> None:
        """Let a batch whose replica died be answered by whoever is next, if it may be tried again."""
        with self._lock:
            self._deaths[number] += 1
            if max(self._deaths[number], in_a_row) < DEATHS:
                heappush(self._waiting, number)
                return
            rows = ", ".join(str(each.index + 1) for each in self._batches[number])
            failure = PrecastError(
                f"Replicas died {DEATHS} times, the last at rows {rows}: {death}. The other rows' answers are kept; "
                f"resume=True goes on with them. Where memory is short, fewer replicas take less."
            )
            self._failures.append((number, failure))

    def _put(self, found: Answers | BaseException | None) -> None:
        while not self._ended.is_set():
            with suppress(Full):
                self._found.put(found, timeout=_TICK)
                return


class _Replica:
    """A replica's process, started when it is first asked, and again when it is asked after it died.

    Attributes:
        deaths: how often it has died since it last answered.
    """

    def __init__(self, job: Mapping[str, Any], place: int, count: int) -> None:
        self._job, self._cores = job, ",".join(map(str, share_of_cores(place, count)))
        self._lock, self._is_over = threading.Lock(), False
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self.deaths = 0

    def ask(self, request: Mapping[str, Any]) -> Answers:
        """Its answers. Raises _DiedError where it dies, and PrecastError for what it reports."""
        if self._process is None:
            self._start()
            self._exchange(self._job)
        found = self._exchange(request)
        self.deaths = 0
        return [(index, row) for index, row in found["answers"]]

    def close_input(self) -> None:
        """Let it end by itself."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def end(self, grace: float) -> None:
        """Let there be no such process, by force after `grace` seconds."""
        with self._lock:
            self._is_over = True
            if self._process is None:
                return
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Give its pipes and files back; nobody asks it any more."""
        self.close_input()
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
        if self._errors is not None:
            self._errors.close()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        with self._lock:
            if self._is_over:
                raise _DiedError("the work has ended")
            self._process = subprocess.Popen(
                child.command("precast.runtime.runner.replica", os.getpid(), self._cores), env=child.environment(),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
            )  # fmt: skip

    def _exchange(self, message: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None, "it was started"
        assert process.stdin is not None
        assert process.stdout is not None
        answer = b""
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if not answer.endswith(b"\n"):
            raise self._bury(process)
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise error_of(found["error"])
        return found

    def _bury(self, process: subprocess.Popen[bytes]) -> _DiedError:
        """Forget a process that is gone."""
        assert self._errors is not None, "it was started"
        status = process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        self.close()
        with self._lock:
            self._process = None
        self.deaths += 1
        return _DiedError(": ".join([describe_status(status), *said[-1:]]))
