"""A rank beside rank 0: `python -m precast.runtime.distributed.worker ARTIFACT --rank N …`.

It opens the artifact as rank 0 does, and then does what that says until it is gone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import Artifact, read_artifact
from ..artifact.integrity import require_trust
from ..artifact.schema import Graph, Input, Output, Variant
from ..artifact.stages import rank_count
from ..engines import Settings, Step, move_rows
from ..errors import UsageError
from ..inputs.tensors import allocate
from .launcher import die_with_parent
from .part import caches_of, open_part
from .shared_memory import GroupMemory, StoppedError

__all__ = ["Rank", "main", "reporting"]

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
        if variant is None or rank_count(variant) != given.ranks:
            raise UsageError(f"{artifact.path} has no variant {given.variant!r} for {given.ranks} ranks.")
        threads = given.threads or len(given.cores.split(","))
        settings = Settings(threads, bool(given.prepack), shares_cores=True, rank_timeout=given.seconds)
        Rank(memory, given.rank, artifact, variant, settings, lambda: os.getppid() == given.parent).serve()
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
    words, counts = ("variant", "sha256", "cores"), ("rank", "ranks", "descriptor", "parent", "threads", "prepack")
    kinds = {**dict.fromkeys(words, str), **dict.fromkeys(counts, int), "seconds": float}
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", type=kind)
    return parser.parse_args(arguments)


class Rank:
    """The model of this rank, and what rank 0 has bound and cached in it."""

    def __init__(
        self, memory: GroupMemory, rank: int, artifact: Artifact, variant: Variant, settings: Settings,
        is_wanted: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._memory, self._rank, self._is_wanted = memory, rank, is_wanted
        self._graphs = {graph.name: graph for graph in variant.graphs}
        self._digest = artifact.contract.digest
        self._part = open_part(artifact, variant, rank, settings, memory)
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
        """Say by taking it that this rank is there. Raises UsageError where it has opened another model."""
        if content["digest"] != self._digest:
            raise UsageError(
                f"rank 0 has opened an artifact with the digest {content['digest']}, and this rank one "
                f"with {self._digest}. Start all with the same"
            )

    def on_wait(self, content: dict[str, Any], data: memoryview) -> None:
        """Say by taking it that what came before is done."""

    def on_bind(self, content: dict[str, Any], data: memoryview) -> None:
        """Bind a graph to arrays of this rank, which has caches of its own: of its heads, or of its layers."""
        graph: Graph = self._graphs[content["graph"]]
        specs: list[Input | Output] = [*graph.inputs, *graph.outputs]
        dtypes = {spec.name: spec.dtype for spec in specs}
        shapes = {spec.name: [size for size in spec.shape if isinstance(size, int)] for spec in graph.inputs}
        given = {name: allocate(shape, dtypes[name]) for name, shape in content["inputs"].items()}
        own, every = caches_of(self._part.graphs[graph.name]), caches_of(graph)
        caches = {
            name: self._caches.setdefault(number, allocate(shapes[name], dtypes[name]))
            for name, number in content["caches"].items()
            if name in own.values()
        }
        outputs = {name: allocate(shape, dtypes[name]) for name, shape in content["outputs"].items()
                   if name not in every}  # fmt: skip
        outputs |= {after: caches[before] for after, before in own.items()}
        step = self._part.bind(graph.name, {**given, **caches}, outputs)
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


if __name__ == "__main__":
    sys.exit(main())
