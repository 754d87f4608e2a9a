"""Compile a program that several ranks run: once, with each rank's weights beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from precast.runtime.artifact.backends import get_backend
from precast.runtime.artifact.ranks import OWN_NUMBER, pattern_of, split_of
from precast.runtime.artifact.schema import Ranks, Split
from precast.runtime.artifact.weight_files import WEIGHTS, WeightFile, divide_weights, join_weights, rank_file
from precast.runtime.errors import ExportError

from ..kinds.trace import Program
from ..options import ExportOptions
from ..parallel.division import Division
from . import Compiled, ProgramCompiler, WritesWeights

__all__ = ["compile_ranks"]

TRACED = "model."
"""What comes before a model's names in those of its traced program."""


def compile_ranks(
    compiler: ProgramCompiler, programs: Sequence[Iterable[Program]], division: Division, stage: Path,
    options: ExportOptions,
) -> Compiled:  # fmt: skip
    """Compile the programs of the first rank, which are those of all, and write the weights of each. Raises ExportError
    where the ranks' programs differ."""
    if not isinstance(compiler, WritesWeights):
        raise ExportError(f"backend={options.backend!r} does not keep weights beside what it compiles for ranks.")
    first, *others = programs
    compiled = compiler.compile(first, stage, options)
    stands_alone = bool(compiled.abi) or get_backend(options.backend).runs_ranks
    if compiled.weights != [WEIGHTS] or not stands_alone:
        raise ExportError(
            f"tensor_parallel={division.ranks} needs native code that stands alone, with its weights in a file, and "
            f"this model's calls what only PyTorch has: {', '.join(compiled.requires_torch) or 'packed weights'}."
        )
    (stage / rank_file(0)).parent.mkdir()
    (stage / WEIGHTS).rename(stage / rank_file(0))
    for rank, each in enumerate(others, 1):
        folder = (stage / rank_file(rank)).parent
        folder.mkdir()
        if compiler.write_weights(each, folder, compiled, options).program != compiled.program:
            raise ExportError(f"The program of rank {rank} is another one than that of rank 0, as it must not be.")
    ranks = _describe(division, options, stage)
    return replace(compiled, weights=_arrange(stage, ranks), ranks=ranks)


def _describe(division: Division, options: ExportOptions, stage: Path) -> Ranks:
    splits: dict[str, Split] = {pattern_of(f"{TRACED}{name}"): split for name, split in division.splits.items()}
    if OWN_NUMBER in WeightFile.read(stage / rank_file(0)).tensors:
        splits[OWN_NUMBER] = Split(dim=0)
    return Ranks(
        count=division.ranks,
        splits=splits,
        degrees=division.degrees.fewer(),
        stored=1 if options.online_split else division.ranks,
    )


def _arrange(stage: Path, ranks: Ranks) -> list[str]:
    """Store what all ranks share once, or everything in one file; returns the files."""
    files = [stage / rank_file(rank) for rank in range(ranks.count)]
    held = [WeightFile.read(file) for file in files]
    for rank, each in enumerate(held):
        if OWN_NUMBER in each.tensors:
            each.tensors[OWN_NUMBER] = np.array([rank], np.uint32)
    own = [[name for name in each.tensors if split_of(ranks, name)] for each in held]
    shared = held[0].select([name for name in held[0].tensors if name not in set(own[0])])
    whole = join_weights(shared, [each.select(names) for each, names in zip(held, own, strict=True)], ranks)
    if ranks.stored == 1:
        whole.write(stage / WEIGHTS)
        for file in files:
            shutil.rmtree(file.parent)
        return [WEIGHTS]
    common, parts = divide_weights(whole, ranks)
    common.write(stage / WEIGHTS)
    for file, part in zip(files, parts, strict=True):
        staged = file.with_suffix(".new")
        part.write(staged)
        staged.replace(file)
    return [WEIGHTS, *(rank_file(rank) for rank in range(ranks.count))]
