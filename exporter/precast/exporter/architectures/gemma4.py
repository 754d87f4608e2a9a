"""Gemma 4 skips positions of a prompt in layers that share keys, by its length; here all positions are computed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

from .patching import replace_method

__all__ = ["make_traceable"]


def make_traceable(model: nn.Module) -> AbstractContextManager[Any]:
    """Compute every position in every layer; the output layer picks those whose logits are asked for."""
    return replace_method(model, Gemma4TextModel, "_maybe_slice_kv_shared_inputs", lambda _: _all_positions)


def _all_positions(states: Any, per_layer: Any, angles: Any, masks: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
    return states, per_layer, angles, masks
