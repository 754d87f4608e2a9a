"""Decoders that count positions themselves instead of being told: BART's relatives and RoBERTa's.

What they would count from the length of the cache is taken from the rows of the call, each of which has a past of its
own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn

from .attention_interface import positions
from .patching import replaced

__all__ = ["traceable"]


def traceable(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace `embed_positions` where the model counts, and what RoBERTa adds to positions that it is told."""
    stack = ExitStack()
    for name, module in list(model.named_modules()):
        if name.endswith("embed_positions") and isinstance(module, nn.Embedding):
            stack.enter_context(replaced(module, type(module), "forward", _counted))
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            stack.enter_context(replaced(module, nn.Embedding, "forward", _shifted))
    return stack


def _counted(module: Any) -> Callable[..., Tensor]:
    """`forward(input_ids or shape, ...)` with the positions of the rows."""
    offset = getattr(module, "offset", 0)

    def forward(tokens: Any, *rest: Any, **named: Any) -> Tensor:
        shape = tokens.shape if isinstance(tokens, Tensor) else tokens
        known = positions(shape[:2][-1])
        if known is None:
            return type(module).forward(module, tokens, *rest, **named)  # type: ignore[no-any-return]
        return nn.functional.embedding(known + offset, module.weight)

    return forward


def _shifted(module: nn.Embedding) -> Callable[[Tensor], Tensor]:
    """RoBERTa's first position is the one after its padding index."""
    first = (module.padding_idx or 0) + 1

    def forward(ids: Tensor) -> Tensor:
        is_told = positions(1) is not None
        return nn.functional.embedding(ids + first if is_told else ids, module.weight)

    return forward
