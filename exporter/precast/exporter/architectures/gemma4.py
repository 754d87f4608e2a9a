"""Gemma 4 skips what it need not compute of a prompt in layers that share keys, and asks for the length to do so."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

from .patching import replaced

__all__ = ["traceable"]


def traceable(model: nn.Module) -> AbstractContextManager[Any]:
    """Compute every position; which of them are wanted is known to the output layer."""
    return replaced(model, Gemma4TextModel, "_maybe_slice_kv_shared_inputs", lambda _: _all_positions)


def _all_positions(states: Any, per_layer: Any, angles: Any, masks: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
    return states, per_layer, angles, masks
