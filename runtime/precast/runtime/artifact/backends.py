"""The backends: one row each. A row's strings are imported when the backend is used.

A package can add a row of its own through the entry point group `precast.backends`, whose value is a `Backend`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Literal

from ..errors import UsageError

__all__ = ["BACKENDS", "Backend", "get_backend"]


@dataclass(frozen=True)
class Backend:
    """What turns programs into files (`compiler`), and what runs those files (`engine`).

    `trust` is the tier of the files: `graph` is interpreted data, `native` is code of the machine. `takes` names
    the export options that its compiler reads besides those of every export ("dtype", "auto_cast", "isa",
    "device"); `because` says, after a colon, why it takes no others. With `decodes_apart` a decoder has a graph of
    its own for one new token per row, which is compiled otherwise than a prompt. With `scales_rows` weights of 8
    bits have one scale per row unless groups are asked for. With `halves_caches` caches may be float16. With
    `is_static` every dimension is fixed. With `casts_itself` its compiler does what auto_cast asks for, and the
    program stays as it was traced.
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


BACKENDS: dict[str, Backend] = {
    "onnx": Backend(
        "onnx",
        "graph",
        "precast.exporter.backends.onnx:OnnxCompiler",
        "precast.runtime.engines.onnx:OnnxEngine",
        because="ONNX Runtime computes in float32 on CPUs, having no other kernels for x86, and picks instructions and "
        "device when it runs",
    ),
    "aoti": Backend(
        "aoti",
        "native",
        "precast.exporter.backends.aoti.compiler:AotiCompiler",
        "precast.runtime.engines.aoti:AotiEngine",
        takes=frozenset({"dtype", "auto_cast", "isa", "device"}),
        decodes_apart=True,
        scales_rows=True,
        halves_caches=True,
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
    ),
    "neuron": Backend(
        "neuron",
        "native",
        "precast.exporter.backends.neuron.compiler:NeuronCompiler",
        "precast.runtime.engines.neuron:NeuronEngine",
        takes=frozenset(
            {
                "dtype",
                "auto_cast",
                "instance_type",
                "strategy",
                "tensor_parallel",
                "inline_weights",
                "optlevel",
                "compiler_args",
                "compiler_workdir",
            }
        ),
        because="it compiles for the Neuron devices that --instance-type names",
        decodes_apart=True,
        is_static=True,
        casts_itself=True,
    ),
}


def get_backend(name: str) -> Backend:
    """The row of backend `name`, built in or from a plug-in. Raises UsageError, which lists the valid names."""
    if name in BACKENDS:
        return BACKENDS[name]
    plugins = entry_points(group="precast.backends")
    for plugin in plugins.select(name=name):
        row = plugin.load()
        assert isinstance(row, Backend), f"the entry point {plugin.value} is not a precast Backend"
        return row
    names = [*BACKENDS, *(plugin.name for plugin in plugins)]
    raise UsageError(f"There is no backend {name!r}. The backends are: {', '.join(names)}.")
