"""Our decoding, through the public API as a user would call it: `… ARTIFACT THREADS generate|stream`."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
from harness import serve

from precast.runtime import CompiledModelForCausalLM

# The checkpoint's end-of-sequence token is off, so that every contender writes the same number of tokens.
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": []}


class _Clock:
    """A streamer that notes when each new token came; the first thing that it is given is the prompt."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, tokens: Any) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


def main(artifact: str, threads: str, way: str = "generate") -> None:
    """Serve requests."""
    model = CompiledModelForCausalLM.from_pretrained(artifact, threads=int(threads), trust_native_code=True)
    repeat = {"generate": _generate, "stream": _stream}[way]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["logits"]:
            return _with_logits(model, request)
        return repeat(model, request)

    serve({}, answer, lambda request: _force(model, request))


def _generate(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    # What an earlier request left in the cache would be used again, and the first token come too soon.
    model.reset()
    clock, started = _Clock(), time.perf_counter()
    if request.get("batch", 1) > 1:
        return _generate_many(model, request)
    options = request.get("options", {})
    whole = model.generate([request["prompt"]], max_new_tokens=request["count"], streamer=clock, **GREEDY, **options)
    stamps = [stamp - started for stamp in clock.stamps[1:]]
    return {"tokens": whole[0, len(request["prompt"]) :].tolist(), "stamps": stamps}


def _generate_many(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """A streamer follows one row, so the clock looks at what chooses tokens: it is called for every row of a step."""
    stamps, batch, started = [], request["batch"], time.perf_counter()

    def note(tokens: Any, logits: Any) -> Any:
        stamps.append(time.perf_counter() - started)
        return logits

    rows = [request["prompt"]] * batch
    whole = model.generate(rows, max_new_tokens=request["count"], logits_processor=[note], **GREEDY)
    return {"tokens": whole[0, len(request["prompt"]) :].tolist(), "stamps": stamps[::batch]}


def _stream(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    model.reset()
    tokens, stamps, started = [], [], time.perf_counter()
    for token in model.stream([request["prompt"]], max_new_tokens=request["count"], **GREEDY):
        stamps.append(time.perf_counter() - started)
        tokens.append(token)
    return {"tokens": tokens, "stamps": stamps}


def _with_logits(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Not timed: the same, with every step's logits written to a file."""
    kept: list[Any] = []

    def keep(tokens: Any, logits: Any) -> Any:
        kept.append(logits[0].copy())
        return logits

    whole = model.generate([request["prompt"]], max_new_tokens=request["count"], logits_processor=[keep], **GREEDY)
    np.save(request["logits"], np.stack(kept))
    return {"tokens": whole[0, len(request["prompt"]) :].tolist()}


def _force(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Not timed: every token of the text in turn is made the likeliest by far."""
    kept: list[Any] = []
    following = iter([*request["text"][1:], 0])

    def force(tokens: Any, logits: Any) -> Any:
        kept.append(logits[0].copy())
        forced = np.full_like(logits, -np.inf)
        forced[:, next(following)] = 0
        return forced

    text = request["text"]
    model.generate([text[:1]], max_new_tokens=len(text), logits_processor=[force], **GREEDY)
    np.save(request["logits"], np.stack(kept))
    return {}


if __name__ == "__main__":
    main(*sys.argv[1:])
