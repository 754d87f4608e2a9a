"""Encoders: one graph per compiled length, each a whole forward pass."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from precast.runtime.artifact.schema import Axis, Dtype, Graph
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import UsageError

from ..options import ExportOptions
from ..plan import GraphPlan, Plan, TensorPlan, check_length, common, run_skeleton
from ..resolve import Checkpoint

__all__ = ["EncoderPlan", "plan"]


@dataclass(frozen=True, kw_only=True)
class EncoderPlan(Plan):
    """One graph per length, each a whole forward pass."""

    inputs: tuple[TensorPlan, ...]
    outputs: tuple[TensorPlan, ...]

    def outline(self) -> list[Graph]:
        return [self.describe(graph) for graph in self.graphs]

    def describe(self, graph: GraphPlan) -> Graph:
        """The graph in the words of the contract; `file` is the backend's to fill in."""
        sizes = {"batch": graph.batch, "length": graph.length}
        return Graph(
            name=graph.name,
            role=graph.role,
            file="pending",
            batch=graph.batch,
            length=graph.length,
            capacity=0,
            inputs=[spec.as_input(sizes) for spec in self.inputs],
            outputs=[spec.as_output(sizes) for spec in self.outputs],
            cache=[],
        )


def plan(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> EncoderPlan:
    """A graph per length. Raises UsageError for missing or impossible shapes."""
    if missing := [axis for axis in task.axes if not getattr(options, axis)]:
        flags = " and ".join(f"--{axis.replace('_', '-')} N" for axis in missing)
        raise UsageError(
            f"The task {task.name!r} is compiled for fixed shapes: {', '.join(task.axes)}. Add {flags}, for example: "
            f"precast export {checkpoint.given} --batch-size 1 --sequence-length 128 -o OUT"
        )
    if options.prefill_lengths:
        raise UsageError(f"--prefill-lengths is for decoders; the task {task.name!r} has no prefill.")
    lengths = tuple(sorted(options.sequence_length))
    check_length(checkpoint, lengths[-1])
    batch = options.batch_size or 1
    names = ["model"] if len(lengths) == 1 else [f"model_{length}" for length in lengths]
    return EncoderPlan(
        **common(checkpoint, options, task, model),
        batch_size=batch,
        lengths=lengths,
        graphs=tuple(GraphPlan(name, "encode", batch, length) for name, length in zip(names, lengths, strict=True)),
        inputs=_encoder_inputs(checkpoint, model),
        outputs=_encoder_outputs(model, task, options.dtype),
    )


def _encoder_inputs(checkpoint: Checkpoint, model: nn.Module) -> tuple[TensorPlan, ...]:
    accepted = inspect.signature(model.forward).parameters
    pads = {"input_ids": checkpoint.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    if getattr(checkpoint.text_config, "type_vocab_size", 2) < 2:
        del pads["token_type_ids"]
    return tuple(TensorPlan(name, "int64", ("batch", "length"), pad) for name, pad in pads.items() if name in accepted)


def _encoder_outputs(model: nn.Module, task: Task, dtype: Dtype) -> tuple[TensorPlan, ...]:
    """Run the weightless model at two sizes: a dimension that follows the batch or the length is that axis."""
    small, large = (_encoder_shapes(model, task, batch, length) for batch, length in ((2, 5), (3, 7)))
    axes: dict[tuple[int, int], Axis] = {(2, 3): "batch", (5, 7): "length"}
    return tuple(
        TensorPlan(
            name, dtype, tuple(a if a == b else axes[a, b] for a, b in zip(small[name], large[name], strict=True))
        )
        for name in task.outputs
    )


def _encoder_shapes(model: nn.Module, task: Task, batch: int, length: int) -> dict[str, tuple[int, ...]]:
    example = {"input_ids": torch.ones(batch, length, dtype=torch.int64, device="meta")}
    result = run_skeleton(model, task, example)
    return {name: tuple(result[name].shape) for name in task.outputs}
