"""The engine of an artifact for several ranks: rank 0 runs here, and has the others do the same.

It is used as one that keeps caches in memory of its own: each rank has those of its heads, or of its layers. Tokens are
chosen here alone, so that whatever chooses them, the ranks agree.
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..artifact import Artifact
from ..artifact.schema import Variant
from ..artifact.stages import rank_count
from ..engines import Arrays, Settings, Step, move_rows
from ..engines.fork import ForkGuard
from ..errors import ArtifactError, HostError, PrecastWarning
from ..hosts.machine import usable_cores
from .group import Group
from .part import caches_of, open_part
from .shared_memory import TIME_LIMIT, StoppedError

__all__ = ["RankedEngine"]

OPENING = 300.0
"""Seconds for all ranks to open the artifact."""

_Array = np.ndarray[Any, Any]


class RankedEngine:
    """Rank 0 of the ranks that an artifact is compiled for; the others are processes of the `group`."""

    def __init__(self, artifact: Artifact, variant: Variant, settings: Settings, group: Group) -> None:
        count = rank_count(variant)
        self._graphs = {graph.name: graph for graph in variant.graphs}
        self._process, self._lock = ForkGuard(f"the {count} ranks that run this model"), threading.RLock()
        self._numbers, self._caches = itertools.count(), _Known()
        if variant.ranks:
            _warn_of_few_cores(count)
        self._memory, self._group, self._limit = group.memory, group, settings.rank_timeout or TIME_LIMIT
        self._own = open_part(artifact, variant, 0, settings, self._memory)
        self._send("open", {"digest": artifact.contract.digest}, OPENING)
        # Whoever takes this has done what came before.
        self._send("wait", {}, OPENING)
        group.formed()

    def bind(self, graph: str, inputs: Arrays, outputs: Arrays) -> Step:
        """See Engine."""
        spec = self._graphs[graph]
        caches, own = set(caches_of(spec).values()), set(caches_of(self._own.graphs[graph]).values())
        with self._lock:
            number = next(self._numbers)
            step = self._own.bind(graph, inputs, outputs)
            given = [each.name for each in spec.inputs if each.name not in caches]
            self._send("bind", {
                "number": number,
                "graph": graph,
                "caches": {name: self._caches.number(inputs[name], is_own=name in own) for name in caches},
                "inputs": {name: list(inputs[name].shape) for name in given},
                "outputs": {each.name: list(outputs[each.name].shape) for each in spec.outputs},
            })  # fmt: skip
        return _RankedStep(self, number, tuple(inputs[name] for name in given), step)

    def move_rows(self, caches: Arrays, to: Sequence[int], parents: Sequence[int], live: int) -> None:
        """See OwnsCaches."""
        with self._lock:
            # Those of other ranks' layers are not touched, and so take no memory here.
            move_rows({name: each for name, each in caches.items() if self._caches.is_own(each)}, to, parents, live)
            known = [self._caches.number(cache) for cache in caches.values()]
            self._send("move", {"caches": known, "to": list(to), "parents": list(parents), "live": live})

    def run(self, number: int, given: tuple[_Array, ...], step: Step) -> None:
        """Run a binding on all ranks at once."""
        with self._lock:
            try:
                self._send("run", {"number": number}, arrays=given)
                step()
            except HostError:
                raise
            except (ArtifactError, StoppedError) as error:
                raise self._explain(error) from error
            except BaseException:
                # Others may be in the step, and would wait for this one.
                self._memory.stop(0, "it was interrupted in a step")
                raise

    def forget(self, number: int) -> None:
        """Let go of a binding that nobody has any more."""
        self._caches.unbound.append(number)

    def _send(
        self, kind: str, content: Mapping[str, Any], seconds: float | None = None, arrays: tuple[_Array, ...] = ()
    ) -> None:
        self._process.check()
        limit = self._limit if seconds is None else seconds
        try:
            if self._caches.freed or self._caches.unbound:
                self._memory.send("free", self._caches.take_freed(), (), limit)
            self._memory.send(kind, content, arrays, limit)
        except StoppedError as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> ArtifactError:
        """What went wrong, in the words of the rank where it did."""
        if found := self._memory.stopped_by():
            rank, reason = found
            return HostError(f"Rank {rank} of {self._memory.ranks} has failed: {reason}. Open the model again.")
        self._memory.stop(0, str(error))
        return HostError(
            f"The ranks of this model have lost each other: {error}. rank_timeout= lets them wait longer, where this "
            f"machine has other work, say. {self._group.advice}"
        )


class _RankedStep:
    """A graph bound on every rank."""

    def __init__(self, engine: RankedEngine, number: int, given: tuple[_Array, ...], step: Step) -> None:
        self._run, self._number, self._given, self._step = engine.run, number, given, step
        weakref.finalize(self, engine.forget, number).atexit = False

    def __call__(self) -> None:
        self._run(self._number, self._given, self._step)


class _Known:
    """The caches that ranks have, each with a number, for as long as its array is there; those that this rank has are
    its own."""

    def __init__(self) -> None:
        self.freed: list[int] = []
        self.unbound: list[int] = []
        self._numbers: dict[int, int] = {}
        self._own: set[int] = set()
        self._next = itertools.count()

    def number(self, array: _Array, *, is_own: bool = False) -> int:
        """The number of an array, a new one for one that is new."""
        at = array.ctypes.data
        if at not in self._numbers:
            self._own |= {at} if is_own else set()
            self._numbers[at] = next(self._next)
            weakref.finalize(array, self._free, at).atexit = False
        return self._numbers[at]

    def is_own(self, array: _Array) -> bool:
        """Whether this rank has the cache."""
        return array.ctypes.data in self._own

    def take_freed(self) -> dict[str, list[int]]:
        """What others may let go of, told once."""
        caches, self.freed = self.freed, []
        bindings, self.unbound = self.unbound, []
        return {"caches": caches, "bindings": bindings}

    def _free(self, at: int) -> None:
        self._own.discard(at)
        self.freed.append(self._numbers.pop(at))


def _warn_of_few_cores(ranks: int) -> None:
    if ranks > (cores := usable_cores()):
        warnings.warn(
            f"This model runs as {ranks} processes at once, and this one may use {cores} cores: they will wait for "
            f"each other.",
            PrecastWarning,
            stacklevel=2,
        )
