"""Patches of Inductor, for behaviour that its options do not reach."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch._inductor import codecache, cpp_builder
from torch._inductor.codegen.cpp import CppKernel
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.cpu_vec_isa import VecAMX, VecAVX512, VecAVX512VNNI, VecISA
from torch._inductor.graph import GraphLowering

__all__ = [
    "keep_out_of_code", "keep_short_loops_serial", "know_the_compiler", "leave_out_input_checks",
    "precompile_headers_in",
]  # fmt: skip


@contextmanager
def keep_short_loops_serial() -> Iterator[None]:
    """Within this block, let Inductor run loops that are too short to gain from threads on one thread.

    With a number of threads that is known at run time only, Inductor parallelizes every loop, however short, and all
    threads wait at its barrier; a decode step has hundreds. The patch has it take the number for known while it decides
    this, and only then.
    """
    decide: Any = CppKernel.decide_parallel_depth

    def decide_as_if_known(kernel: CppKernel, depth: Any, threads: int) -> Any:
        with torch._inductor.config.patch({"cpp.dynamic_threads": False}):
            return decide(kernel, depth, threads)

    CppKernel.decide_parallel_depth = decide_as_if_known  # type: ignore[method-assign]
    try:
        yield
    finally:
        CppKernel.decide_parallel_depth = decide  # type: ignore[method-assign]


@contextmanager
def keep_out_of_code(weights: Iterable[torch.Tensor]) -> Iterator[None]:
    """Within this block, Inductor has libraries read the vectors among these weights, however short. By default it
    writes those of up to eight numbers into its code, a classifier's bias for instance, where those of another
    checkpoint cannot take their place. Single numbers it writes there all the same."""
    decide: Any = GraphLowering.can_inline_constant
    kept = {each.data_ptr() for each in weights}

    def can_inline(tensor: torch.Tensor) -> bool:
        # What freezing has packed for a library's kernels has no memory that others could see.
        is_packed = not torch._C._has_storage(tensor)
        return (is_packed or tensor.data_ptr() not in kept) and bool(decide(tensor))

    GraphLowering.can_inline_constant = staticmethod(can_inline)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        GraphLowering.can_inline_constant = staticmethod(decide)  # type: ignore[method-assign]


@contextmanager
def precompile_headers_in(folder: Path) -> Iterator[None]:
    """Within this block, let Inductor keep the headers that it has compiled in this folder. By default they are in one
    in /tmp, where another user can be the first to make it and put what they like into our libraries."""
    names: Any = codecache
    before = names._HEADER_DIR, names._HEADER_LOCK_DIR
    names._HEADER_DIR, names._HEADER_LOCK_DIR = str(folder), str(folder / "locks")
    # It remembers where they are, and somebody may have removed them.
    names._precompile_header.cache_clear()
    try:
        yield
    finally:
        names._HEADER_DIR, names._HEADER_LOCK_DIR = before
        names._precompile_header.cache_clear()


@contextmanager
def leave_out_input_checks() -> Iterator[None]:
    """Within this block, let Inductor write no checks of a library's inputs: much of the source for a model with many
    caches, and run only where an environment variable asks for them. The runtime checks arrays when they are bound."""
    write: Any = CppWrapperCpu.generate_input_output_runtime_checks

    def write_none(self: Any) -> None:
        self.prefix.splice_aot(
            """
            static constexpr bool _check_aoti_runtime_check_inputs_env() { return false; }
            static void __check_inputs_outputs(AtenTensorHandle*, AtenTensorHandle*) {}
            """
        )

    CppWrapperCpu.generate_input_output_runtime_checks = write_none  # type: ignore[method-assign]
    try:
        yield
    finally:
        CppWrapperCpu.generate_input_output_runtime_checks = write  # type: ignore[method-assign]


_FIRST_GCC = {
    VecISA._avx_code: 9,
    VecAVX512._avx512_bf16_code: 10,
    VecAVX512VNNI._avx512_vnni_code: 9,
    VecAMX._amx_code: 11,
    VecAMX._amx_fp16_code: 13,
}
"""The releases of GCC that compile Inductor's trial programs (https://gcc.gnu.org/releases.html)."""


@contextmanager
def know_the_compiler() -> Iterator[None]:
    """Within this block, Inductor asks GCC for its version, and not for up to five trial programs with PyTorch's
    headers, which take longer to compile than a small model. Other compilers are tried as ever."""
    compile_trial: Any = VecISA.check_build

    def check_build(self: VecISA, code: str) -> bool:
        is_known = code in _FIRST_GCC and _gcc_release(cpp_builder.get_cpp_compiler()) >= _FIRST_GCC[code]
        return is_known or bool(compile_trial(self, code))

    VecISA.check_build = check_build  # type: ignore[method-assign]
    try:
        yield
    finally:
        VecISA.check_build = compile_trial  # type: ignore[method-assign]


@cache
def _gcc_release(compiler: str) -> int:
    """0 where it is another compiler."""
    if not cpp_builder.is_gcc():
        return 0
    said = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=False).stdout
    found = re.match(r"\d+", said)
    return int(found[0]) if found else 0
