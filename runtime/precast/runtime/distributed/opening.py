"""Open an artifact for several ranks, with processes that are started here, or that torchrun has started."""

from __future__ import annotations

import os
import sys
import weakref
from typing import NoReturn

from ..artifact import Artifact
from ..artifact.schema import Variant
from ..engines import Engine, Settings
from ..errors import UsageError
from .checks import check_count
from .engine import RankedEngine
from .launcher import Launched, share_of_cores
from .rendezvous import Place, find_place, leave, meet
from .shared_memory import TIME_LIMIT, GroupMemory
from .worker import Limits, Rank, reporting

__all__ = ["open_ranks"]


def open_ranks(artifact: Artifact, variant: Variant, settings: Settings) -> Engine:
    """The engine of an artifact for several ranks, all of which are up when this returns. A process that torchrun has
    given another rank than 0 does not come back: it does what rank 0 says, and ends with it. Raises UsageError where
    torchrun has started another number of them."""
    assert variant.ranks, "an artifact for several ranks"
    if (place := find_place()) is None:
        return RankedEngine(artifact, variant, settings, _Children(artifact, variant, settings))
    check_count(variant.ranks, place.ranks, f"torchrun has started {place.ranks} processes")
    if settings.log_dir is not None:
        raise UsageError(
            f"log_dir={settings.log_dir} is for ranks that precast starts, and torchrun has started these, which has "
            f"an option of its own for where they write. Leave it out."
        )
    memory = meet(place)
    if place.rank > 0:
        _serve(memory, place, artifact, variant, settings)
    return RankedEngine(artifact, variant, settings, _Elsewhere(memory, place))


class _Children(Launched):
    """Processes that this one has started."""

    def __init__(self, artifact: Artifact, variant: Variant, settings: Settings) -> None:
        assert variant.ranks, "an artifact for several ranks"
        # The directory first, so that a list of processes tells whose they are.
        named = [str(artifact.path), "--variant", variant.name, "--sha256", artifact.contract.digest]
        how = ["--threads", str(settings.threads), "--seconds", str(settings.rank_timeout or TIME_LIMIT)]
        super().__init__(GroupMemory.create(variant.ranks.count), [*named, *how], settings.log_dir)
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
        limits = Limits(settings.rank_timeout or TIME_LIMIT, lambda: os.getppid() == launcher)
        Rank(memory, place.rank, artifact, variant, threads, limits).serve()
    sys.exit(0)
