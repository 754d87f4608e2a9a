"""What a pipeline prepares its inputs by, where the caller names it: `pipeline(…, tokenizer=…)`."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from ..artifact import Artifact
from ..artifact.locks import Scratch
from ..errors import UsageError
from ..inputs.companions import Readable, companions_at, companions_of
from ..inputs.tokenizer import Tokenizer

__all__ = ["PARTS", "files_of", "is_own", "tokenizer_of"]

PARTS = ("tokenizer", "feature_extractor", "image_processor")
"""The arguments of transformers' pipeline() that name such a thing."""


def is_own(artifact: Artifact, given: Any) -> bool:
    """Whether what was given is what the artifact carries: it names the artifact, or the checkpoint it was made of."""
    if isinstance(given, str) and given == artifact.contract.source.model:
        return True
    return isinstance(given, str | PathLike) and Path(given).resolve() == artifact.path.resolve()


def files_of(artifact: Artifact, name: str, given: Any) -> tuple[Path, Readable]:
    """Where the part `name` is read: the artifact's own, for None; or of a directory, or of an object of transformers.

    Raises UsageError for anything else.
    """
    if given is None:
        return artifact.path, companions_of(artifact)
    if isinstance(given, str | PathLike) and Path(given).is_dir():
        return Path(given), companions_at(Path(given))
    if hasattr(given, "save_pretrained"):
        with Scratch() as folder:
            given.save_pretrained(folder)
            return Path(type(given).__name__), _Held.of(folder)
    raise UsageError(
        f"{name}={given!r:.80} is neither a directory nor an object of transformers, and {artifact.path} was not made "
        f"of a checkpoint of this name. Leave it out: the artifact carries its own."
    )


def tokenizer_of(artifact: Artifact, given: Any) -> Tokenizer:
    """The tokenizer that was given. Raises UsageError as `files_of`, ArtifactError where it has no tokenizer.json."""
    return given if isinstance(given, Tokenizer) else Tokenizer(*files_of(artifact, "tokenizer", given))


class _Held(dict[str, bytes]):
    """Files that are gone, by their paths below what was their directory."""

    @classmethod
    def of(cls, folder: Path) -> _Held:
        return cls({
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        })  # fmt: skip

    def below(self, folder: str) -> dict[str, bytes]:
        """See Readable."""
        start = f"{folder}/"
        return {name.removeprefix(start): data for name, data in self.items() if name.startswith(start)}
