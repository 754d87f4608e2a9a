"""Decoding on a GPU in bfloat16, beside eager transformers, torch.compile, and what the memory could give.

python benchmarks/cuda.py CHECKPOINT [--batch 1,8]

In one process, by turns: 128 greedy tokens after the prompt, less the time of the first. Beside the speeds stands how
far the next token's distribution is from that of eager float32, over the prompt. `--device cpu` tries the program
without a GPU; its figures then mean nothing. `benchmarks/device.sh` runs it with the tests that need a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from machine import describe

CAPACITY, PROMPT, COUNT = 512, 107, 128
PROBE_BYTES = {"cuda": 2**30, "cpu": 2**24}
EAGER, COMPILED, OURS = "eager", "torch.compile", "precast aoti"


@dataclass(frozen=True)
class Contender:
    """`ask` makes so many tokens after the prompt; `logits` are those after each token of its first row, float32."""

    ask: Callable[[int], list[list[int]]]
    logits: Callable[[], torch.Tensor]


def main() -> None:
    """Print one JSON line, or end with an error where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a .gguf file or a directory")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tests", type=Path, help="the JUnit report of the tests that need a GPU, to be told as well")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"PyTorch {torch.__version__} sees no GPU, and there is nothing to measure without one.")
    is_gpu = given.device == "cuda"
    print(json.dumps({
        "question": "cuda",
        "machine": describe(),
        "gpu": torch.cuda.get_device_name() if is_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "prompt_tokens": PROMPT,
        "new_tokens": COUNT,
        "rounds": given.rounds,
        "tests": _test_counts(given.tests) if given.tests else None,
        "batches": {batch: _measure(given.checkpoint, given.device, batch, given.rounds) for batch in given.batch},
    }))  # fmt: skip


def _test_counts(report: Path) -> dict[str, int]:
    suite = next(ElementTree.parse(report).iter("testsuite"))
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}


def _measure(checkpoint: Path, device: str, batch: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (batch, PROMPT))
    reference = _log_probabilities(_load(checkpoint, device, torch.float32), ids)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        ours, weight_bytes = _ours(checkpoint, Path(folder) / "out", device, ids)
        export_seconds = time.perf_counter() - started
        contenders = {EAGER: _eager(checkpoint, device, ids), COMPILED: _compiled(checkpoint, device, ids), OURS: ours}
        tokens = {name: each.ask(COUNT) for name, each in contenders.items()}
        speeds = _alternate(contenders, rounds, batch, device)
    ratios = {
        name: [mine / theirs for mine, theirs in zip(speeds[OURS], speeds[name], strict=True)]
        for name in (EAGER, COMPILED)
    }
    read, limit = statistics.median(speeds[OURS]) / batch * weight_bytes, _bandwidth(device)
    return {
        "export_seconds": export_seconds,
        "tokens_per_second": {name: statistics.median(found) for name, found in speeds.items()},
        "times": {name: statistics.median(found) for name, found in ratios.items()},
        "mean_kl": {name: _mean_kl(reference, each.logits()) for name, each in contenders.items() if name != COMPILED},
        # In bfloat16 two likely tokens are now and then as good as each other, and answers part from there on.
        "same_tokens_as_eager": {name: _same_tokens(tokens[EAGER][0], tokens[name][0]) for name in (COMPILED, OURS)},
        "weight_bytes": weight_bytes,
        "read_bytes_per_second": read,
        "memory_bytes_per_second": limit,
        "share_of_memory_bandwidth": read / limit,
    }


def _ours(checkpoint: Path, target: Path, device: str, ids: torch.Tensor) -> tuple[Contender, int]:
    """Our model, and the size of what a step reads."""
    from precast.exporter import ExportOptions, export
    from precast.runtime import CompiledModelForCausalLM

    options = ExportOptions(
        backend="aoti", device=device, dtype="bfloat16", batch_size=len(ids), sequence_length=(CAPACITY,)
    )
    made = export(str(checkpoint), target, options)
    model = CompiledModelForCausalLM.from_pretrained(made.path)
    rows = ids.numpy()

    def ask(count: int) -> list[list[int]]:
        # Another token before it, so that every prompt is read.
        model.generate(rows[:, :1], max_new_tokens=1, do_sample=False, eos_token_id=[])
        found = model.generate(rows, max_new_tokens=count, do_sample=False, eos_token_id=[])
        return [[int(token) for token in row[PROMPT:]] for row in found]

    def logits() -> torch.Tensor:
        return torch.from_numpy(np.asarray(model(rows).logits[0], np.float32))

    return Contender(ask, logits), sum((made.path / name).stat().st_size for name in model.variant.weights)


def _load(checkpoint: Path, device: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    is_file = checkpoint.is_file()
    where: dict[str, Any] = {"gguf_file": checkpoint.name} if is_file else {}
    folder = checkpoint.parent if is_file else checkpoint
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where)
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


def _eager(checkpoint: Path, device: str, ids: torch.Tensor) -> Contender:
    return _transformers(_load(checkpoint, device, torch.bfloat16), ids)


def _compiled(checkpoint: Path, device: str, ids: torch.Tensor) -> Contender:
    """As transformers' documentation has it: a static cache, and the step compiled with CUDA graphs."""
    model = _load(checkpoint, device, torch.bfloat16)
    mode = "reduce-overhead" if device == "cuda" else None
    model.forward = torch.compile(model.forward, mode=mode, fullgraph=True)
    return _transformers(model, ids, cache_implementation="static")


def _transformers(model: Any, ids: torch.Tensor, **how: Any) -> Contender:
    given = ids.to(model.device)

    def ask(count: int) -> list[list[int]]:
        with torch.inference_mode():
            found = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, pad_token_id=0,
                **how,
            )  # fmt: skip
        return [[int(token) for token in row[PROMPT:]] for row in found]

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model(given[:1]).logits[0].float().cpu()
            return found

    return Contender(ask, logits)


def _log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return _transformers(model, ids).logits().log_softmax(-1)


def _mean_kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """In nats per token."""
    found = logits.log_softmax(-1)
    return float((reference.exp() * (reference - found)).sum(-1).mean())


def _same_tokens(first: list[int], second: list[int]) -> int:
    return next((i for i, pair in enumerate(zip(first, second, strict=True)) if len({*pair}) > 1), len(first))


def _alternate(contenders: dict[str, Contender], rounds: int, batch: int, device: str) -> dict[str, list[float]]:
    """Tokens per second of each, one figure per round."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, each in contenders.items():
            first, whole = (_seconds(partial(each.ask, count), device) for count in (1, COUNT))
            speeds[name].append(batch * (COUNT - 1) / (whole - first))
    return speeds


def _seconds(call: Callable[[], Any], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def _bandwidth(device: str) -> float:
    """Bytes per second that a plain copy reads and writes."""
    source = torch.ones(PROBE_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [_seconds(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * PROBE_BYTES[device] / min(times)


if __name__ == "__main__":
    main()
