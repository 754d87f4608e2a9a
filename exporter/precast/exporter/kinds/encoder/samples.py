"""What an encoder is asked before it is published, and what the eager model says to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from precast.runtime.artifact.schema import Graph, Input

from ...checkpoint.sentence_transformers import output_names
from ..samples import Answer, ValidationSample, repeat
from .inputs import RUNNING

__all__ = ["answer", "validation_samples"]

Array = np.ndarray[Any, Any]
ROWS = ("batch", "texts")


def validation_samples(graphs: list[Graph], texts: list[list[int]]) -> list[ValidationSample]:
    """Each graph is asked about ordinary rows, padded on either side, and about the edges of its shapes."""
    return [sample for graph in graphs for sample in _samples(graph, texts)]


def _samples(graph: Graph, texts: list[list[int]]) -> Iterator[ValidationSample]:
    """Sizes run over the batch, so that rows of one sample differ."""
    shortest, longest = _shortest(graph), int(graph.length)  # type: ignore[arg-type]
    sizes = [_between(shortest, longest, len(text)) for text in texts]
    rows = [_row(graph, texts, index, sizes[index % len(sizes)]) for index in range(_most(graph))]
    name = f"{graph.name}: "
    yield ValidationSample(name + "rows of all sizes, padded right", "outputs", tensors=rows)
    yield ValidationSample(name + "a short batch", "outputs", tensors=rows[: max(1, len(rows) - 1)])
    if _is_padded(graph):
        yield ValidationSample(name + "rows of all sizes, padded left", "outputs", tensors=rows, side="left")
        yield ValidationSample(name + "the shortest row", "outputs", tensors=[_row(graph, texts, 0, shortest)])
        yield ValidationSample(name + f"all of {longest}", "outputs", tensors=[_row(graph, texts, 1, longest)])
    if _choices(graph) > 1:
        fewer = {name: each[:1] if _has(graph, name, "choices") else each for name, each in rows[0].items()}
        yield ValidationSample(name + "one choice", "outputs", tensors=[fewer])


def _most(graph: Graph) -> int:
    """How many rows one call holds: where there are texts besides images, a row is one of each."""
    sizes = [size for spec in graph.inputs for axis, size in zip(spec.axes, spec.shape, strict=False) if axis in ROWS]
    return min(int(size) for size in sizes or [graph.slots])  # type: ignore[arg-type]


def _is_padded(graph: Graph) -> bool:
    return any(axis in RUNNING for spec in graph.inputs for axis in spec.axes)


def _has(graph: Graph, name: str, axis: str) -> bool:
    return any(spec.name == name and axis in spec.axes for spec in graph.inputs)


def _choices(graph: Graph) -> int:
    sizes = [spec.shape[spec.axes.index("choices")] for spec in graph.inputs if "choices" in spec.axes]
    return int(sizes[0]) if sizes else 0  # type: ignore[arg-type]


def _shortest(graph: Graph) -> int:
    """One token, or as many samples as the convolutions need."""
    frames = graph.frames
    return 1 if frames is None else (frames.fewest - 1) * frames.step + frames.size


def _between(shortest: int, longest: int, tokens: int) -> int:
    """A row's size: that of a text, or for sound a share that differs from text to text."""
    if shortest == 1:
        return min(tokens, longest)
    return shortest + (longest - shortest) * (tokens % 11) // 10


def _row(graph: Graph, texts: list[list[int]], index: int, size: int) -> dict[str, Array]:
    """One row: every input without its dimension of the batch, at `size` along the running axis."""
    return {spec.name: _tensor(graph, spec, texts, index, size) for spec in graph.inputs if spec.name not in _MASKS}


_MASKS = ("attention_mask", "pixel_mask")


def _tensor(graph: Graph, spec: Input, texts: list[list[int]], index: int, size: int) -> Array:
    axes = spec.axes or ["batch", "length"]
    shape = [
        size if axis in RUNNING else int(have)  # type: ignore[arg-type]
        for axis, have in zip(axes, spec.shape, strict=True)
        if axis not in ROWS
    ]
    numbers = np.random.default_rng(index)
    if spec.name == "input_ids":
        count = int(np.prod(shape)) // shape[-1]
        return np.array([repeat(texts[index + each :] + texts, shape[-1]) for each in range(count)]).reshape(shape)
    if spec.name == "token_type_ids":
        return np.broadcast_to(np.arange(shape[-1]) >= (shape[-1] + 1) // 2, shape).astype(np.int64)
    if spec.dtype == "float32":
        return _signal(shape, numbers)
    return np.sort(numbers.integers(0, 100, shape), -1)


def _signal(shape: list[int], numbers: np.random.Generator) -> Array:
    """Slow waves with noise, of about unit size, as pictures and sound are."""
    waves = np.sin(np.arange(shape[-1]) * numbers.uniform(0.01, 0.3) + numbers.uniform(0, 6, (*shape[:-1], 1)))
    return (waves + 0.3 * numbers.standard_normal(shape)).astype(np.float32)


def answer(model: nn.Module, sample: ValidationSample, outputs: tuple[str, ...]) -> list[Answer]:
    """The eager answers, one row at a time and without padding."""
    return [_encode(model, row, outputs) for row in sample.tensors]


def _encode(model: nn.Module, row: dict[str, Array], outputs: tuple[str, ...]) -> Answer:
    inputs = {name: torch.from_numpy(each[None]) for name, each in row.items()}
    result = model(**inputs, return_dict=True)
    # A row has one text and one image, where both have dimensions of their own.
    return Answer({name: result[name].float().numpy()[0] for name in output_names(model, outputs)})
