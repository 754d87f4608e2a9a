"""What does a file of rows gain by several processes, each with its share of the cores, beside one with all of them?

Prompts of 4 to 120 tokens of prose, 16 greedy new tokens each, batch 8: SmolLM2-135M by ONNX Runtime in float32 and in
8 bits. One process with a thread for each core beside as many processes with one; what starting takes is told apart.

And how many rows can the process that plans and writes serve, whoever computes: it decodes and keeps answers of 50
bytes of text, and of a vector of 384 numbers.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from harness import Answer, Contender, Target, alternate, ratios, summary
from plan import Plan
from rows import CAPACITY, COUNT, texts

__all__ = ["measure"]

ROWS, BATCH, ROUNDS = 96, 8, 2
SCHEMES: dict[str, tuple[str, ...]] = {"onnx fp32": (), "onnx int8": ("--quantize", "int8")}


def measure(plan: Plan) -> Answer:
    """A line for each scheme."""
    header = [
        "",
        "one process, rows/s",
        f"{plan.threads} replicas, rows/s",
        "over one",
        "first batch, s: one",
        "replicas",
    ]
    answer = Answer(f"A file of {ROWS} rows in {plan.threads} processes", header)
    for scheme, options in SCHEMES.items():
        _measure(plan, answer, scheme, options)
    for what, value in _ANSWERS.items():
        _measure_writing(plan, answer, what, value)
    return answer


def _measure(plan: Plan, answer: Answer, scheme: str, options: tuple[str, ...]) -> None:
    name = f"{scheme.replace(' ', '-')}-{BATCH}"
    artifact = plan.artifacts.get(name) or plan.export(
        f"artifact-rows-{name}", *options, "--no-validate", batch=BATCH, capacity=CAPACITY
    )
    request = {"texts": texts(artifact, 40 if plan.is_quick else ROWS), "count": COUNT}
    whole = Contender("one process", "contenders.precast_rows", artifact, plan.threads)
    parts = Contender("replicas", "contenders.precast_rows", artifact, 1, plan.threads)
    with whole, parts:
        # Weights are packed, and files read, before anything is timed.
        for each in (whole, parts):
            each.ask({**request, "texts": request["texts"][: 2 * BATCH]})
        actions = {"one": partial(whole.ask, request), "replicas": partial(parts.ask, request)}
        results = alternate(actions, plan.rounds(ROUNDS), plan.begin)
    _tell(answer, scheme, results, len(request["texts"]))


def _tell(answer: Answer, scheme: str, results: dict[str, list[dict[str, Any]]], rows: int) -> None:
    speeds = {
        name: [(rows - each["first_rows"]) / (each["seconds"] - each["first_seconds"]) for each in found]
        for name, found in results.items()
    }
    firsts = {name: summary([each["first_seconds"] for each in found]) for name, found in results.items()}
    over = ratios(speeds["replicas"], speeds["one"])
    equal = sum(map(str.__eq__, *(found[0]["answers"].splitlines() for found in results.values())))
    answer.figures[scheme] = {
        "one_rows_per_second": summary(speeds["one"]), "replicas_rows_per_second": summary(speeds["replicas"]),
        "over_one": over, "first_batch_seconds": firsts, "equal_rows": equal,
    }  # fmt: skip
    medians = [f"{summary(speeds[name])['median']:.2f}" for name in ("one", "replicas")]
    starts = [f"{firsts[name]['median']:.2f}" for name in ("one", "replicas")]
    answer.rows.append([scheme, *medians, f"{over['median']:.2f}", *starts])
    answer.notes.append(f"{scheme}: {equal} of {rows} rows have the same answer either way.")
    answer.targets.append(Target(f"{scheme}: replicas over one process", over["median"], 1.0, is_floor=True))


_CHANCE = random.Random(1)
_ANSWERS: dict[str, dict[str, Any]] = {
    "text": {"output": "x" * 50, "prompt_tokens": 60, "new_tokens": 16, "finish_reason": "length"},
    "vector": {"answer": [_CHANCE.gauss(0, 0.05) for _ in range(384)]},
}
"""What is kept of a row, beside its input of 200 bytes."""


class _Told:
    """A worker whose answers come as JSON, as those of others do."""

    batch_size = BATCH

    def __init__(self, answer: dict[str, Any]) -> None:
        self._line = json.dumps(answer)

    def prepare(self, index: int, row: Any) -> Any:
        from precast.runtime.runner.batches import Prepared

        return Prepared(index, row, None, index % 120)

    def answer(self, batch: Any) -> list[dict[str, Any]]:
        return [{"input": each.row.given, **json.loads(self._line)} for each in batch]


def _measure_writing(plan: Plan, answer: Answer, what: str, value: dict[str, Any]) -> None:
    from precast.runtime.runner.files import answer_file
    from precast.runtime.runner.rows import Row

    count = 2000 if plan.is_quick else {"text": 100_000, "vector": 10_000}[what]
    rows, speeds = [Row(f"{number:0200d}") for number in range(count)], []
    for turn in range(plan.rounds(3)):
        plan.begin(f"writing, round {turn + 1}: {what}")
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            answer_file(rows, Path(folder) / "out.jsonl", {}, lambda seed: _Told(value))
            speeds.append(count / (time.perf_counter() - started))
    answer.figures[f"writing {what}"] = {"rows_per_second": summary(speeds)}
    answer.notes.append(
        f"One process plans, keeps and writes {summary(speeds)['median']:,.0f} rows a second of a {what}."
    )
