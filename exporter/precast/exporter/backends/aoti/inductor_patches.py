"""How inductor shares the loops of the C++ that it writes among threads: what its options do not say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch._inductor
from torch._inductor.codegen.cpp import CppKernel

__all__ = ["short_ones_alone"]


@contextmanager
def short_ones_alone() -> Iterator[None]:
    """With a number of threads that is known only later, inductor shares every loop out, however short, and all
    threads wait for it; a decode step has hundreds. It is told that the number is known while it decides that, and only
    then."""
    decide: Any = CppKernel.decide_parallel_depth

    def decided(kernel: CppKernel, depth: Any, threads: int) -> Any:
        with torch._inductor.config.patch({"cpp.dynamic_threads": False}):
            return decide(kernel, depth, threads)

    with patch.object(CppKernel, "decide_parallel_depth", decided):
        yield
