"""Freezing: encoders' weights packed at export for this CPU's kernels, within their libraries.

Products then call oneDNN, through PyTorch, with weights in its own layout. The price is a copy of the weights in every
library, and libraries that only CPUs of the same kind can open: so only what oneDNN computes much faster is frozen,
convolutions of windows that overlap and products in dtypes that the CPU has matrix instructions for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from ..aten.lowered import Lowered
from ..aten.lowering import products_of
from .isa import matmul_dtypes
from .options import AotiOptions

__all__ = ["FREEZING_OPTIONS", "can_freeze", "multiplies_narrow", "pays"]

FREEZING_OPTIONS: dict[str, Any] = {
    "freezing": True,
    "aot_inductor.package_constants_in_so": True,
    "aot_inductor.package_constants_on_disk_format": None,
}
"""Inductor's options for it."""

MAX_BYTES = 2**30
"""Of weights, in all libraries together."""


def can_freeze(programs: Sequence[Lowered], native: AotiOptions) -> bool:
    """Whether they are encoders that are small enough to be stored once per graph, for the machine that compiles them.

    A decoder's weights are shared by prefill and decode step, which reads each of them once whatever its layout.
    """
    is_encoder = all(program.graph.role == "encode" and not program.graph.cache for program in programs)
    is_here = native.isa == "native" and native.device == "cpu"
    return is_encoder and is_here and sum(map(_weight_bytes, programs)) <= MAX_BYTES


def pays(programs: Sequence[Lowered], isa: str) -> bool:
    """Whether oneDNN computes them faster than the products of libraries that stand alone."""
    return multiplies_narrow(programs, isa) or any(map(_has_overlapping_windows, _products(programs)))


def _has_overlapping_windows(node: fx.Node) -> bool:
    """Whether a node is a convolution in which numbers of the input are in several windows; patches are in one."""
    if "conv" not in str(node.target):
        return False
    weight: Any = node.args[1]
    stride: Any = node.args[3] if len(node.args) > 3 else 1
    kernel = weight.meta["val"].shape[2:]
    steps = stride if isinstance(stride, list | tuple) else [stride]
    return any(size > step for size, step in zip(kernel, [*steps, *steps[-1:] * len(kernel)], strict=False))


def multiplies_narrow(programs: Sequence[Lowered], isa: str) -> bool:
    """Whether products are taken in a dtype narrower than float32 that a CPU of this level has instructions for."""
    dtypes = matmul_dtypes(isa)
    return any(node.meta["val"].dtype in dtypes for node in _products(programs))


def _products(programs: Sequence[Lowered]) -> Iterator[fx.Node]:
    return (node for program in programs for node in products_of(program.exported))


def _weight_bytes(program: Lowered) -> int:
    held = {each.data_ptr(): each.nbytes for each in program.exported.state_dict.values()}
    return sum(held.values())
