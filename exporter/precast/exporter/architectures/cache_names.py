"""Names that models have for their cache: `cache` since transformers 5.24; before that, and in code that comes with a
checkpoint, `past_key_values` or `cache_params`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["cache_argument", "find_cache"]

_NAMES = ("cache", "cache_params", "past_key_values")


def cache_argument(model: nn.Module) -> str:
    """The name by which `model`, or the decoder that it hands unknown arguments to, takes its cache."""
    decoder = getattr(model, "get_decoder", lambda: model)()
    for owner in (model, decoder):
        taken = inspect.signature(owner.forward).parameters
        if found := next((name for name in _NAMES if name in taken), None):
            return found
    return "past_key_values"


def find_cache(given: Mapping[str, Any]) -> Any:
    """Find the cache among a model's outputs, or among arguments; None where there is none."""
    # By its own keys: transformers' outputs answer to the old names, too, and warn.
    found = [given[name] for name in list(given) if name in _NAMES]
    return next((each for each in found if each is not None), None)
