"""Precast's home directory, which holds the user's key, stamps and caches; signing with the key; atomic writes."""

from __future__ import annotations

import errno
import hashlib
import hmac
import logging
import os
import secrets
import stat
from contextlib import suppress
from functools import cache
from pathlib import Path

__all__ = ["fsync", "home", "sign", "write_atomically"]

KEY_BYTES = 32
_log = logging.getLogger(__name__)


def home() -> Path:
    """`$PRECAST_HOME`, else `$XDG_CACHE_HOME/precast`, else `~/.cache/precast`."""
    try:
        if explicit := os.environ.get("PRECAST_HOME"):
            return Path(explicit).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "precast"
    except RuntimeError:
        # A user without a home, as in some containers: a path that nothing can be written to.
        return Path(os.devnull) / "precast"


def sign(message: bytes) -> str | None:
    """HMAC-SHA256 of `message` under this user's key, or None where no private key can be kept."""
    key = _get_key()
    return hmac.new(key, message, hashlib.sha256).hexdigest() if key else None


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file beside `path` and rename it: readers see the old content or the new one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    stage = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(stage, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(stage, path)
    except BaseException:
        stage.unlink(missing_ok=True)
        raise


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _get_key() -> bytes | None:
    path = home() / "key"
    try:
        return _read_key(path) or _create_key(path)
    except OSError:
        # A machine without a writable home verifies every time; it loses speed, never safety.
        return None


def _read_key(path: Path) -> bytes | None:
    """Read the key; None where there is none, or one that a full disk or a power cut left unfinished. Warns and raises
    OSError for one that must not be used."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            _warn(f"{path} is a symbolic link and not used as a key; remove it, and a new one is made.")
        raise
    try:
        if problem := _key_problem(os.fstat(descriptor), path):
            _warn(problem)
            raise OSError(errno.EINVAL, problem, str(path))
        key = os.read(descriptor, KEY_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(key) == KEY_BYTES:
        return key
    _warn(
        f"The key {path} does not have {KEY_BYTES} bytes; a new one is made. Artifacts are hashed once more, and "
        f"native code that was built here needs its digest (sha256=) or trust_native_code=True from now on."
    )
    path.unlink(missing_ok=True)
    return None


def _key_problem(found: os.stat_result, path: Path) -> str | None:
    """Why a key's file must not be used; None if it may."""
    if not stat.S_ISREG(found.st_mode):
        return f"{path} is not a regular file and not used as a key; remove it, and a new one is made."
    if found.st_uid != os.getuid():
        return f"{path} belongs to another user and is not used as a key; remove it, and a new one is made."
    if stat.S_IMODE(found.st_mode) & 0o077:
        return (
            f"{path} can be read or written by others and is not used as a key; remove it, and a new one is made (or "
            f"chmod 600 it, if nobody else had access)."
        )
    return None


@cache
def _warn(message: str) -> None:
    """Log a warning once per process. Without a key, artifacts are hashed on every load."""
    _log.warning("%s", message)


def _create_key(path: Path) -> bytes | None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    stage = path.with_name(f".key.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(stage, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            # Else a power cut could leave its name without its bytes.
            os.fsync(descriptor)
        with suppress(FileExistsError):
            # link() does not replace: of two processes that start together, both use the first one's key.
            os.link(stage, path)
    finally:
        stage.unlink()
    return _read_key(path)
