"""A stage of a pipeline: some of a model's layers, which take what the stages before have made.

What passes between stages lies in memory that all of them share, where each stage's engine writes its outputs, the next
one's reads its inputs, and rank 0 finds the logits: nothing is copied on the way. Stages take turns within a step.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..artifact import DECODER_INPUTS, Artifact
from ..artifact.schema import Graph, Output, Variant
from ..engines import Arrays, Settings, Step, open_engine
from ..inputs.tensors import storage_dtype
from .shared_memory import TIME_LIMIT, GroupMemory

__all__ = ["StageEngine"]

_ALIGNMENT = 64
_BEAT = 0.2
"""Seconds between two signs of life of a stage, which may take long over a prompt."""

_Array = np.ndarray[Any, Any]


class StageEngine:
    """The stage of one rank, run by the engine of its backend."""

    def __init__(
        self, artifact: Artifact, variant: Variant, rank: int, settings: Settings, memory: GroupMemory
    ) -> None:
        own = variant.stages[rank]
        self.graphs: Mapping[str, Graph] = {graph.name: graph for graph in own.graphs}
        self._memory, self._rank, self._seconds = memory, rank, settings.rank_timeout or TIME_LIMIT
        self._passed = {graph.name: _list_passed(graph, variant) for graph in variant.graphs}
        alone = replace(variant, graphs=own.graphs, weights=own.weights, stages=[])
        self._engine = open_engine(artifact, alone, settings)
        _show_life(self, memory, rank)

    def bind(self, graph: str, inputs: Arrays, outputs: Arrays) -> Step:
        """See Part."""
        part, passed = self.graphs[graph], self._find_passed(graph, inputs)
        step = self._engine.bind(
            graph,
            {spec.name: passed[spec.name] if spec.name in passed else inputs[spec.name] for spec in part.inputs},
            {spec.name: passed[spec.name] if spec.name in passed else outputs[spec.name] for spec in part.outputs},
        )
        if self._rank > 0:
            return _Turn(self._memory, self._rank, self._seconds, step)
        results = {name: outputs[name] for name in passed.keys() & outputs.keys()}
        return _Round(self._memory, self._seconds, step, [(array, passed[name]) for name, array in results.items()])

    def _find_passed(self, graph: str, inputs: Arrays) -> dict[str, _Array]:
        """What passes between stages in a step of this size, and the logits: the same place on every rank."""
        tokens, _, _, positions = (inputs[name].shape for name in DECODER_INPUTS)
        free = {"length": tokens[1], "positions": positions[1]}
        shapes = {
            spec.name: [
                size if isinstance(size, int) else free[str(axis)]
                for size, axis in zip(spec.shape, spec.slice, strict=True)
            ]
            for spec in self._passed[graph]
        }
        dtypes = {spec.name: np.dtype(storage_dtype(spec.dtype)) for spec in self._passed[graph]}
        sizes = [-(-prod(shape) * dtypes[name].itemsize // _ALIGNMENT) * _ALIGNMENT for name, shape in shapes.items()]
        *starts, end = accumulate(sizes, initial=0)
        memory = self._memory.map_shared(end, is_first=self._rank == 0)
        return {
            name: np.frombuffer(memory, dtypes[name], prod(shape), start).reshape(shape)
            for (name, shape), start in zip(shapes.items(), starts, strict=True)
        }


def _list_passed(whole: Graph, variant: Variant) -> list[Output]:
    """What the stages of a graph make, but for caches."""
    caches = {name for layer in whole.cache for name in (layer.key_out, layer.value_out)}
    parts = [part for stage in variant.stages for part in stage.graphs if part.name == whole.name]
    return [spec for part in parts for spec in part.outputs if spec.name not in caches]


class _Turn:
    """A stage's part of a step, after the stage before it."""

    def __init__(self, memory: GroupMemory, rank: int, seconds: float, step: Step) -> None:
        self._memory, self._rank, self._seconds, self._step = memory, rank, seconds, step

    def __call__(self) -> None:
        self._memory.wait_for_turn(self._rank, self._seconds)
        self._step()
        self._memory.pass_turn(self._rank)


class _Round:
    """A whole step, as rank 0 has it: its own stage first, then the others, and what the last has made."""

    def __init__(self, memory: GroupMemory, seconds: float, step: Step, results: list[tuple[_Array, _Array]]) -> None:
        self._memory, self._seconds, self._step, self._results = memory, seconds, step, results

    def __call__(self) -> None:
        self._step()
        self._memory.pass_turn(0)
        self._memory.wait_for_last(self._seconds)
        for own, shared in self._results:
            np.copyto(own, shared)


def _show_life(engine: StageEngine, memory: GroupMemory, rank: int) -> None:
    """Let others see that this process runs, for as long as its engine is there."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT):
            memory.beat(rank)

    threading.Thread(target=beat, daemon=True, name="precast-stage").start()
    weakref.finalize(engine, ended.set)
