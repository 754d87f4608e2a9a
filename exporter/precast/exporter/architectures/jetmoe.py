"""JetMoE sorts tokens by expert and splits them by counts; here expert weights are gathered for every token."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts, JetMoeTopKGating

from .patching import replace_method

__all__ = ["make_traceable"]


def make_traceable(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the router and the experts."""
    stack = ExitStack()
    stack.enter_context(replace_method(model, JetMoeTopKGating, "forward", _make_router))
    stack.enter_context(replace_method(model, JetMoeParallelExperts, "forward", _make_experts))
    return stack


def _make_router(router: JetMoeTopKGating) -> Any:
    """A router that leaves tokens in their order, and returns experts in the place of counts."""

    def forward(states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits = router.layer(states).float()
        best, experts = logits.topk(router.top_k, dim=1)
        gates = best.softmax(1).type_as(states)
        order = torch.arange(states.shape[0] * router.top_k, device=states.device)
        return order, order // router.top_k, gates.flatten(), experts.flatten(), logits

    return forward


def _make_experts(module: JetMoeParallelExperts) -> Any:
    def forward(inputs: Tensor, experts: Tensor) -> Tensor:
        return torch.bmm(module.weight[experts], inputs[:, :, None])[:, :, 0]

    return forward
