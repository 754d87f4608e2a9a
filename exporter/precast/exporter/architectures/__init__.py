"""Adapters for architectures whose attention does not go through transformers' AttentionInterface, or whose other
modules look at values where a graph cannot.

Most need none. One that does gets a file here, named after its `model_type`, with a function
`adapted(model) -> context manager` and one row in `ADAPTERS`, or `traceable(model)` and one row in `TRACEABLE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

from torch import nn

from .last_eos_pooling import pooled_at_last_end
from .scaled_rotary import short_rotations
from .standard import through_interface

__all__ = ["ADAPTERS", "TRACEABLE", "adapted", "traceable"]

_HERE = "precast.exporter.architectures"
_COUNTING = [
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    *("trocr", "whisper", "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"),
    "xlm-roberta-xl",
]
ADAPTERS = {
    "bloom": f"{_HERE}.bloom",
    "codegen": f"{_HERE}.gptj",
    "falcon": f"{_HERE}.falcon",
    "gpt_neo": f"{_HERE}.gptj",
    "gptj": f"{_HERE}.gptj",
    "llama4_text": f"{_HERE}.llama4",
    "mpt": f"{_HERE}.mpt",
    "xglm": f"{_HERE}.xglm",
}
"""The module that puts the operator into a model type."""

TRACEABLE = {
    **dict.fromkeys(_COUNTING, f"{_HERE}.positions"),
    "dbrx": f"{_HERE}.dbrx",
    "deepseek_v2": f"{_HERE}.deepseek_v2",
    "gemma3n_text": f"{_HERE}.gemma3n",
    "gemma4_text": f"{_HERE}.gemma4",
    "jetmoe": f"{_HERE}.jetmoe",
    "longcat_flash": f"{_HERE}.longcat_flash",
    "phimoe": f"{_HERE}.phimoe",
    "xmod": f"{_HERE}.xmod",
}
"""The module that makes the rest of a model type traceable, with the operator or without."""


@contextmanager
def adapted(model: nn.Module) -> Iterator[None]:
    """Within this block the attention of `model` is `cached_attention`, and it is `traceable`."""
    config: Any = model.config
    module = ADAPTERS.get(config.model_type)
    attention = import_module(module).adapted(model) if module else through_interface(model)
    with traceable(model), attention:
        yield


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Within this block `model` computes the same, without looking at values to decide what (which experts, say)."""
    config: Any = model.config
    module = TRACEABLE.get(config.model_type)
    own = import_module(module).traceable(model) if module else nullcontext()
    with own, _batched_experts(model), short_rotations(model), pooled_at_last_end(model):
        yield


@contextmanager
def _batched_experts(model: Any) -> Iterator[None]:
    """Every token is given the weights of its experts."""
    if not model._can_set_experts_implementation():
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
