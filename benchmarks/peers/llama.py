"""llama.cpp through llama-cpp-python, counted in token ids: `… MODEL.gguf THREADS`."""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np
from harness import serve

# For the longest context that is asked for; what is not used costs it no time.
CAPACITY = 2048


def main(path: str, threads: str) -> None:
    """Serve requests."""
    count = int(threads)
    model = llama_cpp.Llama(path, n_ctx=CAPACITY, n_threads=count, n_threads_batch=count, verbose=False)
    facts = {"packages": {"llama-cpp-python": version("llama-cpp-python")}}
    serve(facts, lambda request: _decode(model, request), lambda request: _force(model, request))


def _decode(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    # Otherwise it would keep the last request's cache, since that began with the same prompt.
    model.reset()
    tokens, stamps, started = [], [], time.perf_counter()
    for token in model.generate(request["prompt"], temp=0.0):
        stamps.append(time.perf_counter() - started)
        tokens.append(int(token))
        if len(tokens) == request["count"]:
            break
    return {"tokens": tokens, "stamps": stamps}


def _force(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    model.reset()
    rows = []
    for token in request["text"]:
        model.eval([token])
        logits = llama_cpp.llama_get_logits(model.ctx)
        rows.append(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).copy())
    np.save(request["logits"], np.stack(rows))
    return {}


if __name__ == "__main__":
    main(*sys.argv[1:])
