"""What is asked of ranks, beside what an artifact is compiled for."""

from __future__ import annotations

from ..artifact import Artifact
from ..artifact.backends import get_backend
from ..artifact.schema import Ranks, Variant
from ..artifact.stages import rank_count
from ..engines import Settings
from ..errors import UsageError
from ..terminal import quoted

__all__ = ["check_asked", "check_count", "check_stored"]


def check_asked(variant: Variant, nproc: int | None, settings: Settings) -> None:
    """Raise UsageError for another number of processes than a variant was compiled for, and for what is said of
    processes where it has none beside this one."""
    are_cores = variant.ranks is not None and get_backend(variant.backend).runs_ranks
    asked = {"rank_timeout": settings.rank_timeout, "log_dir": settings.log_dir, "nproc": nproc if are_cores else None}
    given = [f"{name}={value}" for name, value in asked.items() if value is not None]
    if given and rank_count(variant) == 1:
        raise UsageError(
            f"{given[0]} is for models of several ranks, and the variant {variant.name} is compiled for one, which "
            f"runs in this process alone. Leave it out."
        )
    if given and are_cores:
        raise UsageError(
            f"{given[0]} is for ranks that are processes, and those of the variant {variant.name} are NeuronCores, "
            f"which this process runs. Leave it out."
        )
    if nproc is not None:
        check_count(variant, nproc, f"nproc={nproc} processes are asked for")


def check_count(variant: Variant, count: int, given: str) -> None:
    """Raise UsageError where the ranks of an artifact are another number than is given."""
    compiled = rank_count(variant)
    if compiled != count:
        command = f"precast export … --tensor-parallel {quoted(count)}"
        if variant.stages:
            command = f"precast export … --pipeline-parallel {quoted(count)}"
        raise UsageError(
            f"{given}, and this artifact is compiled for {compiled}: give {compiled}, or export the checkpoint for "
            f"{count} ({command})."
        )


def check_stored(artifact: Artifact, ranks: Ranks) -> None:
    """Raise UsageError where weights lie in other parts than those of the ranks, and not whole."""
    if ranks.stored not in (1, ranks.count):
        raise UsageError(
            f"{artifact.path} is compiled for {ranks.count} ranks, and its weights lie in {ranks.stored} parts: "
            f"precast split {quoted(artifact.path)} --ranks {ranks.count} -o OUT makes parts that fit."
        )
