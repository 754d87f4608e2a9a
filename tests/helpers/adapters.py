"""Adapters of peft with random weights, made on the spot for tiny checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from precast.exporter.quiet import silence

__all__ = ["CONFIGS", "make_adapter", "open_adapted"]

CONFIGS = {
    "lora": peft.LoraConfig,
    "rslora": lambda **given: peft.LoraConfig(**given, use_rslora=True),
    "dora": lambda **given: peft.LoraConfig(**given, use_dora=True),
    "adalora": lambda r, **given: peft.AdaLoraConfig(**given, init_r=r, target_r=r, total_step=10),
    "loha": lambda lora_alpha, **given: peft.LoHaConfig(**given, alpha=lora_alpha),
    "lokr": lambda lora_alpha, **given: peft.LoKrConfig(**given, alpha=lora_alpha),
}


def make_adapter(
    path: Path, base: Path, auto: str, kind: str = "lora", *, seed: int = 1, fill: str = "all", **settings: Any
) -> Path:
    """Save an adapter of the checkpoint `base`, with random numbers in all of it, or with none in what is zero when
    training begins (`fill="none"`)."""
    with silence("peft"):
        model = getattr(transformers, auto).from_pretrained(base, attn_implementation="eager")
        settings = {"r": 4, "lora_alpha": 6, **settings}
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, CONFIGS[kind](**settings))
        if fill == "all":
            for name, value in adapted.named_parameters():
                if value.requires_grad:
                    is_magnitude = "magnitude" in name
                    value.data = value.data * 1.2 if is_magnitude else torch.randn_like(value) * 0.2
        adapted.save_pretrained(path)
    return path


def open_adapted(base: Path, auto: str, *adapters: Path, weight: float = 1.0) -> Any:
    """The eager model of peft with these adapters active, the first of them `weight` times."""
    with silence("peft"):
        model = getattr(transformers, auto).from_pretrained(base, attn_implementation="eager")
        adapted = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name="first")
        for number, path in enumerate(adapters[1:]):
            adapted.load_adapter(path, adapter_name=f"further{number}")
        adapted.base_model.set_adapter(list(adapted.peft_config))
    for module in adapted.modules():
        if isinstance(getattr(module, "scaling", None), dict) and "first" in module.scaling:
            module.scaling["first"] *= weight
    return adapted.eval()
