"""Which dtype is computed in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from precast.runtime.artifact.schema import Dtype

from .declaration import OptionsPart, describe

__all__ = ["AUTOMATIC", "AUTO_CAST", "AUTO_CAST_TYPES", "BY_BACKEND", "DTYPES", "PrecisionOptions"]

DTYPES = ("float32", "bfloat16", "float16")
AUTOMATIC = "auto"
AUTO_CAST = ("none", "matmul", "all")
AUTO_CAST_TYPES: dict[str, Dtype] = {"bf16": "bfloat16", "fp16": "float16", "tf32": "float32"}
"""In tf32 numbers keep their 32 bits, and products read 19 of them: only a compiler that casts itself has it."""
BY_BACKEND = ("dtype", "auto_cast")
"""The options that a backend takes only where its row says so."""


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(OptionsPart):
    """The dtype of weights and computation.

    Attributes:
        dtype: the dtype of weights, caches and computation; results are float32 always. "auto" is that of the
            checkpoint's weights, where the backend and this machine have instructions for it, else float32.
        auto_cast: what is computed in less than float32 all the same: "matmul", products of matrices and convolutions,
            their weights stored so; "all", everything but norms, softmax and sums.
        auto_cast_type: what to compute it in, one of AUTO_CAST_TYPES; None is "bf16".
    """

    dtype: Dtype | Literal["auto"] = field(default="float32", metadata=describe(choices=(*DTYPES, AUTOMATIC)))
    auto_cast: str = field(default="none", metadata=describe(choices=AUTO_CAST))
    auto_cast_type: str | None = field(default=None, metadata=describe(choices=AUTO_CAST_TYPES))

    @property
    def is_automatic(self) -> bool:
        """Whether the checkpoint decides what is computed in."""
        return self.dtype == AUTOMATIC

    @property
    def is_cast(self) -> bool:
        """Whether less than float32 is computed in."""
        return self.dtype not in ("float32", AUTOMATIC) or self.auto_cast != "none"

    @property
    def cast_dtype(self) -> Dtype:
        """The dtype that is computed in where `is_cast`."""
        if self.dtype == "float32" or self.dtype == "auto":  # noqa: PLR1714  (type checkers narrow by this alone)
            return AUTO_CAST_TYPES[self.auto_cast_type or "bf16"]
        return self.dtype

    @property
    def cast_type(self) -> str:
        """The short name of `cast_dtype`: one of AUTO_CAST_TYPES."""
        if self.dtype == "float32":
            return self.auto_cast_type or "bf16"
        return next(short for short, dtype in AUTO_CAST_TYPES.items() if dtype == self.dtype)

    def problems(self) -> Iterator[str]:
        """See OptionsPart."""
        yield from super().problems()
        if self.auto_cast_type is not None and self.auto_cast == "none":
            yield f"auto_cast_type={self.auto_cast_type!r} says what auto_cast casts to; give it matmul or all, too."
