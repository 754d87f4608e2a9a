"""Adapters of prefixes and prompts, written as peft does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = ["random_prefix", "save_prefix"]


def save_prefix(folder: Path, tensor: torch.Tensor, kind: str = "PREFIX_TUNING", **config: Any) -> Path:
    """Write an adapter; the keys and values of a prefix may be given as [layers, 2, heads, length, width]."""
    folder.mkdir(exist_ok=True, parents=True)
    if tensor.ndim == 5:
        tensor = tensor.permute(3, 0, 1, 2, 4).flatten(1)
    save_file({"prompt_embeddings": tensor.contiguous()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "task_type": "CAUSAL_LM", **config}))
    return folder


def random_prefix(folder: Path, seed: int = 1) -> Path:
    """A prefix of 5 positions for the tiny Llama of one layer, which has 2 heads of width 16 for keys and values."""
    return save_prefix(folder, torch.randn(1, 2, 2, 5, 16, generator=torch.Generator().manual_seed(seed)))
