"""Strategies: the Neuron SDK's ways to compile graph bodies to files, behind one small interface.

They run in the child process, where the SDK is imported; the exporter uses only their file names and weights. `trace`
and `model-builder` are two of the three stacks that AWS publishes. The third, TorchNeuron, would be one class here: it
compiles through `torch.compile(backend="neuron")`, on a device only, and saves no file, so there is nothing to call yet
(frameworks/torch/pytorch-native-overview.rst of the Neuron documentation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from msgspec import Struct
from torch import Tensor

from precast.runtime.artifact.schema import Graph

from .collectives import call_collectives
from .shared_graphs import SharedGraphs
from .xla_program import Body, OneGraph, example_inputs, step_inputs

__all__ = ["STRATEGIES", "Item", "Job", "Strategy"]


class Item(Struct, frozen=True):
    """One graph to compile: its contract, and the file of its lowered program."""

    graph: Graph
    program: str


class Job(Struct, frozen=True):
    """A job: one file for a child process to compile.

    Attributes:
        strategy: one of STRATEGIES.
        items: the graphs.
        file: path to write.
        arguments: of neuronx-cc.
        cores: NeuronCores, each of which is a rank.
        inline_weights: see ExportOptions.
        workdir: folder for neuronx-cc's files.
    """

    strategy: str
    items: list[Item]
    file: str
    arguments: list[str]
    cores: int
    inline_weights: bool
    workdir: str


class Strategy(Protocol):
    """One way to compile bodies to files. `modules` maps the SDK's modules that it imports to their distributions."""

    modules: Mapping[str, str]

    def files(self, graphs: Sequence[Graph]) -> dict[str, list[Graph]]:
        """The files to write, and the graphs in each; each file is a job of its own."""
        ...

    def weights(self, bodies: Sequence[Body]) -> dict[str, Tensor]:
        """The weights beside the files, by the names under which the runtime passes them in."""
        ...

    def build(self, job: Job, bodies: Sequence[Body], on_graph: Callable[[str], None]) -> None:
        """Write `job.file`; `on_graph` is called with each graph's name before it. The SDK's errors are not caught."""
        ...


_TRACER = {"torch_neuronx": "torch-neuronx", "neuronxcc": "neuronx-cc"}
_BUILDER = {**_TRACER, "neuronx_distributed": "neuronx-distributed"}


class TraceStrategy:
    """`torch_neuronx.trace`: one TorchScript file per graph, with the NEFF in it. Caches are parameters of the traced
    module, aliased with outputs, and so stay on the device; each graph has its own.

    Weights are in the file, or else are put into it when it is opened, by `torch_neuronx.replace_weights`.
    """

    modules: Mapping[str, str] = _TRACER

    def files(self, graphs: Sequence[Graph]) -> dict[str, list[Graph]]:
        return {f"{graph.name}.neuron": [graph] for graph in graphs}

    def weights(self, bodies: Sequence[Body]) -> dict[str, Tensor]:
        # Under each graph's name; memory that several share is stored once all the same.
        return {f"{body.graph.name}:{name}": each for body in bodies for name, each in OneGraph(body).named_weights()}

    def build(self, job: Job, bodies: Sequence[Body], on_graph: Callable[[str], None]) -> None:
        neuronx = import_module("torch_neuronx")
        for body in bodies:
            on_graph(body.graph.name)
            module = OneGraph(body).eval()
            traced = neuronx.trace(
                module,
                example_inputs(step_inputs(body.graph)),
                input_output_aliases=module.aliases(),
                compiler_workdir=str(Path(job.workdir) / body.graph.name),
                compiler_args=job.arguments,
                inline_weights_to_neff=job.inline_weights,
                # Compiles on any machine, without a device.
                cpu_backend=True,
            )
            if not job.inline_weights:
                neuronx.replace_weights(traced, {name: _blank(each) for name, each in module.named_weights()})
            torch.jit.save(traced, job.file)


def _blank(tensor: Tensor) -> Tensor:
    """A tensor of the same shape that takes a single element in a file."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


class ModelBuilderStrategy:
    """NxD's ModelBuilder (version 2): all graphs in one TorchScript file, over one set of weights and one set of caches
    on the device. The bodies are those of one rank, where there are several: each core runs the same, with its own
    weights and caches."""

    modules: Mapping[str, str] = _BUILDER

    def files(self, graphs: Sequence[Graph]) -> dict[str, list[Graph]]:
        return {"model.neuron": list(graphs)}

    def weights(self, bodies: Sequence[Body]) -> dict[str, Tensor]:
        return SharedGraphs(bodies).named_weights()

    def build(self, job: Job, bodies: Sequence[Body], on_graph: Callable[[str], None]) -> None:
        nxd: Any = import_module("neuronx_distributed")
        reduce, gather = _nxd_collectives()
        for body in bodies:
            call_collectives(body.module, reduce, gather)
        with nxd.NxDParallelState(world_size=job.cores, tensor_model_parallel_size=job.cores):
            builder = nxd.ModelBuilder(SharedGraphs(bodies).eval())
            for body in bodies:
                on_graph(body.graph.name)
                builder.trace(args=example_inputs(step_inputs(body.graph)), tag=body.graph.name)
            on_graph(", ".join(body.graph.name for body in bodies))
            built = builder.compile(compiler_workdir=job.workdir, compiler_args=" ".join(job.arguments))
        built.save(job.file)


def _nxd_collectives() -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """NxD's sum over all cores, and its concatenation of what all cores have along the last dimension."""
    mappings: Any = import_module("neuronx_distributed.parallel_layers.mappings")

    def reduce(x: Tensor) -> Tensor:
        # It writes the sum into its argument, which others may read.
        total: Tensor = mappings.reduce_from_tensor_model_parallel_region(x.clone())
        return total

    return reduce, mappings.gather_from_tensor_model_parallel_region


STRATEGIES: dict[str, Strategy] = {"trace": TraceStrategy(), "model-builder": ModelBuilderStrategy()}
