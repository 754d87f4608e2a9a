"""Models that count positions themselves instead of taking `position_ids`: BART's relatives and RoBERTa's.

They would count from the length of the cache, one number for the whole batch; here each row counts from its own past.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn

from .attention_interface import new_positions
from .patching import replace_method

__all__ = ["make_traceable"]


def make_traceable(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace `embed_positions` of BART's relatives, and the embedding of positions of RoBERTa's."""
    stack = ExitStack()
    for name, module in list(model.named_modules()):
        if name.endswith("embed_positions") and isinstance(module, nn.Embedding):
            stack.enter_context(replace_method(module, type(module), "forward", _make_embed_positions))
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            stack.enter_context(replace_method(module, nn.Embedding, "forward", _make_embed_shifted))
    return stack


def _make_embed_positions(module: Any) -> Callable[..., Tensor]:
    """A `forward(input_ids or shape, ...)` that embeds each row's own positions."""
    offset = getattr(module, "offset", 0)

    def forward(tokens: Any, *rest: Any, **named: Any) -> Tensor:
        shape = tokens.shape if isinstance(tokens, Tensor) else tokens
        known = new_positions(shape[:2][-1])
        if known is None:
            return type(module).forward(module, tokens, *rest, **named)  # type: ignore[no-any-return]
        return nn.functional.embedding(known + offset, module.weight)

    return forward


def _make_embed_shifted(module: nn.Embedding) -> Callable[[Tensor], Tensor]:
    """A `forward(positions)` that adds RoBERTa's offset, as its first position is the one after its padding index."""
    first = (module.padding_idx or 0) + 1

    def forward(ids: Tensor) -> Tensor:
        is_traced = new_positions(1) is not None
        return nn.functional.embedding(ids + first if is_traced else ids, module.weight)

    return forward
