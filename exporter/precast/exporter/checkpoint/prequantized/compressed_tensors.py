"""compressed-tensors, as llm-compressor writes it, where only weights are quantized.

A module in format "pack-quantized" has `weight_packed` int32 [outputs, inputs / n], where a word holds n = 32 / bits
consecutive inputs, `weight_shape` [2], and `weight_zero_point` int32 [outputs / n, groups], where it holds n outputs.
What is packed is the signed integer plus 2**(bits - 1). In "int-quantized" and "naive-quantized" it has `weight` and
`weight_zero_point` in int8. In all of them `weight_scale` is [outputs, groups], or one number for strategy "tensor";
there are no zero points where it is symmetric, and `weight_g_idx` [inputs] names the group of each input, if not -1.

Source: `compressors/quantized_compressors` and `quantization/lifecycle/forward.py` of compressed-tensors.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor

from .scheme import (
    Packing,
    SchemeError,
    SourceScheme,
    dequantize,
    get_section,
    make_group_index,
    read_group_index,
    read_group_size,
    require_choice,
    require_matrix,
    require_part,
    unpack_words,
)

__all__ = ["CompressedTensors"]

# The tensors that hold a module's codes in each format.
_CODES = {
    "pack-quantized": frozenset({"weight_packed", "weight_shape"}),
    "int-quantized": frozenset({"weight"}),
    "naive-quantized": frozenset({"weight"}),
}


class CompressedTensors(Packing):
    """See the module, and Packing."""

    supported = f"compressed-tensors (only its weights, 4 or 8 bits, format {', '.join(_CODES)})"

    def __init__(self, settings: dict[str, Any]) -> None:
        _refuse_extras(settings)
        scheme, form = _read_settings(settings)
        require_choice(scheme, "type", ("int",))
        strategy = require_choice(scheme, "strategy", ("group", "channel", "tensor"))
        self._packed, self._one_scale = form == "pack-quantized", strategy == "tensor"
        self.marker = "weight_packed" if self._packed else "weight_scale"
        self.parts = _CODES[form] | {"weight_scale", "weight_zero_point", "weight_g_idx"}
        self.scheme = SourceScheme(
            method="compressed-tensors",
            bits=require_choice(scheme, "num_bits", (4, 8)),
            group_size=read_group_size(scheme) if strategy == "group" else -1,
            symmetric=require_choice(scheme, "symmetric", (True, False)),
            contiguous=scheme.get("actorder") not in ("group", "dynamic", True),
        )

    def weight(self, parts: dict[str, Tensor]) -> Tensor:
        """The float32 weight [outputs, inputs]. Raises SchemeError."""
        codes = self._unpack(parts) if self._packed else require_matrix(parts, "weight", torch.int8)
        outputs, inputs = codes.shape
        groups, index = make_group_index(inputs, self.scheme.group_size)
        # A scale for everything is one row of one group.
        shape, written = (1, 1), [(), (1,), (1, 1)]
        if not self._one_scale:
            shape, written = (outputs, groups), [(outputs, groups)]
        scales = require_part(parts, "weight_scale", *written).reshape(shape)
        if "weight_g_idx" in parts and -1 not in parts["weight_g_idx"]:
            index = read_group_index(parts, "weight_g_idx", inputs, groups)
        return dequantize(codes, scales, self._zeros(parts, shape, written), index)

    def _unpack(self, parts: dict[str, Tensor]) -> Tensor:
        """Codes, uint8 [outputs, inputs]."""
        outputs, inputs = require_part(parts, "weight_shape", (2,), dtypes=(torch.int32, torch.int64)).tolist()
        words = require_part(parts, "weight_packed", (outputs, self._count_words(inputs)), dtypes=(torch.int32,))
        return unpack_words(words, self.scheme.bits)[:, :inputs]

    def _zeros(self, parts: dict[str, Tensor], shape: tuple[int, int], written: list[tuple[int, ...]]) -> Tensor | int:
        """Zero points for the codes as they are stored: integers of that shape, or one for all."""
        middle = 2 ** (self.scheme.bits - 1) if self._packed else 0
        if self.scheme.symmetric and "weight_zero_point" not in parts:
            return middle
        # Early releases, and strategy "tensor", do not pack zero points.
        if (
            not self._packed
            or require_part(parts, "weight_zero_point", dtypes=(torch.int8, torch.int32)).dtype == torch.int8
        ):
            return (
                require_part(parts, "weight_zero_point", *written, dtypes=(torch.int8,)).reshape(shape).short() + middle
            )
        words = require_part(parts, "weight_zero_point", (self._count_words(shape[0]), shape[1]), dtypes=(torch.int32,))
        return unpack_words(words.T, self.scheme.bits)[:, : shape[0]].T

    def _count_words(self, codes: int) -> int:
        return ceil(codes * self.scheme.bits / 32)


def _read_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Read the weights' settings, alike in all config_groups, and the format of storage. Raises SchemeError."""
    groups = get_section(settings, "config_groups")
    if not groups:
        raise SchemeError("no config_groups")
    found = [_read_group(name, group, settings.get("format")) for name, group in groups.items()]
    if any(other != found[0] for other in found):
        raise SchemeError(f"that config_groups {', '.join(groups)} differ")
    scheme, form = found[0]
    return scheme, require_choice({"format": form}, "format", tuple(_CODES))


def _read_group(name: str, group: Any, form: Any) -> tuple[dict[str, Any], Any]:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise SchemeError(f"weights {weights!r} in {name}")
    for quantized in ("input_activations", "output_activations"):
        if group.get(quantized):
            raise SchemeError(f"that activations are quantized too ({quantized} in {name})")
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "actorder")
    return {key: weights.get(key) for key in keys}, group.get("format") or form


def _refuse_extras(settings: dict[str, Any]) -> None:
    if settings.get("kv_cache_scheme"):
        raise SchemeError("that the cache is quantized too (kv_cache_scheme)")
    sparsity = get_section(settings, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise SchemeError(f"sparsity_config format {sparsity!r}")
    if get_section(settings, "transform_config").get("config_groups"):
        raise SchemeError("that activations are transformed (transform_config)")
