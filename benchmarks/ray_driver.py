"""How many rows a second can one process hand out and write, whoever computes them on a Ray cluster?

build/ray/bin/python benchmarks/ray_driver.py ARTIFACT

The environment is that of `make test-ray`; ARTIFACT is a decoder's. Its tokenizer reads prompts of 200 bytes, which is
what planning takes; then actors that compute nothing answer batches of 8 with 50 bytes of text, on a cluster of this
machine, while this process keeps them. Ray's processes have the same cores, so that a cluster's driver is quicker. The
last line of standard output is JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

from precast.runtime import CompiledModelForCausalLM
from precast.runtime.runner import ray_cluster
from precast.runtime.runner.batches import Prepared
from precast.runtime.runner.files import answer_file
from precast.runtime.runner.generating import GeneratingWorker
from precast.runtime.runner.rows import Column, Row

PROSE = Path(__file__).parent / "prose.txt"
ROWS, BATCH = 40_000, 8
ANSWER = {"output": "x" * 50, "prompt_tokens": 60, "new_tokens": 16, "finish_reason": "length"}


class Echo:
    """In the place of BatchActor: answers at once."""

    def __init__(self, job: str, threads: int) -> None:
        self._line = json.loads(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """As BatchActor."""
        asked = [json.loads(str(each))["rows"] for each in batch["request"]]
        answers = [[[index, {"input": given, **self._line}] for index, given, _ in rows] for rows in asked]
        return {"number": list(batch["number"]), "answer": [json.dumps({"answers": each}) for each in answers]}


class Planner:
    """A worker that plans, and has others answer."""

    batch_size = BATCH

    def prepare(self, index: int, row: Row) -> Prepared:
        """A row whose length is known."""
        return Prepared(index, row, None, index % 120)

    def as_job(self, asked: str) -> dict[str, Any]:
        """What Echo takes."""
        return ANSWER


def main(artifact: str) -> None:
    """Measure, and print what was found."""
    text = PROSE.read_text("utf-8")
    rows = [Row(text[start : start + 200]) for start in (number * 37 % (len(text) - 200) for number in range(ROWS))]
    planning, memory = _plan(artifact, rows)
    first, seconds = _hand_out(rows)
    found = {
        "format": 1, "commit": machine.revision(), "machine": machine.describe(), "rows": ROWS,
        "tokenized_rows_per_second": round(ROWS / planning), "planned_bytes_per_row": round(memory / ROWS),
        "first_batch_seconds": round(first, 2), "handed_out_rows_per_second": round(ROWS / (seconds - first)),
    }  # fmt: skip
    print(json.dumps(found))


def _plan(artifact: str, rows: list[Row]) -> tuple[float, int]:
    """Seconds that all rows take to be made ready, and the bytes that they then keep."""
    model = CompiledModelForCausalLM.from_pretrained(artifact, threads=1, trust_native_code=True)
    worker = GeneratingWorker(model, Column(rows, None, ()), {"max_new_tokens": 16})
    worker.prepare(0, rows[0])
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    kept = [worker.prepare(index, row) for index, row in enumerate(rows)]
    seconds = time.perf_counter() - started
    assert len(kept) == len(rows)
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _hand_out(rows: list[Row]) -> tuple[float, float]:
    """Seconds to the first batch that is kept, and to the end."""
    ray_cluster.BatchActor = Echo  # type: ignore[misc,assignment]
    steps: list[float] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        answer_file(
            rows, Path(folder) / "out.jsonl", {}, lambda seed: Planner(), ray="local",  # type: ignore[arg-type,return-value]
            advance=lambda count: steps.append(time.perf_counter() - started),
        )  # fmt: skip
    return steps[1], time.perf_counter() - started


if __name__ == "__main__":
    main(sys.argv[1])
