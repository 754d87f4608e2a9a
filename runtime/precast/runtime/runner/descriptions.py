"""Models as JSON: what another process, here or on another machine, needs to open the same one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..artifact.stages import rank_count
from ..errors import UsageError
from ..hosts.machine import installed_version
from ..models.base import CompiledModel, Opening

__all__ = ["Description", "Opener", "check_plain", "describe_model", "open_described"]

Description = dict[str, Any]
"""A model, as JSON."""
Opener: TypeAlias = Callable[[Description, int], CompiledModel]
"""Opens the model of a description with so many threads."""


def describe_model(model: Any, asked: str) -> Description:
    """What `open_described` takes, of a model that runs on the CPU.

    Args:
        model: a compiled model.
        asked: what its description is for, as messages name it: "replicas=2".

    Raises:
        UsageError: no other process can open the same model beside this one.
    """
    if problem := _find_blocker(model):
        raise UsageError(f"{asked} opens the model in other processes, {problem}")
    opening = model.opening or Opening(str(model.artifact.path))
    prefix = getattr(model, "prefix_path", None)
    paths = {name: str(path.resolve()) for name, path in getattr(model, "adapter_paths", {}).items()}
    return {
        "path": str(model.artifact.path.resolve()),
        # A name on the Hub is one wherever it is said.
        "name": None if Path(opening.model).expanduser().exists() else opening.model,
        "hub": {"revision": opening.revision, "subfolder": opening.subfolder,
                "local_files_only": opening.local_files_only},
        "digest": model.artifact.contract.digest,
        "variant": model.variant.name,
        "threads": opening.threads,
        "options": {"prepack": opening.prepack, "device": opening.device, "provider": opening.provider},
        "adapters": {name: [path, model.adapters[name]] for name, path in paths.items()},
        "prefix": prefix and [str(Path(prefix).resolve()), model.prefix_sha256],
        "precast": installed_version("precast"),
    }  # fmt: skip


def open_described(description: Description, threads: int) -> CompiledModel:
    """The model of a description, with so many threads where it was not opened with another number.

    What vouched for its native code in the first process does here: it is the artifact of the same digest, or none.

    Raises:
        ArtifactError: there is no such artifact here.
        UsageError: an adapter or a prefix is another one here.
    """
    model = CompiledModel.from_pretrained(
        description["path"], variant=description["variant"], sha256=description["digest"],
        threads=description["threads"] or threads, **description["options"],
    )  # fmt: skip
    opened: Any = model
    for name, (place, sha256) in description["adapters"].items():
        opened.load_adapter(name, place, force_base=True)
        _check_same(f"The adapter {name!r} in {place}", opened.adapters[name], sha256)
    if description["prefix"] is not None:
        place, sha256 = description["prefix"]
        opened = opened.new_session(prefix=place)
        _check_same(f"The prefix in {place}", opened.prefix_sha256, sha256)
    return opened  # type: ignore[no-any-return]


def check_plain(settings: Mapping[str, Any], asked: str) -> dict[str, Any]:
    """The settings, as JSON keeps them. Raises UsageError for one that it does not: a function, say."""
    for name, value in settings.items():
        try:
            is_kept = json.loads(json.dumps(value)) == _with_lists(value)
        except (TypeError, ValueError):
            is_kept = False
        if not is_kept:
            raise UsageError(
                f"{asked} sends settings to other processes as JSON, which cannot hold {name}={value!r:.80}. Leave one "
                f"of them out."
            )
    return dict(settings)


def _with_lists(value: Any) -> Any:
    """The value with lists for tuples, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _with_lists(each) for name, each in value.items()}
    return [_with_lists(each) for each in value] if isinstance(value, list | tuple) else value


def _find_blocker(model: Any) -> str | None:
    """Why no other process can open this model, with the way out; None where one can."""
    if not isinstance(model, CompiledModel):
        return f"and this one runs in the mode {getattr(model, 'mode', '?')!r}. Export it, or leave that out."
    path, count, device = model.artifact.path, rank_count(model.variant), model.runs_on
    if device != "cpu":
        return f"which have a share of the CPU's cores each, and {path} runs on {device}. Leave that out."
    if count > 1:
        option = "pipeline_parallel" if model.variant.stages else "tensor_parallel"
        return (
            f"and {path} was compiled for {count} ranks, which are processes that have the cores of this machine "
            f"already. Leave that out, or export the model without {option}."
        )
    if getattr(model, "has_own_config", False):
        return (
            "which have the artifact's generation_config.json, and this model's generation_config was changed. Pass "
            "its settings to the worker instead."
        )
    return None


def _check_same(what: str, found: str | None, expected: str) -> None:
    if found != expected:
        raise UsageError(f"{what} has changed: its hash is {found}, and was {expected}. Begin again with force=True.")
