"""Artifacts on the Hub: pulled into a store of our own, pushed as one commit.

huggingface_hub keeps downloads behind symbolic links, two hops deep in its shared store, and ONNX Runtime refuses
weights that leave the graph's directory that way. So a pulled artifact is opened from `store/<digest>`, where its files
are hard links (or copies, on another file system) under their own names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import UNLISTED, Artifact, read_artifact
from ..artifact.integrity import check_hash
from ..artifact.publish import left_out, publish, read_unlisted, recover, staging
from ..artifact.store import home
from ..errors import ArtifactError, HubError, IntegrityError, PublishError
from ..hosts.reach import hub_or_cache
from ..progress import progress, say, wanted
from ..terminal import first_line

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

__all__ = ["locate", "locate_tokenizer", "push", "say_left_out"]

HELD_BYTES = 16 * 2**20
"""Smaller files are uploaded from memory. Larger ones go to the Hub's storage for large files, which is told their hash
and checks what it gets."""


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
    path = _as_path(model)
    recover(path)
    if path.exists():
        return path / (subfolder or "")
    if str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise ArtifactError(f"There is no directory {model}.")
    snapshot = _download(
        str(model), revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
        force_download=force_download, allow_patterns=[f"{subfolder}/*"] if subfolder else None,
    )  # fmt: skip
    return _link_into_store(read_artifact(snapshot / (subfolder or "")), again=force_download)


def locate_tokenizer(model: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The local directory with the tokenizer of an artifact or a checkpoint, of which nothing else is downloaded.

    Raises ArtifactError, HubError.
    """
    path = _as_path(model)
    if path.exists():
        return path
    if str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise ArtifactError(f"There is no directory {model}.")
    files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    return _download(str(model), revision=revision, token=token, allow_patterns=files)


def _as_path(model: str | Path) -> Path:
    """A model's name as a local path. Raises ArtifactError where it can be none."""
    try:
        path = Path(model).expanduser()
        path.exists()
        path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        # Too long a name, a loop of links, somebody's home who is nobody, a zero byte.
        raise ArtifactError(f"{str(model)!r:.200} is no path that can be looked at: {error}.") from None
    return path


def push(
    artifact: Artifact,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
    commit_message: str = "Upload a precast artifact",
) -> str:
    """Upload an artifact as one commit, creating the repository if there is none; returns the commit's address.

    A `repo_id` without a user's name is a repository of whoever the token belongs to, and `endpoint` the address of
    another Hub.

    What is uploaded is what was opened: files that have changed since are refused, and what config.json does not list
    stays here, but for the model card and timings. Files that an earlier artifact left in the repository are deleted in
    the same commit. Raises HubError, IntegrityError.
    """
    from huggingface_hub import CommitOperationDelete, HfApi

    api, added = HfApi(endpoint=endpoint, token=token), _files_to_upload(artifact)
    with _calling_the_hub(f"{artifact.path} was not pushed to {repo_id}"):
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        api.create_repo(repo_id, private=private, exist_ok=True)
        stale = set(api.list_repo_files(repo_id, revision=revision)) - {
            *(each.path_in_repo for each in added),
            ".gitattributes",
        }
        # upload_folder() makes several commits of a large folder: between them the repository would be broken.
        commit = api.create_commit(
            repo_id,
            [*added, *(CommitOperationDelete(name) for name in sorted(stale))],
            commit_message=commit_message,
            revision=revision,
        )
    say_left_out(artifact)
    return str(commit.commit_url)


def say_left_out(artifact: Artifact) -> None:
    """Say, on a terminal, which files of an artifact's directory do not belong to the artifact."""
    if names := left_out(artifact):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        say(f"Left out, as {artifact.path / 'config.json'} does not list it: {', '.join(names[:3])}{more}.")


def _files_to_upload(artifact: Artifact) -> list[CommitOperationAdd]:
    """The uploads of an artifact's files, each with the content that was verified. Raises IntegrityError."""
    from huggingface_hub import CommitOperationAdd

    added = [CommitOperationAdd(name, data) for name, data in read_unlisted(artifact).items()]
    artifact.contents.verify()
    for name, file in artifact.contract.files.items():
        if file.size <= HELD_BYTES:
            added.append(CommitOperationAdd(name, artifact.contents.get(name) or b""))
            continue
        large = CommitOperationAdd(name, artifact.path / name)
        # It is read again when it is sent, and then refused by the Hub where it no longer has this hash.
        if large.upload_info.sha256.hex() != file.sha256:
            raise artifact.contents.replaced(name)
        added.append(large)
    return added


def _download(repo_id: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    is_offline = options.pop("local_files_only", False)
    with (
        _calling_the_hub(f"{repo_id} could not be fetched"),
        nullcontext("local_files_only is set") if is_offline else hub_or_cache() as problem,
    ):
        try:
            return Path(snapshot_download(repo_id, **options, local_files_only=problem is not None))
        except LocalEntryNotFoundError as error:
            if _find_response(error) is not None:
                raise
            raise HubError(
                f"{repo_id} is neither a local directory nor in the Hub cache, and the Hub was not asked: "
                f"{problem or 'it gave no answer'}."
            ) from error


def _link_into_store(artifact: Artifact, *, again: bool = False) -> Path:
    """Link a downloaded snapshot's files into the store, under the digest of its contract.

    Only what the contract says goes in: one broken download would otherwise stay until the contract changes.
    Raises IntegrityError.
    """
    target = home() / "artifacts" / artifact.contract.digest
    if target.is_dir() and not again:
        return target
    files = artifact.contract.files
    try:
        with staging(target) as stage:
            for name in _file_names(artifact):
                _link_file(artifact.path / name, stage / name)
            with progress("Checking", sum(file.size for file in files.values())) as advance:
                for name, file in files.items():
                    check_hash(stage / name, artifact.path, name, file, advance)
            publish(stage, target, force=again)
    except PublishError:
        # Another process may have been faster; what it published is the same.
        if not (target / "config.json").is_file():
            raise
    return target


def _link_file(source: Path, target: Path) -> None:
    """A hard link to the file behind any symbolic links; a copy where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(strict=True), target)
    except FileNotFoundError:
        raise IntegrityError(f"The download lacks {source.name}, which its config.json lists.") from None
    except OSError:
        shutil.copyfile(source, target)


def _file_names(artifact: Artifact) -> list[str]:
    return [*artifact.contract.files, *(name for name in sorted(UNLISTED) if (artifact.path / name).is_file())]


@contextmanager
def _calling_the_hub(failed: str) -> Iterator[None]:
    """Turn whatever is raised within into a HubError: the HTTP, LFS and xet clients' errors have no common base.

    huggingface_hub draws its bars only where ours are drawn, too.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    hidden = not wanted() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    if hidden:
        disable_progress_bars()
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        raise HubError(f"{failed}: {_describe_error(error)}") from error
    finally:
        if hidden:
            enable_progress_bars()


def _describe_error(error: BaseException) -> str:
    answered = _find_response(error)
    if answered is None:
        return first_line(error)
    status, said = answered.response.status_code, " ".join((getattr(answered, "server_message", None) or "").split())
    return f"the Hub answered {status}{said and ': '}{said.rstrip('.')}.{_status_hint(status)}"


def _find_response(error: BaseException | None) -> Any:
    """The error in the chain of causes that holds the Hub's response; None if there was none."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return error


def _status_hint(status: int) -> str:
    if status in (401, 403):
        return " Log in with `hf auth login`, or pass token=."
    if status == 404:
        return " Check the name and revision; a private repository needs a token."
    return " Try again later." if status >= 500 else ""
