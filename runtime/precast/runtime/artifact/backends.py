"""The backends: one row each. A row's strings are imported when the backend is used.

A package can add a row of its own through the entry point group `precast.backends`, whose value is a `Backend`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Literal

from ..errors import PrecastWarning, UsageError

__all__ = ["BACKENDS", "Backend", "backend_rows", "get_backend"]

GROUP = "precast.backends"
"""The entry points by which packages add rows."""


@dataclass(frozen=True)
class Backend:
    """What turns programs into files (`compiler`), and what runs those files (`engine`).

    `trust` is the tier of the files: `graph` is interpreted data, `native` is code of the machine. `takes` names
    the export options that its compiler reads and not every one does ("dtype", "auto_cast"); `options` is the class of
    those that only it has, derived from `precast.exporter.options.BackendOptions`, in a module that imports nothing
    heavy; `because` says, after a colon, why it takes no others. With `decodes_apart` a decoder has a graph of
    its own for one new token per row, which is compiled otherwise than a prompt. With `scales_rows` weights of 8
    bits have one scale per row unless groups are asked for. With `halves_caches` caches may be float16. With
    `is_static` every dimension is fixed. With `casts_itself` its compiler does what auto_cast asks for, and the
    program stays as it was traced. With `owns_caches` its engine keeps caches in the memory of a device.
    With `runs_ranks` its engine runs all ranks of a model itself, on as many cores of a device, where else each is a
    process. With `has_adapter_slots` it compiles `precast::lora`, so that adapters are inputs of its graphs.
    """

    name: str
    trust: Literal["graph", "native"]
    compiler: str
    engine: str
    takes: frozenset[str] = frozenset()
    because: str = "it does not read that option"
    decodes_apart: bool = False
    scales_rows: bool = False
    halves_caches: bool = False
    is_static: bool = False
    casts_itself: bool = False
    owns_caches: bool = False
    runs_ranks: bool = False
    has_adapter_slots: bool = False
    options: str | None = None


BACKENDS: dict[str, Backend] = {
    "onnx": Backend(
        "onnx",
        "graph",
        "precast.exporter.backends.onnx.compiler:OnnxCompiler",
        "precast.runtime.engines.onnx:OnnxEngine",
        because="ONNX Runtime computes in float32 on CPUs, having no other kernels for x86, and picks instructions and "
        "device when it runs",
        options="precast.exporter.backends.onnx.options:OnnxOptions",
        has_adapter_slots=True,
    ),
    "aoti": Backend(
        "aoti",
        "native",
        "precast.exporter.backends.aoti.compiler:AotiCompiler",
        "precast.runtime.engines.aoti:open_aoti",
        takes=frozenset({"dtype", "auto_cast"}),
        options="precast.exporter.backends.aoti.options:AotiOptions",
        decodes_apart=True,
        scales_rows=True,
        halves_caches=True,
        has_adapter_slots=True,
    ),
    "export": Backend(
        "export",
        "graph",
        "precast.exporter.backends.export:ExportCompiler",
        "precast.runtime.engines.export:ExportEngine",
        takes=frozenset({"dtype", "auto_cast"}),
        because="its graphs are portable and run on the CPU, by torch, which picks instructions when it runs",
        decodes_apart=True,
        halves_caches=True,
        has_adapter_slots=True,
        options="precast.exporter.options.parallel:PipelineOptions",
    ),
    "neuron": Backend(
        "neuron",
        "native",
        "precast.exporter.backends.neuron.compiler:NeuronCompiler",
        "precast.runtime.engines.neuron:NeuronEngine",
        takes=frozenset({"dtype", "auto_cast", "layout"}),
        options="precast.exporter.backends.neuron.options:NeuronOptions",
        because="it compiles for the Neuron devices that instance_type names",
        decodes_apart=True,
        is_static=True,
        casts_itself=True,
        owns_caches=True,
        runs_ranks=True,
    ),
}


def backend_rows() -> Iterator[Backend]:
    """All rows, those of plug-ins last; one that cannot be loaded is left out, with a PrecastWarning."""
    yield from BACKENDS.values()
    for plugin in entry_points(group=GROUP):
        if plugin.name in BACKENDS:
            continue
        try:
            row = _load_row(plugin)
        except Exception as error:
            # Importing a plug-in runs foreign code, which raises anything.
            said = f"The backend {plugin.name} cannot be loaded from {plugin.value} ({type(error).__name__}: {error})."
            warnings.warn(said, PrecastWarning, stacklevel=2)
        else:
            yield row


def get_backend(name: str) -> Backend:
    """The row of backend `name`, built in or from a plug-in. Raises UsageError, which lists the valid names."""
    if name in BACKENDS:
        return BACKENDS[name]
    plugins = entry_points(group=GROUP)
    for plugin in plugins.select(name=name):
        return _load_row(plugin)
    names = [*BACKENDS, *(plugin.name for plugin in plugins)]
    raise UsageError(f"There is no backend {name!r}. The backends are: {', '.join(names)}.")


def _load_row(plugin: EntryPoint) -> Backend:
    row = plugin.load()
    if not isinstance(row, Backend):
        raise UsageError(f"The entry point {plugin.value} of the backend {plugin.name} is no precast Backend.")
    return row
