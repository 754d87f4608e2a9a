"""Resolve MODEL, as the user typed it, to a checkpoint on this machine, downloaded where it is a Hub id."""

from __future__ import annotations

from dataclasses import replace

from ..options import ExportOptions
from .adapters import find_adapters
from .checkpoint import Checkpoint
from .download import download
from .locate import check_is_checkpoint, find_local, find_weights

__all__ = ["resolve"]

_DOWNLOAD = [
    "*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.codes", "*.jinja", "*.py",
]  # fmt: skip


def resolve(model: str, options: ExportOptions) -> Checkpoint:
    """Find the checkpoint that `model` names: a local directory, a `.gguf` file, or a Hub id; and its adapters.

    Raises CheckpointError where there is none, or an adapter is not for it, UsageError for a revision of what is no Hub
    id and for weights elsewhere of what has its own.
    """
    found = find_local(model, options.revision)
    weights = None if options.weights is None else find_weights(options.weights, found)
    if found is None:
        checkpoint = _download(model, options)
    else:
        checkpoint = Checkpoint(model, found.name, found.directory, found.gguf_file, None, options.trust_remote_code)
    return replace(checkpoint, weights=weights, adapters=find_adapters(checkpoint, options.adapters, options.token))


def _download(model: str, options: ExportOptions) -> Checkpoint:
    path = download(model, options.revision, options.token, _DOWNLOAD)
    check_is_checkpoint(path, model)
    # The snapshot's own directory is named after the commit.
    return Checkpoint(model, model, path.resolve(), None, path.name, options.trust_remote_code)
