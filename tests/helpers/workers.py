"""Processes that try one thing after the other; one that dies, or takes too long, takes only its own thing with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from threading import Timer
from typing import Any

LIMIT = 600.0
"""Seconds that one thing may take: some would take for ever."""


class Worker:
    """A process of `program --worker`, which runs `serve`."""

    def __init__(self, program: str) -> None:
        self._command = [sys.executable, program, "--worker"]
        self._process: subprocess.Popen[str] | None = None

    def attempt(self, thing: Any) -> dict[str, Any]:
        """What the process says of it, or {"error": …} where it died."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(thing) + "\n")
        self._process.stdin.flush()
        alarm = Timer(LIMIT, self._process.kill)
        alarm.start()
        answer = self._process.stdout.readline()
        alarm.cancel()
        if answer:
            line: dict[str, Any] = json.loads(answer)
            return line
        code, self._process = self._process.wait(), None
        return {"error": f"the process died, status {code}"}

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()


def attempt_all(program: str, todo: Iterable[Any], jobs: int) -> Iterator[dict[str, Any]]:
    """What processes of `program` say of all things, in their order."""
    idle: Queue[Worker] = Queue()
    for _ in range(jobs):
        idle.put(Worker(program))

    def one(thing: Any) -> dict[str, Any]:
        worker = idle.get()
        try:
            return worker.attempt(thing)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, todo)
    for _ in range(jobs):
        idle.get().close()


def serve(attempt: Callable[[Any], dict[str, Any]]) -> None:
    """What a worker does: things on standard input, answers on standard output, nothing else there."""
    from precast.exporter import quiet_libraries

    quiet_libraries()
    answers, sys.stdout = sys.stdout, sys.stderr
    for words in sys.stdin:
        print(json.dumps(attempt(json.loads(words))), file=answers, flush=True)
