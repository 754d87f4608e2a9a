"""Checkpoint in, artifact out.

from precast.exporter import export

export("user/model", "out", batch_size=1, sequence_length=(512,))
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# First of all: the runtime's package keeps ONNX Runtime from telling what it does.
from precast.runtime import errors as _  # noqa: F401

_EXPORTS = {
    "ExportOptions": "options",
    "choose_backends": "several.fastest",
    "export": "dispatch",
    "export_once": "reuse",
    "faster_here": "several.fastest",
    "open_eager": "eager.model",
    "option_names": "options",
    "preview": "dispatch",
    "preview_swap": "swap",
    "quiet_libraries": "quiet",
    "supported_tasks": "support",
    "swap_weights": "swap",
    "validate_again": "validation.revalidate",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
