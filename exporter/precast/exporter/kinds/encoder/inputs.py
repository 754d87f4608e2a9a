"""An encoder's inputs: tensors by modality, their axes, and every combination of sizes to compile."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from precast.runtime.artifact.schema import Axis
from precast.runtime.artifact.tasks import Task, makes_segments
from precast.runtime.errors import CheckpointError, UsageError

from ...checkpoint.checkpoint import Checkpoint
from ...options import SIZE_EXAMPLES, ExportOptions, keyword_of
from ..plan import TensorPlan, check_blocks, check_length
from .frames import read_convolutions

__all__ = ["PADDED_AXES", "Sizes", "make_example", "padded_axis", "plan_inputs", "plan_sizes"]

Sizes = Mapping[Axis, int]

PADDED_AXES: tuple[Axis, ...] = ("length", "samples", "frames")
"""The axes along which rows differ in size and are padded."""

_FLAGS: dict[Axis, str] = {
    "batch": "batch_size",
    "texts": "text_batch_size",
    "choices": "num_choices",
    "length": "sequence_length",
    "samples": "audio_sequence_length",
    "frames": "audio_sequence_length",
}

READS_PADDING = ("siglip", "siglip_text_model", "siglip2", "siglip2_text_model", "fnet")
"""Model types without a mask, to which padding is input like any other: SigLIP was trained so and pools the last
position, FNet mixes all positions by a Fourier transform. Their rows must have a compiled length exactly."""


def plan_inputs(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> tuple[TensorPlan, ...]:
    """The model's inputs with their axes, the main one first; those that `model.forward` does not take are left out.

    Raises UsageError where neither options nor configuration name a size that is needed, CheckpointError for a model
    of anything but text, images or sound.
    """
    accepted = inspect.signature(model.forward).parameters
    specs = _inputs_by_modality(checkpoint, options, task, model)
    return tuple(spec for spec in specs if spec.name in accepted)


def _inputs_by_modality(
    checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module
) -> list[TensorPlan]:
    main = getattr(model, "main_input_name", "input_ids")
    if "text_batch_size" in task.axes:
        return [*_text_inputs(checkpoint, task, ("texts",)), *_image_inputs(checkpoint, options)]
    parts = {"text_config", "vision_config"}
    if main != "pixel_values" and all(hasattr(checkpoint.config, part) for part in parts):
        raise CheckpointError(
            f"{type(model).__name__} reads images and texts together, which precast compiles for "
            f"zero-shot-image-classification: its answer has image_embeds and text_embeds too."
        )
    if main == "input_ids":
        return _text_inputs(checkpoint, task, ("batch", "choices") if "num_choices" in task.axes else ("batch",))
    if main == "pixel_values":
        return _image_inputs(checkpoint, options)
    if main in ("input_values", "input_features"):
        return _sound_inputs(checkpoint, main)
    raise CheckpointError(
        f"{type(model).__name__} reads {main!r}, which precast does not know; it compiles models of text (input_ids), "
        f"images (pixel_values) and sound (input_values, input_features)."
    )


def _text_inputs(checkpoint: Checkpoint, task: Task, rows: tuple[Axis, ...]) -> list[TensorPlan]:
    axes: tuple[Axis, ...] = (*rows, "length")
    config = checkpoint.text_config
    if checkpoint.config.model_type in READS_PADDING:
        names = {"input_ids": _padding_id(checkpoint)}
    else:
        names = {"input_ids": _padding_id(checkpoint), "attention_mask": 0}
    if _has_segments(checkpoint, config, task):
        names["token_type_ids"] = 0
    exact: tuple[Axis, ...] = () if "attention_mask" in names else ("length",)
    plain = [TensorPlan(name, "int64", axes, pad, exact) for name, pad in names.items()]
    return [*plain, TensorPlan("bbox", "int64", (*axes, 4), 0, exact)]


def _has_segments(checkpoint: Checkpoint, config: Any, task: Task) -> bool:
    """Whether `token_type_ids` are an input: where the configuration counts them, or the tokenizer makes them. GPT-2
    and its relatives take them too, but their answer without any is not the answer to segments of 0, nor is that of a
    model that makes some of its own."""
    if kinds := getattr(config, "type_vocab_sizes", None):
        raise CheckpointError(
            f"A model of type {checkpoint.config.model_type!r} reads {len(kinds)} token_type_ids per token, made from "
            f"tables; precast passes one."
        )
    count = getattr(config, "type_vocab_size", None)
    if count is not None and not makes_segments(checkpoint.config.model_type, task.name):
        return bool(count >= 2)
    return checkpoint.tokenizer is not None and "token_type_ids" in checkpoint.tokenizer.model_input_names


def _padding_id(checkpoint: Checkpoint) -> int:
    """The id that fills padding. CLIP pools at the first end-of-text token, so its padding must be another one."""
    pad, ends = checkpoint.pad_token_id, getattr(checkpoint.text_config, "eos_token_id", None)
    if "clip" in checkpoint.config.model_type and ends is not None:
        return 0 if ends != 0 else 1
    return pad


def _image_inputs(checkpoint: Checkpoint, options: ExportOptions) -> list[TensorPlan]:
    asked = options.image_size * 2 if len(options.image_size) == 1 else options.image_size
    height, width = asked or _image_size(checkpoint)
    channels = getattr(checkpoint.vision_config, "num_channels", 3)
    return [
        TensorPlan("pixel_values", "float32", ("batch", channels, height, width)),
        TensorPlan("pixel_mask", "int64", ("batch", height, width), 1),
    ]


def _image_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width, by the configuration or by the checkpoint's image processor."""
    processor = checkpoint.image_settings
    is_cropped = processor.get("do_center_crop", "crop_size" in processor)
    given = processor.get("crop_size") if is_cropped else processor.get("size")
    for found in (getattr(checkpoint.vision_config, "image_size", None), given):
        if (size := _as_pair(found)) is not None:
            return size
    raise UsageError(
        f"Neither the config of {checkpoint.name} nor a preprocessor_config.json says how large its images are. Add "
        f"image_size=HEIGHT,WIDTH, for make_example: image_size=224"
    )


def _as_pair(given: Any) -> tuple[int, int] | None:
    """(height, width) of a side, a pair, or a processor's dictionary of either; None for anything else."""
    if isinstance(given, dict):
        side = given.get("shortest_edge")
        given = (given.get("height", side), given.get("width", side))
    pair = (given, given) if isinstance(given, int) else given
    if not isinstance(pair, list | tuple) or not pair or not all(isinstance(each, int) for each in pair):
        return None
    return pair[0], pair[-1]


def _sound_inputs(checkpoint: Checkpoint, main: str) -> list[TensorPlan]:
    config = checkpoint.config
    if getattr(config, "conv_kernel", None):
        axes: tuple[Axis, ...] = ("batch", "samples")
        return [TensorPlan(main, "float32", axes), TensorPlan("attention_mask", "int64", axes)]
    if hasattr(config, "feature_projection_input_dim"):
        features = TensorPlan(main, "float32", ("batch", "frames", config.feature_projection_input_dim))
        return [features, TensorPlan("attention_mask", "int64", ("batch", "frames"))]
    if hasattr(config, "max_source_positions"):
        # Whisper's two convolutions halve what its spectrogram, [mels, frames], must hold in full.
        return [TensorPlan(main, "float32", ("batch", config.num_mel_bins, 2 * config.max_source_positions))]
    return [TensorPlan(main, "float32", ("batch", config.max_length, config.num_mel_bins))]


def padded_axis(inputs: Sequence[TensorPlan]) -> Axis | None:
    """The axis along which rows are padded; None where none is."""
    return next((axis for axis in PADDED_AXES if any(axis in spec.axes for spec in inputs)), None)


def plan_sizes(
    checkpoint: Checkpoint, options: ExportOptions, task: Task, inputs: Sequence[TensorPlan]
) -> list[dict[Axis, int]]:
    """Every combination of sizes to compile. Raises UsageError for missing, impossible and unneeded sizes."""
    axes = [axis for axis in _FLAGS if any(axis in spec.axes for spec in inputs)]
    _check_given(checkpoint, options, task, axes, inputs)
    given = {axis: _values(options, axis) for axis in axes}
    if "length" in given:
        check_length(checkpoint, max(given["length"]))
        check_blocks(checkpoint, max(given["length"]))
    if "samples" in given:
        _check_samples(checkpoint, min(given["samples"]))
    return [dict(zip(axes, sizes, strict=True)) for sizes in product(*given.values())]


def _values(options: ExportOptions, axis: Axis) -> tuple[int, ...]:
    found = options.batch_sizes if axis == "batch" else getattr(options, _FLAGS[axis])
    return (found,) if isinstance(found, int) else tuple(sorted(found or ()))


def _check_given(
    checkpoint: Checkpoint, options: ExportOptions, task: Task, axes: Sequence[Axis], inputs: Sequence[TensorPlan]
) -> None:
    needed = [_FLAGS[axis] for axis in axes]
    options.check_sizes(checkpoint.given, task.name, needed, checkpoint.max_length)
    is_seen = any(spec.name == "pixel_values" for spec in inputs)
    known = {*needed, "image_size"} if is_seen else set(needed)
    if useless := [keyword_of(name) for name in SIZE_EXAMPLES if getattr(options, name) and name not in known]:
        raise UsageError(
            f"{', '.join(useless)} fixes nothing here: {checkpoint.config.model_type} reads "
            f"{', '.join(spec.name for spec in inputs)} for {task.name}, compiled for {', '.join(needed)}."
        )


def _check_samples(checkpoint: Checkpoint, samples: int) -> None:
    fewest = read_convolutions(checkpoint.config.to_dict()).min_samples(1)
    if samples < fewest:
        raise UsageError(
            f"audio_sequence_length={samples}: the convolutions of {checkpoint.name} need at least {fewest} samples."
        )


def make_example(inputs: Sequence[TensorPlan], sizes: Sizes, device: str = "cpu") -> dict[str, Tensor]:
    """Tensors of these sizes to run or trace a model with: zeros for floats, ones for integers."""
    made = {}
    for spec in inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes]
        fill = torch.zeros if spec.dtype == "float32" else torch.ones
        made[spec.name] = fill(shape, dtype=getattr(torch, spec.dtype), device=device)
    return made
