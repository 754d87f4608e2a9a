"""How adapters put code of their own in the place of a module's method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["replaced"]


@contextmanager
def replaced(model: nn.Module, cls: type[nn.Module], method: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Within this block every module of `model` that is a `cls` has `make(module)` for its `method`."""
    modules = [module for module in model.modules() if isinstance(module, cls)]
    for module in modules:
        setattr(module, method, make(module))
    try:
        yield
    finally:
        for module in modules:
            delattr(module, method)
