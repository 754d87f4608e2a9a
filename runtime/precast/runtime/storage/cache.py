"""The cache below precast's home, of directories that can be made or fetched again: list, measure and remove them.

Removing is safe at any time: a directory is renamed first, so nobody finds half of it, and a process that has its files
mapped keeps them.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..artifact import locks, read_artifact, strict_json
from ..artifact.integrity import read_regular
from ..artifact.store import fsync, home
from ..errors import ArtifactError, PrecastError

__all__ = ["KINDS", "MANIFEST", "Kept", "Stage", "clear", "kept", "place", "remove", "sweep", "total_bytes", "trim"]

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Kept:
    """One cached directory. `files` has the bytes of each inode, since directories may share files; times are Unix
    seconds."""

    kind: str
    name: str
    path: Path
    created: float
    used: float
    files: dict[tuple[int, int], int] = field(repr=False)

    @property
    def size(self) -> int:
        """Its bytes, shared ones too."""
        return total_bytes([self])


@dataclass(frozen=True)
class _Kind:
    folder: str
    name: Callable[[Path], str]
    """The name to show for the directory at a path. Raises ArtifactError, OSError, ValueError, KeyError, TypeError."""
    used: Callable[[dict[str, os.stat_result]], float]
    """When it was last used, by the status of its files. Looking at it here must not count."""


def _packed_name(path: Path) -> str:
    manifest = json.loads(read_regular(path / MANIFEST, strict_json.MAX_BYTES))["manifest"]
    return f"{manifest['model']}, {manifest['graph']}"


def _packed_last_use(files: dict[str, os.stat_result]) -> float:
    return files[MANIFEST].st_mtime if MANIFEST in files else 0.0


def _artifact_name(path: Path) -> str:
    return read_artifact(path).contract.source.model


def _artifact_last_use(files: dict[str, os.stat_result]) -> float:
    return max((found.st_atime for name, found in files.items() if name != "config.json"), default=0.0)


KINDS = {
    "prepacked": _Kind("prepacked", _packed_name, _packed_last_use),
    "hub": _Kind("artifacts", _artifact_name, _artifact_last_use),
    "exports": _Kind("exports", _artifact_name, _artifact_last_use),
    "compiler": _Kind("compiler", lambda path: path.name, _artifact_last_use),
}
"""Weights in the form of this machine's kernels; artifacts pulled from the Hub; those that `export=True` made; what the
compiler of native code made that is the same for every model."""


def place(kind: str) -> Path:
    """The folder that holds the directories of a kind."""
    return home() / KINDS[kind].folder


def kept(*kinds: str) -> list[Kept]:
    """List the directories of these kinds, by default of all, last used first."""
    found = [_inspect(kind, path) for kind in kinds or KINDS for path in _list_directories(place(kind))]
    return sorted((each for each in found if each), key=lambda each: each.used, reverse=True)


def total_bytes(directories: Iterable[Kept]) -> int:
    """Bytes on disk, with files that several directories share counted once."""
    return sum({inode: size for each in directories for inode, size in each.files.items()}.values())


def remove(path: Path) -> None:
    """Rename a directory out of sight, then delete it. Raises OSError where the first is not allowed."""
    gone = path.with_name(f".gone-{secrets.token_hex(8)}")
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear(*kinds: str) -> list[Kept]:
    """Remove everything of these kinds, and the leftovers of killed processes; returns what was removed.

    Raises PrecastError where something may not be removed.
    """
    removed = []
    for each in kept(*kinds):
        try:
            remove(each.path)
            removed.append(each)
        except FileNotFoundError:
            # Someone else clears, too.
            continue
        except OSError as error:
            raise PrecastError(f"{each.path} cannot be removed: {error.strerror}.") from error
    for kind in kinds:
        sweep(kind)
    return removed


def trim(kind: str, limit: int, spared: Path) -> None:
    """Remove the least recently used until all of a kind fits in `limit` bytes; never `spared`."""
    left = kept(kind)
    for oldest in reversed([each for each in left if each.path != spared]):
        if total_bytes(left) <= limit:
            return
        with suppress(FileNotFoundError):
            # Gone if another process trims, too.
            remove(oldest.path)
        left.remove(oldest)


def sweep(kind: str) -> None:
    """Delete directories that killed processes left half made or half removed."""
    locks.sweep([*place(kind).glob(".gone-*"), *place(kind).glob(".stage-*")])


class Stage(locks.LockedDirectory):
    """A directory in the making."""

    def __init__(self, kind: str) -> None:
        """Raises OSError where none can be made."""
        place(kind).mkdir(parents=True, exist_ok=True, mode=0o700)
        sweep(kind)
        super().__init__(place(kind), ".stage-", 0o700)

    def publish(self, target: Path) -> None:
        """Write everything to disk and rename to `target`. Raises OSError, also where another was faster."""
        for path in [*self.path.iterdir(), self.path]:
            fsync(path)
        os.rename(self.path, target)
        fsync(target.parent)


def _list_directories(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return []


def _inspect(kind: str, path: Path) -> Kept | None:
    """The facts about one directory; None where it has just been removed."""
    try:
        stats = {file.relative_to(path).as_posix(): file.stat() for file in path.rglob("*") if file.is_file()}
        created = path.stat().st_mtime
    except FileNotFoundError:
        return None
    files = {(found.st_dev, found.st_ino): found.st_size for found in stats.values()}
    return Kept(kind, _name_of(kind, path), path, created, KINDS[kind].used(stats), files)


def _name_of(kind: str, path: Path) -> str:
    try:
        return KINDS[kind].name(path)
    except (ArtifactError, OSError, ValueError, KeyError, TypeError):
        return "unreadable"
