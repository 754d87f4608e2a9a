"""A replica: `python -m precast.runtime.runner.replica PARENT 0,1`, started by `.replicas`.

It reads lines of JSON: a job first, then a request for each batch; and writes a line for each: {"ready"}, then
{"answers"}, or {"error"}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

from ..distributed.launcher import die_with_parent
from ..errors import PrecastError
from .jobs import answer_request, open_job, report_error

__all__ = ["main"]


def main() -> None:
    """Answer batches until there are no more."""
    parent, listed = sys.argv[1:]
    die_with_parent(int(parent))
    cores = [int(core) for core in listed.split(",")]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    # Libraries print what they like; the answers have a channel of their own.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(value: object) -> None:
        channel.write(json.dumps(value) + "\n")
        channel.flush()

    _serve(len(cores), say)


def _serve(threads: int, say: Callable[[object], None]) -> None:
    lines = iter(sys.stdin.buffer.readline, b"")
    try:
        worker = open_job(json.loads(next(lines)), threads)
    except PrecastError as error:
        say(report_error(error))
        return
    say({"ready": True})
    for line in lines:
        say(answer_request(json.loads(line), worker))


if __name__ == "__main__":
    main()
