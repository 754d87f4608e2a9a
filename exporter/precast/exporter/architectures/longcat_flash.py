"""LongCat-Flash loops over the experts that were hit; here the weights of its experts are gathered for every token."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from .patching import replace_method

__all__ = ["make_traceable"]


def make_traceable(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the experts, the last of which are identities."""
    return replace_method(model, LongcatFlashExperts, "forward", _make_experts)


def _make_experts(module: LongcatFlashExperts) -> Any:
    def forward(states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """[T, D], and per token K experts and their weights [T, K]."""
        chosen, count = experts.flatten(), experts.shape[1]
        tokens = states.repeat_interleave(count, 0)
        computing = chosen.clamp(max=module.num_routed_experts - 1)
        gate, up = _by_token(module.gate_up_proj[computing], tokens).chunk(2, dim=-1)
        computed = _by_token(module.down_proj[computing], module.act_fn(gate) * up)
        results = torch.where((chosen < module.num_routed_experts)[:, None], computed, tokens)
        summed: Tensor = (results.unflatten(0, (-1, count)) * weights[:, :, None]).sum(1)
        return summed.type_as(states)

    return forward


def _by_token(weights: Tensor, tokens: Tensor) -> Tensor:
    """[N, F, D] and [N, D] -> [N, F]."""
    return torch.bmm(weights, tokens[:, :, None])[:, :, 0]
