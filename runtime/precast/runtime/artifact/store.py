"""Where precast keeps what is the user's own: the key, the stamps, the artifacts pulled from the Hub."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

__all__ = ["fsync", "home", "sign", "write_atomically"]


def home() -> Path:
    """`$PRECAST_HOME`, else `$XDG_CACHE_HOME/precast`, else `~/.cache/precast`."""
    try:
        if explicit := os.environ.get("PRECAST_HOME"):
            return Path(explicit).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "precast"
    except RuntimeError:
        # A user without a home, as in some containers: a place where nothing can be kept.
        return Path(os.devnull) / "precast"


def sign(message: bytes) -> str | None:
    """HMAC-SHA256 of `message` under this user's key, or None where no private key can be kept."""
    key = _key()
    return hmac.new(key, message, hashlib.sha256).hexdigest() if key else None


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write beside `path`, then rename over it: readers see the old content or the new one. Raises OSError."""
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
    """Let a file or a directory reach the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _key() -> bytes | None:
    path = home() / "key"
    try:
        if not path.exists():
            _create_key(path)
        return path.read_bytes() if _is_private(path) else None
    except OSError:
        # A machine without a writable home verifies every time; it loses speed, never safety.
        return None


def _create_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    stage = path.with_name(f".key.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(stage, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(32))
    try:
        # link() does not replace: of two processes that start together, both use the first one's key.
        os.link(stage, path)
    except FileExistsError:
        pass
    finally:
        stage.unlink()


def _is_private(path: Path) -> bool:
    found = path.stat()
    return found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077 == 0
