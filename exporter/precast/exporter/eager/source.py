"""Find the checkpoint behind a name: the name's own, or the one that an artifact was compiled from."""

from __future__ import annotations

import os
from pathlib import Path

from precast.runtime.artifact import Artifact, is_artifact, read_artifact
from precast.runtime.errors import CheckpointError, UsageError
from precast.runtime.terminal import quoted

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.resolve import resolve
from ..options import ExportOptions
from .options import EagerOptions

__all__ = ["find_source"]


def find_source(name: str | Path, options: EagerOptions) -> tuple[Checkpoint, Artifact | None]:
    """The checkpoint to run for `name`, and the artifact that `name` is, if it is one.

    Raises CheckpointError where it is not there, or has other weights than the artifact was compiled from.
    """
    path = Path(name).expanduser()
    if not (path.is_dir() and is_artifact(path)):
        if options.checkpoint is not None:
            raise UsageError(
                f"checkpoint={options.checkpoint!r} says what an artifact was compiled from, and {name} is none. "
                f"Leave it out, or name the checkpoint alone."
            )
        return _resolve(str(name), options.revision, options), None
    artifact = read_artifact(path)
    if artifact.contract.prefix:
        raise UsageError(
            f"{artifact.path} was compiled with a prefix before every prompt (prefix_tuning), and its checkpoint alone "
            f"answers otherwise: only mode='compiled' runs it."
        )
    checkpoint = _resolve_source(artifact, options)
    _check_weights(artifact, checkpoint)
    return checkpoint, artifact


def _resolve_source(artifact: Artifact, options: EagerOptions) -> Checkpoint:
    source = artifact.contract.source
    if options.checkpoint is not None:
        return _resolve(options.checkpoint, options.revision, options)
    if source.revision is not None:
        return _resolve(source.model, options.revision or source.revision, options)
    # Of a local checkpoint an artifact holds the name and not the path.
    places = [Path(source.model), artifact.path.absolute().parent / source.model]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise CheckpointError(
            f"{artifact.path} was compiled from {source.model}, which is neither here nor beside the artifact, and "
            f"only its checkpoint can be run without compiling. Say where it is: checkpoint=PATH."
        )
    return _resolve(os.fspath(found), None, options)


def _resolve(name: str, revision: str | None, options: EagerOptions) -> Checkpoint:
    asked = ExportOptions(revision=revision, token=options.token, trust_remote_code=options.trust_remote_code)
    return resolve(name, asked)


def _check_weights(artifact: Artifact, checkpoint: Checkpoint) -> None:
    source, found = artifact.contract.source, checkpoint.weights_sha256()
    if source.adapters:
        raise CheckpointError(
            f"{artifact.path} has {', '.join(each.name for each in source.adapters)} merged into {source.model}, and "
            f"without compiling the model would run without. Run the artifact in the mode 'compiled'."
        )
    if found != source.weights_sha256:
        raise CheckpointError(
            f"{checkpoint.given} is not what {artifact.path} was compiled from: that had weights of sha256 "
            f"{source.weights_sha256[:8]}…, these have {found[:8]}…. Say where the right one is, checkpoint=PATH, or "
            f"compile this one: precast export {quoted(checkpoint.given)} -o OUT"
        )
