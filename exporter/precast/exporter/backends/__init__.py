"""What a backend is to the exporter: programs in, files and their description out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from precast.runtime.artifact.schema import Compiler, Graph, Host

from ..kinds.trace import Program
from ..options import ExportOptions

__all__ = ["Compiled", "NeedsTools", "ProgramCompiler"]


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
