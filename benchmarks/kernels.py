"""Are native code's own kernels faster than the loops that AOTInductor writes, on every level of instructions?

python benchmarks/kernels.py [--isa avx2,avx512,native] [--only WORD]

Beside each stands how fast its largest input is read, and how fast as much is read by a sum of integers that does
nothing else. A prompt is compared with a matrix of numbers, written by a kernel, and PyTorch's own product.

One thread, and the processor's time, so that neighbours disturb little. Ends with status 1 where a kernel is clearly
slower than AOTInductor's loop for the same operators, else 0; the last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe
from torch import Tensor, nn

from precast.exporter.backends.aoti import library, workspace
from precast.exporter.backends.aoti.isa import cpu_flags_needed
from precast.exporter.backends.aten import linear
from precast.exporter.backends.aten.attention import AttentionContext, cached_attention
from precast.exporter.backends.aten.lowered import LoweringOptions
from precast.exporter.quantize.linear import Packed
from precast.exporter.quantize.methods import Scheme, round_to_nearest
from precast.runtime.hosts.machine import cpu_flags

COLUMNS, OUTPUTS = 1536, 8192
HEADS, SHARED, WIDTH, CAPACITY, LOOKED, PROMPT = 9, 3, 64, 1025, 1000, 128
GRIDS = {
    "int8, a row to a scale": Scheme(8, COLUMNS, "integer"),
    "int8, groups of 32": Scheme(8, 32, "symmetric"),
    "int4, groups of 32": Scheme(4, 32, "integer"),
}
NUMBERS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
OWN: Any = library.lowering_options_for("cpu", "native").kernels
REPETITIONS = 9
TOLERATED = 0.8
"""Of a loop's speed: both may read as fast as memory gives, and a machine is never quite quiet."""

Compute = Callable[..., Tensor]
Case = tuple[str, Callable[[LoweringOptions], Compute], Sequence[Tensor]]


def cases() -> Iterator[Case]:
    """A name, what computes it in one or the other form, and the inputs; the largest is what it reads."""
    x = torch.randn(1, COLUMNS)
    for name, dtype in NUMBERS.items():
        yield f"a token, weights {name}", lambda options: partial(_product, options), (x, _random(dtype))
    for name, scheme in GRIDS.items():
        packed = Packed(round_to_nearest(_random(torch.float32), scheme))
        given = [each for each in (packed.codes, packed.scales, packed.zeros) if each is not None]
        sizes = (packed.bits, packed.group, packed.columns, packed.extra)
        yield f"a token, weights {name}", partial(_codes_product, sizes), (x, *given)
        yield f"a prompt's matrix of {name}", partial(_matrix, sizes), given
        yield f"a prompt, weights {name}", partial(_prompt_product, sizes), (torch.randn(PROMPT, COLUMNS), *given)
    for name, dtype in CACHES.items():
        for length, what in ((1, "a token"), (PROMPT, "a prompt")):
            yield (
                f"attention of {what}, caches {name}",
                lambda options: partial(_attention, options),
                _heads(length, dtype),
            )


def _random(dtype: torch.dtype) -> Tensor:
    return torch.randn(OUTPUTS, COLUMNS).to(dtype)


def _product(options: LoweringOptions, x: Tensor, weight: Tensor) -> Tensor:
    if options.kernels:
        return linear.compute_together([linear.Layer(x, weight, None)], options.kernels.gemv)[0]
    return linear.gemv(x, weight, None, options.materialize)


def _codes_product(sizes: tuple[int, ...], options: LoweringOptions) -> Compute:
    def compute(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        weight = linear.PackedWeight(codes, scales, zeros, *sizes)
        if options.kernels:
            return linear.compute_together([linear.Layer(x, weight, None)], options.kernels.gemv)[0]
        return linear.quantized_linear(x, weight, None, options.materialize, options.matmul_dtype, None, True)

    return compute


def _matrix(sizes: tuple[int, ...], options: LoweringOptions) -> Compute:
    def compute(codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        return linear.PackedWeight(codes, scales, zeros, *sizes).dequantize(options.matmul_dtype, options.kernels)[0]

    return compute


def _prompt_product(sizes: tuple[int, ...], options: LoweringOptions) -> Compute:
    kernels = options.kernels or replace(OWN, quantized_gemm=lambda *_: None)

    def compute(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        weight = linear.PackedWeight(codes, scales, zeros, *sizes)
        return linear.quantized_linear(x, weight, None, options.materialize, options.matmul_dtype, kernels, False)

    return compute


def _heads(length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k = torch.randn(1, HEADS, length, WIDTH), torch.randn(1, SHARED, length, WIDTH)
    caches = (torch.randn(2, 1, SHARED, CAPACITY, WIDTH) * (30 if dtype is torch.int8 else 1)).to(dtype)
    counts = torch.tensor([LOOKED - length], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    scales = (torch.rand(SHARED, WIDTH) / 30,) * 2 if dtype is torch.int8 else ()
    return caches[0].clone(), caches[1].clone(), q, k, k.clone(), torch.arange(LOOKED), *counts, *scales


def _attention(
    options: LoweringOptions, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, past: Tensor,
    new: Tensor, *scales: Tensor,
) -> Tensor:  # fmt: skip
    context = AttentionContext(rows, options.materialize, False, options.kernels, options.matmul_dtype)
    return cached_attention(
        context, q, k, v, keys, values, past, new, 0.1, "causal", 0, 0.0, None, None, *(scales or (None, None))
    )


class _Module(nn.Module):
    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, *given: Tensor) -> Tensor:
        return self.compute(*given)


def measured(compute: Compute, given: Sequence[Tensor], isa: str) -> float:
    """Seconds, the shortest of some repetitions."""
    exported = torch.export.export(_Module(compute), tuple(given))
    with tempfile.TemporaryDirectory() as folder, workspace.compiler_workspace():
        file = Path(folder) / "case.so"
        library.build_library(exported, file, isa)
        runner: Any = torch._C._aoti.AOTIModelContainerRunnerCpu(str(file), 1)
    return _shortest(lambda: runner.run(list(given)))


def _shortest(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPETITIONS):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)


def measure(isa: str, only: str) -> dict[str, dict[str, float]]:
    """Every case on one level of instructions."""
    own = library.lowering_options_for("cpu", isa)
    found: dict[str, dict[str, float]] = {}
    for name, compute, given in cases():
        if only not in name:
            continue
        kernel, loop = (measured(compute(options), given, isa) for options in (own, _without(own)))
        read = max(each.nbytes for each in given)
        numbers = torch.zeros(read // 8, dtype=torch.int64)
        found[name] = {"kernel_ms": round(kernel * 1e3, 3), "loop_ms": round(loop * 1e3, 3),
                       "gb_per_s": round(read / kernel / 1e9, 2),
                       "reading_gb_per_s": round(read / _shortest(numbers.sum) / 1e9, 2),
                       "times_as_fast": round(loop / kernel, 2)}  # fmt: skip
        print(isa, name, found[name], file=sys.stderr, flush=True)
    return found


def _without(options: LoweringOptions) -> LoweringOptions:
    return replace(options, kernels=None)


def main() -> int:
    """Measure, print, and say by the status whether a kernel is slower than a loop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs_here = [
        isa for isa in ("avx2", "avx512") if "avx2" in cpu_flags() and set(cpu_flags_needed(isa)) <= cpu_flags()
    ]
    parser.add_argument("--isa", type=lambda text: text.split(","), default=[*runs_here, "native"])
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this in their names")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        levels = {isa: measure(isa, options.only) for isa in options.isa}
    slower = [f"{isa}: {name}" for isa, found in levels.items() for name, each in found.items()
              if each["times_as_fast"] < TOLERATED]  # fmt: skip
    print(json.dumps({"question": "kernels", "machine": describe(), "threads": 1, "levels": levels, "slower": slower}))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
