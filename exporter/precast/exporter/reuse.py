"""Keep exports and reuse them: one per content of the checkpoint, options, versions and machine.

An artifact that a process has open is never replaced: the same request gets the same artifact, and any other request
one of another name.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.backends import BACKENDS, get_backend
from precast.runtime.artifact.integrity import sha256_of
from precast.runtime.artifact.prefix_files import find_file
from precast.runtime.errors import ArtifactError, PublishError
from precast.runtime.hosts.machine import cpu_flags, installed_version

from .checkpoint.checkpoint import Checkpoint
from .checkpoint.files import read_files
from .checkpoint.resolve import resolve
from .dispatch import export
from .options import AUTO, ExportOptions

__all__ = ["export_once"]

_NAME = re.compile(r"[\w.-]+")
_WITHOUT_EFFECT = ("token", "force", "revision", "weights", "lora", "force_base", "trust_pickle", "prefix_tuning")
"""Options without effect on the artifact: they say how to get the files, whose hashes count, or where to put it."""


def export_once(model: str, folder: Path, options: ExportOptions) -> Path:
    """The directory in `folder` of the artifact of this checkpoint with these options, exported if it is not there.

    Args:
        model: a Hub id, a checkpoint directory, or a .gguf file.
        folder: where artifacts are kept, each in a directory named by a hash of all that it depends on.

    Raises:
        PrecastError: as `export` does.
    """
    options.check()
    checkpoint = resolve(model, options)
    # Pinned: exactly the revision that the key is made of is exported, whatever is published meanwhile.
    lora = tuple(each.request for each in checkpoint.adapters)
    options = options.replace(revision=checkpoint.revision, lora=lora, force=False)
    target = folder / f"{checkpoint.name.rpartition('/')[2]}-{_key(checkpoint, options)}"
    if _is_whole(target):
        return target
    try:
        # An artifact that is there is damaged.
        export(model, target, options.replace(force=target.exists()))
    except PublishError:
        # Another process may have made it meanwhile.
        if not _is_whole(target):
            raise
    return target


def _is_whole(target: Path) -> bool:
    try:
        read_artifact(target).contents.verify()
    except ArtifactError:
        return False
    return True


def _key(checkpoint: Checkpoint, options: ExportOptions) -> str:
    files = [(path.name, path.parent.name, sha256_of(path)) for path in read_files(checkpoint.directory)]
    facts = {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "weights": checkpoint.weights_sha256(),
        "files": files,
        "adapters": [(each.name, each.sha256, each.weight) for each in checkpoint.adapters],
        "options": {name: value for name, value in options.as_keywords().items() if name not in _WITHOUT_EFFECT},
        "prefix": sha256_of(find_file(options.prefix_tuning)) if options.prefix_tuning else None,
        "calibration": sha256_of(text) if (text := options.quantization.calibration) else None,
        "versions": dict(_versions(options)),
        "machine": [platform.machine(), sorted(cpu_flags()), *_gpu_name(options)],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _versions(options: ExportOptions) -> Iterator[tuple[str, str | None]]:
    """Versions of precast, of its requirements, and of the packages that bring the options' plug-in backends."""
    asked = BACKENDS if AUTO in (options.backend, *options.also) else (options.backend, *options.also)
    packages = {get_backend(name).compiler.partition(":")[0].partition(".")[0] for name in asked} - {"precast"}
    found = metadata.packages_distributions() if packages else {}
    needed = [_NAME.match(each) for each in metadata.requires("precast") or () if "extra == 'dev'" not in each]
    names = {name[0] for name in needed if name} | {each for package in packages for each in found.get(package, ())}
    return ((name, installed_version(name)) for name in ("precast", *sorted(names)))


def _gpu_name(options: ExportOptions) -> list[str]:
    """The GPU that code is compiled for, besides the CPU."""
    return [torch.cuda.get_device_name()] if options.device == "cuda" and torch.cuda.is_available() else []
