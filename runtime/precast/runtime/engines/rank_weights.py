"""The parts of whole weights that one rank has, of files that hold all of them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np

from ..artifact.ranks import part_bounds, split_of
from ..artifact.schema import Ranks, Split
from ..artifact.weight_files import ALIGNMENT, take_part
from ..errors import FormatError
from .safetensors_map import Weight, item_size

__all__ = ["own_parts"]

_Array = np.ndarray[Any, Any]


def own_parts(weights: Mapping[str, Weight], ranks: Ranks, rank: int) -> dict[str, Weight]:
    """The weights as a rank has them. Rows are where they lie in the file; columns are copied, as code reads them in
    one piece. Raises FormatError where a weight cannot be divided as config.json says."""
    found, columns = dict(weights), {}
    for name, weight in weights.items():
        if split := split_of(ranks, name):
            bounds = _own_bounds(weight, split, ranks, rank)
            if split.dim == 0 and len(bounds) == 1:
                found[name] = _rows(weight, *bounds[0])
            else:
                columns[name] = take_part(_numbers(weight), split, rank, ranks.count)
    return found | _copies(columns, weights)


def _own_bounds(weight: Weight, split: Split, ranks: Ranks, rank: int) -> list[tuple[int, int]]:
    if split.dim >= len(weight.shape) or weight.shape[split.dim] % (split.blocks * (ranks.count // split.copies)):
        raise FormatError(
            f"A weight of {list(weight.shape)} numbers is not divided between {ranks.count} ranks by {split}."
        )
    return part_bounds(weight.shape[split.dim], split, rank, ranks.count)


def _rows(weight: Weight, begin: int, end: int) -> Weight:
    row = math.prod(weight.shape[1:])
    start, shape = weight.start + begin * row * item_size(weight.dtype), (end - begin, *weight.shape[1:])
    return Weight(weight.memory, start, weight.dtype, shape, weight.strides, (end - begin) * row)


def _numbers(weight: Weight) -> _Array:
    """A weight's numbers, as whole ones of their size."""
    numbers = np.frombuffer(weight.memory, f"u{item_size(weight.dtype)}", math.prod(weight.shape), weight.start)
    return numbers.reshape(weight.shape)


def _copies(parts: Mapping[str, _Array], weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Parts in new memory, one after the other."""
    starts = list(accumulate((-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in parts.values()), initial=0))
    memory, found = _new_memory(starts[-1]), {}
    for (name, part), start in zip(parts.items(), starts, strict=False):
        own = np.frombuffer(memory, part.dtype, part.size, start).reshape(part.shape)
        own[...] = part
        strides = tuple(step // own.itemsize for step in own.strides)
        found[name] = Weight(memory, start, weights[name].dtype, own.shape, strides, own.size)
    return found


def _new_memory(size: int) -> mmap.mmap:
    """Memory in large pages, where the system has them: code that reads weights in small ones is a fifth slower."""
    memory = mmap.mmap(-1, max(1, size))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
