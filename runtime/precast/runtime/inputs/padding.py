"""Check the caller's tensors, align their rows, pad them to the compiled sizes, and undo that for outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError

__all__ = [
    "align_rows",
    "as_array",
    "as_floats",
    "as_ids",
    "as_mask",
    "pad_beyond",
    "row_ends",
    "fill_padded",
    "real_rows",
    "scatter_rows",
    "unalign_rows",
]

Array = np.ndarray[Any, Any]
_MOST_IDS = 2**31
EMPTY_ROWS = ("batch", "choices", "texts")
"""Axes that are padded by repeating the first row: a row of nothing but padding can make a softmax undefined."""


def as_ids(
    value: Any, vocabulary: int | None, name: str = "input_ids", axes: Sequence[str] = ("batch", "length")
) -> Array:
    """Token ids (or other whole numbers) as int64 with these axes. Raises InputError for another rank, dtype, an empty
    tensor, or ids outside 0..vocabulary-1; where that is not known, for negative ones."""
    ids = _as_array(value, name, axes)
    if ids.size == 0:
        raise InputError(f"{name} is empty: its shape is {list(ids.shape)}. Give at least one token per row.")
    if ids.dtype.kind not in "iu":
        raise InputError(f"{name} must be whole numbers (int64); these are {ids.dtype}.")
    limit = _MOST_IDS if vocabulary is None else vocabulary
    if ids.min() < 0 or ids.max() >= limit:
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise InputError(f"{name} holds the id {wrong}; the model's vocabulary is 0..{limit - 1}.")
    return ids.astype(np.int64, copy=False)


def as_floats(value: Any, name: str, axes: Sequence[str]) -> Array:
    """Pixels, samples or features as float32 with these axes. Raises InputError for another rank or dtype, or an empty
    tensor."""
    numbers = _as_array(value, name, axes)
    if numbers.size == 0:
        raise InputError(f"{name} is empty: its shape is {list(numbers.shape)}.")
    if numbers.dtype.kind != "f":
        raise InputError(
            f"{name} must be fractions (float32); these are {numbers.dtype}. The checkpoint's processor scales them."
        )
    return numbers.astype(np.float32, copy=False)


def _as_array(value: Any, name: str, axes: Sequence[str]) -> Array:
    shape = f"[{', '.join(axes)}]"
    found = as_array(value, name)
    if found.ndim == 1 and found.size and found.dtype != object and len(axes) == 2:
        raise InputError(f"{name} has one dimension, [{found.size}]; give {shape}, for one row [1, {found.size}].")
    if found.dtype == object and found.ndim == len(axes):
        raise InputError(f"{name} must be numbers of at most 64 bits; it holds {found.flat[0]!r:.40}.")
    if found.dtype == object or found.ndim != len(axes):
        raise InputError(f"{name} must be {shape}; this has {found.ndim} dimensions, {list(found.shape)}.")
    return found


def as_array(value: Any, name: str) -> Array:
    """An array of nested lists. Raises InputError where their lengths differ."""
    try:
        return np.asarray(value)
    except ValueError:
        raise InputError(f"{name} has rows of different lengths; pad them and give an attention_mask.") from None


def as_mask(value: Any, main: Array, name: str = "input_ids") -> Array:
    """An attention mask as bool of the main input's shape; all true where the caller gave none. Raises InputError for
    another shape, values other than 0 and 1, or a row without any token."""
    if value is None:
        return np.ones(main.shape, bool)
    mask = as_array(value, "attention_mask")
    if mask.shape != main.shape:
        raise InputError(f"attention_mask has the shape {list(mask.shape)}, {name} {list(main.shape)}.")
    if mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise InputError("attention_mask must hold 0 (padding) and 1 (token) only.")
    mask = mask.astype(bool)
    if not mask.any(-1).all():
        raise InputError(f"Row {int(np.argmin(mask.any(-1)))} of attention_mask has no token at all.")
    return mask


def real_rows(ids: Array, mask: Array) -> list[Array]:
    """The tokens of each row without its padding, wherever that is.

    A causal model with positions counted over the mask gives a row with padding the very answer of the row without.
    """
    return [row[keep] for row, keep in zip(ids, mask, strict=True)]


def scatter_rows(values: Sequence[Array], mask: Array) -> Array:
    """Put each row's values [tokens, size] where its mask [batch, length] has tokens: [batch, length, size], else 0."""
    result = np.zeros((*mask.shape, values[0].shape[-1]), values[0].dtype)
    for target, keep, own in zip(result, mask, values, strict=True):
        target[keep] = own
    return result


def align_rows(tensor: Array, shifts: Array) -> Array:
    """Move each row [..., length, …] left by its shift [...], so that its first token stands at position 0."""
    return _roll_rows(tensor, shifts)


def unalign_rows(tensor: Array, shifts: Array) -> Array:
    """Move the rows of an output [..., length, …] back to where the caller had them."""
    return _roll_rows(tensor, -shifts)


def _roll_rows(tensor: Array, shifts: Array) -> Array:
    if not shifts.any():
        return tensor
    axis = shifts.ndim
    index = (np.arange(tensor.shape[axis]) + shifts[..., None]) % tensor.shape[axis]
    return np.take_along_axis(tensor, index.reshape(*index.shape, *[1] * (tensor.ndim - index.ndim)), axis)


def row_ends(mask: Array) -> Array:
    """The end of each row of a mask [..., length]: one past its last token."""
    found: Array = (mask * np.arange(1, mask.shape[-1] + 1)).max(-1)
    return found


def pad_beyond(tensor: Array, ends: Array, pad: int | float) -> Array:
    """Overwrite a tensor [..., length, …] with `pad` from each row's end on, whatever the caller padded with."""
    axis = ends.ndim
    beyond = np.arange(tensor.shape[axis]) >= ends[..., None]
    return np.where(beyond.reshape(*beyond.shape, *[1] * (tensor.ndim - beyond.ndim)), tensor.dtype.type(pad), tensor)


def fill_padded(target: Array, source: Array, axes: Sequence[str | None], pad: int | float) -> None:
    """Copy `source` into the corner of `target` and fill the rest with `pad`, or with copies of the first row."""
    target.fill(pad)
    target[tuple(slice(size) for size in source.shape)] = source
    for index, (axis, size) in enumerate(zip(axes, source.shape, strict=True)):
        if axis in EMPTY_ROWS and size < target.shape[index]:
            before = (slice(None),) * index
            target[(*before, slice(size, None))] = target[(*before, slice(1))]
