"""LongCat-Flash asks which experts were hit; here every token is given the weights of its experts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from .patching import replaced

__all__ = ["traceable"]


def traceable(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the experts, the last of which hand tokens back as they are."""
    return replaced(model, LongcatFlashExperts, "forward", _experts)


def _experts(module: LongcatFlashExperts) -> Any:
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
