"""Sessions in files: what the caches hold of the tokens so far, so that a long prompt is read once per machine.

A file is a line that names the format, a line of JSON, the bytes of the arrays one after the other, and a hash of all
that. It belongs to one variant of one artifact. It holds no code: who can write it can make a model believe that it has
read other tokens than it says.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from errno import EISDIR
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..errors import FormatError, InputError
from .adapters import LoadedAdapter
from .session import Session

__all__ = ["load_session", "save_session"]

Array = np.ndarray[Any, Any]

_FORMAT = b"precast session 1\n"
_MOST_HEADER = 64_000_000
_HASH_SIZE = 32


class _Held(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    dtype: str
    shape: list[int]


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    digest: str
    variant: str
    tokens: list[list[int]]
    arrays: list[_Held]
    adapters: list[str | None] = []
    """The hash of each row's adapter; left out where no row has one."""
    prefix: str | None = None
    """The hash of a prefix that is not the artifact's own."""


def save_session(session: Session, path: Path, digest: str, variant: str) -> None:
    """Write what a session holds to a file, all or nothing; only its owner can read it. Raises InputError where it
    cannot be written."""
    arrays = session.snapshot()
    held = [_Held(name, str(values.dtype), list(values.shape)) for name, values in arrays.items()]
    adapters = [adapter.sha256 if adapter else None for adapter in session.adapters]
    told = _Header(digest, variant, session.tokens, held, adapters if any(adapters) else [], session.prefix_sha256)
    header = msgspec.json.encode(told) + b"\n"
    hashed = hashlib.blake2b(digest_size=_HASH_SIZE)
    staged = None
    try:
        descriptor, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with open(descriptor, "wb") as file:
            for part in (_FORMAT, header, *(values.tobytes() for values in arrays.values())):
                hashed.update(part)
                file.write(part)
            file.write(hashed.digest())
        os.replace(staged, path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"The session cannot be saved as {path}: {why}.") from None
    finally:
        if staged is not None:
            with suppress(FileNotFoundError):
                os.unlink(staged)


def load_session(session: Session, path: Path, digest: str, variant: str, vocabulary: int) -> None:
    """Give a session what a file holds. Raises InputError for a file that is not there or of another model, FormatError
    for one that is no session, or not as it was written; the session then holds what it held before."""
    try:
        if path.exists() and not path.is_file():
            # A pipe would be waited for.
            raise OSError(EISDIR, "It is no file")
        data = memoryview(path.read_bytes())
    except (OSError, ValueError) as error:
        # ValueError: a path with a character that no path has.
        raise InputError(f"The session {path!s} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    header, start = _read_header(data, path)
    if (header.digest, header.variant) != (digest, variant):
        raise InputError(
            f"The session {path} is of another model: of artifact {header.digest[:12]}, variant {header.variant}, and "
            f"this is {digest[:12]}, variant {variant}. Delete the file, or name another."
        )
    _check_prefix(header.prefix, session.prefix_sha256, path)
    _check_tokens(header.tokens, session, vocabulary, path)
    adapters = _find_adapters(header, session, path)
    arrays = dict(_read_arrays(data[start:-_HASH_SIZE], header, session, path))
    if hashlib.blake2b(data[:-_HASH_SIZE], digest_size=_HASH_SIZE).digest() != bytes(data[-_HASH_SIZE:]):
        raise FormatError(f"The session {path} is not as it was written: its hash differs. Delete it.")
    session.restore(header.tokens, arrays, adapters)


def _read_header(data: memoryview, path: Path) -> tuple[_Header, int]:
    start = bytes(data[: len(_FORMAT) + _MOST_HEADER])
    if not start.startswith(_FORMAT):
        raise FormatError(f"{path} is no session of this version of precast: it does not begin as one.")
    end = start.find(b"\n", len(_FORMAT))
    try:
        header = msgspec.json.decode(start[len(_FORMAT) : max(end, 0)], type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"The session {path} is damaged: {error}. Delete it.") from None
    return header, end + 1


def _check_prefix(read: str | None, held: str | None, path: Path) -> None:
    """Raise InputError for tokens that were read after another prefix than the session's."""
    if read == held:
        return
    after, begins = (f"a prefix of sha256 {each[:12]}…" if each else "no prefix" for each in (read, held))
    how = "new_session(prefix=PATH)" if read else "the model itself, without a prefix"
    raise InputError(
        f"The session {path} was read after {after}, and this model's rows begin with {begins}. Open it with {how}, or "
        f"name another file."
    )


def _check_tokens(tokens: list[list[int]], session: Session, vocabulary: int, path: Path) -> None:
    wrong = [token for row in tokens for token in row if not 0 <= token < vocabulary]
    if len(tokens) != session.batch or any(len(row) > session.capacity for row in tokens) or wrong:
        raise FormatError(f"The session {path} is damaged: its tokens are none that this model can hold. Delete it.")


def _find_adapters(header: _Header, session: Session, path: Path) -> list[LoadedAdapter | None]:
    """The adapters that the rows were read with. Raises InputError where one is not loaded."""
    if len(header.adapters) not in (0, session.batch):
        raise FormatError(f"The session {path} is damaged: it has adapters of other rows. Delete it.")
    found = [None if told is None else session.find_adapter(told) for told in header.adapters]
    for told, adapter in zip(header.adapters, found, strict=True):
        if told is not None and adapter is None:
            raise InputError(
                f"The session {path} was read with an adapter that is not loaded, of sha256 {told[:12]}…. Load it "
                f"first, by load_adapter(), or name another file."
            )
    return found


def _read_arrays(data: memoryview, header: _Header, session: Session, path: Path) -> Any:
    """The arrays of a file, which are those that the session would save with as many tokens."""
    place, expected = 0, session.shapes_of(max(map(len, header.tokens)))
    told = {held.name: (held.dtype, held.shape) for held in header.arrays}
    if told != expected or len(header.arrays) != len(expected):
        raise FormatError(f"The session {path} is damaged: its arrays are none of this model's. Delete it.")
    sizes = {held.name: prod(held.shape) * np.dtype(held.dtype).itemsize for held in header.arrays}
    if sum(sizes.values()) != len(data):
        raise FormatError(
            f"The session {path} is damaged: it holds {len(data)} bytes of caches and not {sum(sizes.values())}. "
            f"Delete it."
        )
    for held in header.arrays:
        yield held.name, np.frombuffer(data, held.dtype, prod(held.shape), place).reshape(held.shape)
        place += sizes[held.name]
