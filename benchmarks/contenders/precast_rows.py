"""A file of rows, answered by the runner: `… ARTIFACT THREADS [REPLICAS]`; each replica has so many threads."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import serve


def main(artifact: str, threads: str, replicas: str = "1") -> None:
    """Answer requests: `texts`, of which each gets `count` new tokens.

    `first_seconds` is the time to the first batch, replicas started and all; `first_rows` are those in it.
    """
    from precast.runtime import CompiledModelForCausalLM
    from precast.runtime.runner.files import answer_file
    from precast.runtime.runner.generating import GeneratingWorker
    from precast.runtime.runner.rows import Column, Row

    model = CompiledModelForCausalLM.from_pretrained(artifact, threads=int(threads), trust_native_code=True)
    clock = _Clock(model._engine)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        rows = [Row(text) for text in request["texts"]]
        asked = {"max_new_tokens": request["count"], "do_sample": False, "eos_token_id": []}
        worker = GeneratingWorker(model, Column(rows, None, ()), asked)
        clock.seconds = 0.0
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "out.jsonl"
            steps: list[tuple[float, int]] = []
            started = time.perf_counter()
            answer_file(
                rows, target, {}, lambda seed: worker, replicas=int(replicas),
                advance=lambda rows: steps.append((time.perf_counter(), rows)),
            )  # fmt: skip
            seconds = time.perf_counter() - started
            return {"seconds": seconds, "graph_seconds": clock.seconds, "first_seconds": steps[1][0] - started,
                    "first_rows": steps[1][1], "answers": target.read_text("utf-8")}  # fmt: skip

    serve({}, answer)


class _Clock:
    """Adds up the time within graph calls."""

    def __init__(self, engine: Any) -> None:
        self.seconds, self._bind, engine.bind = 0.0, engine.bind, self._bind_timed

    def _bind_timed(self, *arguments: Any) -> Any:
        call = self._bind(*arguments)

        def timed() -> None:
            started = time.perf_counter()
            call()
            self.seconds += time.perf_counter() - started

        return timed


if __name__ == "__main__":
    main(*sys.argv[1:])
