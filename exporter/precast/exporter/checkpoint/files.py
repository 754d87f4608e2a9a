"""The files of a checkpoint, which is untrusted: only regular files within it, of bounded size, are read.

A name or link that leads elsewhere on this machine would be read with the user's rights, compiled, and published under
the hash of something else. A pipe would block, and a device may never end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from precast.runtime.errors import CheckpointError

__all__ = ["WEIGHT_SUFFIXES", "check_files", "path_within", "read_files", "weight_files"]

MAX_BYTES = 256 * 2**20
"""The largest file that is read as a whole: the largest published vocabularies have a tenth of it."""
_READ = (".codes", ".jinja", ".json", ".md", ".model", ".py", ".spm", ".tiktoken", ".txt")
WEIGHT_SUFFIXES = (".safetensors", ".bin")
_MAPPED = (*WEIGHT_SUFFIXES, ".gguf")
_FOLDERS = ("", "additional_chat_templates", "custom_generate")
"""Folders in which transformers looks for files."""


def check_files(directory: Path, name: str, folders: Sequence[str] = _FOLDERS) -> None:
    """Raise CheckpointError for a file in these folders, of a kind that is read, that is not a regular file, is a link
    out of the checkpoint, or is too large."""
    for path in _list_files(directory, folders):
        shown = f"{path.relative_to(directory).as_posix()} of {name}"
        if not path.exists():
            # A dangling link counts as no file.
            continue
        if not _is_own(path, directory):
            raise CheckpointError(
                f"{shown} is a link to {path.resolve()}, outside of the checkpoint. If that file belongs to it, put it "
                f"there, or export the folder where all of it lies."
            )
        if not path.is_file():
            raise CheckpointError(f"{shown} is not a regular file.")
        if path.suffix in _READ and (size := path.stat().st_size) > MAX_BYTES:
            raise CheckpointError(
                f"{shown} has {size:,} bytes; {MAX_BYTES:,} are the most that is read of such a file."
            )


def read_files(directory: Path) -> list[Path]:
    """The files that are read as a whole, in the directory and the folders in it, except Markdown."""
    found = (path for pattern in ("*", "*/*") for path in directory.glob(pattern))
    return sorted(path for path in found if path.suffix in _READ and path.suffix != ".md" and path.is_file())


def path_within(directory: Path, entry: str, name: str, where: str) -> Path:
    """The path of `entry`, which the checkpoint's file `where` names. Raises CheckpointError where it leads out of the
    checkpoint."""
    path = directory / entry
    if not Path(os.path.abspath(path)).is_relative_to(directory) or not _is_own(path, directory):
        raise CheckpointError(f"{where} of {name} names {entry}, which is outside of the checkpoint.")
    return path


def weight_files(directory: Path, name: str, config: Mapping[str, Any]) -> list[Path]:
    """The weight files: those that transformers loads, else all there are, as AutoGPTQ had names of its own.

    Raises CheckpointError where there are none, or one lies outside of the checkpoint.
    """
    chosen = config.get("transformers_weights")
    if isinstance(chosen, str):
        first = _weight_path(directory, chosen, name, "config.json")
        return _read_index(first, directory, name) if first.name.endswith(".index.json") else [first]
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{whole}.index.json"
        if (directory / whole).is_file():
            return [directory / whole]
        if index.is_file():
            return _read_index(index, directory, name)
    for pattern in ("*.safetensors", "*.bin"):
        if files := sorted(directory.glob(pattern)):
            return files
    raise CheckpointError(f"{name} has no weights: no *.safetensors or *.bin file in it.")


def _read_index(index: Path, directory: Path, name: str) -> list[Path]:
    shown = index.relative_to(directory).as_posix()
    try:
        entries = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(map(str, entries.values())))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise CheckpointError(
            f"{shown} of {name}, which lists the files of its weights, cannot be used: {reason}"
        ) from error
    return [_weight_path(directory, entry, name, shown) for entry in names]


def _weight_path(directory: Path, entry: str, name: str, where: str) -> Path:
    path = path_within(directory, entry, name, where)
    if not path.is_file():
        raise CheckpointError(f"{name} lacks the file {entry}, which its {where} names.")
    return path


def _list_files(directory: Path, folders: Sequence[str]) -> Iterator[Path]:
    for folder in folders:
        if (directory / folder).is_dir():
            yield from (path for path in sorted((directory / folder).iterdir()) if path.suffix in _READ + _MAPPED)


def _is_own(path: Path, directory: Path) -> bool:
    """Whether a path lies in the checkpoint, or is a link to where the Hub's cache keeps a repository's files."""
    if path.resolve().is_relative_to(directory.resolve()):
        return True
    # Only the first link counts: from there huggingface_hub may link on, to a store for all repositories.
    blob = Path(os.path.abspath(path.parent / os.readlink(path))) if path.is_symlink() else path
    return blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
