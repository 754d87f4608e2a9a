"""The compiler of the `neuron` backend: programs lowered to ATen, then the Neuron SDK in child processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from msgspec.structs import replace

from precast.runtime.artifact.locks import Scratch
from precast.runtime.artifact.schema import Compiler, Host, Variant
from precast.runtime.errors import UsageError

from ...kinds.trace import Program
from ...options import ExportOptions
from ...progress import progress
from .. import Compiled, release_of
from ..aten.lowered import Lowered
from ..aten.lowering import lower
from ..aten.safetensors import save_tensors
from ..program_hash import hash_programs
from .compile_job import compile_job, sdk_versions
from .flags import flags_of
from .optimum_layout import OptimumLayout
from .options import NeuronOptions
from .strategies import STRATEGIES, Item, Job
from .xla_program import NEURON_LOWERING, build_body

__all__ = ["NeuronCompiler"]

WEIGHTS = "model.safetensors"


class NeuronCompiler(OptimumLayout):
    """Programs lowered to ATen, traced and compiled by the Neuron SDK in child processes."""

    def __init__(self) -> None:
        self._versions: dict[str, str] = {}

    def check_tools(self, options: ExportOptions) -> None:
        """See NeedsTools."""
        neuron: NeuronOptions = options.backend_options
        self._versions = sdk_versions(neuron.chosen_strategy, str(neuron.instance_type))

    def compile(self, programs: Iterable[Program], stage: Path, options: ExportOptions) -> Compiled:
        """See ProgramCompiler."""
        if not self._versions:
            self.check_tools(options)
        neuron: NeuronOptions = options.backend_options
        strategy = STRATEGIES[neuron.chosen_strategy]
        lowered = {program.graph.name: lower(program, NEURON_LOWERING) for program in programs}
        if not neuron.inline_weights:
            _save_weights(lowered.values(), neuron, stage)
        files = strategy.files([each.graph for each in lowered.values()])
        for done, (file, graphs) in enumerate(files.items()):
            progress(done, len(files), ", ".join(graph.name for graph in graphs))
            _compile([lowered[graph.name] for graph in graphs], stage / file, options)
        return Compiled(
            graphs=[replace(graph, file=file) for file, graphs in files.items() for graph in graphs],
            weights=[] if neuron.inline_weights else [WEIGHTS],
            host=_make_host(self._versions),
            compiler=Compiler(
                name="neuronx-cc",
                version=self._versions["neuronx-cc"],
                options=_describe_options(options),
                torch=release_of("torch"),
                transformers=version("transformers"),
            ),
            program=hash_programs(each.exported for each in lowered.values()),
        )

    def write_weights(
        self, programs: Iterable[Program], stage: Path, old: Variant | Compiled, options: ExportOptions
    ) -> Compiled:
        """See WritesWeights. Needs none of the SDK."""
        neuron: NeuronOptions = options.backend_options
        lowered = [lower(program, NEURON_LOWERING) for program in programs]
        _save_weights(lowered, neuron, stage)
        files = STRATEGIES[neuron.chosen_strategy].files([each.graph for each in lowered])
        return Compiled(
            graphs=[replace(graph, file=file) for file, graphs in files.items() for graph in graphs],
            weights=[WEIGHTS],
            host=old.host,
            compiler=old.compiler,
            program=hash_programs(each.exported for each in lowered),
        )


def _save_weights(lowered: Iterable[Lowered], neuron: NeuronOptions, stage: Path) -> None:
    bodies = [build_body(each) for each in lowered]
    save_tensors(STRATEGIES[neuron.chosen_strategy].weights(bodies), stage / WEIGHTS)


def _compile(lowered: list[Lowered], file: Path, options: ExportOptions) -> None:
    """Write one file. Programs are passed to the child process as temporary files."""
    neuron: NeuronOptions = options.backend_options
    with Scratch() as folder, _workdir(neuron) as workdir:
        items = []
        for each in lowered:
            program = folder / f"{each.graph.name}.pt2"
            _give_own_memory(each.exported)
            torch.export.save(each.exported, program)
            items.append(Item(graph=each.graph, program=str(program)))
        job = Job(
            strategy=neuron.chosen_strategy,
            items=items,
            file=str(file),
            arguments=flags_of(neuron, options.precision),
            cores=neuron.tensor_parallel,
            inline_weights=neuron.inline_weights,
            workdir=str(workdir),
        )
        compile_job(job, folder, str(neuron.instance_type))


def _give_own_memory(exported: torch.export.ExportedProgram) -> None:
    """Copy weights that are parts of larger ones, as a rank's are: torch would write the larger ones. What is one
    tensor under several names stays one."""
    copies: dict[tuple[object, ...], torch.Tensor] = {}
    for held in (exported.state_dict, exported.constants):
        for name, tensor in held.items():
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > tensor.nbytes:
                place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                if place not in copies:
                    copies[place] = tensor.clone()
                held[name] = copies[place]


@contextmanager
def _workdir(neuron: NeuronOptions) -> Iterator[Path]:
    """The folder for neuronx-cc's files: the user's, or a temporary one. Raises UsageError."""
    if neuron.compiler_workdir is None:
        with Scratch() as folder:
            yield folder
        return
    try:
        neuron.compiler_workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"compiler_workdir={neuron.compiler_workdir} cannot be made: {error.strerror}.") from None
    yield neuron.compiler_workdir


def _make_host(versions: dict[str, str]) -> Host:
    """The hosts that can run the files: the SDK that made them, or a later one."""
    needed = {name: _major_minor(found) for name, found in versions.items() if name != "neuronx-cc"}
    return Host(
        platforms=["linux-x86_64"],
        device="neuron",
        isa=[],
        min_versions={"torch": _major_minor(release_of("torch")), **needed},
    )


def _describe_options(options: ExportOptions) -> dict[str, str | int | float | bool]:
    """The compiler's options for the record: the runtime checks them, and they repeat the export."""
    neuron: NeuronOptions = options.backend_options
    return {
        "instance_type": str(neuron.instance_type),
        "strategy": neuron.chosen_strategy,
        "cores": neuron.tensor_parallel,
        "inline_weights": neuron.inline_weights,
        "dynamic_batch_size": options.shapes.dynamic_batch_size,
        "optlevel": neuron.optlevel or 2,
        "arguments": " ".join(flags_of(neuron, options.precision)),
    }


def _major_minor(found: str) -> str:
    """The first two numbers of a version."""
    return ".".join(found.split(".")[:2])
