"""Download a repository of the Hub, or take what its cache holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from precast.runtime.hosts.reach import hub_or_cache

from .describe import describe_error
from .locate import not_found_error

__all__ = ["download"]


def download(name: str, revision: str | None, token: str | None, patterns: Sequence[str]) -> Path:
    """The snapshot of a repository, with the files of these patterns; it is named after the commit.

    Raises CheckpointError where the Hub gives none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with hub_or_cache() as problem:
        try:
            path = snapshot_download(
                name, revision=revision, token=token, allow_patterns=list(patterns),
                ignore_patterns=["original/*", "onnx/*", "openvino/*"], local_files_only=problem is not None,
            )  # fmt: skip
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise not_found_error(name, problem or describe_error(error)) from error
    return Path(os.path.normpath(path))
