"""A program in ATen, and what can be chosen about it. Apart from what lowers it, which needs the whole exporter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from precast.runtime.artifact.schema import Graph

__all__ = ["Forms", "Lowered"]


@dataclass(frozen=True)
class Lowered:
    """A program that returns `graph.outputs` without the caches, which it changes in place, and `graph` as it is."""

    graph: Graph
    exported: torch.export.ExportedProgram


@dataclass(frozen=True)
class Forms:
    """How a backend wants things written.

    Attributes:
        settle: marks what is to be computed once and not inside every loop that reads it.
        sums: linear layers of few rows as products and sums rather than as products of matrices.
        product: the dtype of products of matrices with codes.
        functional: see `precast.exporter.trace.functional`; a compiler that does that itself goes without.
        whole: attention looks at all rows of the caches rather than at as many as the input `rows` says, and multiplies
            matrices for one token as well: for hardware that wants every dimension fixed.
    """

    settle: Callable[[Tensor], Tensor] = lambda x: x
    sums: bool = False
    product: torch.dtype = torch.float32
    functional: bool = True
    whole: bool = False
