"""What a compiled model's answers may differ by, and the verdict on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from precast.runtime.artifact.schema import Accuracy
from precast.runtime.errors import AccuracyError

from ..kinds.samples import Answer, ValidationSample
from ..options import ExportOptions
from .metrics import CAST_ADVICE, QUANTIZED_ADVICE, check, divergence, floor_for, log_softmax, score
from .reference import Reference

__all__ = ["judge", "judge_cast", "judge_loss"]

Array = np.ndarray[Any, Any]
Pair: TypeAlias = tuple[ValidationSample, Answer, dict[str, Array]]


def judge_loss(
    reference: Reference, answers: list[list[dict[str, Array]]], options: ExportOptions, loss: str
) -> Accuracy:
    """The rule for decoders that are less than float32: floors on what is lost on held-out text.

    At the edges of shapes (padding, one token, a full cache) the loss may be as large as short texts make it, but not
    of another kind: a mask that is wrong there costs nats.
    """
    pairs = list(_pairs(reference, answers))
    measured = [pair for pair in pairs if pair[0].kind != "greedy"]
    worst, _ = max(_differences(measured))
    scores = score((sample.rows[0], mine.outputs["logits"], theirs["logits"])
                   for sample, mine, theirs in pairs if sample.kind == "score")  # fmt: skip
    edges = _agreement(measured)["kl_divergence"]
    figures: dict[str, int | float] = {
        **scores.as_figures(),
        "kl_divergence_at_edges": edges,
        "max_abs_difference": _two_digits(worst),
        **_count_greedy([pair for pair in pairs if pair[0].kind == "greedy"]),
    }
    floor = floor_for(options)
    # A faulty graph is no loss that could be accepted.
    _check_edges(edges, scores.kl_divergence)
    try:
        check(scores, floor, loss, CAST_ADVICE if options.is_cast else QUANTIZED_ADVICE)
    except AccuracyError:
        if not options.accept_loss:
            raise
        return Accuracy(status="accepted", reason=f"taken as it is, though not within {floor}", figures=figures)
    return Accuracy(status="passed", reason=f"compared with the eager fp32 model: {floor}", figures=figures)


ROW_ERRORS = {"bf16": 0.045, "fp16": 0.01, "tf32": 0.01}
"""‖difference‖ / ‖row‖; 0.045 is a cosine of 0.999."""


LARGEST_DIFFERENCES = {"bf16": 0.05, "fp16": 0.01, "tf32": 0.01}
"""max|difference| / max|reference|."""


def judge_cast(
    reference: Reference, answers: list[list[dict[str, Array]]], options: ExportOptions, loss: str
) -> Accuracy:
    """The rule for encoders and encoder-decoders that are less than float32: bounds on the error of every output's
    every row, and of every number. A row that is shorter than others is measured by the length that they have."""
    pairs = list(_pairs(reference, answers))
    measured, greedy = ([pair for pair in pairs if (pair[0].kind == "greedy") is it] for it in (False, True))
    worst, _ = max(_differences(measured))
    row_error, where = max(_row_errors(measured))
    difference, place = max(_relative_differences(measured))
    figures: dict[str, int | float] = {
        "max_abs_difference": _two_digits(worst),
        "max_relative_difference": _two_digits(difference),
        "max_row_error": _two_digits(row_error),
        "min_cosine": round(min(_cosines(measured)), 5),
        "questions": len(reference.samples),
        **_agreement(measured),
        **(_count_greedy(greedy) if greedy else {}),
    }
    bounds = ROW_ERRORS[options.cast_type], LARGEST_DIFFERENCES[options.cast_type]
    within = f"row error <= {bounds[0]:g}, difference <= {bounds[1]:g} of the largest value"
    if row_error <= bounds[0] and difference <= bounds[1]:
        return Accuracy(status="passed", reason=f"compared with the eager fp32 model: {within}", figures=figures)
    if options.accept_loss and row_error <= FAULT:
        return Accuracy(status="accepted", reason=f"taken as it is, though not within {within}", figures=figures)
    advice = (
        CAST_ADVICE if row_error <= FAULT else "Casting costs less: this is a fault of the graph, please report it."
    )
    raise AccuracyError(
        f"{loss[0].upper()}{loss[1:]}, the model does not give the reference's answers: a row is off by "
        f"{row_error:.2g} of its length at {where!r} where {bounds[0]:g} is allowed, and a number by {difference:.2g} "
        f"of the largest at {place!r} where {bounds[1]:g} is. Nothing was written. {advice}"
    )


FAULT = 0.5
"""An answer that is half another one is no rounding that could be accepted."""


def _row_errors(measured: list[Pair]) -> Iterator[tuple[float, str]]:
    for where, expected, found in _rows_of_outputs(measured):
        typical = np.mean([np.linalg.norm(row) for row in expected])
        for row, other in zip(expected, found, strict=True):
            yield float(np.linalg.norm(other - row) / max(np.linalg.norm(row), typical, TINY)), where


def _relative_differences(measured: list[Pair]) -> Iterator[tuple[float, str]]:
    for where, expected, found in _rows_of_outputs(measured):
        largest = max(float(np.abs(row).max()) for row in expected)
        for row, other in zip(expected, found, strict=True):
            yield float(np.abs(other - row).max()) / max(largest, TINY), where


def _cosines(measured: list[Pair]) -> Iterator[float]:
    for _, expected, found in _rows_of_outputs(measured):
        for row, other in zip(expected, found, strict=True):
            yield float(row.ravel() @ other.ravel() / max(np.linalg.norm(row) * np.linalg.norm(other), TINY))


TINY = 1e-30


def _rows_of_outputs(measured: list[Pair]) -> Iterator[tuple[str, list[Array], list[Array]]]:
    """Per sample and output: its rows, of the reference and of the other."""
    grouped: dict[str, tuple[list[Array], list[Array]]] = {}
    for sample, mine, theirs in measured:
        for name, expected in mine.outputs.items():
            rows, others = grouped.setdefault(f"{sample.name}, {name}", ([], []))
            rows.append(expected.astype(np.float64))
            others.append(theirs[name].astype(np.float64))
    return ((where, *rows) for where, rows in grouped.items())


EDGE_NATS = 1.0
"""What a few tokens without context may lose on average; the wrong mask or position costs several times as much."""


def _check_edges(divergence: float, held_out: float) -> None:
    allowed = max(EDGE_NATS, 10 * held_out)
    if divergence > allowed:
        raise AccuracyError(
            f"At the edges of its shapes (padded, one token, a full cache) the compiled model is off by a KL "
            f"divergence of {divergence:.2g} where {allowed:.2g} is allowed and ordinary text loses {held_out:.2g}. "
            f"Nothing was written. This is a fault of the compiled graph rather than of rounding: please report it."
        )


def _count_greedy(pairs: list[Pair]) -> dict[str, int | float]:
    """Tokens before the first that differs; rounding moves close decisions, so this is a figure and no rule."""
    equal = sum(_first_difference(mine.outputs["tokens"], theirs["tokens"]) for _, mine, theirs in pairs)
    return {"greedy_tokens_equal": equal, "greedy_tokens": sum(len(mine.outputs["tokens"]) for _, mine, _ in pairs)}


def _first_difference(expected: Array, found: Array) -> int:
    differing = np.flatnonzero(expected != found)
    return int(differing[0]) if len(differing) else len(expected)


def judge(reference: Reference, answers: list[list[dict[str, Array]]], atol: float) -> Accuracy:
    """The rule for fp32: max|difference| <= atol * max(1, max|reference|) over all outputs, and greedy tokens equal
    except where the eager model's own lead was below twice that difference, where either token is right."""
    pairs = list(_pairs(reference, answers))
    measured = [pair for pair in pairs if pair[0].kind != "greedy"]
    worst, where = max(_differences(measured), default=(0.0, "nothing"))
    scale = max((float(np.abs(each).max()) for _, mine, _ in measured for each in mine.outputs.values()), default=0.0)
    allowed = atol * max(1.0, scale)
    if worst > allowed:
        raise AccuracyError(
            f"The compiled model does not give the reference's answers: they differ by {worst:.2g} at {where!r} where "
            f"{allowed:.2g} is allowed ({atol:g} of the largest value, {scale:.2g}). Nothing was written. "
            f"{_atol_advice(worst / max(1.0, scale))}"
        )
    figures: dict[str, int | float] = {
        "max_abs_difference": _two_digits(worst),
        "max_abs_reference": _two_digits(scale),
        "questions": len(reference.samples),
        **_agreement(measured),
        **_judge_greedy([pair for pair in pairs if pair[0].kind == "greedy"], worst),
    }
    return Accuracy(status="passed", reason=f"compared with the eager model, atol {atol:g}", figures=figures)


LARGEST_ATOL = 0.01
"""Of the largest value. What differs by more is no rounding of float32."""


def _atol_advice(difference: float) -> str:
    if difference * 1.1 > LARGEST_ATOL:
        return "Rounding costs less: this is a fault of the graph, please report it."
    return f"If that is good enough for you, --atol {difference * 1.1:.2g} allows it."


def _pairs(reference: Reference, answers: list[list[dict[str, Array]]]) -> Iterator[Pair]:
    for sample, mine, theirs in zip(reference.samples, reference.answers, answers, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            yield sample, one, other


def _differences(measured: list[Pair]) -> Iterator[tuple[float, str]]:
    """The largest difference of every output, and where. Raises AccuracyError where one is no number at all."""
    for sample, mine, theirs in measured:
        for name, expected in mine.outputs.items():
            found, where = theirs[name], f"{sample.name}, {name}"
            if found.shape != expected.shape:
                shapes = f"{list(found.shape)} where the reference has {list(expected.shape)}"
                raise AccuracyError(f"The compiled model's answer to {where!r} has the shape {shapes}.")
            difference = float(np.abs(found.astype(np.float64) - expected).max())
            # NaN is neither above nor below any bound, so it must not reach a comparison.
            if not np.isfinite(difference):
                raise AccuracyError(f"The compiled model's answer to {where!r} holds NaN or infinity.")
            yield difference, where


def _agreement(measured: list[Pair]) -> dict[str, float]:
    """For decoders: how often the likeliest token is the same, and the mean KL divergence from the reference."""
    logits = [
        (mine.outputs["logits"], theirs["logits"]) for sample, mine, theirs in measured if sample.kind == "logits"
    ]
    if not logits:
        return {}
    expected, found = (np.concatenate(each).astype(np.float64) for each in zip(*logits, strict=True))
    mine, theirs = log_softmax(expected), log_softmax(found)
    return {
        "top1_agreement": round(float((expected.argmax(-1) == found.argmax(-1)).mean()), 3),
        "kl_divergence": _two_digits(max(0.0, float(divergence(mine, theirs).mean()))),
    }


def _judge_greedy(pairs: list[Pair], difference: float) -> dict[str, int | float]:
    equal = total = 0
    for sample, mine, theirs in pairs:
        expected, found, margins = mine.outputs["tokens"], theirs["tokens"], mine.margins
        assert margins is not None, "greedy answers carry margins"
        first = _first_difference(expected, found)
        equal, total = equal + first, total + len(expected)
        if first < len(expected) and margins[first] >= 2 * difference:
            raise AccuracyError(
                f"The compiled model generates other tokens than the reference: at {sample.name!r}, token "
                f"{first + 1} is {found[first]} instead of {expected[first]}, where the reference leads by "
                f"{margins[first]:.2g} and logits differ by {difference:.2g} at most. Nothing was written."
            )
    return {"greedy_tokens_equal": equal, "greedy_tokens": total} if pairs else {}


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
