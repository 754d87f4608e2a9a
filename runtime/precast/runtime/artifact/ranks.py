"""How weights are divided between ranks."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from msgspec.structs import replace

from .backends import BACKENDS
from .schema import Ranks, Split, Variant

__all__ = ["OWN_NUMBER", "part_bounds", "pattern_of", "ranks_problem", "split_of", "storage_rule", "weights_of"]

OWN_NUMBER = "rank"
"""The name of a weight, int32 [1], that is the number of the rank that has it; of all ranks int32 [ranks]."""


def part_bounds(size: int, split: Split, rank: int, ranks: int) -> list[tuple[int, int]]:
    """Where a rank's part begins and ends along the dimension of `split`, which has `size` numbers: in each block."""
    parts = ranks // split.copies
    block, piece = size // split.blocks, size // split.blocks // parts
    begin = rank // split.copies * piece
    return [(i * block + begin, i * block + begin + piece) for i in range(split.blocks)]


def split_of(ranks: Ranks, name: str) -> Split | None:
    """How the weight of this name is divided, `graph:name` where only one graph has it so; None where every rank has
    all of it."""
    return ranks.splits.get(pattern_of(name.rpartition(":")[2]))


def ranks_problem(variant: Variant) -> str | None:
    """What is wrong with how a variant's weights are divided, as the end of a sentence."""
    ranks = variant.ranks
    if ranks is None:
        return None
    row = BACKENDS.get(variant.backend)
    if not variant.abi and row is not None and not row.runs_ranks:
        return "has ranks, and libraries that do not stand alone"
    for name, split in ranks.splits.items():
        if ranks.count % split.copies:
            return f"gives each part of {name} to {split.copies} ranks, of {ranks.count}"
    own = sorted(folder for folder in map(_folder_of, variant.weights) if folder.startswith("rank_"))
    expected = [f"rank_{rank}" for rank in range(ranks.stored)] if ranks.stored > 1 else []
    if own != sorted(expected):
        return f"has weights of {', '.join(own[:8]) or 'no rank'}, stored in {ranks.stored} parts"
    return None


def weights_of(variant: Variant, rank: int) -> list[str]:
    """The files of weights that a rank reads: those that all share, and its own."""
    if variant.ranks is None:
        return list(variant.weights)
    folders = {name: _folder_of(name) for name in variant.weights}
    return [name for name, folder in folders.items() if not folder.startswith("rank_") or folder == f"rank_{rank}"]


def _folder_of(name: str) -> str:
    return PurePosixPath(name).parent.name


def storage_rule(ranks: Ranks) -> Ranks:
    """How weights lie in their files: as the ranks have them, or in another number of equal parts."""
    if ranks.stored in (1, ranks.count):
        return ranks
    splits = {name: Split(dim=each.dim, blocks=each.blocks) for name, each in ranks.splits.items()}
    return replace(ranks, count=ranks.stored, splits=splits)


def pattern_of(name: str) -> str:
    """A name with `*` in the place of its numbers: `layers.*.weight`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
