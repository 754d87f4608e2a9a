"""Instruction sets of native code: named levels, as CPU flags of /proc/cpuinfo and as Inductor's options."""

from __future__ import annotations

import platform
from typing import Any

import torch

from precast.runtime.errors import UsageError
from precast.runtime.hosts.machine import cpu_flags

__all__ = ["compiler_options", "cpu_flags_needed", "march", "matmul_dtypes"]

_V3 = ["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"]
_V4 = [*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"]
# Flags beyond the levels, for which compilers and libraries have code of its own.
_BEYOND = ["amx_bf16", "amx_int8", "amx_tile", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx512vbmi", "avx_vnni",
           "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve"]  # fmt: skip

_LEVELS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "avx2": (_V3, {"cpp.march": "x86-64-v3", "cpp.simdlen": 256}),
    "avx512": (_V4, {"cpp.march": "x86-64-v4", "cpp.simdlen": 512}),
}
"""The levels x86-64-v3 and -v4 of the x86-64 psABI: flags as /proc/cpuinfo names them, and Inductor's options."""

_MATMUL_FLAGS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "asimdhp"},
}
"""Flags of which one is enough to multiply matrices of a dtype. Without any, libraries convert back and forth, which
takes four to thirty times as long as float32 (docs/benchmarks.md)."""


def cpu_flags_needed(isa: str) -> list[str]:
    """The flags that a CPU must have for code of this level; for "native", all of this CPU's that code may use."""
    if isa == "native":
        return sorted(cpu_flags() & {*_V4, *_BEYOND})
    _check_platform(isa)
    return sorted(_LEVELS[isa][0])


def compiler_options(isa: str) -> dict[str, Any]:
    """Inductor's options for this level."""
    if isa == "native":
        return {}
    _check_platform(isa)
    return dict(_LEVELS[isa][1])


def march(isa: str) -> str:
    """The compiler's name for this level."""
    return str(compiler_options(isa).get("cpp.march", "native"))


def matmul_dtypes(isa: str) -> frozenset[torch.dtype]:
    """The dtypes narrower than float32 that a CPU of this level has matrix instructions for."""
    flags = set(cpu_flags_needed(isa))
    return frozenset(dtype for dtype, ways in _MATMUL_FLAGS.items() if flags & ways)


def _check_platform(isa: str) -> None:
    if platform.machine() != "x86_64":
        raise UsageError(
            f"isa={isa!r} is a level of x86-64 processors; this is {platform.machine()}. Use isa='native'."
        )
