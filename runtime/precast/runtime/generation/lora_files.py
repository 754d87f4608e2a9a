"""Read LoRA adapters that peft saved, without torch, and refuse by name what slots have no place for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact.peft_files import CONFIG, WEIGHT_FILES, hub_id, read_settings, whole_problems
from ..artifact.schema import Lora, LoraTarget
from ..engines.safetensors_map import Weight, open_weights
from ..errors import FormatError, InputError

__all__ = ["LoraLayer", "check_settings", "read_layers", "read_matrix"]

Array = np.ndarray[Any, Any]

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_HARMLESS = frozenset({
    "auto_mapping", "alpha_pattern", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
})  # fmt: skip
"""Settings that say nothing of what an adapter computes, but where it was trained or how, and those read here."""
_DTYPES = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "bfloat16": np.uint16}


@dataclass(frozen=True)
class LoraLayer:
    """What an adapter adds to a layer's output: `scale * (x @ aᵀ) @ bᵀ`, a [rank, inputs] and b [outputs, rank]."""

    a: Array
    b: Array
    scale: float


def check_settings(path: Path, base: str | None) -> dict[str, Any]:
    """The settings of the adapter in the directory `path`. Raises InputError where there is none, where it is of
    another kind than slots take, or names another base model than `base`."""
    if not (path / CONFIG).is_file():
        raise InputError(
            f"{path} is no adapter of peft: there is no {CONFIG} in it. Give the directory on this machine that "
            f"save_pretrained() of a PeftModel wrote, or that huggingface_hub's snapshot_download() fetched."
        )
    try:
        settings = read_settings(path, str(path))
    except (OSError, FormatError) as error:
        raise InputError(f"The adapter {path} cannot be read: {error}") from error
    if problem := next(_problems(settings), None):
        raise InputError(
            f"The adapter {path} does not fit into a slot: {problem} Slots take LoRA (and rsLoRA) of linear layers; "
            f"export the model with lora= to merge another kind."
        )
    trained_on = hub_id(settings.get("base_model_name_or_path"))
    if base and trained_on and trained_on.lower() != base.lower():
        raise InputError(
            f"The adapter {path} was trained on {trained_on}, and this model is {base}. If both have the same weights, "
            f"pass force_base=True."
        )
    return settings


def _problems(settings: Mapping[str, Any]) -> Iterator[str]:
    """What of the settings an adapter in a slot could not do."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        yield f"its peft_type is {kind!r}."
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        yield f"it was trained for {settings['task_type']}, and this model is for CAUSAL_LM."
    if settings.get("use_dora"):
        yield "it is DoRA (use_dora), which scales the layer's own weights, too."
    if settings.get("bias", "none") != "none":
        yield f"it replaces biases (bias={settings['bias']!r})."
    for name in ("modules_to_save", "trainable_token_indices"):
        if settings.get(name):
            yield f"it replaces weights as a whole ({name}={str(settings[name])[:80]})."
    yield from whole_problems(dict(settings))
    for name, value in settings.items():
        if value and name not in _HARMLESS:
            yield f"it has {name}={str(value)[:80]}."


def read_layers(path: Path, settings: Mapping[str, Any], lora: Lora) -> dict[str, LoraLayer]:
    """The adapter's layers, by the names of the modules that they change. Raises InputError for a tensor that the slots
    have no place for, or that lacks its other half."""
    parts: dict[str, dict[str, Array]] = {}
    for name, weight in _open(path).items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise InputError(
                f"The adapter {path} holds {name}, which is no LoRA of a linear layer, and does not fit into a slot. "
                f"Export the model with lora= to merge it."
            )
        parts.setdefault(found["module"], {})[found["part"]] = read_matrix(weight, name, path)
    if not parts:
        raise InputError(f"The adapter {path} holds no tensors.")
    targets = {target.module: target for target in lora.targets}
    layers = {module: _make_layer(module, both, settings, path) for module, both in parts.items()}
    for module, layer in layers.items():
        _check_fits(module, layer, targets, lora.rank, path)
    return layers


def _open(path: Path) -> dict[str, Weight]:
    file = path / WEIGHT_FILES[0]
    if not file.is_file():
        is_pickled = (path / WEIGHT_FILES[1]).is_file()
        how = f"is pickled ({WEIGHT_FILES[1]}), which can run any code" if is_pickled else "has no weights"
        raise InputError(
            f"The adapter {path} {how}. Save it as safetensors, where it was trained: model.save_pretrained(OUT)."
        )
    try:
        return open_weights([file])
    except (OSError, FormatError) as error:
        raise InputError(f"The adapter {path} cannot be read: {error}") from error


def read_matrix(weight: Weight, name: str, path: Path) -> Array:
    """A matrix in float32. Raises InputError for anything else, and for numbers that are none."""
    kind = _DTYPES.get(weight.dtype)
    if kind is None or len(weight.shape) != 2:
        raise InputError(f"The adapter {path} holds {name} as {weight.dtype} {list(weight.shape)}, not a float matrix.")
    strides = [np.dtype(kind).itemsize * step for step in weight.strides]
    held: Array = np.ndarray(weight.shape, kind, weight.memory, weight.start, strides)
    values = (held.astype(np.uint32) << 16).view(np.float32) if weight.dtype == "bfloat16" else held.astype(np.float32)
    if wrong := int((~np.isfinite(values)).sum()):
        raise InputError(
            f"The adapter {path} holds NaN or infinity: {wrong:,} of {values.size:,} numbers of {name}. It is damaged, "
            f"or its training diverged."
        )
    return values


def _make_layer(module: str, parts: Mapping[str, Array], settings: Mapping[str, Any], path: Path) -> LoraLayer:
    if missing := {"A", "B"} - parts.keys():
        raise InputError(f"The adapter {path} lacks lora_{min(missing)} of {module}: it is damaged.")
    a, b = parts["A"], parts["B"]
    rank = _setting_of(module, "r", "rank_pattern", settings, path)
    alpha = _setting_of(module, "lora_alpha", "alpha_pattern", settings, path)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise InputError(
            f"The adapter {path} has lora_A {list(a.shape)} and lora_B {list(b.shape)} for {module}, where its "
            f"{CONFIG} says rank {rank:g}."
        )
    return LoraLayer(a, b, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _setting_of(module: str, name: str, pattern: str, settings: Mapping[str, Any], path: Path) -> float:
    """A number for one layer: the first of the patterns that the layer's name ends in, or the general one."""
    by_layer = settings.get(pattern) or {}
    try:
        key = next((key for key in by_layer if re.match(rf"(.*\.)?({key})$", module)), None)
        # peft's own defaults.
        value = by_layer[key] if key is not None else settings.get(name, 8)
    except (re.error, TypeError, AttributeError) as error:
        raise InputError(f"The adapter {path} cannot be read: its {pattern} is none ({error}).") from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InputError(f"The adapter {path} cannot be read: {name} of {module} is {value!r:.80}.")
    return value


def _check_fits(module: str, layer: LoraLayer, targets: Mapping[str, LoraTarget], rank: int, path: Path) -> None:
    target = targets.get(module)
    if target is None:
        raise InputError(
            f"The adapter {path} changes {module}, which was compiled without slots. Those with slots are: "
            f"{_list_targets(targets)}. Export the model with lora_targets= that match it, or with lora= to merge it."
        )
    if (layer.a.shape[1], layer.b.shape[0]) != (target.inputs, target.outputs):
        raise InputError(
            f"The adapter {path} is of another model: it changes {module} from {layer.a.shape[1]} to "
            f"{layer.b.shape[0]} numbers, and that of this model is from {target.inputs} to {target.outputs}."
        )
    if len(layer.a) > rank:
        raise InputError(
            f"The adapter {path} has rank {len(layer.a)} for {module}, and the slots hold ranks up to {rank}. Export "
            f"the model with lora_rank={len(layer.a)}."
        )


def _list_targets(targets: Mapping[str, LoraTarget]) -> str:
    """The kinds of layers that have slots: the last part of their names."""
    return ", ".join(dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in targets))
