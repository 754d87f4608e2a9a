"""Adapters for architectures whose attention does not go through transformers' AttentionInterface, or whose other
modules compute what depends on the inputs' values, which one graph cannot.

Most need none. One that does gets a file here, named after its `model_type`, with a context manager
`use_cached_attention(model)` and one row in `ADAPTERS`, or `make_traceable(model)` and one row in `TRACEABLE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

from torch import nn

from .attention_interface import use_attention_interface
from .last_eos_pooling import pool_last_eos
from .scaled_rotary import use_short_angles

__all__ = ["ADAPTERS", "TRACEABLE", "make_traceable", "use_cached_attention"]

_COUNTS_POSITIONS = [
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    *("trocr", "whisper", "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"),
    "xlm-roberta-xl",
]
ADAPTERS = {
    "bloom": f"{__name__}.bloom",
    "codegen": f"{__name__}.gptj",
    "falcon": f"{__name__}.falcon",
    "gpt_neo": f"{__name__}.gptj",
    "gptj": f"{__name__}.gptj",
    "llama4_text": f"{__name__}.llama4",
    "mpt": f"{__name__}.mpt",
    "xglm": f"{__name__}.xglm",
}
"""The module with `use_cached_attention`, by model type."""

TRACEABLE = {
    **dict.fromkeys(_COUNTS_POSITIONS, f"{__name__}.learned_positions"),
    "dbrx": f"{__name__}.dbrx",
    "deepseek_v2": f"{__name__}.deepseek_v2",
    "gemma3n_text": f"{__name__}.gemma3n",
    "gemma4_text": f"{__name__}.gemma4",
    "jetmoe": f"{__name__}.jetmoe",
    "longcat_flash": f"{__name__}.longcat_flash",
    "phimoe": f"{__name__}.phimoe",
    "xmod": f"{__name__}.xmod",
}
"""The module with `make_traceable`, by model type; it is used with the operator and without."""


@contextmanager
def use_cached_attention(model: nn.Module) -> Iterator[None]:
    """Within this block `model` attends by the `cached_attention` operator, and can be traced."""
    config: Any = model.config
    module = ADAPTERS.get(config.model_type)
    attention = import_module(module).use_cached_attention(model) if module else use_attention_interface(model)
    with make_traceable(model), attention:
        yield


@contextmanager
def make_traceable(model: nn.Module) -> Iterator[None]:
    """Within this block `model` computes the same answers without control flow that depends on values (which experts
    were hit, say)."""
    config: Any = model.config
    module = TRACEABLE.get(config.model_type)
    own = import_module(module).make_traceable(model) if module else nullcontext()
    with own, _batch_experts(model), use_short_angles(model), pool_last_eos(model):
        yield


@contextmanager
def _batch_experts(model: Any) -> Iterator[None]:
    """Within this block experts are computed by transformers' "batched_mm", which gathers weights per token."""
    if not model._can_set_experts_implementation():
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
