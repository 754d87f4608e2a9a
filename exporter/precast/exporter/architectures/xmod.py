"""X-MOD chooses an adapter per row by its language; a compiled model uses that of the default language."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn
from transformers.models.xmod.modeling_xmod import XmodOutput

from . import learned_positions
from .patching import replace_method

__all__ = ["make_traceable"]


def make_traceable(model: nn.Module) -> AbstractContextManager[Any]:
    """Always use the adapter of `config.default_language`."""
    language: Any = model.config.default_language  # type: ignore[union-attr]
    stack = ExitStack()
    stack.enter_context(learned_positions.make_traceable(model))
    stack.enter_context(replace_method(model, XmodOutput, "lang_adapter", lambda layer: _make_adapter(layer, language)))
    return stack


def _make_adapter(layer: XmodOutput, language: str) -> Any:
    def adapter(lang_ids: Tensor, states: Tensor) -> Tensor:
        normed = states
        if layer.adapter_layer_norm is not None:
            normed = layer.adapter_layer_norm(states)
        elif layer.adapter_reuse_layer_norm:
            normed = layer.LayerNorm(states)
        residual = normed if layer.ln_before_adapter else states
        adapted: Tensor = layer.adapter_modules[language](normed) + residual
        return adapted

    return adapter
