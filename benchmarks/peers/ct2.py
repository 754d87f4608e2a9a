"""CTranslate2's generator, counted in token ids: `… MODEL THREADS`."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from harness import serve


def main(path: str, threads: str) -> None:
    """Serve requests."""
    generator = ctranslate2.Generator(path, device="cpu", inter_threads=1, intra_threads=int(threads))
    # Prompts are given in the vocabulary's own words, since ids are not taken where it generates.
    words = json.loads((Path(path) / "vocabulary.json").read_text("utf-8"))
    facts = {"packages": {"ctranslate2": version("ctranslate2")}}
    serve(facts, lambda request: _decode(generator, words, request), lambda request: _force(generator, request))


def _decode(generator: Any, words: list[str], request: dict[str, Any]) -> dict[str, Any]:
    tokens, stamps, started = [], [], time.perf_counter()

    def note(step: Any) -> bool:
        stamps.append(time.perf_counter() - started)
        tokens.append(step.token_id)
        return False

    generator.generate_batch(
        [[words[token] for token in request["prompt"]]],
        beam_size=1,
        sampling_topk=1,
        max_length=request["count"],
        # The end of a text must not be its end here; an empty list would mean the model's own.
        min_length=request["count"],
        include_prompt_in_result=False,
        callback=note,
    )
    return {"tokens": tokens, "stamps": stamps}


def _force(generator: Any, request: dict[str, Any]) -> dict[str, Any]:
    """All positions at once: it has no way to give it one token after the other."""
    logits = generator.forward_batch([request["text"]])
    np.save(request["logits"], np.array(logits)[0].astype(np.float32))
    return {}


if __name__ == "__main__":
    main(*sys.argv[1:])
