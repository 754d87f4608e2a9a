"""Classifiers that are encoder-decoders: BART's and T5's relatives answer by the decoder's state at the last
end-of-sequence token.

transformers picks it by indexing with a mask, after comparing how many each row has, and refuses rows that differ. A
compiled graph takes each row's own, of those that are not padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .patching import replaced

__all__ = ["pooled_at_last_end", "pools_last_end"]


def pools_last_end(model: nn.Module) -> bool:
    """Whether `model` classifies by the state at the last end-of-sequence token: by its code, which has this once for
    each type."""
    if not hasattr(model, "classification_head"):
        return False
    forward: Any = inspect.unwrap(type(model).forward)
    return "eos_mask" in forward.__code__.co_varnames


@contextmanager
def pooled_at_last_end(model: nn.Module) -> Iterator[None]:
    """Within this block such a `model` takes rows with any number of end-of-sequence tokens above 0."""
    if not pools_last_end(model):
        yield
        return
    with replaced(model, type(model), "forward", _classifier):
        yield


def _classifier(model: Any) -> Callable[..., SequenceClassifierOutput]:
    # BART's relatives shift what the decoder reads by themselves.
    shift = getattr(model, "_shift_right", None)

    def forward(input_ids: Tensor, attention_mask: Tensor, **named: Any) -> SequenceClassifierOutput:
        if shift is not None:
            named["decoder_input_ids"] = shift(input_ids)
        states = model.base_model(input_ids, attention_mask=attention_mask, use_cache=False, **named)[0]
        ends = input_ids.eq(model.config.eos_token_id) & attention_mask.bool()
        last = (ends * torch.arange(1, input_ids.shape[1] + 1)).argmax(1)
        state = states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]
        return SequenceClassifierOutput(logits=model.classification_head(state))

    return forward
