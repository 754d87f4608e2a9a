"""The small files beside a model that say how to prepare inputs and how to answer: tokenizer, templates, settings.

An artifact's are those that its contract lists, read when it is opened; those of any other directory are read there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ..artifact import Artifact, is_artifact, read_artifact
from ..artifact.integrity import read_regular
from ..artifact.locks import Scratch
from ..errors import ArtifactError

__all__ = ["Readable", "companions_at", "companions_of", "write_processor_files"]

MAX_BYTES = 256 * 2**20
_OF_PROCESSORS = ("config.json", "preprocessor_config.json", "processor_config.json")


class Readable(Protocol):
    """Files by their names below one directory."""

    def get(self, name: str) -> bytes | None:
        """The content of a file; None where there is none."""
        ...

    def below(self, folder: str) -> dict[str, bytes]:
        """The content of all files in a folder, by their names in it."""
        ...


def companions_of(artifact: Artifact) -> Readable:
    """The companions of an artifact, as they were when it was opened, and the checkpoint's own config.json."""
    return _ArtifactFiles(artifact)


def companions_at(path: Path) -> Readable:
    """The companions of the artifact, or of any other directory, at `path`. Raises ArtifactError."""
    return _ArtifactFiles(read_artifact(path)) if is_artifact(path) else _FolderFiles(path)


@contextmanager
def write_processor_files(files: Readable) -> Iterator[Path]:
    """Write the files that transformers makes a processor of to a directory of their own: it reads whatever it finds
    beside them."""
    with Scratch() as folder:
        for name in _OF_PROCESSORS:
            if (data := files.get(name)) is not None:
                (folder / name).write_bytes(data)
        yield folder


class _ArtifactFiles:
    """The companions of an artifact."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def get(self, name: str) -> bytes | None:
        """See Readable. Raises IntegrityError."""
        if name == "config.json":
            return json.dumps(self._artifact.config).encode()
        return self._artifact.contents.get(name)

    def below(self, folder: str) -> dict[str, bytes]:
        """See Readable. Raises IntegrityError."""
        return self._artifact.contents.below(folder)


class _FolderFiles:
    """The companions in a directory without a contract, such as a checkpoint's."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, name: str) -> bytes | None:
        """See Readable. Raises ArtifactError where the file cannot be read."""
        path = self._path / name
        try:
            data = read_regular(path, MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from None
        if len(data) > MAX_BYTES:
            raise ArtifactError(f"{path} has more than {MAX_BYTES:,} bytes, the most that is read.")
        return data

    def below(self, folder: str) -> dict[str, bytes]:
        """See Readable."""
        names = sorted(path.name for path in (self._path / folder).glob("*") if path.is_file())
        return {name: self.get(f"{folder}/{name}") or b"" for name in names}
