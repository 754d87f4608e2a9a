"""Adapters in the format of peft (LoRA and its kin): found, checked, and merged into a model's weights."""

from __future__ import annotations

__all__: list[str] = []
