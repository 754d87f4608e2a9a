"""The kernel of LoRA adapters beside a linear layer: the operator `precast::lora` by cpp/lora.h."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.lowering import register_lowering

from ...operators.lora import lora
from .kernel_template import KernelTemplate, realize_contiguous

__all__ = ["lora"]


@register_lowering(torch.ops.precast.lora.default, type_promotion_kind=None)
def _lower(y: Any, x: Any, weights: Any, slots: Any) -> Any:
    inputs = {name: realize_contiguous(node) for name, node in {"x0": y, "x": x, "w": weights, "s": slots}.items()}
    _, rank, _ = (int(size) for size in weights.get_size())
    columns, outputs = int(x.get_size()[-1]), int(y.get_size()[-1])
    call = f"precast::lora<{columns}, {outputs}, {rank}>(y, x0, x, w, s, {{x:0}}, {{x:1}});"
    return KernelTemplate(inputs, y.get_size(), call, ["simd.h", "lora.h"]).make_node()
