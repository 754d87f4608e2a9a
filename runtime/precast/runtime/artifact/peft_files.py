"""The files of peft's adapters, as they are merged by an export and loaded at run time: names, settings, hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import strict_json
from .integrity import read_regular, sha256_of

__all__ = ["CONFIG", "WEIGHT_FILES", "hash_adapter", "hub_id", "read_settings", "whole_problems"]

CONFIG = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NO_DELTA = (
    "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config", "megatron_config",
    "monteclora_config", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Settings by which an adapter is more than a change of weights, or one that is not tried here."""
_CHANGE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Beginnings of `init_lora_weights` for which training starts from another base than the checkpoint."""


def read_settings(directory: Path, given: str) -> dict[str, Any]:
    """adapter_config.json of the adapter in `directory`, which the user calls `given`. Raises OSError, FormatError."""
    return strict_json.loads(read_regular(directory / CONFIG, strict_json.MAX_BYTES), f"{given}/{CONFIG}")


def hash_adapter(weights: Path) -> str:
    """One hash over an adapter's settings and its tensors, in the file `weights`: that of the list of their names and
    hashes."""
    paths = (weights.with_name(CONFIG), weights)
    return hashlib.sha256("".join(f"{path.name} {sha256_of(path)}\n" for path in paths).encode()).hexdigest()


def whole_problems(settings: dict[str, Any]) -> Iterator[str]:
    """What of the settings makes an adapter more than a change of the checkpoint's weights, with the way out."""
    for name in _NO_DELTA:
        if settings.get(name):
            yield f"it has {name}={str(settings[name])[:80]}, which is no change of the checkpoint's weights alone."
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_BASE):
        yield (
            f"it was trained from init_lora_weights={start!r}, which changes the base model's weights, too. Convert it "
            f"where it was trained: model.save_pretrained(OUT, path_initial_model_for_weight_conversion=START)"
        )


def hub_id(name: object) -> str | None:
    """The id on the Hub that a name is, or that a path in the Hub's cache has; None for other paths."""
    if not isinstance(name, str):
        return None
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]", name):
        return f"{cached[1]}/{cached[2]}"
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists() else None
