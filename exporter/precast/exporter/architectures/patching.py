"""Replace a method of modules for as long as a model is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import nn

from precast.runtime.errors import ExportError

__all__ = ["replace_method"]


@contextmanager
def replace_method(model: nn.Module, cls: type[nn.Module], method: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Within this block every module of `model` that is a `cls` has `make(module)` for its `method`.

    Raises ExportError where this version of transformers has no such method, since the replacement would never be
    called.
    """
    if not hasattr(cls, method):
        raise ExportError(
            f"transformers {transformers.__version__} has no {cls.__name__}.{method}, which precast replaces to "
            f"compile it. Another version of transformers or a newer precast may do."
        )
    modules = [module for module in model.modules() if isinstance(module, cls)]
    for module in modules:
        setattr(module, method, make(module))
    try:
        yield
    finally:
        for module in modules:
            delattr(module, method)
