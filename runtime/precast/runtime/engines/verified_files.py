"""The files of a native variant, opened only while they are the ones that were verified."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..artifact import Artifact
from ..artifact.ranks import weights_of
from ..artifact.schema import Variant
from .safetensors_map import Weight, open_weights

__all__ = ["VerifiedFiles"]

_opened = itertools.count(1)


class VerifiedFiles:
    """The files of a variant: one for each graph, and those of its weights, if it has any, as one rank has them."""

    def __init__(self, artifact: Artifact, variant: Variant, rank: int = 0) -> None:
        self._contents, self._root = artifact.contents, artifact.path
        self._names = {graph.name: graph.file for graph in variant.graphs}
        self._weights = weights_of(variant, rank)

    def path(self, graph: str) -> Path:
        """The path of the graph's file, for messages."""
        return self._root / self._names[graph]

    def read(self, graph: str) -> bytes:
        """The content of the graph's file. Raises IntegrityError where it, or one of weights, was replaced."""
        self._contents.check(*self._weights)
        return self._contents.read(self._names[graph])

    @contextmanager
    def library_path(self, graph: str) -> Iterator[str]:
        """A path for the dynamic linker: of the file that was verified, whatever takes its place in the directory.

        Raises IntegrityError where it, or one of weights, was replaced.
        """
        with self._contents.open(self._names[graph], *self._weights) as [descriptor, *_]:
            folder = "/proc/self/fd/"
            # glibc returns a loaded library for any later one of the same path, and descriptor numbers are reused: so
            # each path is spelled differently.
            spelled = "".join("./" if bit == "1" else "/" for bit in f"{next(_opened):b}")
            yield f"{folder}{spelled}{descriptor}" if os.path.exists(folder) else str(self.path(graph))

    @contextmanager
    def by_path(self, graph: str) -> Iterator[Path]:
        """A path for a library that opens the graph's file itself.

        Raises IntegrityError where it, or one of weights, was replaced before or meanwhile.
        """
        self._contents.check(*self._weights)
        with self._contents.path(self._names[graph]) as path:
            yield path
        self._contents.check(*self._weights)

    def weights(self) -> dict[str, Weight]:
        """The weights, mapped into memory, by name. Raises IntegrityError where a file cannot be read."""
        with self._contents.open(*self._weights) as descriptors:
            return open_weights([self._root / name for name in self._weights], descriptors)
