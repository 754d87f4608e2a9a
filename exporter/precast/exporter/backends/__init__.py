"""The exporter's half of backends: compilers that turn programs into files, and the description of these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from precast.runtime.artifact.backends import get_backend
from precast.runtime.artifact.schema import Compiler, Graph, Host, Ranks, Stage, Variant
from precast.runtime.artifact.tasks import Task

if TYPE_CHECKING:
    # Both import torch, and the options of a backend, which lie below, are checked before that.
    from ..checkpoint.checkpoint import Checkpoint
    from ..kinds.trace import Program
    from ..options import ExportOptions

__all__ = ["Compiled", "HasLayouts", "NeedsTools", "ProgramCompiler", "WritesWeights", "compiler_of", "release_of"]


@dataclass(frozen=True)
class Compiled:
    """The files that a compiler wrote: `graphs` and `weights` name them, relative to the stage. `abi` and
    `requires_torch` are those of a Variant. `program` is the hash of what was compiled, by which weights that fit it
    are known; a compiler that says none makes artifacts that keep their weights. `ranks` says how weights are divided,
    where they are, and `stages` what each part of a pipeline has, where it is one."""

    graphs: list[Graph]
    weights: list[str]
    host: Host
    compiler: Compiler
    abi: int = 0
    requires_torch: Sequence[str] = ()
    program: str | None = None
    ranks: Ranks | None = None
    stages: list[Stage] = field(default_factory=list)


class ProgramCompiler(Protocol):
    """The exporter's half of a backend; the other half is `precast.runtime.engines.Engine`."""

    def compile(self, programs: Iterable[Program], stage: Path, options: ExportOptions) -> Compiled:
        """Turn every program into a file below `stage`, with weights stored once for all of them. Of `options` it reads
        those that its row in the table of backends lists.

        Raises ExportError where a program cannot be compiled.
        """
        ...


@runtime_checkable
class NeedsTools(Protocol):
    """A compiler that calls tools which may be missing: checked before any work starts."""

    def check_tools(self, options: ExportOptions) -> None:
        """Raise ExportError, with what to install, where something is missing."""
        ...


@runtime_checkable
class WritesWeights(Protocol):
    """A compiler whose weights lie beside its compiled files, so that others can take their place."""

    def write_weights(
        self, programs: Iterable[Program], stage: Path, old: Variant | Compiled, options: ExportOptions
    ) -> Compiled:
        """As `compile`, but for what takes long: files of graphs that are not written are those of `old`, which was
        compiled with the same options and has its weights in files."""
        ...


@runtime_checkable
class HasLayouts(Protocol):
    """A compiler whose files can be named and described so that another library opens them, too. Where `options.layout`
    is our own, none of these methods changes anything."""

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
    """Import and make the compiler of a backend. Raises UsageError where there is no backend of this name."""
    module, _, name = get_backend(backend).compiler.partition(":")
    compiler: ProgramCompiler = getattr(import_module(module), name)()
    return compiler


def release_of(distribution: str) -> str:
    """The version of an installed distribution without the part after "+", which tells its build."""
    return version(distribution).split("+", maxsplit=1)[0]
