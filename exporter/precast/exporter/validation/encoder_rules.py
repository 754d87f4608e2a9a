"""The verdict on quantized models that predict no text: cosines of their outputs, and agreement about labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from precast.runtime.artifact.schema import Accuracy
from precast.runtime.errors import AccuracyError

from ..kinds.samples import label_axis
from ..options import ExportOptions
from .metrics import ENCODER_ADVICE, Floor, advice_for, encoder_floor_for, show_beyond
from .reference import Reference
from .rules import TINY, Answers, Comparison, compare_rows, differences, round_figure

__all__ = ["judge_encoder"]

Array = np.ndarray[Any, Any]
Pairs = dict[str, tuple[list[Array], list[Array]]]
"""Per output: the reference's rows, and the compiled model's."""


def judge_encoder(reference: Reference, answers: Answers, options: ExportOptions, loss: str) -> Accuracy:
    """Judge a quantized encoder by floors on its answers to held-out inputs: the mean cosine of the rows of every
    output, and the share of equal labels where it has labels.

    At the edges of shapes (padding, one token) rows may be as far off as few tokens make them, but a wrong mask or
    position is found.
    """
    rows = list(compare_rows(reference, answers))
    worst, _ = max(differences(rows))
    held_out = _pair_outputs([row for row in rows if row.sample.kind == "score"])
    cosines = {name: _row_cosines(*pair) for name, pair in held_out.items()}
    labels = [_labels(name, *pair) for name, pair in held_out.items() if _has_labels(name, pair[0][0])]
    figures: dict[str, int | float] = {
        "heldout_rows": sum(row.sample.kind == "score" for row in rows),
        "mean_cosine": _round_share(min(float(each.mean()) for each in cosines.values())),
        "min_cosine": _round_share(min(float(each.min()) for each in cosines.values())),
        **_score_labels(labels),
        **_score_ranks(held_out),
        "max_abs_difference": round_figure(worst),
    }
    figures["max_row_error_at_edges"] = round_figure(
        _check_edges([row for row in rows if row.sample.kind != "score"], held_out)
    )
    floor = encoder_floor_for(options)
    problems = list(_problems(figures, floor))
    if not problems:
        return Accuracy(status="passed", reason=f"compared with the eager fp32 model: {floor}", figures=figures)
    if options.accept_loss:
        return Accuracy(status="accepted", reason=f"taken as it is, though not within {floor}", figures=figures)
    raise AccuracyError(
        f"{loss[0].upper()}{loss[1:]}, the model loses too much on {figures['heldout_rows']} held-out inputs: "
        f"{' and '.join(problems)}. Nothing was written. {advice_for(options, ENCODER_ADVICE)}"
    )


def _problems(figures: dict[str, int | float], floor: Floor) -> Iterator[str]:
    """The floors that the figures do not reach, a phrase each."""
    cosine, agreement = figures["mean_cosine"], figures.get("label_agreement", 1.0)
    if floor.min_cosine is not None and not cosine >= floor.min_cosine:
        yield f"a mean cosine of {show_beyond(cosine, floor.min_cosine)} where min_cosine asks for {floor.min_cosine}"
    if floor.min_agreement is not None and not agreement >= floor.min_agreement:
        found = show_beyond(agreement, floor.min_agreement)
        yield f"a label agreement of {found} where min_agreement asks for {floor.min_agreement}"


def _pair_outputs(rows: list[Comparison]) -> Pairs:
    pairs: Pairs = {}
    for _, expected, found in rows:
        for name, output in expected.outputs.items():
            expected_rows, found_rows = pairs.setdefault(name, ([], []))
            expected_rows.append(output.astype(np.float64))
            found_rows.append(found[name].astype(np.float64))
    return pairs


def _row_cosines(expected: list[Array], found: list[Array]) -> Array:
    """The cosine of each pair of rows; of rows of one number, that of all rows as one vector."""
    if expected[0].size == 1:
        expected, found = [np.array(expected)], [np.array(found)]
    return np.array([_cosine(row.ravel(), other.ravel()) for row, other in zip(expected, found, strict=True)])


def _cosine(first: Array, second: Array) -> float:
    """1 where both are zero."""
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else float(not first.any() and not second.any())


# ---------------------------------------------------------------- labels


def _has_labels(name: str, row: Array) -> bool:
    return name.endswith("logits") and row.shape[label_axis(row)] > 1


def _labels(name: str, expected: list[Array], found: list[Array]) -> tuple[Array, Array]:
    """The likeliest label of every row, token or pixel."""
    first, second = (
        np.concatenate([np.ravel(row.argmax(label_axis(row))) for row in rows]) for rows in (expected, found)
    )
    return first, second


def _score_labels(labels: list[tuple[Array, Array]]) -> dict[str, float]:
    """The least share of equal labels of an output, and the least macro-averaged F1, the reference's being right."""
    if not labels:
        return {}
    agreements = [float((first == second).mean()) for first, second in labels]
    return {
        "label_agreement": _round_share(min(agreements)),
        "label_f1": _round_share(min(_macro_f1(*pair) for pair in labels)),
    }


def _macro_f1(right: Array, found: Array) -> float:
    scores = []
    for label in np.unique(right):
        both = float(((right == label) & (found == label)).sum())
        scores.append(2 * both / float((right == label).sum() + (found == label).sum()))
    return float(np.mean(scores))


# ---------------------------------------------------------------- order


def _score_ranks(held_out: Pairs) -> dict[str, float]:
    """Spearman's correlation with the reference: of the similarities of all pairs of rows where an output is one vector
    per row, of the numbers where it is one number."""
    found = [
        _spearman(*(_ordered_numbers(rows) for rows in pair))
        for name, pair in held_out.items()
        if pair[0][0].ndim == 1 and not _has_labels(name, pair[0][0]) and len(pair[0]) > 2
    ]
    return {"spearman": _round_share(min(found))} if found else {}


def _ordered_numbers(rows: list[Array]) -> Array:
    table = np.stack(rows)
    if table.shape[1] == 1:
        return table[:, 0]
    table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    result: Array = (table @ table.T)[np.triu_indices(len(rows), 1)]
    return result


def _spearman(first: Array, second: Array) -> float:
    return float(np.corrcoef(first.argsort().argsort(), second.argsort().argsort())[0, 1])


# ---------------------------------------------------------------- edges

EDGE_ERROR = 0.1
"""The row error that edges may have whatever ordinary inputs lose; a wrong mask costs several times as much."""
EDGE_FACTOR = 5
"""How much larger than that of ordinary inputs the row error of edges may be: a row of one token averages nothing."""


def _check_edges(edges: list[Comparison], held_out: Pairs) -> float:
    """The largest error of a row at the edges of shapes, relative to its norm, or to that of an ordinary row of its
    size where that is larger. Raises AccuracyError for a fault."""
    sizes = {
        name: _root_mean_square(np.concatenate([row.ravel() for row in pair[0]])) for name, pair in held_out.items()
    }
    ordinary = max(
        _row_error(row, other, sizes[name]) for name, pair in held_out.items() for row, other in zip(*pair, strict=True)
    )
    error, where = max(
        (_row_error(output, found[name], sizes[name]), f"{sample.name}, {name}")
        for sample, expected, found in edges
        for name, output in expected.outputs.items()
    )
    allowed = max(EDGE_ERROR, EDGE_FACTOR * ordinary)
    if error > allowed:
        raise AccuracyError(
            f"At the edges of its shapes (padded, one token) the compiled model is off by {error:.2g} of a row's "
            f"length at {where!r} where {allowed:.2g} is allowed and ordinary inputs lose {ordinary:.2g}. Nothing was "
            f"written. This is a fault of the compiled graph rather than of rounding: please report it."
        )
    return error


def _row_error(expected: Array, found: Array, size: float) -> float:
    """The root mean square of the difference, relative to that of the row, or to `size` where that is larger."""
    return _root_mean_square(found - expected) / max(_root_mean_square(expected), size, TINY)


def _root_mean_square(values: Array) -> float:
    return float(np.sqrt(np.square(values.astype(np.float64)).mean()))


def _round_share(value: float) -> float:
    return round(value, 5)
