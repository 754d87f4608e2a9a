"""Adapters in the format of peft: LoRA and its kin merged into a model's weights, prefixes laid before every prompt."""

from __future__ import annotations

__all__: list[str] = []
