"""Freezing: encoders' weights packed at export for this CPU's kernels, within their libraries.

GEMMs then call oneDNN with weights in its own layout, bias and activation fused: twice as fast as with plain weights.
The price is a copy of the weights in every library, and libraries that only CPUs of the same kind can open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..aten.lowered import Lowered
from .options import AotiOptions

__all__ = ["FREEZING_OPTIONS", "should_freeze"]

FREEZING_OPTIONS: dict[str, Any] = {
    "freezing": True,
    "aot_inductor.package_constants_in_so": True,
    "aot_inductor.package_constants_on_disk_format": None,
}
"""Inductor's options for it."""

MAX_BYTES = 2**30
"""Of weights, in all libraries together."""


def should_freeze(programs: Sequence[Lowered], native: AotiOptions) -> bool:
    """Whether to freeze: encoders that are small enough to be stored once per graph, for the machine that compiles
    them.

    A decoder's weights are shared by prefill and decode step, which reads each of them once whatever its layout.
    """
    is_encoder = all(program.graph.role == "encode" and not program.graph.cache for program in programs)
    is_here = native.isa == "native" and native.device == "cpu"
    return is_encoder and is_here and sum(map(_weight_bytes, programs)) <= MAX_BYTES


def _weight_bytes(program: Lowered) -> int:
    held = {each.data_ptr(): each.nbytes for each in program.exported.state_dict.values()}
    return sum(held.values())
