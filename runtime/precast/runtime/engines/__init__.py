"""Engines, the runtime's half of a backend: they run graphs over arrays that the session owns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..artifact import Artifact
from ..artifact.backends import get_backend
from ..artifact.schema import Variant

__all__ = ["Arrays", "Engine", "OwnsCaches", "Settings", "Step", "move_rows", "open_engine", "owns_caches",
           "replicas_of"]  # fmt: skip

Arrays = Mapping[str, np.ndarray[Any, Any]]
Step = Callable[[], None]


@dataclass(frozen=True)
class Settings:
    """How an artifact is opened.

    Attributes:
        threads: how many; 0 is one per usable core.
        prepack: an engine may save on this machine what makes the next load faster.
        verify: nothing that was verified before counts.
        device: where to run; an engine whose graphs were compiled for one device is only given that.
        provider: which of ONNX Runtime's providers is to run the graphs; None lets the device decide.
        shares_cores: other processes compute on the same cores whenever this one does not: its threads rest meanwhile.
        cores: which NeuronCores to use, of those that this process sees; none lets the engine decide.
        rank_timeout: how many seconds a rank waits for another; None lets the engine decide.
        log_dir: the folder for what other ranks write; None is one that goes away again where nothing goes wrong.
    """

    threads: int = 0
    prepack: bool = True
    verify: bool = False
    device: str = "cpu"
    provider: str | None = None
    cores: tuple[int, ...] = ()
    shares_cores: bool = False
    rank_timeout: float | None = None
    log_dir: Path | None = None


class Engine(Protocol):
    """The runtime's half of a backend; the other half is `precast.exporter.backends.ProgramCompiler`.

    An engine is made from a verified artifact and one of its variants. It is shared by sessions in several threads.
    """

    def __init__(self, artifact: Artifact, variant: Variant, settings: Settings) -> None: ...

    def bind(self, graph: str, inputs: Arrays, outputs: Arrays) -> Step:
        """Bind a graph to arrays, by its input and output names; the Step that is returned runs it once.

        A step reads `inputs` and writes `outputs` in place. A cache is one array given under both of its names. The
        arrays' shapes are those of the contract, with any free dimension at the size of this binding. Raises
        ArtifactError where the file cannot be opened.
        """
        ...


@runtime_checkable
class OwnsCaches(Protocol):
    """An engine that keeps caches in memory of its own, not in the arrays that graphs are bound to."""

    def move_rows(self, caches: Arrays, to: Sequence[int], parents: Sequence[int], live: int) -> None:
        """In every cache [B, H, C, D] copy row `parents[i]` into row `to[i]`, positions 0 to `live`. `caches` are the
        arrays that graphs were bound to, by any names."""
        ...


def move_rows(caches: Arrays, to: Sequence[int], parents: Sequence[int], live: int) -> None:
    """Copy rows as OwnsCaches says, for caches that are in their arrays."""
    for cache in caches.values():
        cache[list(to), :, :live] = cache[list(parents), :, :live]


def owns_caches(engine: Engine) -> bool:
    """Whether caches are elsewhere than in the arrays that graphs are bound to; an engine for several devices says so
    of the one it runs on."""
    return isinstance(engine, OwnsCaches) and bool(getattr(engine, "has_device", True))


def replicas_of(engine: Engine) -> int:
    """How many steps an engine runs at a time: one, unless it says otherwise."""
    return int(getattr(engine, "replicas", 1))


def open_engine(artifact: Artifact, variant: Variant, settings: Settings) -> Engine:
    """The engine of the variant's backend, imported now."""
    module, _, name = get_backend(variant.backend).engine.partition(":")
    engine: Engine = getattr(import_module(module), name)(artifact, variant, settings)
    return engine
