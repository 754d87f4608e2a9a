"""The files of a native variant: opened only if they are still what was verified."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..artifact import Artifact
from ..artifact.integrity import identity
from ..artifact.schema import Variant
from ..errors import IntegrityError
from ..weights import open_weights

__all__ = ["Files"]


class Files:
    """A file for each graph, and those of the weights, which may be none."""

    def __init__(self, artifact: Artifact, variant: Variant) -> None:
        self._paths = {graph.name: artifact.path / graph.file for graph in variant.graphs}
        self._weight_paths = [artifact.path / name for name in variant.weights]
        self._verified = {path: identity(path) for path in [*self._paths.values(), *self._weight_paths]}

    def path(self, graph: str) -> Path:
        """The graph's file, not checked yet."""
        return self._paths[graph]

    def check(self, path: Path) -> None:
        """Raise IntegrityError where this file, or one of weights, is not what was verified: before code is opened, and
        after, since none is to be run that came in between."""
        for each in (path, *self._weight_paths):
            if identity(each) != self._verified[each]:
                raise IntegrityError(f"{each} was replaced after it was verified. Open the artifact again.")

    def weights(self) -> dict[str, Tensor]:
        """What lies beside the graphs, mapped into memory. Raises IntegrityError where a file cannot be read."""
        try:
            return open_weights(self._weight_paths)
        except OSError as error:
            raise IntegrityError(f"{error.filename} cannot be read: {error.strerror}.") from None
