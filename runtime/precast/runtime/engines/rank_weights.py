"""The parts of whole weights that one rank has, of files that hold all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..artifact.ranks import part_bounds, split_of
from ..artifact.schema import Ranks, Split
from ..artifact.weight_files import take_part
from ..errors import FormatError
from .safetensors_map import Weight, item_size

__all__ = ["own_parts"]


def own_parts(weights: Mapping[str, Weight], ranks: Ranks, rank: int) -> dict[str, Weight]:
    """The weights as a rank has them. Rows are where they lie in the file; columns are copied, as code reads them in
    one piece. Raises FormatError where a weight cannot be divided as config.json says."""
    found = {}
    for name, weight in weights.items():
        split = split_of(ranks, name)
        found[name] = weight if split is None else _own_part(weight, split, ranks, rank)
    return found


def _own_part(weight: Weight, split: Split, ranks: Ranks, rank: int) -> Weight:
    if split.dim >= len(weight.shape) or weight.shape[split.dim] % (split.blocks * (ranks.count // split.copies)):
        raise FormatError(
            f"A weight of {list(weight.shape)} numbers is not divided between {ranks.count} ranks by {split}."
        )
    size = item_size(weight.dtype)
    bounds = part_bounds(weight.shape[split.dim], split, rank, ranks.count)
    if split.dim == 0 and len(bounds) == 1:
        (begin, end), row = bounds[0], math.prod(weight.shape[1:])
        shape = (end - begin, *weight.shape[1:])
        return Weight(
            weight.memory, weight.start + begin * row * size, weight.dtype, shape, weight.strides, (end - begin) * row
        )
    numbers = np.frombuffer(weight.memory, f"u{size}", math.prod(weight.shape), weight.start).reshape(weight.shape)
    part = take_part(numbers, split, rank, ranks.count)
    memory = bytearray(part.nbytes)
    own = np.frombuffer(memory, part.dtype).reshape(part.shape)
    own[...] = part
    strides = tuple(step // own.itemsize for step in own.strides)
    return Weight(memory, 0, weight.dtype, own.shape, strides, own.size)
