"""What the formats have in common: codes packed into 32-bit words, and a scale and a zero point per group."""

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
    "Grid",
    "Packing",
    "SchemeError",
    "choice",
    "chosen_groups",
    "dequantized",
    "group_size",
    "groups_of",
    "matrix",
    "part",
    "section",
    "unpack_words",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class SchemeError(ValueError):
    """A quantization scheme that is not supported, or tensors that are not as the scheme says."""


@dataclass(frozen=True)
class Grid:
    """The levels that the weights of a quantized checkpoint lie on, `scale * (code - zero)` for each group.

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
    """How one format stores a weight.

    Attributes:
        supported: what of the format can be read, for error messages.
        marker: the tensor that every packed module has.
        parts: all tensors that together stand for a module's `weight`.
        grid: where the weights lie.
    """

    supported: ClassVar[str]
    marker: str
    parts: frozenset[str]
    grid: Grid

    @abstractmethod
    def __init__(self, settings: dict[str, Any]) -> None:
        """Raises SchemeError where `settings`, a config.json's quantization_config, is of a kind not supported."""

    @abstractmethod
    def weight(self, parts: dict[str, Tensor]) -> Tensor:
        """The float32 weight [outputs, inputs]. Raises SchemeError for tensors that do not fit together."""


def choice(settings: dict[str, Any], key: str, valid: tuple[Any, ...]) -> Any:
    """The value of a setting that must be one of `valid`. Raises SchemeError."""
    value = settings.get(key)
    # 4.0 and True are equal to integers and are none.
    if value not in valid or type(value) is not type(valid[0]):
        raise SchemeError(f"{key} {value!r}")
    return value


def group_size(settings: dict[str, Any]) -> int:
    """The setting of that name: a positive number, or -1 for whole rows. Raises SchemeError."""
    value = settings.get("group_size")
    if type(value) is not int or (value < 1 and value != -1):
        raise SchemeError(f"group_size {value!r}")
    return value


def section(settings: dict[str, Any], key: str) -> dict[str, Any]:
    """The settings below a key; none where it is absent or null. Raises SchemeError."""
    found = settings.get(key) or {}
    if not isinstance(found, dict):
        raise SchemeError(f"{key} {found!r}")
    return found


def groups_of(inputs: int, size: int) -> tuple[int, Tensor]:
    """How many groups of `size` consecutive inputs there are, and the group of each input, int64 [inputs]."""
    if size == -1:
        return 1, torch.zeros(inputs, dtype=torch.int64)
    return ceil(inputs / size), torch.arange(inputs) // size


def part(
    parts: dict[str, Tensor], name: str, *shapes: tuple[int, ...], dtypes: Sequence[torch.dtype] = FLOATS
) -> Tensor:
    """A tensor that must be there, of one of `dtypes`, and of one of `shapes` if any is given. Raises SchemeError."""
    if name not in parts:
        raise SchemeError(f"has no {name}")
    tensor = parts[name]
    if tensor.dtype not in dtypes:
        raise SchemeError(f"has {name} in {_name(tensor.dtype)}, not {' or '.join(map(_name, dtypes))}")
    if shapes and tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise SchemeError(f"has {name} of shape {list(tensor.shape)}, not {expected}")
    return tensor


def matrix(parts: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """A tensor that must be there, of that dtype and with two dimensions. Raises SchemeError."""
    tensor = part(parts, name, dtypes=(dtype,))
    if tensor.ndim != 2:
        raise SchemeError(f"has {name} of shape {list(tensor.shape)}, which is no matrix")
    return tensor


def chosen_groups(parts: dict[str, Tensor], name: str, inputs: int, groups: int) -> Tensor:
    """The group of each input as the file has it, int64 [inputs]. Raises SchemeError."""
    index = part(parts, name, (inputs,), dtypes=(torch.int32, torch.int64)).long()
    if not (int(index.min()) >= 0 and int(index.max()) < groups):
        raise SchemeError(f"has {name} with groups {index.min()} to {index.max()}, but {groups} groups")
    return index


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, n * 32 / bits]: the codes of each word, lowest bits first."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)


def dequantized(codes: Tensor, scales: Tensor, zeros: Tensor | int, index: Tensor) -> Tensor:
    """`scale * (code - zero)` in float32, which no step of it rounds for float16 and bfloat16 scales.

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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
