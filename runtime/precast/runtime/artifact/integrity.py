"""Verify that each file is what `config.json` lists, and that somebody vouches for native code.

Hashing a gigabyte takes a second, so a file is hashed once: a stamp, signed with the user's key, remembers which
inode with which size and times had which hash. A file that is opened later is checked again, by its descriptor, and
files that are not listed are not opened at all.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath

from ..errors import FormatError, IntegrityError, TrustError
from .schema import File
from .store import home, sign, write_atomically

__all__ = [
    "Contents", "Identity", "check_hash", "identity", "open_regular", "read_regular", "remember", "require_trust",
    "sha256_of", "verify_files", "vouch",
]  # fmt: skip

CHUNK = 4 * 2**20
KEPT_BYTES = 256 * 2**20
"""The most that the companions of an artifact may take together: they are held in memory."""

_TRIES = 3
"""How often a file that changes meanwhile is hashed again."""

Advance = Callable[[int], None]
Identity = tuple[int, ...]
"""Device, inode, size, and times of the last change of content and of anything."""


def _no_progress(count: int) -> None:
    """Ignore progress."""


def sha256_of(file: Path | int, advance: Advance = _no_progress) -> str:
    """sha256, in hexadecimal, of the content of a path or of an open file; `advance` is called with the bytes done.

    Raises OSError.
    """
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with open(file, "rb", buffering=0, closefd=not isinstance(file, int)) as opened:
        opened.seek(0)
        while count := opened.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            advance(count)
        opened.seek(0)
    return digest.hexdigest()


def identity(path: Path) -> Identity | None:
    """The facts by which a file differs from another in its place, and from itself after a change; None where there is
    no file."""
    try:
        return _identity_of(path.stat())
    except OSError:
        return None


def _identity_of(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a file, of which `limit` + 1 bytes at most are read. Raises OSError, also for what is no regular
    file: a pipe would never end, nor would some devices."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        # Python allocates as much as is asked for.
        return file.read(min(limit, found.st_size) + 1)


def open_regular(root: Path, name: str) -> int:
    """A descriptor of the regular file `name` below `root`, reached without following links; the caller closes it.

    Raises OSError, and IntegrityError where anything else lies there.
    """
    *folders, last = PurePosixPath(name).parts
    place = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            _check_part(root, name, place, folder, stat.S_ISLNK)
            outer, place = place, os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
            os.close(outer)
        _check_part(root, name, place, last, lambda mode: not stat.S_ISREG(mode))
        # O_NONBLOCK: it may have become a pipe by now.
        return os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place)
    finally:
        os.close(place)


def _check_part(root: Path, name: str, place: int, part: str, is_wrong: Callable[[int], bool]) -> None:
    if is_wrong(os.stat(part, dir_fd=place, follow_symlinks=False).st_mode):
        raise IntegrityError(f"{name} in {root} is not a regular file inside the artifact.")


class Contents:
    """The files that a contract lists, opened only while they have the listed hash.

    A file that was verified and has the same identity is not hashed again; any other is. A file must not have changed
    between opening and closing. Several threads may use it.
    """

    def __init__(self, root: Path, files: Mapping[str, File]) -> None:
        self.root, self.files = root, files
        self._known: dict[str, Identity] = {}
        self._kept: dict[str, bytes] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def verify(
        self, names: Iterable[str] | None = None, *, force: bool = False, advance: Advance = _no_progress
    ) -> None:
        """Check size and hash of these files, by default of all.

        Raises IntegrityError for the first that is missing, of another size, altered, or not a regular file that is
        reached without links. With `force` nothing is taken from earlier stamps.
        """
        stamps = _Stamps(self.root)
        for name in sorted(self.files if names is None else names):
            with self._open_listed(name) as descriptor:
                self._check_file(name, descriptor, stamps, force=force, advance=advance)
        stamps.save()

    @contextmanager
    def open(self, *names: str) -> Iterator[list[int]]:
        """Descriptors of listed files, at their start. Raises IntegrityError as `verify` does, also at the end, where
        one was changed meanwhile."""
        with ExitStack() as stack:
            opened = {name: stack.enter_context(self._open_listed(name)) for name in names}
            before = {name: self._check_again(name, opened[name]) for name in names}
            yield list(opened.values())
            for name in names:
                if _identity_of(os.fstat(opened[name])) != before[name]:
                    raise self.replaced(name)

    @contextmanager
    def path(self, name: str, *others: str, is_pinned: bool = True) -> Iterator[Path]:
        """A path for a library that opens `name` by itself, and `others` in the same folder. They are compared with the
        verified files on entry and on exit. In between nothing can replace the folder where it `is_pinned`: the path
        then leads through an open directory, which takes Linux.

        Raises IntegrityError as `open` does.
        """
        folder = self.root / PurePosixPath(name).parent
        names = (name, *others)
        with self.open(*names) as descriptors, _pin_folder(folder, is_pinned) as held:
            paths = [held / PurePosixPath(each).name for each in names]
            self._check_same(names, paths, descriptors)
            yield paths[0]
            self._check_same(names, paths, descriptors)

    def _check_same(self, names: Iterable[str], paths: Iterable[Path], descriptors: Iterable[int]) -> None:
        for name, path, descriptor in zip(names, paths, descriptors, strict=True):
            if identity(path) != _identity_of(os.fstat(descriptor)) or path.is_symlink():
                raise self.replaced(name)

    def check(self, *names: str) -> None:
        """Raise IntegrityError where one of these files is no longer what was verified."""
        with self.open(*names):
            pass

    def keep(self, names: Iterable[str]) -> None:
        """Read small files now; `get` gives what they hold now, whatever takes their place. Raises IntegrityError, and
        FormatError where they are not small."""
        names = list(names)
        if (size := sum(self.files[name].size for name in names)) > KEPT_BYTES:
            raise FormatError(
                f"{self.root} lists {size:,} bytes of tokenizers, templates and settings; {KEPT_BYTES:,} are the most "
                f"that is read."
            )
        for name in names:
            self._kept[name] = self.read(name)

    def get(self, name: str) -> bytes | None:
        """The content of a listed file, as it was when it was kept; None for one that is not listed."""
        if name not in self.files:
            return None
        return self._kept[name] if name in self._kept else self.read(name)

    def below(self, folder: str) -> dict[str, bytes]:
        """The listed files in a folder, by their names in it."""
        names = [name for name in self.files if PurePosixPath(name).parent == PurePosixPath(folder)]
        return {PurePosixPath(name).name: self.get(name) or b"" for name in names}

    def read(self, name: str) -> bytes:
        """The content of a listed file, as it is now. Raises IntegrityError."""
        with self.open(name) as [descriptor], open(descriptor, "rb", closefd=False) as file:
            return file.read(self.files[name].size)

    def replaced(self, name: str) -> IntegrityError:
        """The error for a file that is no longer the verified one."""
        return IntegrityError(f"{self.root / name} was replaced after it was verified. Open the artifact again.")

    @contextmanager
    def _open_listed(self, name: str) -> Iterator[int]:
        try:
            descriptor = open_regular(self.root, name)
        except FileNotFoundError:
            raise IntegrityError(f"{self.root} lacks the file {name} that its config.json lists. {_FIX}") from None
        except OSError as error:
            raise IntegrityError(f"{name} in {self.root} cannot be read: {error.strerror}.") from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _check_again(self, name: str, descriptor: int) -> Identity:
        """The identity of an open file, which is hashed only if it is unknown or has changed. Raises IntegrityError."""
        if self._known.get(name) != _identity_of(os.fstat(descriptor)):
            try:
                self._check_file(name, descriptor, _Stamps(self.root))
            except IntegrityError as error:
                raise (self.replaced(name) if name in self._known else error) from None
        return self._known[name]

    def _check_file(
        self, name: str, descriptor: int, stamps: _Stamps, *, force: bool = False, advance: Advance = _no_progress
    ) -> None:
        """Raise IntegrityError where the open file is not what the contract says."""
        expected = self.files[name]
        for _ in range(_TRIES):
            found = os.fstat(descriptor)
            self._check_size(name, found)
            if not force and stamps.has(name, found, expected.sha256):
                break
            check_hash(descriptor, self.root, name, expected, advance)
            if _identity_of(os.fstat(descriptor)) == _identity_of(found):
                stamps.add(name, found, expected.sha256)
                break
            # A new link to the file is a change, too; so this is a whole file, or a mixture of two: hash again.
        else:
            raise self.replaced(name)
        self._known[name] = _identity_of(found)

    def _check_size(self, name: str, found: os.stat_result) -> None:
        expected = self.files[name].size
        if found.st_size != expected or not stat.S_ISREG(found.st_mode):
            raise IntegrityError(
                f"{name} in {self.root} has {found.st_size:,} bytes where config.json says {expected:,}. {_FIX}"
            )


@contextmanager
def _pin_folder(folder: Path, is_pinned: bool) -> Iterator[Path]:
    """A path that keeps leading to the directory that `folder` is now."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        pinned = Path(f"/proc/self/fd/{descriptor}")
        yield pinned if is_pinned and pinned.exists() else folder
    finally:
        os.close(descriptor)


def verify_files(
    root: Path, files: Mapping[str, File], *, force: bool = False, advance: Advance = _no_progress
) -> None:
    """Check size and hash of every file below `root`: see Contents.verify()."""
    Contents(root, files).verify(force=force, advance=advance)


def remember(root: Path, files: Mapping[str, File]) -> None:
    """Stamp files that were hashed a moment ago, so that verify_files() need not. Raises OSError."""
    stamps = _Stamps(root)
    for name, file in files.items():
        stamps.add(name, (root / name).stat(), file.sha256)
    stamps.save()


_FIX = "Export or download the artifact again."


def check_hash(file: Path | int, root: Path, name: str, expected: File, advance: Advance = _no_progress) -> None:
    """Read a path, or an open file, that is listed as `name` in `root`. Raises IntegrityError where its hash is not the
    expected."""
    try:
        actual = sha256_of(file, advance)
    except OSError as error:
        raise IntegrityError(f"{name} in {root} cannot be read: {error.strerror}.") from None
    if actual != expected.sha256:
        raise IntegrityError(
            f"{name} in {root} was altered: its sha256 is {actual[:12]}… where config.json says "
            f"{expected.sha256[:12]}…. {_FIX}"
        )


class _Stamps:
    """The signed stamps of the files that were verified below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.path = home() / "stamps" / (hashlib.sha256(str(self.root).encode()).hexdigest() + ".json")
        self.known = self._read_stamps()
        self.changed = False

    def has(self, name: str, found: os.stat_result, sha256: str) -> bool:
        claim, actual = self.known.get(name), self._sign_stamp(name, found, sha256)
        return isinstance(claim, str) and actual is not None and _is_equal(claim, actual)

    def add(self, name: str, found: os.stat_result, sha256: str) -> None:
        if (signature := self._sign_stamp(name, found, sha256)) is not None:
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

    def _sign_stamp(self, name: str, found: os.stat_result, sha256: str) -> str | None:
        facts = [str(self.root), name, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, sha256]
        return sign(json.dumps(["stamp", *facts]).encode())

    def _read_stamps(self) -> dict[str, object]:
        try:
            known = json.loads(read_regular(self.path, KEPT_BYTES))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def vouch(digest: str) -> None:
    """Record, signed, that this user built the artifact with this digest here, if there is a key and room."""
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
    why = "it was not built here" if sign(b"") else f"{home()} has no key that could prove that it was built here"
    raise TrustError(
        f"{name} holds native code, which would run with all your rights, and {why}. If you know where it comes from, "
        f"pin it with sha256={digest!r}, or pass trust_native_code=True."
    )


def _built_here(digest: str) -> bool:
    expected = sign(f"built {digest}".encode())
    try:
        claim = read_regular(home() / "built" / digest, CHUNK).decode("latin-1")
    except OSError:
        return False
    return expected is not None and _is_equal(claim, expected)


def _is_equal(claim: str, signature: str) -> bool:
    """Compare in constant time. A claim can be any text, where compare_digest() takes ASCII or bytes."""
    return hmac.compare_digest(claim.encode(errors="replace"), signature.encode())
