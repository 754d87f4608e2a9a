"""The tokenizer or processor of a pipeline, where the caller gives another: `pipeline(…, tokenizer=…)`."""

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
"""The arguments of transformers' pipeline() that name such a part."""


def is_own(artifact: Artifact, given: Any) -> bool:
    """Whether `given` names the artifact itself, or the checkpoint that it was made of."""
    if isinstance(given, str) and given == artifact.contract.source.model:
        return True
    return isinstance(given, str | PathLike) and Path(given).resolve() == artifact.path.resolve()


def files_of(artifact: Artifact, name: str, given: Any) -> tuple[Path, Readable]:
    """The path and files of the part `name`: the artifact's for None, else a directory's or a transformers object's.

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
    """The contents of files whose directory is gone, by their paths below it."""

    @classmethod
    def of(cls, folder: Path) -> _Held:
        return cls({
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        })  # fmt: skip

    def below(self, folder: str) -> dict[str, bytes]:
        """See Readable."""
        start = f"{folder}/"
        return {name.removeprefix(start): data for name, data in self.items() if name.startswith(start)}
