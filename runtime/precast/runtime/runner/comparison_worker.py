"""`python -m precast.runtime.runner.comparison_worker < JOB`: run prompts in one mode, and say what came and how fast.

Each mode has a process of its own, so that its memory is its own. A job and its answer are JSON; `comparison` writes
and reads them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..bench.worker import measure_memory
from ..errors import PrecastError
from .modes import open_model

__all__ = ["main", "run_mode"]

Array = np.ndarray[Any, Any]
Clock: TypeAlias = Callable[[], float]


def main() -> None:
    """Read a job from standard input; print its answer, or `{"error": [class, message]}` for a PrecastError."""
    job = json.load(sys.stdin)
    try:
        answer = run_mode(job)
    except PrecastError as error:
        answer = {"error": [type(error).__name__, str(error)]}
    # On a line of its own, whatever libraries have printed before.
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


def run_mode(job: dict[str, Any], clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Run the prompts in one mode.

    Args:
        job: `model`, `mode` and `options` of `open_model`; `prompts`, texts; `max_new_tokens`; `repeat`, how often each
            request is timed; `logits`, the path of the file to write logits to.
        clock: seconds, from any zero.

    Returns:
        `prompts` and `tokens`, per prompt the ids that were read and that were generated greedily; `load_seconds`,
        `warm_up_seconds` and, where torch.compile compiles, `compile_seconds` of it; `prefill_seconds` and
        `decode_seconds`, medians; `decode_steps`, those that the latter are of; memory as in `bench`.

    Raises:
        PrecastError: whatever opening and running the model raises.
    """
    started = clock()
    model = open_model(job["model"], job["mode"], **job["options"])
    opened = clock()
    batches = _make_batches(model, job["prompts"])
    tokens = _generate_all(model, batches, job["max_new_tokens"])
    warm = clock()
    one, all_of_them = (_time_all(model, batches, count, job["repeat"], clock) for count in (1, job["max_new_tokens"]))
    rows = [row[mask == 1] for ids, mask in batches for row, mask in zip(ids, mask, strict=True)]
    answer = {
        "prompts": [row.tolist() for row in rows],
        "tokens": tokens,
        "load_seconds": opened - started,
        "warm_up_seconds": warm - opened,
        "compile_seconds": getattr(model, "compile_seconds", None),
        "prefill_seconds": one,
        "decode_seconds": max(0.0, all_of_them - one),
        "decode_tokens": sum(max(0, len(row) - 1) for row in tokens),
        # Before the logits of whole prompts, which no answer needs.
        **measure_memory(),
    }
    np.savez(job["logits"], *_score_all(model, batches))
    return answer


def _make_batches(model: Any, prompts: Sequence[str]) -> list[tuple[Array, Array]]:
    """The prompts' ids and masks, as many together as the model is made for."""
    size, tokenizer = model.batch_size, model.tokenizer
    batches = [tokenizer(list(prompts[start : start + size])) for start in range(0, len(prompts), size)]
    return [(batch["input_ids"], batch["attention_mask"]) for batch in batches]


def _generate_all(model: Any, batches: Sequence[tuple[Array, Array]], count: int) -> list[list[int]]:
    """What is generated for each prompt, up to and with its end."""
    found: list[list[int]] = []
    for ids, mask in batches:
        # What an earlier request has left in caches would not be computed again.
        model.reset()
        answers = model.generate(ids, mask, max_new_tokens=count, do_sample=False)[:, ids.shape[1] :]
        found += [_cut_at_end(row.tolist(), model.generation_config.eos_ids) for row in answers]
    return found


def _cut_at_end(row: list[int], ends: Sequence[int]) -> list[int]:
    first = next((index for index, token in enumerate(row) if token in ends), len(row))
    return row[: first + 1]


def _time_all(model: Any, batches: Sequence[tuple[Array, Array]], count: int, repeat: int, clock: Clock) -> float:
    seconds = []
    for _ in range(repeat):
        started = clock()
        _generate_all(model, batches, count)
        seconds.append(clock() - started)
    return float(np.median(seconds))


def _score_all(model: Any, batches: Sequence[tuple[Array, Array]]) -> list[Array]:
    """Logits after every token of each prompt, float32 [length, vocabulary]."""
    scored = [(np.asarray(model(ids, mask).logits), mask) for ids, mask in batches]
    return [
        row[keep == 1].astype(np.float32) for logits, mask in scored for row, keep in zip(logits, mask, strict=True)
    ]


if __name__ == "__main__":
    main()
