"""The options of the `onnx` backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...options.declaration import describe
from ...options.parallel import PipelineOptions

__all__ = ["FORMATS", "OnnxOptions"]

FORMATS = ("kernels", "qdq")


@dataclass(frozen=True, kw_only=True)
class OnnxOptions(PipelineOptions):
    """How graphs are written.

    Attributes:
        format: "kernels", in the operators that ONNX Runtime has the fastest kernels for; "qdq", quantized weights and
            activations between QuantizeLinear and DequantizeLinear, in standard operators alone, which other runtimes
            read, too.
    """

    format: str = field(
        default="kernels",
        metadata=describe(
            choices=FORMATS,
            section="Quantization",
            metavar="FORMAT",
            help_text="Graphs in operators of: ONNX Runtime's own (kernels), the ONNX standard alone (qdq).",
        ),
    )

    @property
    def is_standard(self) -> bool:
        """Whether graphs have operators of the domain ai.onnx alone."""
        return self.format == "qdq"

    def name_parts(self) -> Sequence[str]:
        """See BackendOptions."""
        return [*(["qdq"] if self.is_standard else []), *super().name_parts()]
