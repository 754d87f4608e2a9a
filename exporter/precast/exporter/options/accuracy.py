"""How close to the eager model the artifact must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .declaration import OptionsPart

__all__ = ["AccuracyOptions"]


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions(OptionsPart):
    """The bounds that validation holds an artifact to.

    Attributes:
        atol: the allowed difference from the reference, relative to max(1, max|reference|).
        validate: compare with the eager model before publishing.
        max_kl: the largest mean KL divergence from the eager fp32 model, in nats per token of held-out text.
        min_agreement: the smallest share of tokens for which the likeliest is the same; of encoders, of equal labels.
        min_cosine: for encoders that are quantized: the smallest mean cosine of an output with the eager model's.
        accept_loss: write the artifact even if it is below these floors, and record that.
    """

    atol: float = 1e-4
    validate: bool = True
    max_kl: float | None = None
    min_agreement: float | None = None
    min_cosine: float | None = None
    accept_loss: bool = False

    def problems(self) -> Iterator[str]:
        """See OptionsPart."""
        if self.max_kl is not None and not self.max_kl > 0:
            yield f"max_kl must be above 0, not {self.max_kl}."
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            yield f"min_agreement must lie between 0 and 1, not {self.min_agreement}."
        if self.min_cosine is not None and not -1 <= self.min_cosine <= 1:
            yield f"min_cosine must lie between -1 and 1, not {self.min_cosine}."
        if not self.atol > 0:
            yield f"atol= must be above 0, not {self.atol}."
