"""The inputs of an encoder: checked against the contract, rows aligned to position 0 with padding only behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artifact.schema import Axis, Frames, Input
from ..errors import InputError
from .padding import align_rows, as_floats, as_ids, as_mask, pad_beyond, row_ends
from .tensors import to_numpy

__all__ = ["RUNNING", "Rows", "axes_of", "input_names", "named_inputs", "read_rows", "running_dimension"]

Array = np.ndarray[Any, Any]
Axes = tuple[Axis | None, ...]

RUNNING: tuple[Axis, ...] = ("length", "samples", "frames")
"""The axes along which rows differ in size."""


@dataclass(frozen=True)
class Rows:
    """A batch of aligned rows.

    Attributes:
        tensors: by name, among them `attention_mask` where rows differ in size.
        sizes: of each axis; of the running one, that of the longest row.
        width: the caller's size of the running axis; 0 if there is none.
        shifts, ends: [batch] or [batch, choices] or [texts]: how far each row was moved left, and its length.
    """

    tensors: dict[str, Array]
    sizes: dict[Axis, int]
    width: int
    shifts: Array
    ends: Array

    def take_rows(self, specs: Sequence[Input], rows: slice) -> Rows:
        """Some rows of the batch."""
        axes = {spec.name: axes_of(spec) for spec in specs}
        main, batch = axes_of(specs[0]), rows.stop - rows.start
        tensors = {
            name: each[rows] if axes.get(name, main)[0] == "batch" else each for name, each in self.tensors.items()
        }
        ends = self.ends[rows] if main[0] == "batch" else self.ends
        longest: dict[Axis, int] = {axis: int(ends.max()) for axis in RUNNING if axis in self.sizes}
        return Rows(tensors, {**self.sizes, "batch": batch, **longest}, self.width, self.shifts, ends)


def axes_of(spec: Input) -> Axes:
    """The names of an input's dimensions; format 1 had none, as all were of text."""
    return tuple(spec.axes) or ("batch", "length")


def running_dimension(specs: Sequence[Input]) -> int | None:
    """The dimension of the main input along which rows differ in size, or would if any length were compiled for."""
    axes = axes_of(specs[0])
    found = next((index for index, axis in enumerate(axes) if axis in RUNNING), None)
    return len(axes) - 1 if found is None and specs[0].name == "input_ids" else found


def input_names(specs: Sequence[Input]) -> list[str]:
    """The names a caller may use, in their order: rows that differ in size may always have a mask."""
    names = [spec.name for spec in specs]
    return names if running_dimension(specs) is None or "attention_mask" in names else [*names, "attention_mask"]


def named_inputs(specs: Sequence[Input], tensors: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs given by position or name, the main one first. Raises InputError for unknown, doubled and missing
    inputs; token_type_ids that are all 0 are ignored by a model without them."""
    names = input_names(specs)
    if len(tensors) > len(names):
        raise InputError(f"{len(tensors)} inputs were given; this model has {len(names)}: {', '.join(names)}.")
    placed = dict(zip(names, tensors, strict=False))
    if twice := sorted(placed.keys() & named.keys()):
        raise InputError(f"{', '.join(twice)} was given twice: in its place and by name.")
    given = {name: value for name, value in {**placed, **named}.items() if value is not None}
    for name in [name for name in given if name not in names]:
        if name != "token_type_ids" or np.any(to_numpy(given[name])):
            raise InputError(f"This model has no input {name!r}. It has: {', '.join(names)}.")
    for spec in specs:
        if spec.name not in given and (spec.dtype == "float32" or spec.name == "input_ids"):
            raise InputError(f"This model needs {spec.name!r}. Its inputs are: {', '.join(names)}.")
    return {name: given[name] for name in names if name in given}


def read_rows(
    specs: Sequence[Input], given: Mapping[str, Any], limits: Mapping[str, int | None], frames: Frames | None
) -> Rows:
    """Check tensors, and align their rows.

    `limits` are the numbers of ids, by input. Raises InputError for wrong dtypes, ids, ranks, and sizes that do not fit
    each other; whether a graph is large enough is checked later.
    """
    kinds = {spec.name: spec for spec in specs}
    tensors = {
        name: _check_tensor(kinds[name], value, limits.get(name))
        for name, value in given.items()
        if name != "attention_mask"
    }
    sizes = _axis_sizes(kinds, tensors)
    dimension = running_dimension(specs)
    if dimension is None:
        none = np.zeros(0, np.int64)
        return Rows(tensors, sizes, 0, none, none)
    main = tensors[specs[0].name]
    # Features have further dimensions behind the running one, which the mask has not.
    plane = main.reshape(*main.shape[: dimension + 1], -1)[..., 0] if main.ndim > dimension + 1 else main
    mask = as_mask(given.get("attention_mask"), plane, specs[0].name)
    shifts = mask.argmax(-1)
    mask = align_rows(mask, shifts)
    ends = row_ends(mask)
    axis = axes_of(specs[0])[dimension]
    _check_mask(axis, mask, ends, frames)
    for name, tensor in tensors.items():
        if axis is not None and axis in axes_of(kinds[name]):
            tensors[name] = pad_beyond(align_rows(tensor, shifts), ends, kinds[name].pad)
    return Rows({**tensors, "attention_mask": mask.astype(np.int64)}, sizes, mask.shape[-1], shifts, ends)


def _check_tensor(spec: Input, value: Any, limit: int | None) -> Array:
    names = [str(axis or size) for axis, size in zip(axes_of(spec), spec.shape, strict=True)]
    if spec.dtype == "float32":
        return as_floats(value, spec.name, names)
    return as_ids(value, limit, spec.name, names)


def _axis_sizes(specs: Mapping[str, Input], tensors: Mapping[str, Array]) -> dict[Axis, int]:
    """The size of each axis, by the inputs that have it. Raises InputError where two differ."""
    found: dict[Axis, tuple[int, str]] = {}
    for name, tensor in tensors.items():
        for axis, size in zip(axes_of(specs[name]), tensor.shape, strict=True):
            if axis is not None and found.setdefault(axis, (size, name))[0] != size:
                other = found[axis][1]
                raise InputError(f"{name} has the shape {list(tensor.shape)}, {other} {list(tensors[other].shape)}.")
    return {axis: size for axis, (size, _) in found.items()}


def _check_mask(axis: Axis | None, mask: Array, ends: Array, frames: Frames | None) -> None:
    if axis is None and not mask.all():
        raise InputError(
            f"This model reads every one of its {mask.shape[-1]} positions, padding too: none can be masked. Pad as it "
            f"was trained, and leave attention_mask out."
        )
    if axis in ("samples", "frames") and not np.array_equal(mask.sum(-1), ends):
        raise InputError("attention_mask has a hole: sound is padded at its beginning or at its end, not within.")
    if frames is not None and frames.count(int(ends.min())) < frames.fewest:
        shortest = (frames.fewest - 1) * frames.step + frames.size
        raise InputError(f"A row has {ends.min()} {axis}; this model answers {shortest} or more. Add silence to it.")
