"""Run one model in several modes, and adapt how it is run.

from precast.runtime.runner import ModelRunner, compare_modes, open_model

model = open_model("out", mode="eager")                        # or "compiled", "torch-compile"
print(compare_modes(["Water boils at"], artifact="out").to_json())
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "InferenceConfig": "config",
    "ModelRunner": "model_runner",
    "OfflineInference": "offline",
    "SamplingParams": "offline",
    "compare_modes": "comparison",
    "open_model": "modes",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
