"""What a backend is to the exporter: programs in, files and their description out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from precast.runtime.artifact.backends import get_backend
from precast.runtime.artifact.schema import Compiler, Graph, Host
from precast.runtime.artifact.tasks import Task

from ..checkpoint.resolve import Checkpoint
from ..kinds.trace import Program
from ..options import ExportOptions

__all__ = ["Compiled", "HasLayouts", "NeedsTools", "ProgramCompiler", "compiler_of"]


@dataclass(frozen=True)
class Compiled:
    """What a compiler wrote into the stage: `graphs` and `weights` name its files, relative to it."""

    graphs: list[Graph]
    weights: list[str]
    host: Host
    compiler: Compiler


class ProgramCompiler(Protocol):
    """The exporter's half of a backend; the other half is `precast.runtime.engines.Engine`."""

    def compile(self, programs: Iterable[Program], stage: Path, options: ExportOptions) -> Compiled:
        """Turn every program into a file below `stage`, with weights stored once for all of them. Of `options` it reads
        what its row in the table of backends says that it takes.

        Raises ExportError where a program cannot be compiled.
        """
        ...


@runtime_checkable
class NeedsTools(Protocol):
    """A compiler of programs that calls tools which may not be there: asked before any work starts."""

    def check_tools(self, options: ExportOptions) -> None:
        """Raise ExportError, with what to install, where something is missing."""
        ...


@runtime_checkable
class HasLayouts(Protocol):
    """A compiler of programs whose files can be named and described so that another library opens them, too. Where
    `options.layout` is our own, each of these changes nothing."""

    def prepare(self, checkpoint: Checkpoint, options: ExportOptions) -> Checkpoint:
        """The checkpoint as the layout can hold it."""
        ...

    def check_graphs(self, graphs: Sequence[Graph], task: Task, checkpoint: Checkpoint, options: ExportOptions) -> None:
        """Raise ExportError, before anything is compiled, for what the other library would not open."""
        ...

    def lay_out(
        self, compiled: Compiled, task: Task, config: dict[str, Any], options: ExportOptions, stage: Path
    ) -> Compiled:
        """Name the compiled files as the other library does, and add what it reads to `config`."""
        ...


def compiler_of(backend: str) -> ProgramCompiler:
    """What compiles for a backend. Raises UsageError where there is none of this name."""
    module, _, name = get_backend(backend).compiler.partition(":")
    compiler: ProgramCompiler = getattr(import_module(module), name)()
    return compiler
