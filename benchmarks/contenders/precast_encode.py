"""An encoder of ours, through the public API: `… ARTIFACT THREADS`."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
from harness import serve

from precast.runtime import CompiledModel


def main(artifact: str, threads: str) -> None:
    """Serve requests: the median milliseconds of `calls`; `outputs` is where the last hidden states go."""
    model = CompiledModel.from_pretrained(artifact, threads=int(threads), trust_native_code=True)
    serve({}, lambda request: _repeat(model, request))


def _repeat(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    inputs = dict(np.load(request["inputs"]))
    found, times = model(**inputs), []
    for _ in range(request["calls"]):
        started = time.perf_counter()
        found = model(**inputs)
        times.append(time.perf_counter() - started)
    if request["outputs"]:
        np.save(request["outputs"], found["last_hidden_state"])
    return {"milliseconds": 1e3 * float(np.median(times))}


if __name__ == "__main__":
    main(*sys.argv[1:])
