"""Patches of Inductor, for behaviour that its options do not reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch._inductor
from torch._inductor.codegen.cpp import CppKernel

__all__ = ["keep_short_loops_serial"]


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
