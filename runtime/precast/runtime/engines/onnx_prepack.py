"""Weights in the layout of this machine's kernels, saved once and memory-mapped by all later processes.

ONNX Runtime copies most weights into a layout of its own whenever it opens a graph: seconds of work, and private memory
of about their size in every process. It can save graph and layout, and open that instead. It does not check what it
opens, though (with a zeroed file all logits are zero, and no error), so an entry counts only with a manifest that is
signed with the user's key and lists the files' hashes; like an artifact's, they are verified once and stamped.

An entry lies under a key of all that it depends on: the contract's digest, the hashes of the graph and of whatever it
opens (a graph that opens anything else is refused), this build of ONNX Runtime, this CPU. Number of threads and level
of optimization are not among them: the former does not change a byte of it, the latter is part of FORMAT.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import platform
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ..artifact import Artifact, strict_json
from ..artifact.integrity import read_regular, remember, sha256_of, verify_files
from ..artifact.schema import File, Graph, Sha256, Variant
from ..artifact.store import home, sign
from ..errors import IntegrityError, UsageError
from ..progress import say
from ..storage import cache
from ..terminal import printable

__all__ = ["DATA", "GRAPH", "Entry", "Packing", "is_wanted"]

FORMAT = 3
"""Part of every key: raise it when what is saved, or how, changes."""
MIN_BYTES = 16 * 2**20
"""Graphs with less are opened in no time anyway."""
MOST = 2.5
"""Once the graphs of an artifact have saved more than so many times its weights, no further one is saved. The graphs of
a decoder pack the same weights, which are kept once; the buckets of an encoder differ in the constants folded for their
lengths, and each keeps its own."""
GRAPH, DATA = "model.onnx", "model.onnx.data"
THREAD = "precast-prepacked"

_log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()
"""Graphs opened together find what they can share only if one is published before the next looks."""


def is_wanted() -> bool:
    """Whether packed weights are saved: not where the environment says `PRECAST_PREPACK=0`."""
    return os.environ.get("PRECAST_PREPACK") != "0"


def limit() -> int:
    """The bytes that all entries together may take: `PRECAST_PREPACK_GB`, 20 if not set. Raises UsageError."""
    asked = os.environ.get("PRECAST_PREPACK_GB") or "20"
    try:
        return int(float(asked) * 1e9)
    except (ValueError, OverflowError):
        raise UsageError(f"PRECAST_PREPACK_GB={asked} is not a number of gigabytes, such as 20.") from None


class _Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    key: Sha256
    artifact: Sha256
    model: str
    graph: str
    files: dict[str, File]


class _Signed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    manifest: _Manifest
    signature: str


class Entry:
    """The place in the cache of one graph of a verified artifact, packed by one build of ONNX Runtime on this CPU."""

    def __init__(self, artifact: Artifact, variant: Variant, graph: Graph, build: str) -> None:
        files = artifact.contract.files
        self.root, self.model, self.graph = artifact.path, artifact.contract.source.model, graph.name
        self.artifact = artifact.contract.digest
        self.sources = {name: files[name] for name in (graph.file, *variant.weights)}
        # A stage has a part of the variant's weights, and others on this machine have the rest.
        names = {name for each in artifact.contract.variants if each.name == variant.name for name in each.weights}
        self._weight_bytes = sum(files[name].size for name in names)
        hashes = {name: file.sha256 for name, file in self.sources.items()}
        self.key = _entry_key([self.artifact, graph.file, hashes], build)
        self.path = cache.place("prepacked") / self.key

    def find(self, *, force: bool = False) -> Path | None:
        """The path of the packed graph, verified, with `force` hashed anew; None where none can be trusted."""
        if sign(b"") is None or not os.path.lexists(self.path):
            return None
        try:
            manifest = _read_manifest(self.path)
            verify_files(self.path, manifest.files, force=force)
        except (OSError, IntegrityError) as error:
            self.drop(str(error))
            return None
        with suppress(OSError):
            os.utime(self.path / cache.MANIFEST)
        return self.path / GRAPH

    @property
    def size(self) -> int:
        """Bytes of the graph and its weights, as the artifact has them."""
        return sum(file.size for file in self.sources.values())

    def has_room(self) -> bool:
        """Whether the other graphs of the artifact leave room for this one: see MOST."""
        others = [each for each in cache.kept("prepacked") if _artifact_of(each.path) == self.artifact]
        return cache.total_bytes(others) <= MOST * max(self.size, self._weight_bytes)

    def drop(self, reason: str) -> None:
        """Remove an entry that cannot be used, and log why."""
        _log.warning("The packed weights of %s are not used: %s", printable(self.model), reason)
        with suppress(OSError):
            cache.remove(self.path)

    def pack(self) -> Packing | None:
        """Begin to pack; None where it is not worth it, or nothing can be kept."""
        size = self.size
        # Weights are saved in both layouts: kernels without a packed form read the plain one.
        if size < MIN_BYTES or 2 * size > limit() or sign(b"") is None or not self.has_room():
            return None
        try:
            if shutil.disk_usage(_nearest_existing(self.path)).free < 3 * size:
                return None
            return Packing(self)
        except OSError as error:
            _log.info("No weights can be packed in %s: %s", home(), error)
            return None


class Packing:
    """An entry in the making: ONNX Runtime writes GRAPH and DATA into `path`; then `keep()`, or else `discard()`."""

    def __init__(self, entry: Entry) -> None:
        """Raises OSError."""
        self._entry, self._stage = entry, cache.Stage("prepacked")
        self.path = self._stage.path

    def discard(self) -> None:
        """Delete what was written."""
        self._stage.close()

    def keep(self) -> None:
        """Hash and publish in a thread, while the model already answers; a process that ends waits for it."""
        try:
            threading.Thread(target=self._publish_in_turn, name=THREAD).start()
        except RuntimeError as error:
            # No more threads in this container, or the interpreter is about to end.
            _log.info("The packed weights of %s were not saved: %s", self._entry.model, error)
            self.discard()

    def _publish_in_turn(self) -> None:
        with _one_at_a_time:
            self._publish_entry()

    def _publish_entry(self) -> None:
        entry = self._entry
        try:
            if not entry.has_room():
                return
            # What was packed just now may no longer be what was verified when the artifact was opened.
            verify_files(entry.root, entry.sources)
            files = {path.name: _describe_file(path) for path in sorted(self.path.iterdir())}
            self._link_shared(files)
            added = sum(found.st_size for found in map(Path.stat, self.path.iterdir()) if found.st_nlink == 1)
            _write_manifest(self.path, _Manifest(
                key=entry.key, artifact=entry.artifact, model=entry.model, graph=entry.graph, files=files
            ))  # fmt: skip
            self._stage.publish(entry.path)
            remember(entry.path, files)
            say(
                f"Packed weights of {entry.model} ({entry.graph}) saved: {added / 1e6:,.1f} MB in {entry.path.parent}, "
                f"for faster loading. `precast cache list` shows them, PRECAST_PREPACK=0 saves none."
            )
            cache.trim("prepacked", limit(), entry.path)
        except (OSError, IntegrityError) as error:
            # Another process may have been faster; else the next load tries again.
            _log.info("The packed weights of %s were not saved: %s", entry.model, error)
        finally:
            self._stage.close()

    def _link_shared(self, files: dict[str, File]) -> None:
        """Graphs of one artifact pack the same weights to the same bytes: keep them once."""
        holders = _entries_with(files[DATA]) if DATA in files else {}
        with suppress(OSError):
            # Where there are no hard links it stays a copy.
            for path in list(holders)[:1]:
                os.link(path / DATA, self.path / f"{DATA}.shared")
                os.replace(self.path / f"{DATA}.shared", self.path / DATA)
            # A new link changes the file's ctime, and with it what the stamps were made of.
            for path, known in holders.items():
                remember(path, known)


def _entries_with(data: File) -> dict[Path, dict[str, File]]:
    """The verified files of the entries that hold the same weights."""
    found = {}
    for path in (each.path for each in cache.kept("prepacked")):
        with suppress(OSError, IntegrityError):
            known = _read_manifest(path).files
            if known.get(DATA) == data:
                verify_files(path, known)
                found[path] = known
    return found


def _artifact_of(path: Path) -> str | None:
    """The digest of the artifact that an entry belongs to; None where it is not one of ours."""
    try:
        return _read_manifest(path).artifact
    except (OSError, IntegrityError):
        return None


def _entry_key(content: list[Any], build: str) -> str:
    facts = [FORMAT, content, build, platform.machine(), _cpu_features()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


_CPU = {
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features",
}  # fmt: skip


def _cpu_features() -> list[str]:
    """Model and features of the first core, as Linux lists them; elsewhere the processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            # Not all of it: the kernel asks every core for its frequency.
            block = file.read(8192).partition("\n\n")[0]
    except OSError:
        return [platform.processor()]
    return sorted(line for line in block.splitlines() if line.partition(":")[0].strip() in _CPU)


def _read_manifest(path: Path) -> _Manifest:
    """The manifest of the entry at `path`. Raises OSError, IntegrityError where this user did not sign it for it."""
    try:
        signed = msgspec.json.decode(read_regular(path / cache.MANIFEST, strict_json.MAX_BYTES), type=_Signed)
    except msgspec.MsgspecError as error:
        raise IntegrityError(f"{path / cache.MANIFEST} is damaged: {error}.") from None
    if not hmac.compare_digest(signed.signature.encode(errors="replace"), _sign_manifest(signed.manifest).encode()):
        raise IntegrityError(f"{path / cache.MANIFEST} was not signed with this user's key.")
    if signed.manifest.key != path.name:
        raise IntegrityError(f"{path} holds the entry {signed.manifest.key[:12]}….")
    return signed.manifest


def _write_manifest(path: Path, manifest: _Manifest) -> None:
    data = msgspec.json.encode(_Signed(manifest=manifest, signature=_sign_manifest(manifest)))
    (path / cache.MANIFEST).write_bytes(data)


def _sign_manifest(manifest: _Manifest) -> str:
    """Raises IntegrityError where there is no key to sign with."""
    signature = sign(b"prepacked " + msgspec.json.encode(manifest))
    if signature is None:
        raise IntegrityError(f"{home() / 'key'} is not a private key that can be used.")
    return signature


def _describe_file(path: Path) -> File:
    return File(size=path.stat().st_size, sha256=sha256_of(path))


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
