"""size -> padded_size and back: what the caller gives, aligned and padded to what was compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import InputError

__all__ = ["align", "as_ids", "as_mask", "pad_rows", "real_rows", "smallest_fit", "unalign"]

Array = np.ndarray[Any, Any]


def as_ids(value: Any, vocabulary: int | None, name: str = "input_ids") -> Array:
    """Token ids as int64 [batch, length]. Raises InputError for another rank, dtype, an empty tensor, or ids outside
    0..vocabulary-1."""
    try:
        ids = np.asarray(value)
    except ValueError:
        raise InputError(f"{name} has rows of different lengths; pad them and give an attention_mask.") from None
    if ids.ndim == 1 and ids.size and ids.dtype != object:
        raise InputError(f"{name} has one dimension, [{ids.size}]; give [batch, length], for one row [1, {ids.size}].")
    if ids.dtype == object or ids.ndim != 2:
        raise InputError(f"{name} must be [batch, length]; this has {ids.ndim} dimensions, {list(ids.shape)}.")
    if ids.size == 0:
        raise InputError(f"{name} is empty: its shape is {list(ids.shape)}. Give at least one token per row.")
    if ids.dtype.kind not in "iu":
        raise InputError(f"{name} must be whole numbers (int64); these are {ids.dtype}.")
    if vocabulary is not None and (ids.min() < 0 or ids.max() >= vocabulary):
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise InputError(f"{name} holds the id {wrong}; the model's vocabulary is 0..{vocabulary - 1}.")
    return ids.astype(np.int64, copy=False)


def as_mask(value: Any, ids: Array) -> Array:
    """An attention mask as bool [batch, length]; all true where the caller gave none. Raises InputError for another
    shape, values other than 0 and 1, or a row without any token."""
    if value is None:
        return np.ones(ids.shape, bool)
    mask = np.asarray(value)
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask has the shape {list(mask.shape)}, input_ids {list(ids.shape)}.")
    if mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise InputError("attention_mask must hold 0 (padding) and 1 (token) only.")
    mask = mask.astype(bool)
    if not mask.any(1).all():
        raise InputError(f"Row {int(np.argmin(mask.any(1)))} of attention_mask has no token at all.")
    return mask


def real_rows(ids: Array, mask: Array) -> list[Array]:
    """The tokens of each row without its padding, wherever that is.

    A causal model with positions counted over the mask gives a row with padding the very answer of the row without.
    """
    return [row[keep] for row, keep in zip(ids, mask, strict=True)]


def align(tensors: dict[str, Array], mask: Array) -> tuple[dict[str, Array], Array]:
    """Move each row left over its leading padding, so that its first token stands at position 0.

    Returns the moved tensors and, per row, by how much.
    """
    shifts = mask.argmax(1)
    if not shifts.any():
        return tensors, shifts
    index = (np.arange(mask.shape[1])[None] + shifts[:, None]) % mask.shape[1]
    return {name: np.take_along_axis(tensor, index, 1) for name, tensor in tensors.items()}, shifts


def unalign(tensor: Array, shifts: Array) -> Array:
    """Move the rows of an output [batch, length, …] back to where the caller had them."""
    if not shifts.any():
        return tensor
    index = (np.arange(tensor.shape[1])[None] - shifts[:, None]) % tensor.shape[1]
    return np.take_along_axis(tensor, index.reshape(*index.shape, *[1] * (tensor.ndim - 2)), 1)


def pad_rows(target: Array, source: Array, pad: int | float) -> None:
    """Copy `source` [size, length] into the corner of `target` [padded_size, padded_length].

    What is right of it becomes `pad`; rows below it repeat the first row, which is as harmless as any real row, where
    a row of nothing but padding can make a softmax undefined.
    """
    rows, length = source.shape[:2]
    target[:rows, :length] = source
    target[:rows, length:] = pad
    target[rows:] = target[:1]


def smallest_fit(size: int, sizes: Sequence[int]) -> int | None:
    """The smallest of `sizes` that holds `size`, if any."""
    return min((each for each in sizes if each >= size), default=None)
