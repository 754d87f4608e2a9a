"""Are the matrix products of libraries that stand alone as fast as PyTorch's with packed weights, on the same shapes?

python benchmarks/products.py [--isa avx2,avx512]

Layers of encoders and of prompts in float32: x [rows, depth] times a weight [columns, depth], plus a bias. PyTorch's
are what freezing calls, MKL and oneDNN, which are kept to the same instructions; their weights were packed before. One
thread, and the processor's time, so that neighbours disturb little: the lower quartile of rounds in turns. The last
line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from ctypes import byref, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

LAYERS = {
    "MiniLM": [(384, 384), (384, 1536), (1536, 384)],
    "BERT base": [(768, 768), (768, 3072), (3072, 768)],
}
ROWS = (16, 128, 512)
ROUNDS, ROUND_SECONDS = 5, 0.1
LIMITS = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
}
"""What keeps PyTorch's libraries to a level of instructions, read when they are first called."""


def main() -> None:
    """Measure each level in a process of its own, and print."""
    from machine import describe

    from precast.exporter.backends.aoti.isa import cpu_flags_needed
    from precast.runtime.hosts.machine import cpu_flags

    runs_here = [isa for isa in LIMITS if set(cpu_flags_needed(isa)) <= cpu_flags()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", type=lambda text: text.split(","), default=runs_here)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(_measure_level(given.isa[0])))
        return
    levels = {}
    for isa in given.isa:
        command = [sys.executable, __file__, "--child", "--isa", isa]
        environment = {**os.environ, **LIMITS[isa], "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        levels[isa] = json.loads(done.stdout)
    print(json.dumps({"question": "products", "machine": describe(), "threads": 1, "levels": levels}))


def _measure_level(isa: str) -> dict[str, dict[str, float]]:
    """Gigaflops of each, per layer; and how many times as fast as oneDNN ours are."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    pieces, found = _open_pieces(isa), {}
    for rows in ROWS:
        for depth, columns in (shape for shapes in LAYERS.values() for shape in shapes):
            calls = _calls(pieces, rows, depth, columns)
            operations = 2 * rows * depth * columns
            speeds = {name: operations / seconds / 1e9 for name, seconds in _times(calls).items()}
            name = f"{rows} rows, {depth} -> {columns}"
            found[name] = {
                **{f"{each}_gflops": round(speed, 1) for each, speed in speeds.items()},
                "times_onednn": round(speeds["ours"] / speeds["onednn"], 2),
            }
            print(isa, name, found[name], file=sys.stderr, flush=True)
    found["geometric mean"] = {
        "times_onednn": round(math.exp(sum(math.log(each["times_onednn"]) for each in found.values()) / len(found)), 2)
    }
    return found


def _open_pieces(isa: str) -> ctypes.CDLL:
    """The pieces of libraries that stand alone, in one whose functions can be seen."""
    import torch
    from torch._inductor import cpp_builder

    from precast.exporter.backends.aoti.isa import march
    from precast.exporter.backends.aoti.standalone import link

    compiler = [cpp_builder.get_cpp_compiler(), f"-march={march(isa)}"]
    flags = [each for each in link._FLAGS if not each.startswith("-fvisibility")]
    include = str(Path(torch.__file__).parent / "include")
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{name}.o" for name in ("tensors", "threads", "math", "gemm")]
        for each in objects:
            source = link._SOURCES / f"{each.stem}.cpp"
            subprocess.run([*compiler, *flags, "-isystem", include, "-c", source, "-o", each], check=True)
        library = Path(folder) / "pieces.so"
        own = ["-Wl,-z,defs", "-Wl,--as-needed", "-Wl,-Bsymbolic"]
        subprocess.run([*compiler, "-shared", *objects, *own, "-o", library], check=True)
        pieces = ctypes.CDLL(str(library))
    pieces.aoti_torch_cpu_addmm_out.argtypes = [c_void_p] * 4 + [c_double] * 2
    pieces.omp_set_num_threads(1)
    return pieces


def _calls(pieces: ctypes.CDLL, rows: int, depth: int, columns: int) -> dict[str, Callable[[], Any]]:
    """The product by ours and by PyTorch's libraries. Ends with an AssertionError where they do not agree."""
    import torch

    x, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
    out = torch.empty(rows, columns)
    handles = [_handle(pieces, each) for each in (out, bias, x, weight.T)]
    mkl: Any = torch.ops.mkl
    onednn: Any = torch.ops.mkldnn
    for_mkl = mkl._mkl_reorder_linear_weight(weight, rows)
    for_onednn = onednn._reorder_linear_weight(weight, rows)

    def ours() -> torch.Tensor:
        assert not pieces.aoti_torch_cpu_addmm_out(*handles, 1.0, 1.0)
        return out

    calls: dict[str, Callable[[], Any]] = {
        "ours": ours,
        "onednn": lambda: onednn._linear_pointwise(x, for_onednn, bias, "none", [], ""),
        "mkl": lambda: mkl._mkl_linear(x, for_mkl, weight, bias, rows),
    }
    expected = x.double() @ weight.double().T + bias.double()
    for name, call in calls.items():
        assert (call() - expected).abs().max() < 1e-5 * expected.abs().max(), name
    return calls


def _handle(pieces: ctypes.CDLL, tensor: Any) -> c_void_p:
    """The C ABI's tensor over a tensor's memory."""
    sizes, strides = ((c_int64 * 8)(*values) for values in (tensor.shape, tensor.stride()))
    made = c_void_p()
    given = (c_void_p(tensor.data_ptr()), c_int64(tensor.dim()), sizes, strides, c_int64(0), 6, 0, 0)
    assert not pieces.aoti_torch_create_tensor_from_blob(*given, byref(made))
    return made


def _times(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            end = time.thread_time() + ROUND_SECONDS
            while time.thread_time() < end:
                started = time.thread_time()
                call()
                times[name].append(time.thread_time() - started)
    # The clock of a thread is now and then behind: the very shortest would be nothing.
    return {name: sorted(found)[len(found) // 4] for name, found in times.items()}


if __name__ == "__main__":
    main()
