"""What rounding costs: perplexity, KL divergence and agreement on held-out text, against the eager fp32 model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from precast.runtime.errors import AccuracyError

from ..options import ExportOptions

__all__ = ["CAST_ADVICE", "Floor", "Scores", "check", "divergence", "floor_for", "log_softmax", "score"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Floor:
    """What an artifact may lose: mean KL divergence in nats per token, and the share of tokens for which the likeliest
    must be the same. None asks for nothing."""

    max_kl: float | None
    min_agreement: float | None

    def __str__(self) -> str:
        kl = [] if self.max_kl is None else [f"KL divergence <= {self.max_kl:g}"]
        return ", ".join(kl + ([] if self.min_agreement is None else [f"top-1 agreement >= {self.min_agreement:g}"]))

    @classmethod
    def within(cls, words: str) -> Floor:
        """The one that `str` wrote among these words, as an artifact records it; of nothing where there is none."""
        found = (re.search(rf"{said} ([\d.e-]+)", words) for said in ("KL divergence <=", "top-1 agreement >="))
        return cls(*(None if each is None else float(each[1]) for each in found))


@dataclass(frozen=True)
class Scores:
    """Of two models that read the same text: perplexities, and how far the second's distributions are from the
    first's."""

    tokens: int
    reference_perplexity: float
    perplexity: float
    kl_divergence: float
    top1_agreement: float

    def as_figures(self) -> dict[str, int | float]:
        return {
            "heldout_tokens": self.tokens,
            "reference_perplexity": float(f"{self.reference_perplexity:.4g}"),
            "perplexity": float(f"{self.perplexity:.4g}"),
            "kl_divergence": float(f"{self.kl_divergence:.2g}"),
            "top1_agreement": round(self.top1_agreement, 3),
        }


# Measured: SmolLM2-135M loses 0.0006 to 0.001 in bfloat16, and a hundredth of that in float16; tf32 has as many digits.
_CAST_FLOORS: dict[str, tuple[float, float | None]] = {
    "bf16": (0.005, 0.94),
    "fp16": (0.0005, 0.98),
    "tf32": (0.0005, 0.98),
}
# What `auto` may lose is a choice, of KL divergence alone.
_FLOORS: dict[str, tuple[float, float | None]] = {"int4": (0.1, None), "auto": (0.01, None)}


def floor_for(options: ExportOptions) -> Floor:
    """The floors that the user named, else those of the scheme: what one can ship without thinking."""
    found = _CAST_FLOORS[options.cast_type] if options.is_cast else _FLOORS.get(options.quantize, (0.01, 0.95))
    if options.max_kl is not None or options.min_agreement is not None:
        return Floor(options.max_kl, options.min_agreement)
    return Floor(*found)


def score(rows: Iterable[tuple[list[int], Array, Array]]) -> Scores:
    """Each row: token ids, the reference's logits and the other's, both [tokens, vocabulary]."""
    parts = [np.stack(list(_row(*row))) for row in rows]
    surprise, other_surprise, divergence, agreement = np.concatenate(parts, axis=1)
    said = ~np.isnan(surprise)
    return Scores(
        tokens=len(agreement),
        reference_perplexity=_perplexity(surprise[said]),
        perplexity=_perplexity(other_surprise[said]),
        kl_divergence=max(0.0, float(divergence.mean())),
        top1_agreement=float(agreement.mean()),
    )


def _perplexity(surprise: Array) -> float:
    """Of a text of one token, which says nothing that could surprise, it is 1."""
    return float(np.exp(surprise.mean())) if surprise.size else 1.0


def _row(ids: list[int], reference: Array, other: Array) -> Iterator[Array]:
    mine, theirs = log_softmax(reference), log_softmax(other)
    for logs in (mine, theirs):
        # The last token's logits are about a token that is not there.
        said = np.full(len(ids), np.nan)
        said[:-1] = -logs[np.arange(len(ids) - 1), ids[1:]]
        yield said
    yield divergence(mine, theirs)
    yield (reference.argmax(-1) == other.argmax(-1)).astype(np.float64)


def divergence(mine: Array, theirs: Array) -> Array:
    """Per token the KL divergence in nats; both are logarithms of probabilities [..., vocabulary]."""
    result: Array = (np.exp(mine) * (mine - theirs)).sum(-1)
    return result


def log_softmax(logits: Array) -> Array:
    """Over the last dimension, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


QUANTIZED_ADVICE = (
    "Try --method gptq, a smaller --group-size, --quantize int8, or --quantize auto, which keeps the worst layers in "
    "int8; --accept-loss takes it as it is."
)
CAST_ADVICE = (
    "Try --auto-cast matmul, which leaves sums, norms and softmax in float32, or the type with more digits, "
    "--auto-cast-type fp16; --accept-loss takes it as it is."
)


def check(scores: Scores, floor: Floor, what: str, advice: str = QUANTIZED_ADVICE) -> None:
    """Raise AccuracyError, with the figures and `advice`, if `scores` of a model that is `what` are below `floor`."""
    problems = []
    if floor.max_kl is not None and not scores.kl_divergence <= floor.max_kl:
        found = _beyond(scores.kl_divergence, floor.max_kl)
        problems.append(f"a KL divergence of {found} where --max-kl allows {floor.max_kl}")
    if floor.min_agreement is not None and not scores.top1_agreement >= floor.min_agreement:
        found = _beyond(scores.top1_agreement, floor.min_agreement)
        problems.append(f"a top-1 agreement of {found} where --min-agreement asks for {floor.min_agreement}")
    if problems:
        raise AccuracyError(
            f"{what[0].upper()}{what[1:]}, the model loses too much on {scores.tokens} tokens of held-out text: "
            f"{' and '.join(problems)} (perplexity {scores.perplexity:.4g}, in fp32 {scores.reference_perplexity:.4g})"
            f". Nothing was written. {advice}"
        )


def _beyond(value: float, bound: float) -> str:
    """`value` in two digits, or as many as it takes to see on which side of `bound` it is."""
    texts = (f"{value:.{digits}g}" for digits in range(2, 18))
    return next((text for text in texts if (float(text) < bound) == (value < bound) and float(text) != bound), "nan")
