"""Adapters for slots at export: a random one to validate with, and what it does to the eager model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from precast.runtime.artifact.peft_files import CONFIG, WEIGHT_FILES
from precast.runtime.artifact.schema import Lora

__all__ = ["apply_adapter", "write_random_adapter"]

_ALPHA = 2
_SIZE = 0.5
"""How large an adapter's part of a layer's output is beside an input of the same width."""


def write_random_adapter(lora: Lora, folder: Path) -> None:
    """Write an adapter of all targets and of the full rank as peft would, the same each time."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for target in lora.targets:
        a = torch.randn(lora.rank, target.inputs, generator=generator) / target.inputs**0.5
        b = torch.randn(target.outputs, lora.rank, generator=generator) * _SIZE * lora.rank**0.5 / _ALPHA
        tensors |= {_key(target.module, "A"): a, _key(target.module, "B"): b}
    save_file(tensors, folder / WEIGHT_FILES[0])
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": _ALPHA}
    (folder / CONFIG).write_text(json.dumps(settings))


@contextmanager
def apply_adapter(model: nn.Module, folder: str) -> Iterator[None]:
    """Within this block the eager model has the adapter that `write_random_adapter` wrote; none where `folder` is
    empty."""
    with ExitStack() as stack:
        tensors = load_file(Path(folder) / WEIGHT_FILES[0]) if folder else {}
        for key, a in tensors.items():
            module = key.removeprefix(_START).removesuffix(_END.format("A"))
            if key == _key(module, "A"):
                b = tensors[_key(module, "B")] * (_ALPHA / len(a))
                stack.enter_context(model.get_submodule(module).register_forward_hook(partial(_add, a, b)))
        yield


def _add(a: Tensor, b: Tensor, _: nn.Module, given: tuple[Any, ...], made: Tensor) -> Tensor:
    added: Tensor = (given[0] @ a.T) @ b.T
    return made + added


_START, _END = "base_model.model.", ".lora_{}.weight"


def _key(module: str, part: str) -> str:
    return f"{_START}{module}{_END.format(part)}"
