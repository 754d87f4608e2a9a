"""A rank beside rank 0: `python -m precast.runtime.distributed.worker ARTIFACT --rank N …`.

It opens the artifact as rank 0 does, and then does what that says until it is gone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import Artifact, read_artifact
from ..artifact.integrity import require_trust
from ..artifact.schema import Graph, Input, Output, Variant
from ..engines import Settings, Step, move_rows
from ..engines.aoti import Member, StandaloneEngine
from ..errors import UsageError
from ..inputs.tensors import allocate
from .launcher import die_with_parent
from .shared_memory import GroupMemory, StoppedError

__all__ = ["Limits", "Rank", "main", "reporting"]

_Array = np.ndarray[Any, Any]


def main(arguments: list[str] | None = None) -> int:
    """Be a rank until rank 0 ends; returns the exit code."""
    given = _parse(arguments)
    die_with_parent(given.parent)
    if given.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [int(core) for core in given.cores.split(",")])
    memory = GroupMemory(given.descriptor, given.ranks)
    with reporting(memory, given.rank):
        artifact = read_artifact(given.artifact)
        require_trust(str(artifact.path), artifact.contract.digest, sha256=given.sha256, trust_native_code=False)
        variant = next((each for each in artifact.contract.variants if each.name == given.variant), None)
        if variant is None or variant.ranks is None or variant.ranks.count != given.ranks:
            raise UsageError(f"{artifact.path} has no variant {given.variant!r} for {given.ranks} ranks.")
        threads = given.threads or len(given.cores.split(","))
        limits = Limits(given.seconds, lambda: os.getppid() == given.parent)
        Rank(memory, given.rank, artifact, variant, threads, limits).serve()
    return 0


@contextmanager
def reporting(memory: GroupMemory, rank: int) -> Iterator[None]:
    """Within this block, what this rank cannot do is told to the others, which end, too; what they tell ends it."""
    try:
        yield
    except StoppedError as error:
        sys.stderr.write(f"Rank {rank} ends, since {error}.\n")
    except BaseException as error:
        if found := memory.stopped_by():
            sys.stderr.write(f"Rank {rank} ends, since rank {found[0]} has: {found[1]}.\n")
            return
        memory.stop(rank, f"{type(error).__name__}: {error}")
        raise


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    words, counts = ("variant", "sha256", "cores"), ("rank", "ranks", "descriptor", "parent", "threads")
    kinds = {**dict.fromkeys(words, str), **dict.fromkeys(counts, int), "seconds": float}
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", type=kind)
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Limits:
    """How many seconds a rank waits for another, and whether whoever started it is still there."""

    seconds: float
    is_wanted: Callable[[], bool]


class Rank:
    """The model of this rank, and what rank 0 has bound and cached in it."""

    def __init__(
        self, memory: GroupMemory, rank: int, artifact: Artifact, variant: Variant, threads: int, limits: Limits
    ) -> None:
        self._memory, self._rank, self._is_wanted = memory, rank, limits.is_wanted
        self._graphs = {graph.name: graph for graph in variant.graphs}
        member = Member(memory.address, rank, limits.seconds, memory)
        self._engine = StandaloneEngine(artifact, variant, Settings(threads), member)
        self._caches: dict[int, _Array] = {}
        self._bound: dict[int, tuple[list[_Array], Step]] = {}

    def serve(self) -> None:
        """Do what rank 0 says until it says no more: raises StoppedError."""
        while True:
            with self._memory.receive(self._rank, self._is_wanted) as (kind, content, data):
                step = getattr(self, f"on_{kind}")(content, data)
            # The command is taken: rank 0 may give the next, which the step does not need.
            if step:
                step()

    def on_open(self, content: dict[str, Any], data: memoryview) -> None:
        """Say by taking it that this rank is there."""

    on_wait = on_open

    def on_bind(self, content: dict[str, Any], data: memoryview) -> None:
        """Bind a graph to arrays of this rank, which has caches of its own."""
        graph: Graph = self._graphs[content["graph"]]
        specs: list[Input | Output] = [*graph.inputs, *graph.outputs]
        dtypes = {spec.name: spec.dtype for spec in specs}
        shapes = {spec.name: [size for size in spec.shape if isinstance(size, int)] for spec in graph.inputs}
        given = {name: allocate(shape, dtypes[name]) for name, shape in content["inputs"].items()}
        caches = {
            name: self._caches.setdefault(number, allocate(shapes[name], dtypes[name]))
            for name, number in content["caches"].items()
        }
        outputs = {name: allocate(shape, dtypes[name]) for name, shape in content["outputs"].items()
                   if name not in _present(graph)}  # fmt: skip
        outputs |= {after: caches[before] for after, before in _present(graph).items()}
        step = self._engine.bind(graph.name, {**given, **caches}, outputs)
        self._bound[content["number"]] = list(given.values()), step

    def on_run(self, content: dict[str, Any], data: memoryview) -> Step:
        """Take the inputs of a step, and return the step."""
        given, step = self._bound[content["number"]]
        begin = 0
        for array in given:
            array[...] = np.frombuffer(data, array.dtype, array.size, begin).reshape(array.shape)
            begin += array.nbytes
        return step

    def on_move(self, content: dict[str, Any], data: memoryview) -> None:
        """Copy rows of caches."""
        caches = {str(number): self._caches[number] for number in content["caches"] if number in self._caches}
        move_rows(caches, content["to"], content["parents"], content["live"])

    def on_free(self, content: dict[str, Any], data: memoryview) -> None:
        """Let go of what rank 0 has let go of."""
        for number in content["bindings"]:
            self._bound.pop(number, None)
        for number in content["caches"]:
            self._caches.pop(number, None)


def _present(graph: Graph) -> dict[str, str]:
    """The name in of each cache by its name out."""
    pairs = [
        pair for layer in graph.cache for pair in ((layer.key_out, layer.key_in), (layer.value_out, layer.value_in))
    ]
    return dict(pairs)


if __name__ == "__main__":
    sys.exit(main())
