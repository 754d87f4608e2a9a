"""The limit that memory sets: read as many bytes as the model has weights, once per token: `… BYTES THREADS`."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from harness import serve


def main(size: str, threads: str) -> None:
    """Serve requests."""
    parts = np.array_split(np.ones(int(size) // 4, np.float32), int(threads))
    with ThreadPoolExecutor(len(parts)) as pool:
        serve({}, lambda request: _read(pool, parts, request["count"]))


def _read(pool: ThreadPoolExecutor, parts: list[Any], count: int) -> dict[str, Any]:
    stamps, started = [], time.perf_counter()
    for _ in range(count):
        # The maximum is the cheapest thing to compute that has to look at everything.
        list(pool.map(np.max, parts))
        stamps.append(time.perf_counter() - started)
    return {"stamps": stamps}


if __name__ == "__main__":
    main(*sys.argv[1:])
