"""The ways from bodies to files that the Neuron SDK has, each behind one small interface.

They run in the child process, where the SDK is imported; the exporter asks them only for names and weights. `trace`
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

from .tensor_parallel import SharedGraphs
from .xla_program import Body, OneGraph, example_of, given_of

__all__ = ["STRATEGIES", "Item", "Job", "Strategy"]


class Item(Struct, frozen=True):
    """One graph to compile: its contract, and the file of its lowered program."""

    graph: Graph
    program: str


class Job(Struct, frozen=True):
    """What one child process compiles.

    Attributes:
        strategy: one of STRATEGIES.
        items: the graphs.
        file: what to write.
        arguments: of neuronx-cc.
        cores: over how many NeuronCores each layer's weights are spread.
        inline_weights: see ExportOptions.
        workdir: where neuronx-cc leaves its files.
    """

    strategy: str
    items: list[Item]
    file: str
    arguments: list[str]
    cores: int
    inline_weights: bool
    workdir: str


class Strategy(Protocol):
    """One way from bodies to files. `modules` is what it needs of the SDK: what to import, and its distribution."""

    modules: Mapping[str, str]

    def files(self, graphs: Sequence[Graph]) -> dict[str, list[Graph]]:
        """Which file holds which graphs; each is a job of its own."""
        ...

    def weights(self, bodies: Sequence[Body], cores: int) -> dict[str, Tensor]:
        """What lies beside the files, by the names that the runtime gives them back under."""
        ...

    def build(self, job: Job, bodies: Sequence[Body], on_graph: Callable[[str], None]) -> None:
        """Write `job.file`; `tell` is called with each graph's name before it. What the SDK raises goes through."""
        ...


_TRACER = {"torch_neuronx": "torch-neuronx", "neuronxcc": "neuronx-cc"}
_BUILDER = {**_TRACER, "neuronx_distributed": "neuronx-distributed"}


class Trace:
    """`torch_neuronx.trace`: one TorchScript file per graph, with the NEFF in it. Caches are parameters of the traced
    module, aliased with outputs, and so stay on the device; each graph has its own.

    Weights are in the file unless it says otherwise; then they are put in again when it is opened, by
    `torch_neuronx.replace_weights`.
    """

    modules: Mapping[str, str] = _TRACER

    def files(self, graphs: Sequence[Graph]) -> dict[str, list[Graph]]:
        return {f"{graph.name}.neuron": [graph] for graph in graphs}

    def weights(self, bodies: Sequence[Body], cores: int) -> dict[str, Tensor]:
        # Under each graph's name, which says what it takes; what several share is stored once all the same.
        return {f"{body.graph.name}:{name}": each for body in bodies for name, each in OneGraph(body).kept()}

    def build(self, job: Job, bodies: Sequence[Body], on_graph: Callable[[str], None]) -> None:
        neuronx = import_module("torch_neuronx")
        for body in bodies:
            on_graph(body.graph.name)
            module = OneGraph(body).eval()
            traced = neuronx.trace(
                module,
                example_of(given_of(body.graph)),
                input_output_aliases=module.aliases(),
                compiler_workdir=str(Path(job.workdir) / body.graph.name),
                compiler_args=job.arguments,
                inline_weights_to_neff=job.inline_weights,
                # On any machine, with a device or without one.
                cpu_backend=True,
            )
            if not job.inline_weights:
                neuronx.replace_weights(traced, {name: _blank(each) for name, each in module.kept()})
            torch.jit.save(traced, job.file)


def _blank(tensor: Tensor) -> Tensor:
    """A tensor of the same shape that takes a single element in a file."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


class ModelBuilder:
    """NxD's ModelBuilder (its second version): all graphs in one TorchScript file, over one set of weights and one set
    of caches on the device, spread over several cores if asked for."""

    modules: Mapping[str, str] = _BUILDER

    def files(self, graphs: Sequence[Graph]) -> dict[str, list[Graph]]:
        return {"model.neuron": list(graphs)}

    def weights(self, bodies: Sequence[Body], cores: int) -> dict[str, Tensor]:
        return SharedGraphs(bodies, cores).kept()

    def build(self, job: Job, bodies: Sequence[Body], on_graph: Callable[[str], None]) -> None:
        nxd: Any = import_module("neuronx_distributed")
        with nxd.NxDParallelState(world_size=job.cores, tensor_model_parallel_size=job.cores):
            builder = nxd.ModelBuilder(SharedGraphs(bodies, job.cores, _gather()).eval())
            for body in bodies:
                on_graph(body.graph.name)
                builder.trace(args=example_of(given_of(body.graph)), tag=body.graph.name)
            on_graph(", ".join(body.graph.name for body in bodies))
            built = builder.compile(compiler_workdir=job.workdir, compiler_args=" ".join(job.arguments))
        built.save(job.file)


def _gather() -> Callable[[Tensor], Tensor]:
    """What puts the parts of a layer's output together that the cores have computed."""
    mappings = import_module("neuronx_distributed.parallel_layers.mappings")
    found: Callable[[Tensor], Tensor] = mappings.gather_from_tensor_model_parallel_region
    return found


STRATEGIES: dict[str, Strategy] = {"trace": Trace(), "model-builder": ModelBuilder()}
