"""Where inductor cuts the C++ that it writes: what its options do not say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch._inductor
from torch._inductor.codegen.cpp import CppKernel, CppScheduling

__all__ = ["cut"]


@contextmanager
def cut() -> Iterator[None]:
    """One function per layer of a decoder, and short loops for one thread."""
    with _short_loops_alone(), _layers_apart():
        yield


@contextmanager
def _short_loops_alone() -> Iterator[None]:
    """With a number of threads that is known only later, inductor shares every loop out, however short, and all
    threads wait for it; a decode step has hundreds. It is told that the number is known while it decides that, and only
    then."""
    decide: Any = CppKernel.decide_parallel_depth

    def decided(kernel: CppKernel, depth: Any, threads: int) -> Any:
        with torch._inductor.config.patch({"cpp.dynamic_threads": False}):
            return decide(kernel, depth, threads)

    with patch.object(CppKernel, "decide_parallel_depth", decided):
        yield


@contextmanager
def _layers_apart() -> Iterator[None]:
    """Inductor writes loops one after the other into a function until it has 500 arguments, so that no two functions of
    a model are alike. Here one ends once a layer's key and value are in the caches. Functions that are the same to the
    letter are compiled once: those of all layers between the first and the last."""
    write: Any = CppScheduling.codegen_node
    changed: list[str] = []

    def written(scheduling: CppScheduling, node: Any) -> None:
        write(scheduling, node)
        before = len(changed) // 2
        changed.extend(
            name for each in node.get_nodes() for buffer in each.get_outputs() for name in buffer.get_mutations()
        )
        if len(changed) // 2 > before:
            scheduling._set_flush_status(True)

    with patch.object(CppScheduling, "codegen_node", written):
        yield
