"""Validation samples for encoders, and the eager model's answers to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from precast.runtime.artifact.schema import Graph, Input

from ...checkpoint.sentence_transformers import output_names
from ..samples import CALIBRATION_SEED, HELD_OUT_SEED, Answer, ValidationSample, repeat_tokens
from .inputs import PADDED_AXES

__all__ = ["answer", "calibration_inputs", "held_out_samples", "validation_samples"]

Array = np.ndarray[Any, Any]
ROWS = ("batch", "texts")


def validation_samples(graphs: list[Graph], texts: list[list[int]]) -> list[ValidationSample]:
    """For each graph: rows of all sizes, padded on either side, and the edges of its shapes."""
    return [sample for graph in graphs for sample in _graph_samples(graph, texts)]


HELD_OUT_TEXTS = 32
HELD_OUT_SIGNALS = 12
"""Pictures and sounds, which take longer."""
CALIBRATION_SIGNALS = 8


def held_out_samples(graphs: list[Graph], texts: list[list[int]]) -> list[ValidationSample]:
    """Inputs of their own for the largest graph, as many per call as it takes."""
    graph, per_call = graphs[-1], _rows_per_call(graphs[-1])
    count = HELD_OUT_TEXTS if _reads_text(graph) else HELD_OUT_SIGNALS
    rows = _make_rows(graph, texts, count, HELD_OUT_SEED)
    calls = [rows[start : start + per_call] for start in range(0, count, per_call)]
    return [ValidationSample(f"held-out {index + 1}", "score", tensors=call) for index, call in enumerate(calls)]


def calibration_inputs(graphs: list[Graph], texts: list[list[int]]) -> list[dict[str, Array]]:
    """Rows to calibrate on, each with a batch dimension of 1: the texts, cut to the largest graph, or signals, which
    need none."""
    if not _reads_text(graphs[-1]):
        # Of a text nothing but its length is taken here, which makes sounds of different lengths.
        texts = [[0] * length for length in range(CALIBRATION_SIGNALS)]
    rows = _make_rows(graphs[-1], texts, len(texts), CALIBRATION_SEED)
    return [{name: tensor[None] for name, tensor in row.items()} for row in rows]


def _make_rows(graph: Graph, texts: list[list[int]], count: int, seed: int) -> list[dict[str, Array]]:
    """Rows of the sizes of the texts, with these texts in them, or signals from seeds that follow `seed`."""
    shortest, longest = _min_size(graph), int(graph.length)  # type: ignore[arg-type]
    numbered = [(index, texts[index % len(texts)]) for index in range(count)]
    return [
        _make_row(graph, texts, index, _row_size(shortest, longest, len(text)), seed + index)
        for index, text in numbered
    ]


def _reads_text(graph: Graph) -> bool:
    return any(spec.name == "input_ids" for spec in graph.inputs)


def _graph_samples(graph: Graph, texts: list[list[int]]) -> Iterator[ValidationSample]:
    """The rows of a sample differ in size."""
    shortest, longest = _min_size(graph), int(graph.length)  # type: ignore[arg-type]
    sizes = [_row_size(shortest, longest, len(text)) for text in texts]
    rows = [_make_row(graph, texts, index, sizes[index % len(sizes)]) for index in range(_rows_per_call(graph))]
    name = f"{graph.name}: "
    yield ValidationSample(name + "rows of all sizes, padded right", "outputs", tensors=rows)
    yield ValidationSample(name + "a short batch", "outputs", tensors=rows[: max(1, len(rows) - 1)])
    if _is_padded(graph):
        yield ValidationSample(name + "rows of all sizes, padded left", "outputs", tensors=rows, side="left")
        yield ValidationSample(name + "the shortest row", "outputs", tensors=[_make_row(graph, texts, 0, shortest)])
        yield ValidationSample(name + f"all of {longest}", "outputs", tensors=[_make_row(graph, texts, 1, longest)])
    if _choice_count(graph) > 1:
        fewer = {name: each[:1] if _has_axis(graph, name, "choices") else each for name, each in rows[0].items()}
        yield ValidationSample(name + "one choice", "outputs", tensors=[fewer])


def _rows_per_call(graph: Graph) -> int:
    """How many rows one call holds; where there are texts beside images, a row is one of each."""
    sizes = [size for spec in graph.inputs for axis, size in zip(spec.axes, spec.shape, strict=False) if axis in ROWS]
    return min(int(size) for size in sizes or [graph.slots])  # type: ignore[arg-type]


def _is_padded(graph: Graph) -> bool:
    return any(axis in PADDED_AXES for spec in graph.inputs for axis in spec.axes)


def _has_axis(graph: Graph, name: str, axis: str) -> bool:
    return any(spec.name == name and axis in spec.axes for spec in graph.inputs)


def _choice_count(graph: Graph) -> int:
    sizes = [spec.shape[spec.axes.index("choices")] for spec in graph.inputs if "choices" in spec.axes]
    return int(sizes[0]) if sizes else 0  # type: ignore[arg-type]


def _min_size(graph: Graph) -> int:
    """The smallest row: one token, or as many samples as the convolutions need."""
    frames = graph.frames
    return 1 if frames is None else (frames.fewest - 1) * frames.step + frames.size


def _row_size(shortest: int, longest: int, tokens: int) -> int:
    """The size of a row: that of a text of so many tokens, or for sound a share of the range that varies with it."""
    if shortest == 1:
        return min(tokens, longest)
    return shortest + (longest - shortest) * (tokens % 11) // 10


def _make_row(graph: Graph, texts: list[list[int]], index: int, size: int, seed: int | None = None) -> dict[str, Array]:
    """One row: every input without its batch dimension, at `size` along the padded axis. Its text is that of `index`,
    and its numbers come from `seed`, or `index`."""
    numbers = np.random.default_rng(index if seed is None else seed)
    start = index % len(texts)
    return {
        spec.name: _make_tensor(spec, texts[start:] + texts[:start], numbers, size)
        for spec in graph.inputs
        if spec.name not in _MASKS
    }


_MASKS = ("attention_mask", "pixel_mask")


def _make_tensor(spec: Input, texts: list[list[int]], numbers: np.random.Generator, size: int) -> Array:
    axes = spec.axes or ["batch", "length"]
    shape = [
        size if axis in PADDED_AXES else int(have)  # type: ignore[arg-type]
        for axis, have in zip(axes, spec.shape, strict=True)
        if axis not in ROWS
    ]
    if spec.name == "input_ids":
        count = int(np.prod(shape)) // shape[-1]
        return np.array([repeat_tokens(texts[each:] + texts, shape[-1]) for each in range(count)]).reshape(shape)
    if spec.name == "token_type_ids":
        return np.broadcast_to(np.arange(shape[-1]) >= (shape[-1] + 1) // 2, shape).astype(np.int64)
    if spec.dtype == "float32":
        return _make_signal(shape, numbers)
    return np.sort(numbers.integers(0, 100, shape), -1)


def _make_signal(shape: list[int], numbers: np.random.Generator) -> Array:
    """Slow waves with noise, of about unit size, as pictures and sound are."""
    waves = np.sin(np.arange(shape[-1]) * numbers.uniform(0.01, 0.3) + numbers.uniform(0, 6, (*shape[:-1], 1)))
    return (waves + 0.3 * numbers.standard_normal(shape)).astype(np.float32)


def answer(model: nn.Module, sample: ValidationSample, outputs: tuple[str, ...]) -> list[Answer]:
    """The eager answers, one row at a time and without padding."""
    return [_encode(model, row, outputs) for row in sample.tensors]


def _encode(model: nn.Module, row: dict[str, Array], outputs: tuple[str, ...]) -> Answer:
    inputs = {name: torch.from_numpy(each[None]) for name, each in row.items()}
    result = model(**inputs, return_dict=True)
    # Of texts and images, each with a batch dimension of its own, a row has one each.
    return Answer({name: result[name].float().numpy()[0] for name in output_names(model, outputs)})
