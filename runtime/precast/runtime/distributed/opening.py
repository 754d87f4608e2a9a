"""Open an artifact for several ranks, with processes that are started here, or that torchrun has started."""

from __future__ import annotations

import os
import sys
import weakref
from typing import NoReturn

from ..artifact import Artifact
from ..artifact.schema import Ranks, Variant
from ..engines import Engine, Settings
from ..errors import UsageError
from ..terminal import quoted
from .count import check_count
from .engine import RankedEngine
from .launcher import Launched, share_of_cores
from .rendezvous import Place, find_place, leave, meet
from .shared_memory import GroupMemory
from .worker import Rank, reporting

__all__ = ["open_ranks"]


def open_ranks(artifact: Artifact, variant: Variant, settings: Settings) -> Engine:
    """The engine of an artifact for several ranks, all of which are up when this returns. A process that torchrun has
    given another rank than 0 does not come back: it does what rank 0 says, and ends with it. Raises UsageError where
    torchrun has started another number of them."""
    assert variant.ranks, "an artifact for several ranks"
    _check_stored(artifact, variant.ranks)
    if (place := find_place()) is None:
        return RankedEngine(artifact, variant, settings, _Children(artifact, variant, settings))
    check_count(variant.ranks, place.ranks, f"torchrun has started {place.ranks} processes")
    memory = meet(place)
    if place.rank > 0:
        _serve(memory, place, artifact, variant, settings)
    return RankedEngine(artifact, variant, settings, _Elsewhere(memory, place))


def _check_stored(artifact: Artifact, ranks: Ranks) -> None:
    if ranks.stored not in (1, ranks.count):
        raise UsageError(
            f"{artifact.path} is compiled for {ranks.count} ranks, and its weights lie in {ranks.stored} parts: "
            f"precast split {quoted(artifact.path)} --ranks {ranks.count} -o OUT makes parts that fit."
        )


class _Children(Launched):
    """Processes that this one has started."""

    def __init__(self, artifact: Artifact, variant: Variant, settings: Settings) -> None:
        assert variant.ranks, "an artifact for several ranks"
        # The directory first, so that a list of processes tells whose they are.
        named = [str(artifact.path), "--variant", variant.name, "--sha256", artifact.contract.digest]
        super().__init__(GroupMemory.create(variant.ranks.count), [*named, "--threads", str(settings.threads)])
        self.advice = f"Their logs: {self.logs}"

    def formed(self) -> None:
        """See Group."""


class _Elsewhere:
    """Processes that torchrun has started beside this one."""

    def __init__(self, memory: GroupMemory, place: Place) -> None:
        self.memory, self._place = memory, place
        self.advice = "See what they have written."
        self.end = weakref.finalize(self, memory.stop, 0, "it is done")

    def formed(self) -> None:
        """See Group."""
        leave(self._place)


def _serve(memory: GroupMemory, place: Place, artifact: Artifact, variant: Variant, settings: Settings) -> NoReturn:
    launcher = os.getppid()
    with reporting(memory, place.rank):
        threads = settings.threads or len(share_of_cores(place.rank, place.ranks))
        Rank(memory, place.rank, artifact, variant, threads, lambda: os.getppid() == launcher).serve()
    sys.exit(0)
