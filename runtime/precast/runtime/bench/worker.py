"""`python -m precast.runtime.bench.worker < JOB`: open an artifact, let it answer one request, say how long that took.

One process measures once: what an earlier repetition left behind, warm caches and grown arenas, cannot flatter the next
one. A job and its answer are JSON; `bench` writes and reads them.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..artifact.schema import Graph
from ..engines import Step
from ..engines.warmup import bind_blank
from ..errors import PrecastError
from ..models.base import CompiledModel
from ..models.causal_lm import CompiledModelForCausalLM

__all__ = ["CALLS", "STEPS", "main", "measure", "measure_memory"]

CALLS = 20
"""Forward passes of an encoder that one repetition times."""
STEPS = 16
"""How often a decoder's graph runs for each run of an encoder's, where graphs are timed for themselves."""

Clock: TypeAlias = Callable[[], float]
Array: TypeAlias = np.ndarray[Any, Any]
Figures: TypeAlias = dict[str, float | None]


def main() -> None:
    """Read a job from standard input; print `{"figures": …}`, or `{"error": [class, message]}` for a PrecastError."""
    job = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {"figures": measure(job)}
    except PrecastError as error:
        answer = {"error": [type(error).__name__, str(error)]}
    # On a line of its own, whatever libraries have printed before.
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


def measure(job: dict[str, Any], clock: Clock = time.perf_counter) -> Figures:
    """Times, speeds and memory of one repetition.

    Args:
        job: `model`, a directory; `options` of `from_pretrained`; `warm_up`, equally long lists of token ids, which are
            run first; `rows`, others of the same shape, which are timed, unless there are none; for decoders
            `new_tokens` and `prompt_lookup`. With `is_bare` graphs are timed for themselves, over blank inputs.
        clock: seconds, from any zero.

    Returns:
        `load_seconds`, which `from_pretrained` took, and `cold_start_seconds`, from its beginning to the warm-up's
        first answer: a graph is opened when it is first used. Of decoders `first_token_ms` (until every row has one),
        `tokens_per_second` of all rows after their first tokens, the same `per_row`, and percentiles of the time
        between a row's tokens; of encoders percentiles of a call and `sequences_per_second`. Then memory in units of
        10^6 bytes: the most that was ever resident, and, with the model still open, what is its own (`private`), or
        that and its share of what processes share (`pss`). None where there is nothing to measure.

    Raises:
        PrecastError: whatever opening and running the model raises.
    """
    started = clock()
    model = CompiledModel.from_pretrained(job["model"], **job["options"])
    load = clock() - started
    first, figures = _choose_measurement(model, job)(model, job, clock)
    return {"load_seconds": load, "cold_start_seconds": load + first, **figures, **measure_memory()}


def _choose_measurement(
    model: Any, job: dict[str, Any]
) -> Callable[[Any, dict[str, Any], Clock], tuple[float, Figures]]:
    if job.get("is_bare"):
        return _measure_graphs
    return _measure_decoder if isinstance(model, CompiledModelForCausalLM) else _measure_encoder


def _measure_decoder(model: Any, job: dict[str, Any], clock: Clock) -> tuple[float, Figures]:
    """Seconds to the first token of the warm-up, and the figures of the timed request."""
    first = float(_time_generate(model, job["warm_up"], job, clock)[-1][0])
    if not job["rows"]:
        return first, {}
    slices, rows = _time_generate(model, job["rows"], job, clock), len(job["rows"])
    gaps = np.concatenate([np.diff(each) for each in slices])
    # Every row has as many tokens after its first as its slice has gaps.
    speed = rows * (len(slices[0]) - 1) / float(gaps.sum()) if len(gaps) else None
    return first, {
        "first_token_ms": 1e3 * float(slices[-1][0]),
        "tokens_per_second": speed,
        "tokens_per_second_per_row": None if speed is None else speed / rows,
        **_time_percentiles("inter_token", gaps),
    }


def _time_generate(model: Any, rows: list[list[int]], job: dict[str, Any], clock: Clock) -> list[Array]:
    """Per slice of rows that run together, the time at which each step's tokens were chosen, in seconds since the
    request."""
    stamps: list[float] = []

    def stamp(tokens: Any, logits: Any) -> bool:
        stamps.append(clock())
        return False

    # Otherwise tokens of an earlier request would be reused, and the first token come too soon.
    model.reset()
    started = clock()
    # Spelled out, so that the checkpoint's own generation settings play no part.
    model.generate(
        rows, np.ones_like(rows), max_new_tokens=job["new_tokens"], do_sample=False, eos_token_id=[], stop_strings=[],
        repetition_penalty=1.0, no_repeat_ngram_size=0, prompt_lookup_num_tokens=job["prompt_lookup"],
        stopping_criteria=[stamp],
    )  # fmt: skip
    return _split_stamps(np.array(stamps) - started, len(rows), model.batch_size)


def _split_stamps(stamps: Array, rows: int, size: int) -> list[Array]:
    """Split the times of all tokens, in their order, into one array [steps] per slice of at most `size` rows: a step is
    done when its last row is."""
    sizes = [min(size, rows - start) for start in range(0, rows, size)]
    steps = len(stamps) // rows
    parts = np.split(stamps, np.cumsum(sizes)[:-1] * steps)
    return [part.reshape(steps, -1)[:, -1] for part in parts]


def _measure_encoder(model: Any, job: dict[str, Any], clock: Clock) -> tuple[float, Figures]:
    """Seconds of the first call, and the figures of the timed ones."""
    first, rows = _time_call(model, job["warm_up"], clock), job["rows"]
    if not rows:
        return first, {}
    seconds = [_time_call(model, rows, clock) for _ in range(CALLS)]
    return first, {**_time_percentiles("call", seconds), "sequences_per_second": len(rows) * CALLS / sum(seconds)}


def _time_call(model: Any, rows: list[list[int]], clock: Clock) -> float:
    ids = np.array(rows, np.int64)
    started = clock()
    model(ids)
    return clock() - started


def _measure_graphs(model: Any, job: dict[str, Any], clock: Clock) -> tuple[float, Figures]:
    """Seconds of the first run of every graph, and percentiles of running them all, as `call`."""
    started = clock()
    steps = [(bind_blank(model._engine, graph, {}), graph) for graph in model.variant.graphs]
    for step, _ in steps:
        step()
    first = clock() - started
    seconds = [_run_all(steps, clock) for _ in range(CALLS)] if job["rows"] else []
    return first, _time_percentiles("call", seconds) if seconds else {}


def _run_all(steps: list[tuple[Step, Graph]], clock: Clock) -> float:
    started = clock()
    for step, graph in steps:
        for _ in range(1 if graph.role == "encode" else STEPS):
            step()
    return clock() - started


def _time_percentiles(name: str, seconds: Any) -> Figures:
    values = np.percentile(seconds, (50, 90, 99)) if len(seconds) else (None,) * 3
    return {
        f"{name}_p{percent}_ms": None if value is None else 1e3 * float(value)
        for percent, value in zip((50, 90, 99), values, strict=True)
    }


def measure_memory() -> Figures:
    """Memory of this process in 10^6 bytes: the most that was ever resident, its own with its share of what is shared,
    and its own. None where the system does not say."""
    return {
        "peak_rss_mb": _read_megabytes("status", "VmHWM"),
        "pss_mb": _read_megabytes("smaps_rollup", "Pss"),
        "private_mb": _read_megabytes("smaps_rollup", "Private_Clean|Private_Dirty"),
    }


def _read_megabytes(file: str, names: str) -> float | None:
    """The sum of these counters of /proc/self, in 10^6 bytes; None where the system has none."""
    try:
        text = Path("/proc/self", file).read_text()
    except OSError:
        return None
    found = re.findall(rf"^(?:{names}):\s+(\d+) kB", text, re.MULTILINE)
    return sum(map(int, found)) * 1024 / 1e6 if found else None


if __name__ == "__main__":
    main()
