"""What generate() costs with a form, with a draft, and from a saved session: `… ARTIFACT THREADS DRAFT`."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import serve

FORM = {
    "type": "array",
    "minItems": 20,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "kind": {"enum": ["person", "animal", "thing"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
}


def main(artifact: str, threads: str, draft: str) -> None:
    """Answer requests: `how` is plain, form, draft or session."""
    from precast.runtime import CompiledModelForCausalLM

    model = CompiledModelForCausalLM.from_pretrained(artifact, threads=int(threads), trust_native_code=True)
    assistant = CompiledModelForCausalLM.from_pretrained(draft, threads=int(threads), trust_native_code=True)
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "form": {"json_schema": FORM},
        "draft": {"assistant_model": assistant},
    }

    def decode(request: dict[str, Any]) -> dict[str, Any]:
        asked = {"max_new_tokens": request["count"], "eos_token_id": [], **options[request["how"]]}
        model.reset()
        started, stamps = time.perf_counter(), []
        stream = model.stream([request["prompt"]], **asked)
        tokens = []
        for token in stream:
            tokens.append(token)
            stamps.append(time.perf_counter() - started)
        return {
            "stamps": stamps,
            "tokens": tokens,
            "guessed": stream.draft_tokens,
            "right": stream.accepted_draft_tokens,
        }

    def open_session(request: dict[str, Any]) -> dict[str, Any]:
        model.reset()
        model.generate([request["prompt"]], max_new_tokens=1)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "session"
            model.save_session(file)
            model.reset()
            started = time.perf_counter()
            model.load_session(file)
            return {"seconds": time.perf_counter() - started, "bytes": file.stat().st_size}

    serve({}, lambda request: open_session(request) if request["how"] == "session" else decode(request))


if __name__ == "__main__":
    main(*sys.argv[1:])
