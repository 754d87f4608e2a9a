"""Decoding on a GPU: SmolLM2 in bfloat16, batch 1, beside eager transformers and what the memory could give.

python benchmarks/cuda.py build/models/SmolLM2-135M-Instruct.Q4_1.gguf

In one process, by turns: 128 greedy tokens after the prompt, less the time of the first. `--rounds` says how often.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from plan import CAPACITY, PROMPT

COUNT = 128
PROBE_BYTES = 2**30
EAGER, OURS = "eager bf16", "precast aoti bf16"
Ask = Callable[[int], list[int]]
"""So many tokens after the prompt."""


def main() -> None:
    """Print one JSON line, or end with an error where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a .gguf file or a directory")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"PyTorch {torch.__version__} sees no GPU, and there is nothing to measure without one.")
    print(json.dumps(_measure(given.checkpoint, given.rounds)))


def _measure(checkpoint: Path, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        ours, weight_bytes, prompt = _ours(checkpoint, Path(folder) / "out")
        contenders = {EAGER: _eager(checkpoint, prompt), OURS: ours}
        tokens = {name: ask(COUNT) for name, ask in contenders.items()}
        speeds = _alternate(contenders, rounds)
    ratios = [mine / theirs for mine, theirs in zip(speeds[OURS], speeds[EAGER], strict=True)]
    read, limit = statistics.median(speeds[OURS]) * weight_bytes, _bandwidth()
    return {
        "question": "cuda",
        "machine": describe(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "prompt_tokens": len(prompt),
        "new_tokens": COUNT,
        "rounds": rounds,
        "tokens_per_second": {name: statistics.median(found) for name, found in speeds.items()},
        "times_eager": statistics.median(ratios),
        # In bfloat16 two likely tokens are now and then as good as each other, and answers part from there on.
        "same_tokens": next(
            (i for i, pair in enumerate(zip(*tokens.values(), strict=True)) if len({*pair}) > 1), COUNT
        ),
        "weight_bytes": weight_bytes,
        "read_bytes_per_second": read,
        "memory_bytes_per_second": limit,
        "share_of_memory_bandwidth": read / limit,
    }


def _ours(checkpoint: Path, target: Path) -> tuple[Ask, int, list[int]]:
    """How to ask our model, the size of what a step reads, and the prompt."""
    from precast.exporter import ExportOptions, export
    from precast.runtime import CompiledModelForCausalLM

    options = ExportOptions(backend="aoti", device="cuda", dtype="bfloat16", sequence_length=(CAPACITY,))
    made = export(str(checkpoint), target, options)
    model = CompiledModelForCausalLM.from_pretrained(made.path)
    prompt = model.tokenizer.encode(PROMPT)
    ids = np.array([prompt])

    def ask(count: int) -> list[int]:
        # Another token before it, so that every prompt is read.
        model.generate(ids[:, :1], max_new_tokens=1, do_sample=False, eos_token_id=[])
        found = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=[])
        return [int(token) for token in found[0, len(prompt) :]]

    return ask, sum((made.path / name).stat().st_size for name in model.variant.weights), prompt


def _eager(checkpoint: Path, prompt: list[int]) -> Ask:
    from transformers import AutoModelForCausalLM

    is_file = checkpoint.is_file()
    where: dict[str, Any] = {"gguf_file": checkpoint.name} if is_file else {}
    folder = checkpoint.parent if is_file else checkpoint
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **where)
    model = model.to("cuda").eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt], device="cuda")

    def ask(count: int) -> list[int]:
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            found = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return [int(token) for token in found[0, len(prompt) :]]

    return ask


def _alternate(contenders: dict[str, Ask], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each, one figure per round."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, ask in contenders.items():
            first, whole = _seconds(ask, 1), _seconds(ask, COUNT)
            speeds[name].append((COUNT - 1) / (whole - first))
    return speeds


def _seconds(ask: Ask, count: int) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    ask(count)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _bandwidth() -> float:
    """Bytes per second that a plain copy reads and writes."""
    source = torch.ones(PROBE_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy(count: int) -> list[int]:
        target.copy_(source)
        return []

    times = [_seconds(copy, 1) for _ in range(10)]
    return 2 * PROBE_BYTES / min(times)


if __name__ == "__main__":
    main()
