"""Encoders whose weights are packed at export for this CPU's kernels, and lie in their libraries.

Products of matrices then call oneDNN with weights as it wants them, bias and activation included: twice as fast as
multiplying by weights as they are. The price is a copy of the weights in every library, and that only CPUs of the same
kind can open it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...options import ExportOptions
from ..aten.lowering import Lowered

__all__ = ["FROZEN", "pays"]

FROZEN: dict[str, Any] = {
    "freezing": True,
    "aot_inductor.package_constants_in_so": True,
    "aot_inductor.package_constants_on_disk_format": None,
}
"""Inductor's options."""

LARGEST = 2**30
"""Bytes: what all libraries' copies together may take."""


def pays(programs: Sequence[Lowered], options: ExportOptions) -> bool:
    """Whether to freeze: encoders of a size that can be had once per graph, for the machine that compiles them. A
    decoder's weights are shared by prompt and decode step, which reads each of them once whatever its layout."""
    is_encoder = all(program.graph.role == "encode" and not program.graph.cache for program in programs)
    is_here = options.isa == "native" and options.device == "cpu"
    return is_encoder and is_here and sum(map(_bytes, programs)) <= LARGEST


def _bytes(program: Lowered) -> int:
    held = {each.data_ptr(): each.nbytes for each in program.exported.state_dict.values()}
    return sum(held.values())
