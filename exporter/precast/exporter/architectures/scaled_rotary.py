"""Rotary angles that depend on how long a sequence is (`dynamic`, `longrope`).

Up to the length of pretraining they are those of the short sequence, and beyond it nothing is compiled (`short_limit`):
a graph's rows have lengths of their own, and its caches hold keys that are rotated already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["short_limit", "short_rotations"]

_BY_LENGTH = ("dynamic", "longrope")


def short_limit(config: Any) -> int | None:
    """The longest sequence with the angles of short ones, for longrope; None where there is no other kind. Those of
    `dynamic` change beyond max_position_embeddings, which nothing is compiled for."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = [one["original_max_position_embeddings"] for one in each if one.get("rope_type") == "longrope"]
    return min(limits, default=None)


@contextmanager
def short_rotations(model: nn.Module) -> Iterator[None]:
    """Within this block rotary embeddings use the angles of short sequences, without looking how long one is."""
    told = [module for module in model.modules() if hasattr(module, "rope_type")]
    before = [module.rope_type for module in told]
    for module, kind in zip(told, before, strict=True):
        plain: Any = {name: _plain(one) for name, one in kind.items()} if isinstance(kind, dict) else _plain(kind)
        module.rope_type = plain
    try:
        yield
    finally:
        for module, kind in zip(told, before, strict=True):
            module.rope_type = kind


def _plain(kind: Any) -> Any:
    return "default" if kind in _BY_LENGTH else kind
