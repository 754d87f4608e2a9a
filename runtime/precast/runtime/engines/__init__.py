"""What a backend is to the runtime: something that runs graphs over memory that we own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..artifact.backends import get_backend
from ..artifact.schema import Variant

__all__ = ["Arrays", "Engine", "Step", "open_engine"]

Arrays = Mapping[str, np.ndarray[Any, Any]]
Step = Callable[[], None]


class Engine(Protocol):
    """The runtime's half of a backend; the other half is `precast.exporter.backends.ProgramCompiler`.

    An engine is made from the artifact's directory, one of its variants, and a thread count (0: one per usable core).
    It is shared by sessions in several threads.
    """

    def __init__(self, root: Path, variant: Variant, threads: int) -> None: ...

    def bind(self, graph: str, inputs: Arrays, outputs: Arrays) -> Step:
        """Tie a graph to arrays, by its own input and output names, and return what runs it once.

        A step reads `inputs` and writes `outputs` in place. A cache is one array given under both of its names. The
        arrays' shapes are those of the contract, with any free dimension at the size of this binding. Raises
        ArtifactError where the file cannot be opened.
        """
        ...


def open_engine(root: Path, variant: Variant, threads: int) -> Engine:
    """The engine of the variant's backend, imported now."""
    module, _, name = get_backend(variant.backend).engine.partition(":")
    engine: Engine = getattr(import_module(module), name)(root, variant, threads)
    return engine
