"""DBRX loops over the experts that were hit; here the weights of its experts are gathered for every token."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.dbrx.modeling_dbrx import DbrxExperts

from .patching import replace_method

__all__ = ["make_traceable"]


def make_traceable(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the experts."""
    return replace_method(model, DbrxExperts, "forward", _make_experts)


def _make_experts(module: DbrxExperts) -> Any:
    def forward(states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """[B, S, D], and per token K experts and their weights [B * S, K]."""
        chosen, count, layers = experts.flatten(), experts.shape[1], module.mlp
        tokens = states.flatten(0, 1).repeat_interleave(count, 0)[:, :, None]
        w1, v1, w2 = (each.view(-1, layers.ffn_hidden_size, layers.hidden_size)[chosen]
                      for each in (layers.w1, layers.v1, layers.w2))  # fmt: skip
        inner = layers.activation_fn(torch.bmm(w1, tokens)) * torch.bmm(v1, tokens)
        results = torch.bmm(inner.transpose(1, 2), w2)[:, 0]
        summed: Tensor = (results.unflatten(0, (-1, count)) * weights[:, :, None]).sum(1)
        return summed.view(states.shape).type_as(states)

    return forward
