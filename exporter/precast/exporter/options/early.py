"""What can be refused before torch is imported, which takes longer than all that is checked here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.publish import check_target
from precast.runtime.artifact.tasks import get_task, tasks_named
from precast.runtime.errors import CheckpointError, UsageError

from ..checkpoint.locate import find_local
from ..support import check_supported, supported_tasks, task_in
from . import ExportOptions

__all__ = ["check_comparison", "check_length", "check_request"]

_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
"""Model types whose tables of positions hold some that no token has."""


def check_request(model: str, target: Path | None, options: ExportOptions) -> None:
    """Check options, target and MODEL, and what MODEL's configuration alone says about the sizes asked for.

    Raises PrecastError, as the export itself would later.
    """
    options.check()
    if target is not None:
        check_target(target, force=options.force)
    find_local(model, options.revision)
    config = check_supported(
        model, options.task, revision=options.revision, token=options.token, trust_remote_code=options.trust_remote_code
    )
    if config is not None:
        _check_sizes(model, config, options)


def check_comparison(artifact: Path, model: str, options: ExportOptions) -> None:
    """As `check_request`, for an artifact that is to be compared with MODEL. Raises PrecastError."""
    options.check()
    compiled = read_artifact(artifact)
    local = find_local(model, options.revision)
    config = check_supported(
        model, compiled.contract.task, revision=options.revision, token=options.token,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    given, needed = (config or {}).get("model_type"), compiled.config.get("model_type")
    # What a GGUF file calls its architecture is not always transformers' name.
    is_gguf = local is not None and local.gguf_file is not None
    if given and given != needed and not is_gguf:
        raise CheckpointError(
            f"{artifact} was compiled from {compiled.contract.source.model}, of type {needed!r}, and {model} is "
            f"of type {given!r}: is it the right checkpoint?"
        )


def check_length(name: str, longest: int | None, length: int) -> None:
    """Raise UsageError for a sequence that is longer than the model of that name was made for, if that is known."""
    if longest is not None and length > longest:
        raise UsageError(
            f"--sequence-length {length} is more than {name} was made for: its max_position_embeddings allow {longest}."
        )


def _check_sizes(model: str, config: Mapping[str, Any], options: ExportOptions) -> None:
    """Only for tasks that one kind of model does, of types that were tried: all else is for who loads the model."""
    name = get_task(options.task).name if options.task else task_in(config)
    line = supported_tasks(str(config.get("model_type"))).get(name or "")
    rows = tasks_named(line.task) if line else []
    if line is None or len(rows) != 1:
        return
    options.check_task(rows[0])
    longest = _longest(config)
    options.check_sizes(model, line.task, line.axes, longest)
    if "sequence_length" in line.axes or rows[0].kind == "decoder":
        check_length(Path(model).name, longest, max(options.sequence_length, default=0))


def _longest(config: Mapping[str, Any]) -> int | None:
    found = config.get("max_position_embeddings")
    is_plain = type(found) is int and found > 0 and config.get("model_type") not in _OFFSET_POSITIONS
    return found if is_plain else None
