"""Files of weights, tensor by tensor as they lie there: divided between ranks, and put together again.

They are safetensors files as `precast.exporter` writes them; see `precast.runtime.engines.safetensors_map`. Elements
are moved, never converted, so that what is divided and put together has the bytes that it had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from . import strict_json
from .ranks import part_bounds, split_of
from .schema import Ranks, Split

__all__ = ["ALIGNMENT", "VIEWS", "WEIGHTS", "WeightFile", "divide_weights", "join_weights", "rank_file", "take_part"]

WEIGHTS = "model.safetensors"
VIEWS = "precast.views"
ALIGNMENT = 64
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "C64": 8}
_Array = np.ndarray[Any, Any]


def rank_file(rank: int) -> str:
    """The path of the weights that one rank alone has, in an artifact's folder."""
    return f"rank_{rank}/{WEIGHTS}"


@dataclass
class WeightFile:
    """The tensors of one file: of each its dtype as the file names it, and its elements as plain numbers of that size;
    further names stand for others, all or a part of them."""

    dtypes: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, _Array] = field(default_factory=dict)
    views: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> WeightFile:
        """Map a file; nothing is read yet. Raises FormatError where it is none of ours."""
        data = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = strict_json.loads(data[8 : 8 + length].tobytes(), str(path))
        views = strict_json.loads(header.pop("__metadata__", {}).get(VIEWS, "{}").encode(), str(path))
        found = cls(views=views)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            if entry["dtype"] not in _SIZES or end > len(data):
                raise FormatError(f"{path} is not a file of weights as precast writes it: see {name[:80]!r}.")
            found.dtypes[name] = entry["dtype"]
            numbers = data[begin:end].view(f"u{_SIZES[entry['dtype']]}")
            found.tensors[name] = numbers.reshape(entry["shape"])
        return found

    def write(self, path: Path) -> None:
        """Write a file as the exporter does: what fills whole cache lines first, so that each tensor of these begins
        one; the same tensors give the same bytes."""
        names = sorted(self.tensors, key=self._order)
        header: dict[str, Any] = {}
        offset = 0
        for name in names:
            end = offset + self.tensors[name].nbytes
            shape = list(self.tensors[name].shape)
            header[name] = {"dtype": self.dtypes[name], "shape": shape, "data_offsets": [offset, end]}
            offset = end
        if self.views:
            header["__metadata__"] = {VIEWS: json.dumps(self.views, sort_keys=True, separators=(",", ":"))}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(np.ascontiguousarray(self.tensors[name]).data)

    def select(self, names: Sequence[str]) -> WeightFile:
        """The tensors of these names, and the views of them."""
        chosen = set(names)
        return WeightFile(
            {name: self.dtypes[name] for name in names},
            {name: self.tensors[name] for name in names},
            {name: view for name, view in self.views.items() if view["of"] in chosen},
        )

    def _order(self, name: str) -> tuple[Any, ...]:
        tensor = self.tensors[name]
        is_whole = tensor.nbytes % ALIGNMENT == 0
        return not is_whole, 0 if is_whole else -tensor.itemsize, name


def take_part(tensor: _Array, split: Split, rank: int, ranks: int) -> _Array:
    """A rank's part of a tensor: a view where it is in one piece."""
    before = (slice(None),) * split.dim
    bounds = part_bounds(tensor.shape[split.dim], split, rank, ranks)
    pieces = [tensor[(*before, slice(begin, end))] for begin, end in bounds]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, split.dim)


def divide_weights(whole: WeightFile, ranks: Ranks) -> tuple[WeightFile, list[WeightFile]]:
    """What all ranks share, and what each has for itself. Raises FormatError where something cannot be divided."""
    own = [name for name in whole.tensors if split_of(ranks, name) is not None]
    shared = whole.select([name for name in whole.tensors if name not in set(own)])
    return shared, [_part_of(whole.select(own), rank, ranks) for rank in range(ranks.count)]


def _part_of(whole: WeightFile, rank: int, ranks: Ranks) -> WeightFile:
    def divided(name: str, shape: Sequence[int]) -> list[int]:
        split = _split(ranks, name)
        return [size // (ranks.count // split.copies) if dim == split.dim else size for dim, size in enumerate(shape)]

    tensors = {
        name: take_part(tensor, _split(ranks, name), rank, ranks.count) for name, tensor in whole.tensors.items()
    }
    return WeightFile(whole.dtypes, tensors, _resize_views(whole.views, ranks, divided))


def join_weights(shared: WeightFile, own: Sequence[WeightFile], ranks: Ranks) -> WeightFile:
    """The whole weights of all ranks. Raises FormatError where files of ranks do not fit each other."""

    def whole(name: str, shape: Sequence[int]) -> list[int]:
        split = _split(ranks, name)
        return [size * (ranks.count // split.copies) if dim == split.dim else size for dim, size in enumerate(shape)]

    first, *others = own
    for rank, other in enumerate(others, 1):
        if other.tensors.keys() != first.tensors.keys() or other.dtypes != first.dtypes:
            raise FormatError(f"The weights of rank {rank} are others than those of rank 0: they do not fit together.")
    joined = {name: _join(name, [each.tensors[name] for each in own], _split(ranks, name)) for name in first.tensors}
    views = _resize_views(first.views, ranks, whole)
    return WeightFile({**shared.dtypes, **first.dtypes}, {**shared.tensors, **joined}, {**shared.views, **views})


def _join(name: str, parts: Sequence[_Array], split: Split) -> _Array:
    for rank, part in enumerate(parts):
        first = parts[rank - rank % split.copies]
        if part.shape != parts[0].shape or (part is not first and not np.array_equal(part, first)):
            raise FormatError(f"{name} of rank {rank} does not fit that of the ranks before it.")
    different = [np.split(part, split.blocks, split.dim) for part in parts[:: split.copies]]
    return np.concatenate([part[block] for block in range(split.blocks) for part in different], split.dim)


def _split(ranks: Ranks, name: str) -> Split:
    split = split_of(ranks, name)
    if split is None:
        raise FormatError(f"{name} is a rank's own, and config.json does not say how it is divided.")
    return split


def _resize_views(
    views: Mapping[str, dict[str, Any]], ranks: Ranks, resize: Callable[[str, Sequence[int]], list[int]]
) -> dict[str, dict[str, Any]]:
    """Views of tensors whose rows are divided. Raises FormatError for others."""
    found = {}
    for name, view in views.items():
        if view["offset"] or _split(ranks, name).dim or _split(ranks, view["of"]).dim:
            raise FormatError(f"{name} is a view of {view['of']} that cannot be divided between ranks.")
        found[name] = {**view, "shape": resize(name, view["shape"])}
    return found
