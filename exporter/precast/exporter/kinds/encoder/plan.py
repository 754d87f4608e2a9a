"""The plan of an encoder: one graph per combination of compiled sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from precast.runtime.artifact.schema import Axis, Frames, Graph
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import CheckpointError, ExportError

from ...architectures import make_traceable
from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.sentence_transformers import output_names
from ...options import ExportOptions
from ..plan import GraphPlan, Plan, TensorPlan, common_fields, run_skeleton
from .frames import read_convolutions
from .inputs import Sizes, make_example, padded_axis, plan_inputs, plan_sizes
from .padding_invariance import allow_batches, check_paddable

__all__ = ["EncoderGraph", "EncoderPlan", "plan"]

Trials = dict[Axis, tuple[int, int]]

_TRIALS: Trials = {
    "batch": (2, 3),
    "texts": (8, 10),
    "choices": (4, 6),
    "length": (5, 7),
    "frames": (31, 44),
}
"""Two sizes to try of each axis, so that every pair of sizes belongs to one axis."""


@dataclass(frozen=True)
class EncoderGraph(GraphPlan):
    """A graph with the size of each of its axes; `length` is that along which rows are padded, or 0."""

    sizes: Sizes


@dataclass(frozen=True, kw_only=True)
class EncoderPlan(Plan):
    """One graph per combination of sizes."""

    graphs: tuple[EncoderGraph, ...]
    inputs: tuple[TensorPlan, ...]
    outputs: tuple[TensorPlan, ...]
    frames: Frames | None

    @property
    def reads_text(self) -> bool:
        return any(spec.name == "input_ids" for spec in self.inputs)

    def outline(self) -> list[Graph]:
        return [self.describe(graph) for graph in self.graphs]

    def as_json(self) -> dict[str, Any]:
        """As `Plan.as_json`, with the inputs' shapes in the last graph, which is the largest."""
        shapes = {spec.name: spec.shape for spec in self.outline()[-1].inputs}
        return {**super().as_json(), "inputs": shapes}

    def describe(self, graph: EncoderGraph) -> Graph:
        """The graph in the words of the contract; `file` is the backend's to fill in."""
        return Graph(
            name=graph.name,
            role=graph.role,
            file="pending",
            batch=graph.batch,
            length=graph.length,
            capacity=0,
            inputs=[spec.as_input(graph.sizes) for spec in self.inputs],
            outputs=[spec.as_output(graph.sizes) for spec in self.outputs],
            cache=[],
            frames=self.frames,
        )


def plan(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> EncoderPlan:
    """Plan one graph per combination of sizes. Raises UsageError for missing or impossible shapes, CheckpointError for
    a model whose padded rows would not get the answer of the row alone."""
    check_paddable(model, task)
    inputs = plan_inputs(checkpoint, options, task, model)
    sizes = plan_sizes(checkpoint, options, task, inputs)
    frames = _plan_frames(checkpoint, task)
    graphs = _plan_graphs(sizes, padded_axis(inputs), frames)
    return EncoderPlan(
        **common_fields(checkpoint, options, task, model),
        batch_size=max(graph.batch for graph in graphs),
        lengths=tuple(sorted({graph.length for graph in graphs if isinstance(graph.length, int)} - {0})),
        graphs=graphs,
        frames=frames,
        inputs=inputs,
        outputs=_plan_outputs(checkpoint, options, task, model, inputs),
    )


def _plan_graphs(sizes: Sequence[Sizes], padded: Axis | None, frames: Frames | None) -> tuple[EncoderGraph, ...]:
    """One graph per combination, named after the sizes that differ between them."""
    differing = [axis for axis in sizes[0] if len({each[axis] for each in sizes}) > 1]
    return tuple(
        EncoderGraph(
            name="_".join(["model", *(["x".join(str(each[axis]) for axis in differing)] if differing else [])]),
            role="encode",
            batch=each["batch"],
            length=each[padded] if padded else 0,
            sizes={**each, "frames": frames.count(each["samples"])} if "samples" in each and frames else each,
        )
        for each in sizes
    )


def _plan_frames(checkpoint: Checkpoint, task: Task) -> Frames | None:
    """How samples become frames; None for models without frames.

    SEW needs frames for one pool; an x-vector's standard deviation needs two frames after the model's own layers.
    """
    config = checkpoint.config.to_dict()
    chain = read_convolutions(config)
    fewest = int(config.get("squeeze_factor", 1))
    if task.name == "audio-xvector":
        layers = zip(config["tdnn_kernel"], config["tdnn_dilation"], strict=True)
        fewest = 2 + sum((kernel - 1) * dilation for kernel, dilation in layers)
    return chain.as_frames(fewest) if chain.stages or fewest > 1 else None


def _plan_outputs(
    checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module, inputs: Sequence[TensorPlan]
) -> tuple[TensorPlan, ...]:
    """Run the model without weights at two sizes: an output dimension that changes like an axis is that axis."""
    trials = _trial_sizes(checkpoint)
    sizes = [{axis: pair[index] for axis, pair in trials.items()} for index in (0, 1)]
    small, large = (_answer(options, task, model, make_example(inputs, each, "meta")) for each in sizes)
    axes = {pair: axis for axis, pair in trials.items()}
    exact = tuple(axis for spec in inputs for axis in spec.exact)
    found = []
    for name in output_names(model, task.outputs):
        if small.get(name) is None:
            raise CheckpointError(f"{type(model).__name__} gives no {name!r}, which the task {task.name!r} is about.")
        pairs = zip(small[name].shape, large[name].shape, strict=True)
        named = tuple(_axis(model, name, pair, axes) for pair in pairs)
        found.append(TensorPlan(name, "float32", named, exact=exact))
    return tuple(found)


def _answer(options: ExportOptions, task: Task, model: nn.Module, tensors: dict[str, Tensor]) -> Any:
    try:
        with make_traceable(model), allow_batches(model):
            return run_skeleton(model, task, tensors)
    except ExportError as error:
        if not options.image_size:
            raise
        size = ",".join(map(str, options.image_size))
        raise ExportError(
            f"{error} It may be that this model cannot have images of image_size={size}: without it they are as "
            f"large as its configuration says."
        ) from error


def _trial_sizes(checkpoint: Checkpoint) -> Trials:
    chain = read_convolutions(checkpoint.config.to_dict())
    if not chain.stages:
        return _TRIALS
    small, large = _TRIALS["frames"]
    return {**_TRIALS, "samples": (chain.min_samples(small), chain.min_samples(large))}


def _axis(model: nn.Module, name: str, pair: tuple[int, int], axes: dict[tuple[int, int], Axis]) -> int | Axis:
    if pair[0] == pair[1]:
        return pair[0]
    if pair in axes:
        return axes[pair]
    raise CheckpointError(
        f"{type(model).__name__}'s {name!r} grows with its input in a way that precast does not know: from "
        f"{pair[0]} to {pair[1]}."
    )
