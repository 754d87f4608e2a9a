"""onnxruntime-genai with its own generator loop, counted in token ids; run by the peers' own Python.

`… MODEL THREADS` serves requests; `… MODEL THREADS PROMPT` prints one token and leaves, for the time that takes.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import onnxruntime_genai

# The cache's size, as in the artifact that it is compared with, unless a request says otherwise.
CAPACITY = 512


def main(path: str, threads: str, prompt: str | None = None) -> None:
    """Serve requests, or answer a prompt."""
    config = onnxruntime_genai.Config(path)
    options = {"session_options": {"intra_op_num_threads": int(threads)}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model = onnxruntime_genai.Model(config)
    if prompt is not None:
        _print_first(model, prompt)
        return
    from harness import serve

    names = ("onnxruntime-genai", "onnxruntime")
    facts = {"packages": {name: version(name) for name in names}}
    serve(facts, lambda request: _decode(model, request), lambda request: _force(model, request))


def _decode(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    kept: list[Any] = []
    tokens, stamps, started = [], [], time.perf_counter()
    generator = _generator(model, request["prompt"], request.get("capacity", CAPACITY))
    for _ in range(request["count"]):
        if request["logits"]:
            kept.append(np.array(generator.get_logits()).reshape(-1))
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
        stamps.append(time.perf_counter() - started)
    if request["logits"]:
        np.save(request["logits"], np.stack(kept))
    return {"tokens": tokens, "stamps": stamps}


def _force(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    rows, first, rest = [], request["text"][:1], request["text"][1:]
    generator = _generator(model, first)
    for token in [*rest, None]:
        rows.append(np.array(generator.get_logits(), np.float32).reshape(-1))
        if token is not None:
            generator.append_tokens(np.array([[token]], np.int32))
    np.save(request["logits"], np.stack(rows))
    return {}


def _print_first(model: Any, prompt: str) -> None:
    tokenizer = onnxruntime_genai.Tokenizer(model)
    generator = _generator(model, tokenizer.encode(prompt))
    generator.generate_next_token()
    print(tokenizer.decode(generator.get_next_tokens()), flush=True)


def _generator(model: Any, prompt: Any, capacity: int = CAPACITY) -> Any:
    parameters = onnxruntime_genai.GeneratorParams(model)
    # The end of a text must not be its end here.
    parameters.set_search_options(max_length=capacity, min_length=capacity, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    return generator


if __name__ == "__main__":
    main(*sys.argv[1:])
