"""What a backend is to the runtime: something that runs graphs over memory that we own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from ..artifact import Artifact
from ..artifact.backends import get_backend
from ..artifact.schema import Variant

__all__ = ["Arrays", "Engine", "Settings", "Step", "open_engine"]

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
    """

    threads: int = 0
    prepack: bool = True
    verify: bool = False
    device: str = "cpu"
    provider: str | None = None


class Engine(Protocol):
    """The runtime's half of a backend; the other half is `precast.exporter.backends.ProgramCompiler`.

    An engine is made from a verified artifact and one of its variants. It is shared by sessions in several threads.
    """

    def __init__(self, artifact: Artifact, variant: Variant, settings: Settings) -> None: ...

    def bind(self, graph: str, inputs: Arrays, outputs: Arrays) -> Step:
        """Tie a graph to arrays, by its own input and output names, and return what runs it once.

        A step reads `inputs` and writes `outputs` in place. A cache is one array given under both of its names. The
        arrays' shapes are those of the contract, with any free dimension at the size of this binding. Raises
        ArtifactError where the file cannot be opened.
        """
        ...


def open_engine(artifact: Artifact, variant: Variant, settings: Settings) -> Engine:
    """The engine of the variant's backend, imported now."""
    module, _, name = get_backend(variant.backend).engine.partition(":")
    engine: Engine = getattr(import_module(module), name)(artifact, variant, settings)
    return engine
