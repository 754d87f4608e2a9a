"""States of a fixed size that a decoder carries from token to token: of convolutions, state spaces, linear attention.

transformers keeps them in its cache's `LinearAttention…` layers, which change them in place. In a program they are
inputs and outputs: the layers start with copies of the inputs, and the changed copies are the outputs. A state cannot
be cut back, and padding would change it, so programs with states take one token at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from msgspec import convert
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from precast.runtime.artifact.schema import Dtype

__all__ = ["StateLayer", "StateLayout", "find_states"]

_KINDS = ("conv", "recurrent")


@dataclass(frozen=True)
class StateLayout:
    """One state of one layer: its kind, its number among those of that kind, its shape without the batch."""

    layer: int
    kind: str
    number: int
    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.kind}.{self.number}"

    def example(self, batch: int) -> Tensor:
        return torch.zeros(batch, *self.shape, dtype=getattr(torch, self.dtype))


def find_states(layer: Any, index: int) -> tuple[StateLayout, ...]:
    """The states in `layer`, number `index` of a cache that a run has filled."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return ()
    found = [(kind, number, tensor) for kind in _KINDS for number, tensor in getattr(layer, f"{kind}_states").items()]
    return tuple(
        StateLayout(
            index, kind, number, tuple(tensor.shape[1:]), convert(str(tensor.dtype).removeprefix("torch."), Dtype)
        )
        for kind, number, tensor in found
        if tensor is not None
    )


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """A cache layer that starts with these states: zeros for a sequence without a past, as transformers has them for
    its first token."""

    def __init__(self, plan: Sequence[StateLayout], states: Sequence[Tensor]) -> None:
        super().__init__(number_of_states=1 + max(each.number for each in plan))
        self.plan = plan
        for each, state in zip(plan, states, strict=True):
            getattr(self, f"{each.kind}_states")[each.number] = state.clone()
            getattr(self, f"is_{each.kind}_states_initialized")[each.number] = True
            self.has_previous_state[each.number] = True
            if each.kind == "conv":
                self.conv_kernel_size[each.number] = each.shape[-1]

    def updated_states(self) -> list[Tensor]:
        """The states after the step, in the order of the plan."""
        return [getattr(self, f"{each.kind}_states")[each.number] for each in self.plan]
