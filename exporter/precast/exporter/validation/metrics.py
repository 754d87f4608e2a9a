"""Accuracy lost to rounding: perplexity, KL divergence and top-1 agreement on held-out text, and their floors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from precast.runtime.errors import AccuracyError

from ..options import ExportOptions

__all__ = [
    "CAST_ADVICE",
    "ENCODER_ADVICE",
    "QUANTIZED_ADVICE",
    "Floor",
    "Scores",
    "advice_for",
    "check_floor",
    "encoder_floor_for",
    "floor_for",
    "kl_divergence",
    "log_softmax",
    "score_rows",
    "show_beyond",
]

Array = np.ndarray[Any, Any]


_BOUNDS = ("KL divergence <=", "top-1 agreement >=", "mean cosine >=")


@dataclass(frozen=True)
class Floor:
    """Bounds on what an artifact may lose: the largest mean KL divergence, in nats per token, the smallest share of
    tokens or inputs with the same likeliest token or label, and the smallest mean cosine of outputs. None is no
    bound."""

    max_kl: float | None
    min_agreement: float | None
    min_cosine: float | None = None

    def __str__(self) -> str:
        values = (self.max_kl, self.min_agreement, self.min_cosine)
        return ", ".join(
            f"{words} {value:g}" for words, value in zip(_BOUNDS, values, strict=True) if value is not None
        )

    @classmethod
    def parse(cls, words: str) -> Floor:
        """Read the floor that `str` wrote within these words, as artifacts record it; without bounds where none is."""
        found = (re.search(rf"{said} ([\d.e-]+)", words) for said in _BOUNDS)
        return cls(*(None if each is None else float(each[1]) for each in found))


@dataclass(frozen=True)
class Scores:
    """Two models on the same text: their perplexities, and the distance of the second's distributions from those of the
    first, the reference."""

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
# For `auto` and a8w8 the KL divergence is the budget by which they choose; agreement has no floor.
_FLOORS: dict[str, tuple[float, float | None]] = {
    "int4": (0.1, None),
    "auto": (0.01, None),
    "a8w8": (0.05, None),
    "a8w8-dynamic": (0.05, None),
}


def _scheme_of(options: ExportOptions) -> str:
    """The scheme whose floor holds: llm.int8 rounds activations by token."""
    return "a8w8-dynamic" if options.quantization.keeps_outliers else str(options.quantize)


def floor_for(options: ExportOptions) -> Floor:
    """The floor that the user named, else the default of the scheme; what is quantized and cast may lose what both
    do."""
    if options.max_kl is not None or options.min_agreement is not None:
        return Floor(options.max_kl, options.min_agreement)
    parts = [_CAST_FLOORS[options.cast_type]] if options.is_cast else []
    if options.quantization.is_rounded or not parts:
        parts.append(_FLOORS.get(_scheme_of(options), (0.01, 0.95)))
    agreements = [agreement for _, agreement in parts]
    return Floor(sum(kl for kl, _ in parts), None if None in agreements else min(filter(None, agreements)))


# Measured: all-MiniLM-L6-v2 and random models of the usual families keep a mean cosine of 0.9999 in 8 bits.
_ENCODER_FLOORS = dict.fromkeys(("int4", "a8w8", "a8w8-dynamic"), Floor(None, None, 0.98))


def encoder_floor_for(options: ExportOptions) -> Floor:
    """The floor of a quantized encoder: that which the user named, else the default of the scheme."""
    if options.min_cosine is not None or options.min_agreement is not None:
        return Floor(None, options.min_agreement, options.min_cosine)
    found = _ENCODER_FLOORS.get(_scheme_of(options), Floor(None, 0.95, 0.999))
    return replace(found, min_cosine=(found.min_cosine or 0.0) - 0.001) if options.is_cast else found


def score_rows(rows: Iterable[tuple[list[int], Array, Array]]) -> Scores:
    """Score rows of (token ids, the reference's logits, the other model's logits), both logits [tokens, vocabulary]."""
    parts = [np.stack(list(_score_tokens(*row))) for row in rows]
    reference_nll, nll, divergence, agreement = np.concatenate(parts, axis=1)
    is_predicted = ~np.isnan(reference_nll)
    return Scores(
        tokens=len(agreement),
        reference_perplexity=_perplexity(reference_nll[is_predicted]),
        perplexity=_perplexity(nll[is_predicted]),
        kl_divergence=max(0.0, float(divergence.mean())),
        top1_agreement=float(agreement.mean()),
    )


def _perplexity(nll: Array) -> float:
    """exp of the mean negative log-likelihood; 1 for a text of one token, in which nothing is predicted."""
    return float(np.exp(nll.mean())) if nll.size else 1.0


def _score_tokens(ids: list[int], expected: Array, found: Array) -> Iterator[Array]:
    """Per token: both negative log-likelihoods, NaN for the last one; KL divergence; whether the likeliest agree."""
    expected_logs, found_logs = log_softmax(expected), log_softmax(found)
    for logs in (expected_logs, found_logs):
        # The last token's logits predict a token that is not in the text.
        nll = np.full(len(ids), np.nan)
        nll[:-1] = -logs[np.arange(len(ids) - 1), ids[1:]]
        yield nll
    yield kl_divergence(expected_logs, found_logs)
    yield (expected.argmax(-1) == found.argmax(-1)).astype(np.float64)


def kl_divergence(expected: Array, found: Array) -> Array:
    """KL divergence per token, in nats, of `found` from `expected`: log-probabilities [..., vocabulary]."""
    result: Array = (np.exp(expected) * (expected - found)).sum(-1)
    return result


def log_softmax(logits: Array) -> Array:
    """Log-softmax over the last dimension, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


QUANTIZED_ADVICE = (
    "Try quantize_method='gptq', a smaller group_size, quantize='int8', or quantize='auto', which keeps the worst "
    "layers in int8; accept_loss=True takes it as it is."
)
ENCODER_ADVICE = (
    "Try quantize='int8', quantize_method='gptq' or a smaller group_size, or leave the layers that cost most as they "
    "are by skip=; accept_loss=True takes it as it is."
)
ACTIVATION_ADVICE = (
    "Try quantize='a8w8-dynamic', another exponent in smooth=, or quantize='int8', which rounds weights alone; "
    "accept_loss=True takes it as it is."
)
CAST_ADVICE = (
    "Try auto_cast='matmul', which leaves sums, norms and softmax in float32, or the type with more digits, "
    "auto_cast_type='fp16'; accept_loss=True takes it as it is."
)


def advice_for(options: ExportOptions, otherwise: str) -> str:
    """What to try instead where a model is beyond its floor; `otherwise` where only its weights are rounded."""
    if options.quantization.rounds_activations:
        return ACTIVATION_ADVICE
    return CAST_ADVICE if options.is_cast else otherwise


def check_floor(scores: Scores, floor: Floor, loss: str, advice: str = QUANTIZED_ADVICE) -> None:
    """Raise AccuracyError, with the figures and `advice`, where `scores` do not keep to `floor`. `loss` says how the
    model is less than float32."""
    problems = []
    if floor.max_kl is not None and not scores.kl_divergence <= floor.max_kl:
        found = show_beyond(scores.kl_divergence, floor.max_kl)
        problems.append(f"a KL divergence of {found} where max_kl allows {floor.max_kl}")
    if floor.min_agreement is not None and not scores.top1_agreement >= floor.min_agreement:
        found = show_beyond(scores.top1_agreement, floor.min_agreement)
        problems.append(f"a top-1 agreement of {found} where min_agreement asks for {floor.min_agreement}")
    if problems:
        raise AccuracyError(
            f"{loss[0].upper()}{loss[1:]}, the model loses too much on {scores.tokens} tokens of held-out text: "
            f"{' and '.join(problems)} (perplexity {scores.perplexity:.4g}, in fp32 {scores.reference_perplexity:.4g})"
            f". Nothing was written. {advice}"
        )


def show_beyond(value: float, bound: float) -> str:
    """`value` in two digits, or in as many as show on which side of `bound` it is."""
    texts = (f"{value:.{digits}g}" for digits in range(2, 18))
    return next((text for text in texts if (float(text) < bound) == (value < bound) and float(text) != bound), "nan")
