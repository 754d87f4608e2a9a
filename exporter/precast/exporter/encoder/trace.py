"""An encoder as one program: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import GraphPlan
from ..trace import Program, export_program
from .plan import EncoderPlan

__all__ = ["trace"]


def trace(model: nn.Module, plan: EncoderPlan, scales: Any = None) -> Iterator[Program]:
    """One program per graph of the plan. Raises ExportError."""
    return (_trace(model, plan, graph) for graph in plan.graphs)


class _Encoder(nn.Module):
    """The model with positional inputs and a flat tuple of named outputs."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.model(**dict(zip(self.inputs, tensors, strict=True)), return_dict=True)
        return tuple(result[name] for name in self.outputs)


def _trace(model: nn.Module, plan: EncoderPlan, graph: GraphPlan) -> Program:
    assert isinstance(graph.length, int), "an encoder's length is static"
    names = [spec.name for spec in plan.inputs]
    example = [torch.ones(graph.batch, graph.length, dtype=torch.int64) for _ in names]
    program = _Encoder(model, names, [output.name for output in plan.outputs]).eval()
    exported = export_program(program, tuple(example), None)
    return Program(plan.describe(graph), exported)
