"""Parts that the formats share: codes packed into 32-bit words, a scale and a zero point per group, and checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "SourceScheme",
    "Packing",
    "SchemeError",
    "require_choice",
    "read_group_index",
    "dequantize",
    "read_group_size",
    "make_group_index",
    "require_matrix",
    "require_part",
    "get_section",
    "unpack_words",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class SchemeError(ValueError):
    """A quantization scheme that is not supported, or tensors that are not as the scheme says."""


@dataclass(frozen=True)
class SourceScheme:
    """How the weights of a quantized checkpoint are quantized: `scale * (code - zero)` in groups.

    Attributes:
        method: "gptq", "awq" or "compressed-tensors".
        bits: of a code: 4 or 8.
        group_size: how many inputs share a scale and a zero point; -1 for all of a row's.
        symmetric: the zero point is the middle code everywhere.
        contiguous: groups are of consecutive inputs; False where they were chosen by activation order.
    """

    method: str
    bits: int
    group_size: int
    symmetric: bool
    contiguous: bool = True


class Packing(ABC):
    """A reader of one format's weights.

    Attributes:
        supported: the part of the format that can be read, for error messages.
        marker: the tensor that every packed module has.
        parts: all tensors that together replace a module's `weight`.
        scheme: the quantization of the weights.
    """

    supported: ClassVar[str]
    marker: str
    parts: frozenset[str]
    scheme: SourceScheme

    @abstractmethod
    def __init__(self, settings: dict[str, Any]) -> None:
        """Raises SchemeError where `settings`, a config.json's quantization_config, is of a kind not supported."""

    @abstractmethod
    def weight(self, parts: dict[str, Tensor]) -> Tensor:
        """The float32 weight [outputs, inputs]. Raises SchemeError for tensors that do not fit together."""


def require_choice(settings: dict[str, Any], key: str, valid: tuple[Any, ...]) -> Any:
    """Read a setting that must be one of `valid`. Raises SchemeError."""
    value = settings.get(key)
    # 4.0 and True are equal to integers and are none.
    if value not in valid or type(value) is not type(valid[0]):
        raise SchemeError(f"{key} {value!r}")
    return value


def read_group_size(settings: dict[str, Any]) -> int:
    """Read the setting `group_size`: a positive number, or -1 for whole rows. Raises SchemeError."""
    value = settings.get("group_size")
    if type(value) is not int or (value < 1 and value != -1):
        raise SchemeError(f"group_size {value!r}")
    return value


def get_section(settings: dict[str, Any], key: str) -> dict[str, Any]:
    """The settings below a key; empty where it is absent or null. Raises SchemeError."""
    found = settings.get(key) or {}
    if not isinstance(found, dict):
        raise SchemeError(f"{key} {found!r}")
    return found


def make_group_index(inputs: int, size: int) -> tuple[int, Tensor]:
    """Count groups of `size` consecutive inputs, and name the group of each input, int64 [inputs]."""
    if size == -1:
        return 1, torch.zeros(inputs, dtype=torch.int64)
    return ceil(inputs / size), torch.arange(inputs) // size


def require_part(
    parts: dict[str, Tensor], name: str, *shapes: tuple[int, ...], dtypes: Sequence[torch.dtype] = FLOATS
) -> Tensor:
    """Get a tensor and check that it has one of `dtypes`, and one of `shapes` if any is given. Raises SchemeError."""
    if name not in parts:
        raise SchemeError(f"has no {name}")
    tensor = parts[name]
    if tensor.dtype not in dtypes:
        raise SchemeError(f"has {name} in {_dtype_name(tensor.dtype)}, not {' or '.join(map(_dtype_name, dtypes))}")
    if shapes and tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise SchemeError(f"has {name} of shape {list(tensor.shape)}, not {expected}")
    return tensor


def require_matrix(parts: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """Get a tensor and check that it has that dtype and two dimensions. Raises SchemeError."""
    tensor = require_part(parts, name, dtypes=(dtype,))
    if tensor.ndim != 2:
        raise SchemeError(f"has {name} of shape {list(tensor.shape)}, which is no matrix")
    return tensor


def read_group_index(parts: dict[str, Tensor], name: str, inputs: int, groups: int) -> Tensor:
    """Read the group of each input from the file, int64 [inputs]. Raises SchemeError."""
    index = require_part(parts, name, (inputs,), dtypes=(torch.int32, torch.int64)).long()
    if not (int(index.min()) >= 0 and int(index.max()) < groups):
        raise SchemeError(f"has {name} with groups {index.min()} to {index.max()}, but {groups} groups")
    return index


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, n * 32 / bits]: the codes of each word, lowest bits first."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | int, index: Tensor) -> Tensor:
    """Compute `scale * (code - zero)` in float32, exactly for float16 and bfloat16 scales.

    Args:
        codes: any integers [outputs, inputs].
        scales: [outputs, groups], or [1, groups] for all outputs.
        zeros: of the shape of `scales`, or one for all.
        index: the group of each input, int64 [inputs].
    """
    weight = codes.to(torch.float32)
    weight -= zeros.to(torch.float32)[:, index] if isinstance(zeros, Tensor) else zeros
    weight *= scales.to(torch.float32)[:, index]
    return weight


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
