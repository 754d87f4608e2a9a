"""Open an artifact for several ranks, with processes that are started here, or that torchrun has started."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from ..artifact import Artifact
from ..artifact.schema import Variant
from ..artifact.stages import rank_count
from ..engines import Engine, Settings
from ..errors import UsageError
from .checks import check_count
from .engine import RankedEngine
from .launcher import Launched, share_of_cores
from .rendezvous import Place, find_place, leave, meet
from .shared_memory import TIME_LIMIT, GroupMemory
from .worker import Rank, reporting

__all__ = ["open_ranks"]


def open_ranks(artifact: Artifact, variant: Variant, settings: Settings) -> Engine:
    """The engine of an artifact for several ranks, all of which are up when this returns. A process that torchrun has
    given another rank than 0 does not come back: it does what rank 0 says, and ends with it. Raises UsageError where
    torchrun has started another number of them."""
    if variant.stages:
        _check_device(variant, settings)
    cores = _share_cores(variant)
    if (place := find_place()) is None:
        group = _Children(artifact, variant, settings, cores)
        return RankedEngine(artifact, variant, _own_settings(settings, cores[0]), group)
    check_count(variant, place.ranks, f"torchrun has started {place.ranks} processes")
    if settings.log_dir is not None:
        raise UsageError(
            f"log_dir={settings.log_dir} is for ranks that precast starts, and torchrun has started these, which has "
            f"an option of its own for where they write. Leave it out."
        )
    memory = meet(place)
    own = _own_settings(settings, cores[place.rank])
    if place.rank > 0:
        _serve(memory, place, artifact, variant, own)
    return RankedEngine(artifact, variant, own, _Elsewhere(memory, place))


def _check_device(variant: Variant, settings: Settings) -> None:
    if settings.device != "cpu" or settings.provider:
        given = f"provider={settings.provider!r}" if settings.provider else f"device={settings.device!r}"
        raise UsageError(
            f"{given}: this model is {len(variant.stages)} processes, which pass on what they compute in the memory of "
            f"the CPU, and run there. Leave it out, or export the checkpoint without pipeline_parallel."
        )


def _share_cores(variant: Variant) -> list[list[int]]:
    """The cores of each rank. Ranks that compute at once share them out; stages have all of them, each in its turn."""
    count = rank_count(variant)
    return [share_of_cores(0, 1)] * count if variant.stages else [share_of_cores(rank, count) for rank in range(count)]


def _own_settings(settings: Settings, cores: Sequence[int]) -> Settings:
    return replace(settings, threads=settings.threads or len(cores), shares_cores=True)


class _Children(Launched):
    """Processes that this one has started."""

    def __init__(
        self, artifact: Artifact, variant: Variant, settings: Settings, cores: Sequence[Sequence[int]]
    ) -> None:
        # The directory first, so that a list of processes tells whose they are.
        named = [str(artifact.path), "--variant", variant.name, "--sha256", artifact.contract.digest]
        how = ["--threads", str(settings.threads), "--prepack", str(int(settings.prepack))]
        limit = ["--seconds", str(settings.rank_timeout or TIME_LIMIT)]
        super().__init__(GroupMemory.create(rank_count(variant)), [*named, *how, *limit], cores, settings.log_dir)
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
        Rank(memory, place.rank, artifact, variant, settings, lambda: os.getppid() == launcher).serve()
    sys.exit(0)
