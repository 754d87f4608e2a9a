"""What the steps of a generation took."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

__all__ = ["Timing"]


@dataclass
class Timing:
    """Seconds of every step, in their order: the first of each batch is its prefill.

    Attributes:
        prefill: of each batch.
        decode: of all decode steps.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def add(self, seconds: float, *, is_prefill: bool) -> None:
        """Keep what a step took."""
        (self.prefill if is_prefill else self.decode).append(seconds)

    @property
    def average_step(self) -> float | None:
        """Seconds of a decode step on average, without outliers: those above Q3 + 1.5·IQR. None without a step."""
        kept = self.usual_steps
        return statistics.fmean(kept) if kept else None

    @property
    def usual_steps(self) -> list[float]:
        """Seconds of the decode steps that are no outliers."""
        if len(self.decode) < 2:
            return list(self.decode)
        low, _, high = statistics.quantiles(self.decode, n=4, method="inclusive")
        return [each for each in self.decode if each <= high + 1.5 * (high - low)]
