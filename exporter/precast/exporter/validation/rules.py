"""Rules for how far a compiled model's answers may be from the reference's, and the verdict on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from precast.runtime.artifact.schema import Accuracy
from precast.runtime.errors import AccuracyError

from ..kinds.samples import Answer, ValidationSample
from ..options import ExportOptions
from .metrics import (
    CAST_ADVICE,
    QUANTIZED_ADVICE,
    advice_for,
    check_floor,
    floor_for,
    kl_divergence,
    log_softmax,
    score_rows,
)  # fmt: skip
from .reference import Reference

__all__ = [
    "TINY",
    "Answers",
    "Comparison",
    "compare_rows",
    "differences",
    "judge_cast",
    "judge_float32",
    "judge_loss",
    "round_figure",
]

Array = np.ndarray[Any, Any]
Answers = list[list[dict[str, Array]]]
"""The compiled model's outputs by name, per sample and row."""


class Comparison(NamedTuple):
    """One row of a sample: the reference's answer, and the compiled model's outputs by name."""

    sample: ValidationSample
    expected: Answer
    found: dict[str, Array]


def judge_loss(reference: Reference, answers: Answers, options: ExportOptions, loss: str) -> Accuracy:
    """Judge a model that predicts text and is less than float32, by floors on its loss on held-out text.

    At the edges of shapes (padding, one token, a full cache) the loss may be as large as short texts make it, but a
    wrong mask or position, which costs whole nats, is found.
    """
    rows = list(compare_rows(reference, answers))
    measured, greedy = _split_greedy(rows)
    worst, _ = max(differences(measured))
    scores = score_rows((row.sample.rows[0], row.expected.outputs["logits"], row.found["logits"])
                        for row in rows if row.sample.kind == "score")  # fmt: skip
    edges = _agreement(measured)["kl_divergence"]
    figures: dict[str, int | float] = {
        **scores.as_figures(),
        "kl_divergence_at_edges": edges,
        "max_abs_difference": round_figure(worst),
        **_count_greedy(greedy),
    }
    floor = floor_for(options)
    # First of all: a faulty graph is not accepted, whatever the options say.
    _check_edges(edges, scores.kl_divergence)
    try:
        check_floor(scores, floor, loss, advice_for(options, QUANTIZED_ADVICE))
    except AccuracyError:
        if not options.accept_loss:
            raise
        return Accuracy(status="accepted", reason=f"taken as it is, though not within {floor}", figures=figures)
    return Accuracy(status="passed", reason=f"compared with the eager fp32 model: {floor}", figures=figures)


ROW_ERRORS = {"bf16": 0.045, "fp16": 0.01, "tf32": 0.01}
"""The largest ‖difference‖ / ‖row‖, by type; 0.045 is a cosine of 0.999."""

LARGEST_DIFFERENCES = {"bf16": 0.05, "fp16": 0.01, "tf32": 0.01}
"""The largest max|difference| / max|reference|, by type."""


def judge_cast(reference: Reference, answers: Answers, options: ExportOptions, loss: str) -> Accuracy:
    """Judge an encoder or encoder-decoder that is less than float32, by bounds on the errors of every row of every
    output, and of every number. A row's error is relative to its norm, or to the rows' mean norm where that is larger.
    """
    measured, greedy = _split_greedy(list(compare_rows(reference, answers)))
    worst, _ = max(differences(measured))
    row_error, where = max(_row_errors(measured))
    difference, place = max(_relative_differences(measured))
    figures: dict[str, int | float] = {
        "max_abs_difference": round_figure(worst),
        "max_relative_difference": round_figure(difference),
        "max_row_error": round_figure(row_error),
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
"""The row error from which on a difference is a faulty graph rather than rounding, and cannot be accepted."""


def _row_errors(measured: list[Comparison]) -> Iterator[tuple[float, str]]:
    for where, expected, found in _rows_by_output(measured):
        typical = np.mean([np.linalg.norm(row) for row in expected])
        for row, other in zip(expected, found, strict=True):
            yield float(np.linalg.norm(other - row) / max(np.linalg.norm(row), typical, TINY)), where


def _relative_differences(measured: list[Comparison]) -> Iterator[tuple[float, str]]:
    for where, expected, found in _rows_by_output(measured):
        largest = max(float(np.abs(row).max()) for row in expected)
        for row, other in zip(expected, found, strict=True):
            yield float(np.abs(other - row).max()) / max(largest, TINY), where


def _cosines(measured: list[Comparison]) -> Iterator[float]:
    for _, expected, found in _rows_by_output(measured):
        for row, other in zip(expected, found, strict=True):
            yield float(row.ravel() @ other.ravel() / max(np.linalg.norm(row) * np.linalg.norm(other), TINY))


TINY = 1e-30


def _rows_by_output(measured: list[Comparison]) -> Iterator[tuple[str, list[Array], list[Array]]]:
    """Per sample and output: where it is, the reference's rows, and the compiled model's."""
    grouped: dict[str, tuple[list[Array], list[Array]]] = {}
    for sample, expected, found in measured:
        for name, output in expected.outputs.items():
            expected_rows, found_rows = grouped.setdefault(f"{sample.name}, {name}", ([], []))
            expected_rows.append(output.astype(np.float64))
            found_rows.append(found[name].astype(np.float64))
    return ((where, *rows) for where, rows in grouped.items())


EDGE_NATS = 1.0
"""The KL divergence that a few tokens without context may have on average; a wrong mask or position costs several times
as much."""


def _check_edges(divergence: float, held_out: float) -> None:
    allowed = max(EDGE_NATS, 10 * held_out)
    if divergence > allowed:
        raise AccuracyError(
            f"At the edges of its shapes (padded, one token, a full cache) the compiled model is off by a KL "
            f"divergence of {divergence:.2g} where {allowed:.2g} is allowed and ordinary text loses {held_out:.2g}. "
            f"Nothing was written. This is a fault of the compiled graph rather than of rounding: please report it."
        )


def _count_greedy(greedy: list[Comparison]) -> dict[str, int | float]:
    """How many greedy tokens come before the first that differs. A figure only: rounding moves close decisions."""
    tokens = [(expected.outputs["tokens"], found["tokens"]) for _, expected, found in greedy]
    equal = sum(_first_difference(*pair) for pair in tokens)
    return {"greedy_tokens_equal": equal, "greedy_tokens": sum(len(expected) for expected, _ in tokens)}


def _first_difference(expected: Array, found: Array) -> int:
    differing = np.flatnonzero(expected != found)
    return int(differing[0]) if len(differing) else len(expected)


def judge_float32(reference: Reference, answers: Answers, atol: float) -> Accuracy:
    """Judge a model that computes in float32: max|difference| <= atol * max(1, max|reference|) over all outputs, and
    greedy tokens equal except where the eager model's own margin was below twice that difference."""
    measured, greedy = _split_greedy(list(compare_rows(reference, answers)))
    worst, where = max(differences(measured), default=(0.0, "nothing"))
    outputs = [output for _, expected, _ in measured for output in expected.outputs.values()]
    scale = max((float(np.abs(output).max()) for output in outputs), default=0.0)
    allowed = atol * max(1.0, scale)
    if worst > allowed:
        raise AccuracyError(
            f"The compiled model does not give the reference's answers: they differ by {worst:.2g} at {where!r} where "
            f"{allowed:.2g} is allowed ({atol:g} of the largest value, {scale:.2g}). Nothing was written. "
            f"{_atol_advice(worst / max(1.0, scale))}"
        )
    figures: dict[str, int | float] = {
        "max_abs_difference": round_figure(worst),
        "max_abs_reference": round_figure(scale),
        "questions": len(reference.samples),
        **_agreement(measured),
        **_judge_greedy(greedy, worst),
    }
    return Accuracy(status="passed", reason=f"compared with the eager model, atol {atol:g}", figures=figures)


LARGEST_ATOL = 0.01
"""Of the largest value: a larger difference is a fault rather than rounding, and no atol is advised for it."""


def _atol_advice(difference: float) -> str:
    if difference * 1.1 > LARGEST_ATOL:
        return "Rounding costs less: this is a fault of the graph, please report it."
    return f"If that is good enough for you, atol={difference * 1.1:.2g} allows it."


def compare_rows(reference: Reference, answers: Answers) -> Iterator[Comparison]:
    """Every row of every sample with both answers to it. Raises ValueError where some are missing."""
    for sample, expected_rows, found_rows in zip(reference.samples, reference.answers, answers, strict=True):
        for expected, found in zip(expected_rows, found_rows, strict=True):
            yield Comparison(sample, expected, found)


def _split_greedy(rows: list[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """Rows whose numbers are compared, and rows of greedy tokens."""
    measured = [row for row in rows if row.sample.kind != "greedy"]
    return measured, [row for row in rows if row.sample.kind == "greedy"]


def differences(measured: list[Comparison]) -> Iterator[tuple[float, str]]:
    """The largest difference of every output, and where. Raises AccuracyError for other shapes, NaN and infinity."""
    for sample, expected, found in measured:
        for name, output in expected.outputs.items():
            other, where = found[name], f"{sample.name}, {name}"
            if other.shape != output.shape:
                shapes = f"{list(other.shape)} where the reference has {list(output.shape)}"
                raise AccuracyError(f"The compiled model's answer to {where!r} has the shape {shapes}.")
            difference = float(np.abs(other.astype(np.float64) - output).max())
            # NaN is neither above nor below any bound, so it must not reach a comparison.
            if not np.isfinite(difference):
                raise AccuracyError(f"The compiled model's answer to {where!r} holds NaN or infinity.")
            yield difference, where


def _agreement(measured: list[Comparison]) -> dict[str, float]:
    """For models that generate: top-1 agreement and mean KL divergence over the samples of logits."""
    logits = [(row.expected.outputs["logits"], row.found["logits"]) for row in measured if row.sample.kind == "logits"]
    if not logits:
        return {}
    expected, found = (np.concatenate(each).astype(np.float64) for each in zip(*logits, strict=True))
    divergence = kl_divergence(log_softmax(expected), log_softmax(found))
    return {
        "top1_agreement": round(float((expected.argmax(-1) == found.argmax(-1)).mean()), 3),
        "kl_divergence": round_figure(max(0.0, float(divergence.mean()))),
    }


def _judge_greedy(greedy: list[Comparison], difference: float) -> dict[str, int | float]:
    equal = total = 0
    for sample, expected, found in greedy:
        tokens, other, margins = expected.outputs["tokens"], found["tokens"], expected.margins
        assert margins is not None, "greedy answers carry margins"
        first = _first_difference(tokens, other)
        equal, total = equal + first, total + len(tokens)
        if first < len(tokens) and margins[first] >= 2 * difference:
            raise AccuracyError(
                f"The compiled model generates other tokens than the reference: at {sample.name!r}, token "
                f"{first + 1} is {other[first]} instead of {tokens[first]}, where the reference leads by "
                f"{margins[first]:.2g} and logits differ by {difference:.2g} at most. Nothing was written."
            )
    return {"greedy_tokens_equal": equal, "greedy_tokens": total} if greedy else {}


def round_figure(value: float) -> float:
    """In two digits, as artifacts record figures."""
    return float(f"{value:.2g}")
