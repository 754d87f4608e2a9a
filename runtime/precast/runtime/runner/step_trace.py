"""Trace files of single steps of a compiled model: when each began, and what it took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

__all__ = ["NoProfiler", "trace_steps"]


class NoProfiler:
    """Stands where a profiler would, and records nothing."""

    def step(self) -> None:
        """A step has ended."""


class _Recorder:
    """Records steps by a schedule, and writes a file when so many are there."""

    def __init__(self, folder: Path, active: int, repeat: int, skip_first: int) -> None:
        self._folder, self._active, self._most, self._skip = folder, active, repeat or inf, skip_first
        self._began, self._events, self._written = time.perf_counter(), list[dict[str, Any]](), 0

    def step(self) -> None:
        """A step has ended, and the next begins."""
        began, self._began = self._began, time.perf_counter()
        if self._skip:
            self._skip -= 1
            return
        if self._written < self._most:
            self._events.append({
                "name": "step", "ph": "X", "pid": 0, "tid": 0, "ts": began * 1e6, "dur": (self._began - began) * 1e6,
            })  # fmt: skip
        if len(self._events) == self._active:
            self.write()

    def write(self) -> None:
        """Write what was recorded and not written yet."""
        if self._events:
            self._written += 1
            self._folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"})
            (self._folder / f"steps-{self._written}.json").write_text(text)
            self._events.clear()


@contextmanager
def trace_steps(folder: Path, *, active: int, repeat: int, skip_first: int) -> Iterator[_Recorder]:
    """Record whole steps: leave out `skip_first`, then record `active` ones, `repeat` times. What is yielded has
    `step()`, to be called after each step. Every recording is a file `steps-N.json` in `folder`, in Chrome's trace
    format."""
    recorder = _Recorder(folder, active, repeat, skip_first)
    try:
        yield recorder
    finally:
        recorder.write()
