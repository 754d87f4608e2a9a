"""Merge adapters into a model by peft, or refuse them by name where that would leave out some of them.

peft passes over tensors that have no place in the model and leaves layers without tensors as they were; here every
tensor must be used, and every adapted layer must have its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from precast.runtime.artifact.peft_files import CONFIG
from precast.runtime.errors import CheckpointError, UsageError

from ..quiet import silence
from .adapter import Adapter

__all__ = ["merge_adapter"]

_NAME = "precast"
"""What peft calls the adapter among a model's parameters."""
_COUNTED = "ranknum"
"""AdaLoRA's count of ranks, which peft sets from the settings and does not save."""


def merge_adapter(model: nn.Module, adapter: Adapter) -> set[str]:
    """Add the adapter to the model's weights, in place; returns the names of weights that it replaced as a whole.

    Raises UsageError where peft is not installed, CheckpointError where the adapter does not fit the model.
    """
    try:
        import peft
    except ImportError:
        raise UsageError("lora= needs peft: pip install 'precast[peft]'") from None
    tensors = _read_tensors(adapter)
    whole = {name.removeprefix("base_model.model.") for name in tensors if not _is_delta(name)}
    if whole and adapter.weight != 1:
        raise CheckpointError(
            f"The adapter {adapter.given} replaces {min(whole)} as a whole, which excludes a weight of "
            f"{adapter.weight:g}: give it one of 1."
        )
    is_tied = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    with silence("peft"), torch.no_grad():
        config = _make_config(peft, adapter)
        adapted = _inject(peft, model, config, adapter)
        _load(peft, adapted, tensors, adapter)
        _untie(adapted)
        _scale(adapted, adapter.weight)
        _merge(adapted, adapter)
    if is_tied is not None:
        # peft clears it where an embedding and the head differ now; T5's kin compute by it.
        model.config.tie_word_embeddings = is_tied  # type: ignore[union-attr]
    return whole


def _read_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors. Raises CheckpointError for a broken file, and for numbers that are none."""
    try:
        if adapter.weights.suffix == ".bin":
            found: dict[str, Tensor] = torch.load(adapter.weights, map_location="cpu", weights_only=True)
        else:
            from safetensors.torch import load_file

            found = load_file(adapter.weights)
    except Exception as error:
        # The libraries raise anything at a broken file.
        raise CheckpointError(f"{adapter.weights.name} of {adapter.given} cannot be read: {error}") from error
    for name, value in found.items():
        if value.is_floating_point() and (wrong := int((~value.isfinite()).sum())):
            raise CheckpointError(
                f"The adapter {adapter.given} holds NaN or infinity: {wrong:,} of {value.numel():,} numbers of {name}. "
                f"It is damaged, or its training diverged."
            )
    return found


def _make_config(peft: Any, adapter: Adapter) -> Any:
    """peft's form of the settings. Raises CheckpointError for one that it does not know and would leave out."""
    kind = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[adapter.settings["peft_type"]]
    known = {each.name for each in fields(kind)} | {"runtime_config"}
    for name, value in adapter.settings.items():
        if name not in known and value:
            raise CheckpointError(
                f"{CONFIG} of {adapter.given} says {name}={str(value)[:80]}, which peft {peft.__version__} does not "
                f"know for {adapter.settings['peft_type']}: pip install -U peft"
            )
    settings = {name: value for name, value in adapter.settings.items() if name in known - {"runtime_config"}}
    try:
        return kind(**{**settings, "inference_mode": True})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{CONFIG} of {adapter.given} cannot be used: {error}") from error


def _inject(peft: Any, model: nn.Module, config: Any, adapter: Adapter) -> Any:
    try:
        return peft.PeftModel(model, config, _NAME, autocast_adapter_dtype=False)
    except Exception as error:
        # Each kind of adapter has code of its own for each kind of layer.
        raise CheckpointError(
            f"The adapter {adapter.given} does not fit {type(model).__name__}: {_first_line(error)}"
        ) from error


def _load(peft: Any, adapted: Any, tensors: dict[str, Tensor], adapter: Adapter) -> None:
    """Put the tensors into the adapted layers. Raises CheckpointError where some are left over, lack or do not fit."""
    of = type(adapted.get_base_model()).__name__
    try:
        result = peft.set_peft_model_state_dict(adapted, tensors, _NAME)
    except KeyError as error:
        raise CheckpointError(f"The adapter {adapter.given} lacks the tensor {error.args[0]} for {of}.") from error
    except RuntimeError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), _first_line(error))
        raise CheckpointError(
            f"The adapter {adapter.given} has other shapes than {of}, {reason.rstrip('.')}. It is of another model, or "
            f"of one with another size of vocabulary or number of labels."
        ) from error
    if left := sorted(result.unexpected_keys):
        raise CheckpointError(
            f"The adapter {adapter.given} changes modules that {of} does not have, {len(left)} tensors such as "
            f"{left[0].removeprefix('base_model.model.')}: it is of another model, or for another task."
        )
    if missing := sorted(key for key in result.missing_keys if f".{_NAME}" in key and _COUNTED not in key):
        raise CheckpointError(
            f"The adapter {adapter.given} lacks {len(missing)} tensors that its {CONFIG} promises for {of}, such as "
            f"{missing[0].removeprefix('base_model.model.').replace(f'.{_NAME}', '')}."
        )


def _untie(adapted: Any) -> None:
    """Give adapted layers weights of their own where others have the same, such as a head that is tied to an embedding:
    merged in place, the change would be that of both."""
    shared = _count_uses(adapted)
    for layer in _adapted_layers(adapted):
        for name, weight in layer.get_base_layer().named_parameters(recurse=False):
            if shared[id(weight)] > 1:
                setattr(layer.get_base_layer(), name, nn.Parameter(weight.clone(), requires_grad=False))


def _count_uses(model: nn.Module) -> dict[int, int]:
    counts: dict[int, int] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            counts[id(weight)] = counts.get(id(weight), 0) + 1
    return counts


def _scale(adapted: Any, weight: float) -> None:
    for layer in _adapted_layers(adapted):
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(weight)


def _adapted_layers(adapted: Any) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in adapted.modules() if isinstance(module, BaseTunerLayer))


def _merge(adapted: Any, adapter: Adapter) -> None:
    try:
        adapted.merge_and_unload(safe_merge=True)
    except Exception as error:
        # Each kind of adapter has code of its own for each kind of layer.
        raise CheckpointError(f"peft cannot merge the adapter {adapter.given}: {_first_line(error)}") from error


def _is_delta(name: str) -> bool:
    """Whether a tensor is part of a change of a layer's weights, rather than such weights."""
    return any(part.startswith(("lora_", "hada_", "lokr_", "trainable_tokens_")) for part in name.split("."))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
