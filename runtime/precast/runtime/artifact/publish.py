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
from . import UNLISTED, Artifact, contract_digest, is_artifact, parse_artifact, render_config, strict_json
from .integrity import CHUNK, check_hash, open_regular, sha256_of
from .locks import LockedDirectory, sweep
from .schema import Contract, File
from .store import fsync

__all__ = [
    "check_target", "copy_artifact", "copy_file", "hash_files", "left_out", "publish", "recover", "staging",
    "read_unlisted", "write_config",
]  # fmt: skip

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
    if occupied and os.path.ismount(_real_path(target)):
        raise PublishError(f"{target} is a mount point, which cannot be exchanged; empty it first.")


def _is_occupied(target: Path) -> bool:
    """Whether the target holds anything but stages, which are inside it where it is a mount point."""
    stages = f".{_real_path(target).name}.stage-"
    return target.is_dir() and any(not path.name.startswith(stages) for path in target.iterdir())


def _real_path(target: Path) -> Path:
    """The target's path without symbolic links, which a rename would replace, and never just `.`."""
    return Path(os.path.realpath(target))


def _stages_in(target: Path) -> Path:
    """The directory in which a target is staged: beside it, or inside a mount point."""
    place = _real_path(target)
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
    parent, name = _stages_in(target), _real_path(target).name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(parent, name)
        stage = LockedDirectory(parent, f".{name}.stage-")
    except OSError as error:
        raise PublishError(f"{target} cannot be written: {error.strerror} ({error.filename}).") from error
    try:
        yield stage.path
    except OSError as error:
        raise _publish_error(error, target) from error
    finally:
        stage.close()


def publish(stage: Path, target: Path, *, force: bool) -> None:
    """Make a complete stage the artifact at `target`. Raises PublishError; then the target is as it was."""
    check_target(target, force=force)
    place = _real_path(target)
    try:
        for path in sorted(stage.rglob("*")):
            fault(f"fsync {path.name}")
            fsync(path)
        fsync(stage)
        if os.path.ismount(place):
            _move_into(stage, place)
        elif _is_occupied(place):
            _exchange_directories(stage, place)
        else:
            fault("rename")
            os.rename(stage, place)
    except OSError as error:
        raise _publish_error(error, target) from error
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
    """Copy an artifact as it was opened, all or nothing: what its contract lists, and what `read_unlisted` gives.

    Raises PublishError, IntegrityError.
    """
    if target.resolve() == artifact.path.resolve():
        raise PublishError(f"{target} is the artifact itself.")
    check_target(target, force=force)
    others = read_unlisted(artifact)
    with staging(target) as stage:
        for name in artifact.contract.files:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(artifact, name, stage / name)
        for name, data in others.items():
            (stage / name).write_bytes(data)
        publish(stage, target, force=force)


def copy_file(artifact: Artifact, name: str, copy: Path) -> None:
    """Copy a file that the artifact's contract lists. Raises IntegrityError where the copy is not what is listed."""
    with (
        artifact.contents.open(name) as [descriptor],
        open(descriptor, "rb", closefd=False) as source,
        copy.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, CHUNK)
    check_hash(copy, artifact.path, name, artifact.contract.files[name])


def read_unlisted(artifact: Artifact) -> dict[str, bytes]:
    """The files that belong to an artifact without being listed: the contract as it was read, the model card, timings.

    Raises IntegrityError where one is a link, or anything else than a small regular file, or where another contract
    has taken this one's place.
    """
    found = {}
    for name in sorted(UNLISTED):
        try:
            descriptor = open_regular(artifact.path, name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise IntegrityError(f"{name} in {artifact.path} cannot be read: {error.strerror}.") from None
        with open(descriptor, "rb") as file:
            found[name] = file.read(strict_json.MAX_BYTES + 1)
        if len(found[name]) > strict_json.MAX_BYTES:
            raise IntegrityError(
                f"{name} in {artifact.path} has more than {strict_json.MAX_BYTES:,} bytes, the most that are copied."
            )
    if "config.json" not in found or parse_artifact(found["config.json"], artifact.path).contract != artifact.contract:
        raise IntegrityError(f"{artifact.path} now holds another artifact than the one that was opened. Open it again.")
    return found


def left_out(artifact: Artifact) -> list[str]:
    """The names of files in an artifact's directory that do not belong to it, and are not copied with it."""
    found = (path.relative_to(artifact.path).as_posix() for path in artifact.path.rglob("*") if not path.is_dir())
    return sorted(set(found) - set(artifact.contract.files) - UNLISTED)


def recover(target: Path) -> None:
    """Put back the old artifact if a replacement by two renames was killed between them, and if we may."""
    place = _real_path(target)
    if os.path.exists(place):
        return
    with suppress(OSError):
        for old in sorted(place.parent.glob(f".{glob.escape(place.name)}.old-*")):
            os.rename(old, place)
            return


def _exchange_directories(stage: Path, target: Path) -> None:
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
                _exchange_directories(stage, target)
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


def _remove_leftovers(parent: Path, name: str) -> None:
    """Remove the stages and old artifacts that killed exports left."""
    sweep(parent.glob(f".{glob.escape(name)}.stage-*"))
    if (parent / name).exists():
        for path in parent.glob(f".{glob.escape(name)}.old-*"):
            shutil.rmtree(path, ignore_errors=True)


def _publish_error(error: OSError, target: Path) -> PublishError:
    what = {
        errno.ENOSPC: "the disk is full",
        errno.EFBIG: "a file would be larger than this process or file system allows",
        errno.EDQUOT: "your disk quota is used up",
    }.get(error.errno or 0, error.strerror or str(error))
    return PublishError(f"{target} was not written: {what}. Nothing was changed there.")
