"""Artifacts on the Hub: pulled into a store of our own, pushed as one commit.

huggingface_hub keeps downloads behind symbolic links, two hops deep in its shared store, and ONNX Runtime refuses
weights that leave the graph's directory that way. So a pulled artifact is opened from `store/<digest>`, where its files
are hard links (or copies, on another file system) under their own names.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from .artifact import UNLISTED, Artifact, read_artifact
from .artifact.publish import publish, recover, staging
from .artifact.store import home
from .errors import ArtifactError, HubError, PublishError

__all__ = ["locate", "push"]


def locate(
    model: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The local directory of an artifact, downloaded if need be. Raises ArtifactError, HubError."""
    path = Path(model).expanduser()
    recover(path)
    if path.exists():
        return path / (subfolder or "")
    if str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise ArtifactError(f"There is no directory {model}.")
    snapshot = _download(
        str(model), revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
        force_download=force_download, allow_patterns=[f"{subfolder}/*"] if subfolder else None,
    )  # fmt: skip
    return _store(read_artifact(snapshot / (subfolder or "")))


def push(
    artifact: Artifact,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a precast artifact",
) -> str:
    """Upload an artifact as one commit, creating the repository if there is none; returns the commit's address.

    Files that an earlier artifact left in the repository are deleted in the same commit. Raises HubError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=artifact.path, revision=revision, commit_message=commit_message,
            allow_patterns=_names(artifact), delete_patterns=["*"],
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise HubError(f"{artifact.path} was not pushed to {repo_id}: {_first_line(error)}{_hint(error)}") from error
    return str(commit.commit_url)


def _download(repo_id: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, **options))
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"{repo_id} is neither a local directory nor in the Hub cache, and the Hub was not asked or not reached "
            f"(HF_HUB_OFFLINE, local_files_only, HF_ENDPOINT)."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise HubError(f"{repo_id} could not be fetched: {_first_line(error)}{_hint(error)}") from error


def _store(artifact: Artifact) -> Path:
    """Link a downloaded snapshot's files into the store, under the digest of its contract."""
    target = home() / "artifacts" / artifact.contract.digest
    if target.is_dir():
        return target
    try:
        with staging(target) as stage:
            for name in _names(artifact):
                _link(artifact.path / name, stage / name)
            publish(stage, target, force=False)
    except PublishError:
        # Another process may have been faster; what it published is the same.
        if not (target / "config.json").is_file():
            raise
    return target


def _link(source: Path, target: Path) -> None:
    """A hard link to the file behind any symbolic links; a copy where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(strict=True), target)
    except FileNotFoundError:
        raise ArtifactError(f"The download lacks {source.name}, which its config.json lists.") from None
    except OSError:
        shutil.copyfile(source, target)


def _names(artifact: Artifact) -> list[str]:
    return [*artifact.contract.files, *(name for name in sorted(UNLISTED) if (artifact.path / name).is_file())]


def _hint(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return " Log in with `hf auth login`, or pass --token."
    if status == 404:
        return " Check the name and revision; a private repository needs a token."
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
