"""JetMoE sorts tokens by expert and splits them by counts; here every token is given the weights of its experts."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts, JetMoeTopKGating

from .patching import replaced

__all__ = ["traceable"]


def traceable(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the router and the experts."""
    stack = ExitStack()
    stack.enter_context(replaced(model, JetMoeTopKGating, "forward", _route))
    stack.enter_context(replaced(model, JetMoeParallelExperts, "forward", _experts))
    return stack


def _route(router: JetMoeTopKGating) -> Any:
    """What the router returns, with tokens in the order they came, and experts in the place of counts."""

    def forward(states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits = router.layer(states).float()
        best, experts = logits.topk(router.top_k, dim=1)
        gates = best.softmax(1).type_as(states)
        order = torch.arange(states.shape[0] * router.top_k, device=states.device)
        return order, order // router.top_k, gates.flatten(), experts.flatten(), logits

    return forward


def _experts(module: JetMoeParallelExperts) -> Any:
    def forward(inputs: Tensor, experts: Tensor) -> Tensor:
        return torch.bmm(module.weight[experts], inputs[:, :, None])[:, :, 0]

    return forward
