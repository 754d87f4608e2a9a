"""One forward pass over padded rows, cut back to what the caller gave: the base of every encoder's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import numpy as np

from ..advice import suggest_larger
from ..artifact.schema import Axis, Graph, Output
from ..artifact.tasks import makes_segments
from ..engines import replicas_of
from ..errors import InputError
from ..inputs.encoder_inputs import RUNNING, Rows, axes_of, input_names, named_inputs, read_rows
from ..inputs.padding import fill_padded, pad_beyond, unalign_rows
from ..inputs.tensors import ModelOutput, allocate, convert_like, to_numpy
from .base import CompiledModel
from .training_loss import with_labels

__all__ = ["Encoder"]

Array = np.ndarray[Any, Any]

_FLAGS: dict[Axis, str] = {
    "batch": "batch-size",
    "texts": "text-batch-size",
    "choices": "num-choices",
    "length": "sequence-length",
    "samples": "audio-sequence-length",
    "frames": "audio-sequence-length",
}
_UNITS = {"texts": "texts", "choices": "choices", "length": "tokens", "samples": "samples", "frames": "frames"}


class Encoder(CompiledModel):
    """A model that computes its answer in one forward pass."""

    @with_labels
    def __call__(self, *tensors: Any, **named: Any) -> ModelOutput:
        """One forward pass.

        Args:
            tensors, named: the model's inputs, numpy or torch, in their order or by name (`inputs` lists them):
                input_ids int64 [batch, length], for multiple choice [batch, choices, length];
                pixel_values float32 [batch, channels, height, width], of the compiled size;
                input_values float32 [batch, samples], or spectrograms of the compiled size;
                attention_mask of 0 and 1, by default all 1. Rows may be padded on either side; the answer is that of
                the row without padding;
                token_type_ids, bbox and pixel_mask for models that have them, by default all 0, 0 and 1. Models that
                have no segments of their own (GPT-2, XLM) take token_type_ids where their tokenizer makes them.

        Returns:
            The task's outputs by name, cut to the caller's sizes. What stands at padded positions of text means
            nothing. Frames of sound are as many as the longest row's samples make; behind a shorter row they are 0.

        Raises:
            InputError: the tensors do not fit each other or the compiled sizes.
        """
        specs = self.variant.graphs[0].inputs
        given = named_inputs(specs, tensors, named)
        kind = self.config.get("model_type")
        _check_segments(kind, self.artifact.contract.task, self.inputs, {**named, **given})
        limits = {"input_ids": self._vocabulary_size(), "token_type_ids": self._segment_count()}
        frames = self.variant.graphs[0].frames
        rows = read_rows(specs, {name: to_numpy(value) for name, value in given.items()}, limits, frames)
        self._check_rows(rows)
        parts = [rows.take_rows(specs, part) for part in self._batch_slices(rows.sizes["batch"])]
        sizes = self._output_sizes(rows)
        with self._lock:
            answers = self._run_all(parts, sizes)
        outputs = {
            spec.name: convert_like(
                next(iter(given.values())), self._join_parts([each[spec.name] for each in answers], spec, rows)
            )
            for spec in self.variant.graphs[0].outputs
        }
        return ModelOutput(outputs)

    def _check_rows(self, rows: Rows) -> None:
        """Raise InputError for rows that this model has no answer to."""

    def _segment_count(self) -> int | None:
        found = self.config.get("type_vocab_size")
        return found if type(found) is int and found > 0 else None

    @property
    def inputs(self) -> list[str]:
        """The names of the model's inputs, in their order."""
        return input_names(self.variant.graphs[0].inputs)

    @property
    def lengths(self) -> list[int]:
        """The compiled lengths of rows, in tokens, samples or frames; none where they do not differ."""
        return list(self.artifact.contract.shapes.sequence_length)

    def frames(self, samples: int) -> int:
        """How many frames the outputs have of a row of so many samples."""
        chain = self.variant.graphs[0].frames
        return samples if chain is None else chain.count(samples)

    def _output_sizes(self, rows: Rows) -> dict[Axis, int]:
        """The sizes that outputs are cut to: text to the caller's width, sound to the frames of its longest row."""
        sizes: dict[Axis, int] = {**rows.sizes, "length": rows.width}
        if rows.ends.size:
            sizes["frames"] = self.frames(int(rows.ends.max()))
        return sizes

    def _run_all(self, parts: Sequence[Rows], sizes: Mapping[Axis, int]) -> list[dict[str, Array]]:
        """Every part's answer; as many at a time as the engine has replicas."""
        width = min(replicas_of(self._engine), len(parts))
        if width < 2:
            return [self._run_part(part, sizes) for part in parts]
        with ThreadPoolExecutor(width) as pool:
            return list(pool.map(lambda part: self._run_part(part, sizes), parts))

    def _run_part(self, rows: Rows, sizes: Mapping[Axis, int]) -> dict[str, Array]:
        """Pad the rows to a graph's sizes, run it, and cut the padding off. The results own their memory."""
        graph = self._smallest_graph(rows)
        inputs = {spec.name: allocate(spec.shape, spec.dtype) for spec in graph.inputs}  # type: ignore[arg-type]
        for spec in graph.inputs:
            axes = axes_of(spec)
            if spec.name in rows.tensors:
                source = rows.tensors[spec.name]
                wanted = tuple(slice(rows.sizes[axis]) if axis in RUNNING else slice(None) for axis in axes)
                fill_padded(inputs[spec.name], source[wanted], axes, spec.pad)
            else:
                inputs[spec.name].fill(spec.pad)
        outputs = {spec.name: allocate(spec.shape, spec.dtype) for spec in graph.outputs}  # type: ignore[arg-type]
        self._engine.bind(graph.name, inputs, outputs)()
        sizes = {**sizes, "batch": rows.sizes["batch"]}
        return {spec.name: _resize(outputs[spec.name], spec, sizes) for spec in graph.outputs}

    def _smallest_graph(self, rows: Rows) -> Graph:
        """The smallest graph that holds these rows. Raises InputError, which names the size that no graph has."""
        graphs = [graph for graph in self.variant.graphs if _fits_fixed_sizes(graph, rows)]
        if not graphs:
            raise InputError(self._describe_misfit(rows))
        for axis, size in rows.sizes.items():
            held = [graph for graph in graphs if _compiled_sizes(graph)[axis] >= size]
            if not held:
                raise InputError(
                    self._describe_too_large(axis, size, max(_compiled_sizes(graph)[axis] for graph in graphs))
                )
            graphs = held
        return min(graphs, key=lambda graph: prod(_compiled_sizes(graph).values()))

    def _describe_too_large(self, axis: Axis, size: int, largest: int) -> str:
        what = f"There are {size} texts" if axis == "texts" else f"A row has {size} {_UNITS[axis]}"
        shorter = "" if axis in ("texts", "choices") else " Shorten it."
        return f"{what}; the model was compiled for {largest}.{shorter} {self._suggest_larger_axis(axis, size)}"

    def _describe_misfit(self, rows: Rows) -> str:
        """Which input has another size than compiled along a dimension that is not padded."""
        for spec in self.variant.graphs[0].inputs:
            choices = [_fixed_sizes(each.shape, axes_of(spec)) for graph in self.variant.graphs
                       for each in graph.inputs if each.name == spec.name]  # fmt: skip
            if spec.name in rows.tensors:
                given = _fixed_sizes(rows.tensors[spec.name].shape, axes_of(spec))
                if given not in choices:
                    known = " or ".join(dict.fromkeys("x".join(map(str, each)) for each in choices))
                    return (
                        f"{spec.name} is {'x'.join(map(str, given))} where the model was compiled for {known}, and it "
                        f"is neither resized nor padded. Prepare it as the checkpoint's own processor does, or compile "
                        f"the model for that size."
                    )
        return "The inputs have sizes that were not compiled together."

    def _join_parts(self, pieces: list[Array], spec: Output, rows: Rows) -> Array:
        """Join the parts of a batch; move rows of text back to where the caller's padding had them, and set frames
        behind a row's end to 0."""
        whole = np.concatenate(pieces) if spec.slice[0] == "batch" else pieces[0]
        if "length" in spec.slice:
            whole = unalign_rows(whole, rows.shifts)
        if "frames" in spec.slice:
            whole = pad_beyond(whole, np.array([self.frames(int(end)) for end in rows.ends]), 0)
        return np.ascontiguousarray(whole)

    def _suggest_larger_axis(self, axis: Axis, size: int) -> str:
        """A sentence with the command that compiles the model for `size` along one axis."""
        sizes: dict[Axis, list[int]] = {}
        for graph in self.variant.graphs:
            for name, found in _compiled_sizes(graph).items():
                sizes[name] = sorted({*sizes.get(name, []), found})
        sizes[axis] = [size]
        flags = " ".join(f"--{_FLAGS[name]} {','.join(map(str, found))}" for name, found in sizes.items())
        return suggest_larger(self.artifact, flags, size if axis == "length" else 0)


_WORDS_FOR_SEGMENTS = (
    "codegen", "ctrl", "flaubert", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt", "xlm",
)  # fmt: skip
"""Model types that embed segments as words: to them those of 0 are not the same as none."""


def _check_segments(kind: Any, task: str, inputs: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raise InputError where token_type_ids are missed, or given to a model that was compiled without."""
    has = "token_type_ids" in inputs
    differs = kind in _WORDS_FOR_SEGMENTS or makes_segments(kind, task)
    if not differs or has == (given.get("token_type_ids") is not None):
        return
    if has:
        raise InputError(
            f"This {kind} model needs token_type_ids: its tokenizer makes them, and without them it answers otherwise. "
            f"Pass all that model.tokenizer(texts) makes, or zeros."
        )
    raise InputError(
        f"This {kind} model was compiled without token_type_ids, as its tokenizer makes none, and segments of 0 would "
        f"change its answer. Leave token_type_ids out."
    )


def _compiled_sizes(graph: Graph) -> dict[Axis, int]:
    """The size of each axis of a graph's inputs."""
    return {
        axis: size
        for spec in graph.inputs
        for axis, size in zip(axes_of(spec), spec.shape, strict=True)
        if axis is not None and isinstance(size, int)
    }


def _fits_fixed_sizes(graph: Graph, rows: Rows) -> bool:
    """Whether the dimensions that are never padded have this graph's sizes."""
    return all(
        _fixed_sizes(spec.shape, axes_of(spec)) == _fixed_sizes(rows.tensors[spec.name].shape, axes_of(spec))
        for spec in graph.inputs
        if spec.name in rows.tensors
    )


def _fixed_sizes(shape: Sequence[Any], axes: Sequence[Axis | None]) -> list[int]:
    return [int(size) for size, axis in zip(shape, axes, strict=True) if axis is None]


def _resize(array: Array, spec: Output, sizes: Mapping[Axis, int]) -> Array:
    """Cut or zero-pad an output along every axis that has a name."""
    shape = [sizes[axis] if axis else size for axis, size in zip(spec.slice, array.shape, strict=True)]
    corner = tuple(slice(min(size, have)) for size, have in zip(shape, array.shape, strict=True))
    if all(size <= have for size, have in zip(shape, array.shape, strict=True)):
        return array[corner]
    result = np.zeros(shape, array.dtype)
    result[corner] = array[corner]
    return result
