"""Read an adapter's settings and find its weights, and refuse what cannot be merged. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from precast.runtime.artifact.peft_files import (
    CONFIG,
    WEIGHT_FILES,
    hash_adapter,
    hub_id,
    read_settings,
    whole_problems,
)
from precast.runtime.errors import CheckpointError, FormatError

__all__ = ["KINDS", "Adapter", "check_base", "read_adapter"]

KINDS = ("LORA", "ADALORA", "LOHA", "LOKR")
"""Values of `peft_type` that are merged; rsLoRA and DoRA are settings of LORA."""


@dataclass(frozen=True)
class Adapter:
    """The files of an adapter.

    Attributes:
        given: what the user typed, without the weight.
        name: id on the Hub or local base name, as recorded in the artifact.
        revision: commit of one on the Hub.
        weight: how much of it is added to the model.
        settings: its adapter_config.json.
        weights: the file of its tensors.
    """

    given: str
    name: str
    revision: str | None
    weight: float
    settings: dict[str, Any]
    weights: Path

    @property
    def request(self) -> str:
        """What asks for exactly this one, as a value of `lora=`."""
        return f"{self.given}{f'@{self.revision}' if self.revision else ''}:{self.weight!r}"

    @cached_property
    def sha256(self) -> str:
        """One hash over its settings and its tensors: that of the list of their names and hashes."""
        return hash_adapter(self.weights)


def read_adapter(
    directory: Path, given: str, name: str, *, revision: str | None, weight: float, trust_pickle: bool
) -> Adapter:
    """The adapter in `directory`. Raises CheckpointError for one that cannot be merged, or is none."""
    settings = _read_settings(directory, given)
    if problem := next(_problems(settings, weight), None):
        raise CheckpointError(f"The adapter {given} cannot be merged: {problem}")
    return Adapter(given, name, revision, weight, settings, _find_weights(directory, given, trust_pickle))


def check_base(adapter: Adapter, name: str | None) -> None:
    """Raise CheckpointError for an adapter of another model than the checkpoint `name`, where both names are ids of the
    Hub."""
    wanted = hub_id(adapter.settings.get("base_model_name_or_path"))
    if wanted and name and wanted.lower() != name.lower():
        raise CheckpointError(
            f"The adapter {adapter.given} was trained on {wanted}, and the checkpoint is {name}: export {wanted} with "
            f"it, or, if both have the same weights, give force_base=True."
        )


def _read_settings(directory: Path, given: str) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{given} is no adapter of peft: it has no {CONFIG}. lora= takes the directory or repository that "
            f"save_pretrained of a PeftModel wrote."
        )
    try:
        return read_settings(directory, given)
    except OSError as error:
        raise CheckpointError(f"{CONFIG} of {given} cannot be read: {error.strerror}.") from error
    except FormatError as error:
        raise CheckpointError(str(error)) from error


def _problems(settings: dict[str, Any], weight: float) -> Iterator[str]:
    """What of the settings keeps the adapter from being merged into a checkpoint as it is, with the way out."""
    kind = settings.get("peft_type")
    if kind not in KINDS:
        yield f"its peft_type is {kind!r}; what is merged: {', '.join(KINDS)}."
    yield from whole_problems(settings)
    if weight != 1:
        for name in ("modules_to_save", "trainable_token_indices"):
            if settings.get(name):
                yield f"it replaces weights as a whole ({name}), which excludes a weight of {weight:g}."
        if settings.get("bias", "none") != "none":
            yield f"it replaces biases as a whole (bias={settings['bias']!r}), which excludes a weight of {weight:g}."


def _find_weights(directory: Path, given: str, trust_pickle: bool) -> Path:
    found = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"The adapter {given} has no weights: there is no {' or '.join(WEIGHT_FILES)} in it.")
    if found.suffix == ".bin" and not trust_pickle:
        raise CheckpointError(
            f"The adapter {given} is pickled ({found.name}). Save it as safetensors where it was trained, or give "
            f"trust_pickle=True: then its tensors are read, and nothing else of it."
        )
    return found
