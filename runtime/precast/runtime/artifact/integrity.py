"""Is each file what `config.json` says it is, and who vouches for native code?

Hashing a gigabyte takes a second, so a file is hashed once: a stamp, signed with the user's key, remembers which
inode with which times had which hash.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ..errors import IntegrityError, TrustError
from .schema import File
from .store import home, sign, write_atomically

__all__ = ["check_hash", "identity", "remember", "require_trust", "sha256_of", "verify_files", "vouch"]

CHUNK = 4 * 2**20


def sha256_of(path: Path, advance: Callable[[int], None] = lambda n: None) -> str:
    """sha256 of a file's content in hexadecimal; `advance` is told the bytes done. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(CHUNK)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            advance(count)
    return digest.hexdigest()


def identity(path: Path) -> tuple[int, ...] | None:
    """What tells a file from another that takes its place; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def verify_files(
    root: Path, files: dict[str, File], *, force: bool = False, advance: Callable[[int], None] = lambda n: None
) -> None:
    """Check size and hash of every file below `root`.

    Raises IntegrityError for the first file that is missing, of another size, altered, or not a regular file inside
    `root`. With `force` nothing is taken from earlier stamps.
    """
    stamps = _Stamps(root)
    for name, expected in sorted(files.items()):
        path = root / name
        found = _stat(root, path, name, expected)
        if force or not stamps.has(name, found, expected.sha256):
            check_hash(path, name, expected, advance)
            stamps.add(name, found, expected.sha256)
    stamps.save()


def remember(root: Path, files: dict[str, File]) -> None:
    """Stamp files that were hashed a moment ago, so that verify_files() need not. Raises OSError."""
    stamps = _Stamps(root)
    for name, file in files.items():
        stamps.add(name, (root / name).stat(), file.sha256)
    stamps.save()


def _stat(root: Path, path: Path, name: str, expected: File) -> os.stat_result:
    try:
        if not path.resolve(strict=True).is_relative_to(root.resolve()) or not path.is_file():
            raise IntegrityError(f"{name} in {root} is not a regular file inside the artifact.")
        found = path.stat()
    except FileNotFoundError:
        raise IntegrityError(f"{root} lacks the file {name} that its config.json lists. {_FIX}") from None
    except (OSError, RuntimeError) as error:
        # Before Python 3.13 a loop of symbolic links is a RuntimeError.
        raise IntegrityError(f"{name} in {root} cannot be read: {error}.") from None
    if found.st_size != expected.size:
        raise IntegrityError(
            f"{name} in {root} has {found.st_size:,} bytes where config.json says {expected.size:,}. {_FIX}"
        )
    return found


_FIX = "Export or download the artifact again."


def check_hash(path: Path, name: str, expected: File, advance: Callable[[int], None]) -> None:
    """Read the file at `path`, which is listed as `name`. Raises IntegrityError where its hash is not the expected."""
    try:
        actual = sha256_of(path, advance)
    except OSError as error:
        raise IntegrityError(f"{name} in {path.parent} cannot be read: {error.strerror}.") from None
    if actual != expected.sha256:
        raise IntegrityError(
            f"{name} in {path.parent} was altered: its sha256 is {actual[:12]}… where config.json says "
            f"{expected.sha256[:12]}…. {_FIX}"
        )


class _Stamps:
    """The signed memory of what was verified below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.path = home() / "stamps" / (hashlib.sha256(str(self.root).encode()).hexdigest() + ".json")
        self.known = self._read()
        self.changed = False

    def has(self, name: str, found: os.stat_result, sha256: str) -> bool:
        claim, actual = self.known.get(name), self._sign(name, found, sha256)
        return isinstance(claim, str) and actual is not None and _is_equal(claim, actual)

    def add(self, name: str, found: os.stat_result, sha256: str) -> None:
        if (signature := self._sign(name, found, sha256)) is not None:
            self.known[name] = signature
            self.changed = True

    def save(self) -> None:
        if not self.changed:
            return
        try:
            write_atomically(self.path, json.dumps(self.known).encode())
        except OSError:
            # Without the stamp the next load hashes again, which is slower and just as safe.
            return

    def _sign(self, name: str, found: os.stat_result, sha256: str) -> str | None:
        facts = [str(self.root), name, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, sha256]
        return sign(json.dumps(["stamp", *facts]).encode())

    def _read(self) -> dict[str, object]:
        try:
            known = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def vouch(digest: str) -> None:
    """Remember that the artifact with this digest was built here, by this user, if anything can be remembered."""
    if (signature := sign(f"built {digest}".encode())) is not None:
        with suppress(OSError):
            write_atomically(home() / "built" / digest, signature.encode())


def require_trust(name: str, digest: str, *, sha256: str | None, trust_native_code: bool) -> None:
    """Let native code pass only with proof: built here, pinned by digest, or trusted by the caller's own words.

    Raises TrustError.
    """
    if sha256 is not None and sha256 != digest:
        raise TrustError(f"The digest of {name} is {digest}, not {sha256} as pinned by sha256=.")
    if trust_native_code or sha256 is not None or _built_here(digest):
        return
    raise TrustError(
        f"{name} holds native code, which would run with all your rights, and it was not built here. If you know "
        f"where it comes from, pin it with sha256={digest!r} (--sha256 {digest}), or pass trust_native_code=True "
        f"(--trust-native-code)."
    )


def _built_here(digest: str) -> bool:
    expected = sign(f"built {digest}".encode())
    try:
        claim = (home() / "built" / digest).read_text("latin-1")
    except OSError:
        return False
    return expected is not None and _is_equal(claim, expected)


def _is_equal(claim: str, signature: str) -> bool:
    """Compare in constant time. A claim can be any text, where compare_digest() takes ASCII or bytes."""
    return hmac.compare_digest(claim.encode(errors="replace"), signature.encode())


def total_size(files: Iterable[File]) -> int:
    """Bytes of all files together."""
    return sum(file.size for file in files)
