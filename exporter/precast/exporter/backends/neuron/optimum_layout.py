"""`--layout optimum-neuron`: an artifact of ours that optimum-neuron opens as well, for its users to move both ways.

The graph lies in `model.neuron`, and `config.json` has the section `neuron` as optimum-neuron's own export writes it
(`store_compilation_config` in optimum/neuron/utils/argument_utils.py of release 0.4.6), beside our contract, of which
it knows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec.structs import replace as replaced

from precast.runtime.artifact.optimum_neuron import FILE, SECTION, TASKS, text_inputs
from precast.runtime.artifact.schema import Axis, Graph
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import ExportError

from ...checkpoint.checkpoint import Checkpoint
from ...options import ExportOptions
from ...options.layout import OPTIMUM_NEURON
from .. import Compiled
from .options import NeuronOptions

__all__ = ["OptimumLayout"]

_AXES: dict[Axis, str] = {
    "batch": "static_batch_size",
    "length": "static_sequence_length",
    "choices": "static_num_choices",
    "samples": "static_audio_sequence_length",
}
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class OptimumLayout:
    """See HasLayouts: the layout "optimum-neuron"."""

    def prepare(self, checkpoint: Checkpoint, options: ExportOptions) -> Checkpoint:
        """Its second output is taken for a pooler's, never for an embedding."""
        return replace(checkpoint, embeds_sentences=False) if options.layout == OPTIMUM_NEURON else checkpoint

    def check_graphs(self, graphs: Sequence[Graph], task: Task, checkpoint: Checkpoint, options: ExportOptions) -> None:
        """Raise ExportError for graphs that it has no place for, or would feed otherwise."""
        if options.layout != OPTIMUM_NEURON:
            return
        flag = f"layout={OPTIMUM_NEURON!r}"
        if len(graphs) != 1 or graphs[0].role != "encode" or task.name not in TASKS:
            raise ExportError(
                f"{flag} holds one graph of an encoder, for: {', '.join(TASKS)}. {checkpoint.name} is exported for "
                f"{task.name} as {', '.join(graph.name for graph in graphs)}: decoders of optimum-neuron are bundles "
                f"that sample on the device, which this is not. Leave layout= out."
            )
        mine = [spec.name for spec in graphs[0].inputs]
        theirs = (
            text_inputs(checkpoint.config.model_type, checkpoint.written_config) if mine[0] == "input_ids" else mine[:1]
        )
        if mine != theirs:
            known = "which it has not" if theirs is None else f"whose inputs it takes to be {', '.join(theirs)}"
            raise ExportError(
                f"{flag}: optimum-neuron would not feed this graph, whose inputs are {', '.join(mine)}: it goes by the "
                f"model type, {checkpoint.config.model_type}, {known}. Leave layout= out."
            )

    def lay_out(
        self, compiled: Compiled, task: Task, config: dict[str, Any], options: ExportOptions, stage: Path
    ) -> Compiled:
        """Name the compiled file as optimum-neuron does, and write its section into `config`."""
        if options.layout != OPTIMUM_NEURON:
            return compiled
        (graph,) = compiled.graphs
        (stage / graph.file).rename(stage / FILE)
        config[SECTION] = _section(compiled, graph, task.name, config["model_type"], options)
        return replace(compiled, graphs=[replaced(graph, file=FILE)])


def _section(compiled: Compiled, graph: Graph, task: str, model_type: str, options: ExportOptions) -> dict[str, Any]:
    neuron: NeuronOptions = options.backend_options
    precision = options.precision
    cast = None if precision.auto_cast == "none" else precision
    return {
        "compiler_type": compiled.compiler.name,
        "compiler_version": compiled.compiler.version,
        "inline_weights_to_neff": True,
        **_sizes(graph),
        # The file takes the compiled batch alone; slices of larger ones are our runtime's.
        "dynamic_batch_size": False,
        "tensor_parallel_size": 1,
        "optlevel": str(neuron.optlevel or 2),
        "auto_cast": cast and cast.auto_cast,
        "auto_cast_type": cast and cast.cast_type,
        "instance_type": neuron.instance_type,
        "int_dtype": "int64",
        "float_dtype": _SHORT[precision.dtype],
        "model_type": model_type,
        "output_attentions": False,
        "output_hidden_states": False,
        "task": task,
    }


def _sizes(graph: Graph) -> dict[str, Any]:
    main = graph.inputs[0]
    found: dict[str, Any] = {
        _AXES[axis]: size for axis, size in zip(main.axes, main.shape, strict=True) if axis in _AXES
    }
    if main.name == "pixel_values":
        names = ("static_num_channels", "static_height", "static_width")
        found |= dict(zip(names, main.shape[1:], strict=True))
    return found
