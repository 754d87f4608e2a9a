"""Checkpoints that are already quantized (GPTQ, AWQ, compressed-tensors), read without the libraries that wrote them.

Weights come out as float32, exactly `scale * (code - zero)`, so that quantizing again recovers the same codes.
"""

from __future__ import annotations

from typing import Any

from precast.runtime.errors import CheckpointError

from .awq import Awq
from .compressed_tensors import CompressedTensors
from .files import check_all_used, unpack_tensors
from .gptq import Gptq
from .scheme import Packing, SchemeError, SourceScheme

__all__ = [
    "SourceScheme",
    "Packing",
    "check_all_used",
    "find_packing",
    "find_quantization_settings",
    "unpack_tensors",
    "strip_quantization",
]

_PACKINGS: dict[str, type[Packing]] = {"gptq": Gptq, "awq": Awq, "compressed-tensors": CompressedTensors}
# The second name is what compressed-tensors wrote before transformers knew it.
_KEYS = ("quantization_config", "compression_config")


def find_quantization_settings(config: dict[str, Any]) -> dict[str, Any] | None:
    """The section of a config.json that says how its weights are quantized; None where they are not."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    found = (part.get(key) for part in parts for key in _KEYS)
    return next((settings for settings in found if settings and isinstance(settings, dict)), None)


def strip_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without the sections on quantization: it describes the model with unpacked weights."""
    kept = {name: value for name, value in config.items() if name not in _KEYS}
    text = kept.get("text_config")
    return {**kept, "text_config": strip_quantization(text)} if isinstance(text, dict) else kept


def find_packing(settings: dict[str, Any], name: str) -> Packing:
    """The reader for weights quantized as `settings` says, in checkpoint `name`.

    Raises CheckpointError, which names the method and what is supported.
    """
    method = settings.get("quant_method", "compressed-tensors" if "config_groups" in settings else None)
    try:
        if not isinstance(method, str) or method not in _PACKINGS:
            raise SchemeError(f"quant_method {method!r}")
        return _PACKINGS[method](settings)
    except SchemeError as error:
        supported = ", ".join(packing.supported for packing in _PACKINGS.values())
        raise CheckpointError(
            f"{name} is quantized in a way that cannot be exported: its quantization_config says {error}. Export the "
            f"checkpoint that it was quantized from, or one quantized with {supported}."
        ) from error
