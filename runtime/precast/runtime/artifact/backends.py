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

    `trust` is the tier of the files: `graph` is interpreted data, `native` is code of the machine.
    """

    name: str
    trust: Literal["graph", "native"]
    compiler: str
    engine: str


BACKENDS: dict[str, Backend] = {
    "onnx": Backend(
        "onnx", "graph", "precast.exporter.backends.onnx:OnnxCompiler", "precast.runtime.engines.onnx:OnnxEngine"
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
