"""Rotary angles that depend on the length of the sequence (rope types `dynamic` and `longrope`).

Up to the length of pretraining they are the angles of short sequences. Beyond it nothing is compiled
(`longrope_limit`), since the rows of a batch differ in length and caches hold keys that are rotated already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["longrope_limit", "use_short_angles"]

_BY_LENGTH = ("dynamic", "longrope")


def longrope_limit(config: Any) -> int | None:
    """The longest sequence that longrope rotates by the angles of short ones; None for other rope types. The angles of
    `dynamic` change beyond max_position_embeddings only, for which nothing is compiled."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = [one["original_max_position_embeddings"] for one in each if one.get("rope_type") == "longrope"]
    return min(limits, default=None)


@contextmanager
def use_short_angles(model: nn.Module) -> Iterator[None]:
    """Within this block rotary embeddings use the angles of short sequences, whatever the length."""
    rotary = [module for module in model.modules() if hasattr(module, "rope_type")]
    before = [module.rope_type for module in rotary]
    for module, kind in zip(rotary, before, strict=True):
        plain: Any = (
            {name: _plain_type(one) for name, one in kind.items()} if isinstance(kind, dict) else _plain_type(kind)
        )
        module.rope_type = plain
    try:
        yield
    finally:
        for module, kind in zip(rotary, before, strict=True):
            module.rope_type = kind


def _plain_type(kind: Any) -> Any:
    return "default" if kind in _BY_LENGTH else kind
