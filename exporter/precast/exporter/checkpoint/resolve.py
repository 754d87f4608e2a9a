"""Resolve MODEL, as the user typed it, to a checkpoint on this machine, downloaded where it is a Hub id."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from precast.runtime.hosts.reach import hub_or_cache

from ..options import ExportOptions
from .checkpoint import Checkpoint
from .describe import describe_error
from .locate import check_is_checkpoint, find_local, find_weights, not_found_error

__all__ = ["resolve"]

_DOWNLOAD = [
    "*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.codes", "*.jinja", "*.py",
]  # fmt: skip


def resolve(model: str, options: ExportOptions) -> Checkpoint:
    """Find the checkpoint that `model` names: a local directory, a `.gguf` file, or a Hub id.

    Raises CheckpointError where there is none, UsageError for a revision of what is no Hub id and for weights elsewhere
    of what has its own.
    """
    found = find_local(model, options.revision)
    weights = None if options.weights is None else find_weights(options.weights, found)
    if found is None:
        return replace(_download(model, options), weights=weights)
    return Checkpoint(
        model, found.name, found.directory, found.gguf_file, None, options.trust_remote_code, weights=weights
    )


def _download(model: str, options: ExportOptions) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with hub_or_cache() as problem:
        try:
            path = snapshot_download(
                model, revision=options.revision, token=options.token, allow_patterns=_DOWNLOAD,
                ignore_patterns=["original/*", "onnx/*", "openvino/*"], local_files_only=problem is not None,
            )  # fmt: skip
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise not_found_error(model, problem or describe_error(error)) from error
    check_is_checkpoint(Path(path), model)
    # The snapshot's own directory is named after the commit.
    commit = os.path.basename(os.path.normpath(path))
    return Checkpoint(model, model, Path(path).resolve(), None, commit, options.trust_remote_code)
