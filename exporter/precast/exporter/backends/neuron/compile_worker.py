"""Compile for Neuron in a process of its own: `python -m precast.exporter.backends.neuron.compile_worker JOB`.

`… compile_worker --versions STRATEGY` prints the installed versions of the SDK, as JSON.

A process of its own, since tracing and compiling for Neuron may crash or be killed for lack of memory, and since the
SDK reads its environment when it is imported. The file JOB.at names the graph that it is working on.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from precast.runtime.errors import PrecastError

from ..aten.lowered import Lowered
from .strategies import STRATEGIES, Job
from .xla_program import build_body

__all__ = ["main"]

MISSING = 3
"""The exit status where the SDK cannot be imported; the last line says which module, and what it raised."""


def main(argument: str, strategy: str = "") -> None:
    """Do what the module's documentation says. Raises what the SDK raises."""
    if argument == "--versions":
        print(json.dumps(_installed_versions(strategy)))  # noqa: T201
    else:
        _compile(Path(argument))


def _installed_versions(strategy: str) -> dict[str, str]:
    found = {}
    for module, distribution in STRATEGIES[strategy].modules.items():
        try:
            import_module(module)
        except ImportError as error:
            print(json.dumps({"module": module, "reason": str(error)}), file=sys.stderr)  # noqa: T201
            sys.exit(MISSING)
        found[distribution] = version(distribution)
    return found


def _compile(path: Path) -> None:
    job = msgspec.json.decode(path.read_bytes(), type=Job)
    at = path.with_suffix(".at")
    bodies = [build_body(Lowered(item.graph, torch.export.load(item.program))) for item in job.items]
    STRATEGIES[job.strategy].build(job, bodies, lambda graph: _write_position(at, graph))


def _write_position(at: Path, graph: str) -> None:
    at.write_text(graph)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except PrecastError as error:
        sys.exit(f"{type(error).__name__}: {error}")
