"""LLM.int8: weights and activations of 8 bits, but for the few columns whose activations are large.

Dettmers et al. 2022 (https://arxiv.org/abs/2208.07339): a handful of columns holds activations many times as large as
all others. Rounded together with these, a token's others would have no digits left, so those columns are multiplied in
float32. There they are found anew for every input; in a compiled graph they are those of calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .activations import Call, observe_inputs
from .int8_linear import Int8Linear, Int8Weight
from .recipe import Layer

__all__ = ["OutlierLinear", "quantize_around_outliers"]

THRESHOLD = 6.0
"""The size from which an activation makes its column an outlier: that of the paper, and of bitsandbytes."""


class OutlierLinear(nn.Module):
    """A linear layer whose columns `kept` are multiplied as they are, and all others in 8 bits.

    Args:
        weight: float [N, K].
        kept: int64 [k], sorted.
    """

    kept: Tensor
    columns: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, kept: Tensor) -> None:
        super().__init__()
        # Zeros make both factors of an outlier nothing, so that no scale is chosen for it.
        rest = torch.ones(weight.shape[1]).index_fill(0, kept, 0.0)
        self.rounded = Int8Linear(Int8Weight.round(weight * rest), bias, rest, None)
        self.register_buffer("kept", kept)
        self.register_buffer("columns", weight[:, kept].float().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """float [..., K] -> [..., N]."""
        found: Tensor = self.rounded(x)
        return found + nn.functional.linear(x.index_select(-1, self.kept).float(), self.columns).to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """float32 [N, K], for modelling code that multiplies by it itself."""
        return self.rounded.weight.index_copy(1, self.kept, self.columns)


@torch.no_grad()
def quantize_around_outliers(
    model: nn.Module,
    layers: Sequence[Layer],
    calls: Sequence[Call],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Replace the linear layers of `model` that calibration reaches; returns descriptions by layer, for people."""
    by_name, done = {layer.name: layer for layer in layers}, dict[str, str]()
    groups = observe_inputs(model, calls, list(by_name))
    for count, group in enumerate(groups):
        progress(count, len(groups))
        kept = (group.largest >= THRESHOLD).nonzero()[:, 0]
        for name in group.names:
            layer = by_name[name]
            assert layer.linear is not None, "the caller gives linear layers"
            model.set_submodule(layer.linear, _make_layer(layer, kept))
            done[name] = "int8 weights and activations by llm.int8"
    return done


def _make_layer(layer: Layer, kept: Tensor) -> nn.Module:
    if len(kept):
        return OutlierLinear(layer.weight, layer.bias, kept)
    return Int8Linear(Int8Weight.round(layer.weight), layer.bias, None, None)
