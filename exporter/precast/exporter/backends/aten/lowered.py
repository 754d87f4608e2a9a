"""What lowering takes and gives, apart from how it is done: a child process that reads it needs no tracer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from precast.runtime.artifact.schema import Graph

from .kernel_set import Kernels

__all__ = ["Lowered", "LoweringOptions"]


@dataclass(frozen=True)
class Lowered:
    """A program that returns `graph.outputs` without the caches, which it updates in place, and `graph` unchanged."""

    graph: Graph
    exported: torch.export.ExportedProgram


@dataclass(frozen=True)
class LoweringOptions:
    """How a backend wants programs written in ATen.

    Attributes:
        materialize: marks a value that is to be computed once, not inside every loop that reads it.
        reduce_small_matmul: linear layers of few rows as elementwise products and sums rather than matrix products.
        kernels: the backend's own for these layers, and for attention, if it has any.
        matmul_dtype: the dtype of matrix products with quantized weights.
        float32_matmuls: dtypes whose matrix products and convolutions are computed in float32, since the processor has
            no instructions for them.
        functional: see `precast.exporter.kinds.trace.functional`; not for a compiler that does that itself.
        static_cache_view: attention reads all positions of the caches rather than as many as an input says, and uses
            matrix products for one token as well: for hardware that wants every dimension fixed.
    """

    materialize: Callable[[Tensor], Tensor] = lambda x: x
    reduce_small_matmul: bool = False
    kernels: Kernels | None = None
    matmul_dtype: torch.dtype = torch.float32
    float32_matmuls: frozenset[torch.dtype] = frozenset()
    functional: bool = True
    static_cache_view: bool = False
