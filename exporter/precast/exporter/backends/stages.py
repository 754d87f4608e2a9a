"""Compile a program that is cut into stages: each stage by itself, with its files in a folder of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from msgspec.structs import replace as changed

from precast.runtime.artifact import is_cache_positions
from precast.runtime.artifact.schema import Graph, Stage
from precast.runtime.artifact.stages import stage_folder

from ..kinds.trace import Program
from ..options import ExportOptions
from ..progress import progress
from . import Compiled, ProgramCompiler

__all__ = ["compile_stages"]


def compile_stages(
    compiler: ProgramCompiler, graphs: Sequence[Graph], stages: Sequence[Sequence[Program]], folder: Path,
    options: ExportOptions,
) -> Compiled:  # fmt: skip
    """Compile the programs of each stage into files below `folder`. `graphs` describe the whole of each program, whose
    file is that of its first stage."""
    found: list[Compiled] = []
    for number, programs in enumerate(stages):
        progress(number, len(stages), f"stage {number + 1} of {len(stages)}")
        own = folder / stage_folder(number)
        own.mkdir()
        found.append(_place(compiler.compile(programs, own, options), number))
    whole = [_gather(graph, [each.graphs[index] for each in found]) for index, graph in enumerate(graphs)]
    return replace(
        found[0],
        graphs=whole,
        weights=[name for each in found for name in each.weights],
        program=hashlib.sha256("".join(str(each.program) for each in found).encode()).hexdigest(),
        stages=[Stage(graphs=each.graphs, weights=each.weights) for each in found],
    )


def _gather(whole: Graph, parts: Sequence[Graph]) -> Graph:
    """The description of a whole program, with what the backend has changed in its parts."""
    inputs = {spec.name: spec for part in parts for spec in part.inputs}
    outputs = {spec.name: spec for part in parts for spec in part.outputs}
    names = [spec.name for spec in whole.inputs]
    added = [spec for spec in inputs.values() if is_cache_positions(spec)]
    return changed(
        whole,
        file=parts[0].file,
        inputs=[*(inputs[name] for name in names), *added],
        outputs=[outputs[spec.name] for spec in whole.outputs],
    )


def _place(compiled: Compiled, stage: int) -> Compiled:
    """Name files from the artifact's folder."""
    folder = stage_folder(stage)
    return replace(
        compiled,
        graphs=[changed(graph, file=f"{folder}/{graph.file}") for graph in compiled.graphs],
        weights=[f"{folder}/{name}" for name in compiled.weights],
    )
