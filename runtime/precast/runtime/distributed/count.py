"""How many ranks an artifact is for, beside how many are asked for."""

from __future__ import annotations

from ..artifact.schema import Ranks
from ..errors import UsageError
from ..terminal import quoted

__all__ = ["check_count"]


def check_count(ranks: Ranks | None, count: int, given: str) -> None:
    """Raise UsageError where the ranks of an artifact are another number than is given."""
    compiled = ranks.count if ranks else 1
    if compiled != count:
        raise UsageError(
            f"{given}, and this artifact is compiled for {compiled}: give {compiled}, or export the checkpoint for "
            f"{count} (precast export … --tensor-parallel {quoted(count)})."
        )
