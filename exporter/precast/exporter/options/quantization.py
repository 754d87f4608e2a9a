"""How weights and caches are quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from precast.runtime.artifact.schema import Dtype

from .declaration import OptionsPart, describe

__all__ = ["GROUP_SIZES", "KV_CACHES", "QUANTIZE", "QUANTIZE_METHODS", "QuantizationOptions"]

QUANTIZE = ("none", "source", "int8", "int4", "auto")
QUANTIZE_METHODS = ("rtn", "search", "gptq", "awq")
"""The names of quantize.METHODS, which are made of torch."""
KV_CACHES = ("float32", "float16", "int8")
GROUP_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions(OptionsPart):
    """How weights and caches are rounded.

    Attributes:
        quantize: "none"; "int8" or "int4" for the weights of linear layers and embeddings; "source", the scheme that
            the checkpoint's weights are quantized in already; "auto", the smallest mixture of int8 and int4 in
            groups of several sizes within `max_kl`.
        quantize_method: how weights are rounded, one of QUANTIZE_METHODS; None is "rtn" for int8, "awq" where a row
            shares a scale, "search" for int4, "gptq" for auto.
        group_size: weights that share a scale; None is 32, a whole row for int8 where the backend prefers that, and for
            auto several sizes.
        symmetric: symmetric zero points or free ones; None is True for int8 in groups, False for int4 and for rows
            that share a scale.
        skip: patterns of layers' names that stay as they are.
        calibration: a text file for methods that look at activations; None is a small text of our own.
        kv_cache: the caches' dtype; "float16" where the backend takes it, "int8" with scales from the calibration text.
    """

    quantize: str = field(default="none", metadata=describe(choices=QUANTIZE))
    quantize_method: str | None = field(default=None, metadata=describe(flags=("--method",)))
    group_size: int | None = field(default=None, metadata=describe(choices=GROUP_SIZES))
    symmetric: bool | None = field(default=None, metadata=describe(flags=("--symmetric/--asymmetric",)))
    skip: tuple[str, ...] = ()
    calibration: Path | None = None
    kv_cache: Dtype = field(default="float32", metadata=describe(choices=KV_CACHES))

    @property
    def is_rounded(self) -> bool:
        """Whether weights or caches are stored in less than float32."""
        return self.quantize != "none" or self.kv_cache != "float32"

    @property
    def is_calibrated(self) -> bool:
        """Whether text may help to choose scales, of weights or of caches."""
        return self.quantize != "none" or self.kv_cache == "int8"

    def problems(self) -> Iterator[str]:
        """See OptionsPart."""
        yield from super().problems()
        if self.quantize_method not in (None, *QUANTIZE_METHODS):
            known = ", ".join(QUANTIZE_METHODS)
            yield f"quantize_method={self.quantize_method!r} is not supported; the choices are: {known}."
        if self.quantize == "none" and (useless := self.given("group_size", "skip")):
            yield f"{', '.join(useless)} say how weights are rounded; give quantize=, too."
        if self.quantize in ("none", "source") and (useless := self.given("quantize_method", "symmetric")):
            yield f"{', '.join(useless)} say how weights are rounded, which quantize={self.quantize!r} does not do."
        if not self.is_calibrated and self.calibration is not None:
            yield "calibration= says how weights and caches are rounded; give quantize= or kv_cache='int8', too."
        if self.calibration is not None and not self.calibration.is_file():
            yield f"calibration=: there is no file {self.calibration}."
