"""All or nothing: an artifact appears at its target complete, or not at all.

    stage beside the target -> write -> fsync -> hash -> config.json last -> rename into place -> fsync the parent

An existing artifact is replaced by exchanging the two directories in one step of the file system
(renameat2 RENAME_EXCHANGE); where that is missing, by two renames, and a kill between them is repaired by the next
use, since the old artifact then lies beside under a name that says so.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from ..errors import IntegrityError, PublishError
from . import UNLISTED, Artifact, contract_digest, is_artifact, read_artifact, render_config
from .integrity import sha256_of
from .locks import Held, sweep
from .schema import Contract, File
from .store import fsync

__all__ = ["check_target", "copy_artifact", "hash_files", "publish", "recover", "staging", "write_config"]

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _no_fault(step: str) -> None:
    """Called before every step; tests replace it to fail or die there."""


fault: Callable[[str], None] = _no_fault


def check_target(target: Path, *, force: bool) -> None:
    """Refuse, before any work, a target that could not be written to in the end. Raises PublishError."""
    recover(target)
    try:
        _check_kind(target, force=force)
    except OSError as error:
        raise PublishError(f"{target} cannot be written: {error.strerror} ({error.filename}).") from error
    _check_writable(target)


def _check_kind(target: Path, *, force: bool) -> None:
    if target.is_symlink() and not target.exists():
        raise PublishError(f"{target} is a symbolic link to nothing.")
    if target.exists() and not target.is_dir():
        raise PublishError(f"{target} exists and is a file; give a directory that does not exist yet.")
    if os.path.realpath(target) == os.getcwd():
        raise PublishError(f"{target} is the current directory, which cannot be exchanged; give another one.")
    occupied = _is_occupied(target)
    if occupied and not force:
        raise PublishError(
            f"{target} exists and is not empty. Choose another directory, or replace it with force=True."
        )
    if occupied and not is_artifact(target):
        raise PublishError(f"{target} holds something that is not an artifact; force=True replaces artifacts only.")
    if occupied and os.path.ismount(_place(target)):
        raise PublishError(f"{target} is a mount point, which cannot be exchanged; empty it first.")


def _is_occupied(target: Path) -> bool:
    """Is there anything but stages, which lie inside where the target is a mount point?"""
    stages = f".{_place(target).name}.stage-"
    return target.is_dir() and any(not path.name.startswith(stages) for path in target.iterdir())


def _place(target: Path) -> Path:
    """Where the target really is: not behind symbolic links, which a rename would replace, and never just `.`."""
    return Path(os.path.realpath(target))


def _stages_in(target: Path) -> Path:
    """The directory in which a target is staged: beside it, or inside a mount point."""
    place = _place(target)
    return place if os.path.ismount(place) else place.parent


def _check_writable(target: Path) -> None:
    place = _stages_in(target)
    while not os.path.exists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise PublishError(f"{target} cannot be written: {place} is not a directory that you may write to.")


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A fresh directory on the target's file system, removed on the way out if it is still there.

    Raises PublishError where it cannot be made.
    """
    parent, name = _stages_in(target), _place(target).name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, name)
        stage = Held(parent, f".{name}.stage-")
    except OSError as error:
        raise PublishError(f"{target} cannot be written: {error.strerror} ({error.filename}).") from error
    try:
        yield stage.path
    except OSError as error:
        raise _explained(error, target) from error
    finally:
        stage.close()


def publish(stage: Path, target: Path, *, force: bool) -> None:
    """Make a complete stage the artifact at `target`. Raises PublishError; then the target is as it was."""
    check_target(target, force=force)
    place = _place(target)
    try:
        for path in sorted(stage.rglob("*")):
            fault(f"fsync {path.name}")
            fsync(path)
        fsync(stage)
        if os.path.ismount(place):
            _move_into(stage, place)
        elif _is_occupied(place):
            _exchange(stage, place)
        else:
            fault("rename")
            os.rename(stage, place)
    except OSError as error:
        raise _explained(error, target) from error
    try:
        fault("fsync parent")
        fsync(_stages_in(target))
    except OSError as error:
        raise PublishError(f"{target} is complete, but a power cut could undo it: {error.strerror}.") from error


def hash_files(stage: Path) -> dict[str, File]:
    """Size and hash of every file in the stage that the contract lists."""
    fault("hash")
    return {
        name: File(size=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(stage.rglob("*"))
        if path.is_file() and (name := path.relative_to(stage).as_posix()) not in UNLISTED
    }


def write_config(stage: Path, config: dict[str, Any], contract: Contract) -> Artifact:
    """Write `config.json` and return the artifact that the stage now is."""
    fault("config")
    (stage / "config.json").write_bytes(render_config(config, contract))
    return Artifact(stage, config, msgspec.structs.replace(contract, digest=contract_digest(config, contract)))


def copy_artifact(artifact: Artifact, target: Path, *, force: bool) -> None:
    """Copy an artifact, all or nothing. Raises PublishError, IntegrityError."""
    if target.resolve() == artifact.path.resolve():
        raise PublishError(f"{target} is the artifact itself.")
    check_target(target, force=force)
    names = [*artifact.contract.files, *(name for name in UNLISTED if (artifact.path / name).is_file())]
    with staging(target) as stage:
        for name in names:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.path / name, stage / name)
        copied, listed = hash_files(stage), read_artifact(stage).contract.files
        if wrong := sorted(name for name in copied if copied[name] != listed.get(name)):
            raise IntegrityError(f"{wrong[0]} in {artifact.path} is not what config.json lists; nothing was copied.")
        publish(stage, target, force=force)


def recover(target: Path) -> None:
    """Put back the old artifact if a replacement by two renames was killed between them, and if we may."""
    place = _place(target)
    if os.path.exists(place):
        return
    with suppress(OSError):
        for old in sorted(place.parent.glob(f".{glob.escape(place.name)}.old-*")):
            os.rename(old, place)
            return


def _exchange(stage: Path, target: Path) -> None:
    fault("exchange")
    if _rename_exchange(stage, target):
        # The old artifact now lies where the stage was, and goes with it.
        return
    old = target.parent / f".{target.name}.old-{secrets.token_hex(4)}"
    fault("set aside")
    os.rename(target, old)
    try:
        fault("rename")
        os.rename(stage, target)
    except BaseException as error:
        try:
            os.rename(old, target)
        except FileNotFoundError:
            # Someone found no target in this moment and put the old one back.
            if isinstance(error, OSError):
                _exchange(stage, target)
                return
        raise
    shutil.rmtree(old, ignore_errors=True)


def _rename_exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where system or file system cannot."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _move_into(stage: Path, target: Path) -> None:
    """A mount point cannot be renamed: move the files into it, config.json last, which makes them an artifact."""
    paths = sorted(stage.iterdir(), key=lambda path: path.name == "config.json")
    try:
        for path in paths:
            fault(f"move {path.name}")
            os.rename(path, target / path.name)
    except BaseException:
        for path in reversed(paths):
            with suppress(FileNotFoundError):
                os.rename(target / path.name, path)
        raise


def _sweep(parent: Path, name: str) -> None:
    """Remove what killed exports left."""
    sweep(parent.glob(f".{glob.escape(name)}.stage-*"))
    if (parent / name).exists():
        for path in parent.glob(f".{glob.escape(name)}.old-*"):
            shutil.rmtree(path, ignore_errors=True)


def _explained(error: OSError, target: Path) -> PublishError:
    what = {
        errno.ENOSPC: "the disk is full",
        errno.EFBIG: "a file would be larger than this process or file system allows",
        errno.EDQUOT: "your disk quota is used up",
    }.get(error.errno or 0, error.strerror or str(error))
    return PublishError(f"{target} was not written: {what}. Nothing was changed there.")
