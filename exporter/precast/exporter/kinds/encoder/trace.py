"""Trace an encoder: one program per graph, a whole forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ...architectures import make_traceable
from ..plan import TensorPlan
from ..trace import Program, export_program
from .inner_padding import compact, compaction_index, is_causal, restore
from .inputs import make_example
from .padding_invariance import ignore_padding
from .plan import EncoderGraph, EncoderPlan

__all__ = ["trace"]


def trace(model: nn.Module, plan: EncoderPlan, scales: Any = None) -> Iterator[Program]:
    """Trace one program per graph of the plan. Raises ExportError."""
    return (_trace(model, plan, graph) for graph in plan.graphs)


class _Encoder(nn.Module):
    """The model with positional inputs and a flat tuple of named outputs."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[TensorPlan]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs
        self.is_compacted = "attention_mask" in inputs and is_causal(model)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, tensors, strict=True))
        index = compaction_index(named["attention_mask"]) if self.is_compacted else None
        if index is not None:
            named = {name: compact(tensor, index) for name, tensor in named.items()}
        with ignore_padding(self.model, named.get("attention_mask")):
            result = self.model(**named, return_dict=True)
        return tuple(
            result[spec.name] if index is None or "length" not in spec.axes else restore(result[spec.name], index)
            for spec in self.outputs
        )


def _trace(model: nn.Module, plan: EncoderPlan, graph: EncoderGraph) -> Program:
    inputs = make_example(plan.inputs, graph.sizes)
    program = _Encoder(model, list(inputs), plan.outputs).eval()
    with make_traceable(model):
        exported = export_program(program, tuple(inputs.values()), None)
    return Program(plan.describe(graph), exported)
