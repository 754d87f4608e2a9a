"""GPT-J, CodeGen and GPT-Neo: their attention is a method `_attn` of each layer, called right after the cache.

Since transformers 5.24 that of GPT-J and CodeGen goes through transformers' AttentionInterface instead.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn
from transformers.models.codegen.modeling_codegen import CodeGenAttention
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention

from .attention_interface import Mask, attend, use_attention_interface
from .patching import replace_method

__all__ = ["use_cached_attention"]


def use_cached_attention(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace `_attn` of every layer, where layers have one."""
    written_out = [cls for cls in (GPTJAttention, CodeGenAttention, GPTNeoSelfAttention) if hasattr(cls, "_attn")]
    if not any(isinstance(module, tuple(written_out)) for module in model.modules()):
        return use_attention_interface(model)
    stack = ExitStack()
    for cls in written_out:
        stack.enter_context(replace_method(model, cls, "_attn", _make_attention))
    return stack


def _make_attention(layer: Any) -> Any:
    # GPT-Neo does not scale, and every other layer sees a window.
    scale = 1 / float(getattr(layer, "scale_attn", 1.0))
    is_local = getattr(layer, "attention_type", None) == "local"
    mask = Mask("window", layer.config.window_size) if is_local else None

    def attention(query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> tuple[Tensor, None]:
        return attend(query, key, value, scale=scale, mask=mask), None

    return attention
