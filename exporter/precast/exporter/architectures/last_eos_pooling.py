"""Classifiers that are encoder-decoders: BART's and T5's relatives classify by the decoder's state at the last
end-of-sequence token.

transformers picks that state by a boolean mask, and refuses a batch whose rows hold different numbers of such tokens. A
compiled graph takes the last one of each row that is not padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .patching import replace_method

__all__ = ["pool_last_eos", "pools_last_eos"]


def pools_last_eos(model: nn.Module) -> bool:
    """Whether `model` classifies by the state at the last end-of-sequence token, read off its code: transformers writes
    this out for each type."""
    if not hasattr(model, "classification_head"):
        return False
    forward: Any = inspect.unwrap(type(model).forward)
    return "eos_mask" in forward.__code__.co_varnames


@contextmanager
def pool_last_eos(model: nn.Module) -> Iterator[None]:
    """Within this block such a `model` takes rows with different numbers of end-of-sequence tokens, 1 or more each."""
    if not pools_last_eos(model):
        yield
        return
    with replace_method(model, type(model), "forward", _make_forward):
        yield


def _make_forward(model: Any) -> Callable[..., SequenceClassifierOutput]:
    # BART's relatives shift the decoder's input by themselves.
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
