"""How weights and caches are quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from precast.runtime.artifact.schema import Dtype

from .declaration import OptionsPart, describe

__all__ = ["GROUP_SIZES", "KV_CACHES", "QUANTIZE", "QUANTIZE_METHODS", "QuantizationOptions"]

QUANTIZE = ("none", "source", "int8", "int4", "auto", "a8w8", "a8w8-dynamic")
SMOOTH = ("auto", "none")
"""Beside exponents between 0 and 1."""
QUANTIZE_METHODS = ("rtn", "search", "gptq", "awq")
"""The names of quantize.METHODS, which are made of torch."""
LLM_INT8 = "llm.int8"
"""The method that rounds activations, too, but for large ones."""
KV_CACHES = ("float32", "float16", "int8")
GROUP_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions(OptionsPart):
    """How weights and caches are rounded.

    Attributes:
        quantize: "none"; "int8" or "int4" for the weights of linear layers and embeddings; "source", the scheme that
            the checkpoint's weights are quantized in already; "auto", the smallest mixture of int8 and int4 in
            groups of several sizes within `max_kl`; "a8w8", weights and activations of linear layers in 8 bits, with
            one range of activations per layer from the calibration text, or in "a8w8-dynamic" a scale per token, as
            far as that stays within the floor.
        smooth: what a8w8 moves from activations into weights: by an exponent between 0 and 1, by "none", or by the one
            of several that serves each layer best, "auto".
        quantize_method: how weights are rounded, one of QUANTIZE_METHODS; None is "rtn" for int8, "awq" where a row
            shares a scale, "search" for int4, "gptq" for auto. For int8 also "llm.int8", which rounds activations per
            token, but for columns where they are large.
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
    smooth: str | float = "auto"
    skip: tuple[str, ...] = ()
    calibration: Path | None = None
    kv_cache: Dtype = field(default="float32", metadata=describe(choices=KV_CACHES))

    @property
    def is_rounded(self) -> bool:
        """Whether weights or caches are stored in less than float32."""
        return self.quantize != "none" or self.kv_cache != "float32"

    @property
    def rounds_activations(self) -> bool:
        """Whether linear layers multiply activations of 8 bits."""
        return self.quantize in ("a8w8", "a8w8-dynamic") or self.keeps_outliers

    @property
    def keeps_outliers(self) -> bool:
        """Whether columns of large activations are multiplied as they are, and all others in 8 bits."""
        return self.quantize == "int8" and self.quantize_method == LLM_INT8

    @property
    def is_calibrated(self) -> bool:
        """Whether text may help to choose scales, of weights or of caches."""
        return self.quantize != "none" or self.kv_cache == "int8"

    def problems(self) -> Iterator[str]:
        """See OptionsPart."""
        yield from super().problems()
        if self.quantize_method not in (None, *QUANTIZE_METHODS, LLM_INT8):
            known = ", ".join((*QUANTIZE_METHODS, LLM_INT8))
            yield f"quantize_method={self.quantize_method!r} is not supported; the choices are: {known}."
        if self.quantize == "none" and (useless := self.given("group_size", "skip")):
            yield f"{', '.join(useless)} say how weights are rounded; give quantize=, too."
        if self.quantize in ("none", "source") and (useless := self.given("quantize_method", "symmetric")):
            yield f"{', '.join(useless)} say how weights are rounded, which quantize={self.quantize!r} does not do."
        yield from self._activation_problems()
        if not self.is_calibrated and self.calibration is not None:
            yield "calibration= says how weights and caches are rounded; give quantize= or kv_cache='int8', too."
        if self.calibration is not None and not self.calibration.is_file():
            yield f"calibration=: there is no file {self.calibration}."

    def _activation_problems(self) -> Iterator[str]:
        if self.quantize_method == LLM_INT8 and not self.keeps_outliers:
            yield f"quantize_method={LLM_INT8!r} rounds to 8 bits; give quantize='int8' with it."
        method = () if self.quantize_method == LLM_INT8 else ("quantize_method",)
        if self.rounds_activations and (useless := self.given(*method, "group_size", "symmetric")):
            yield (
                f"{', '.join(useless)} say how weights are rounded alone; those that multiply activations of 8 bits "
                f"have a symmetric scale per row. Leave them out, or give quantize='int8'."
            )
        if (not self.rounds_activations or self.keeps_outliers) and self.given("smooth"):
            yield "smooth= is for activations of 8 bits; give quantize='a8w8' or a8w8-dynamic, too."
        if self.smooth not in SMOOTH and not _is_exponent(self.smooth):
            yield f"smooth={self.smooth!r} is not supported; give an exponent from 0 to 1, {' or '.join(SMOOTH)}."


def _is_exponent(given: str | float) -> bool:
    try:
        return 0 <= float(given) <= 1
    except ValueError:
        return False
