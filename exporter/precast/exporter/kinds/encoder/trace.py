"""An encoder as one program: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ...architectures import make_traceable
from ..plan import TensorPlan
from ..trace import Program, export_program
from .inner_padding import closed, is_causal, opened, places_of
from .inputs import example
from .padding_invariance import padded_exactly
from .plan import EncoderGraph, EncoderPlan

__all__ = ["trace"]


def trace(model: nn.Module, plan: EncoderPlan, scales: Any = None) -> Iterator[Program]:
    """One program per graph of the plan. Raises ExportError."""
    return (_trace(model, plan, graph) for graph in plan.graphs)


class _Encoder(nn.Module):
    """The model with positional inputs and a flat tuple of named outputs."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[TensorPlan]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs
        self.closes = "attention_mask" in inputs and is_causal(model)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, tensors, strict=True))
        places = places_of(named["attention_mask"]) if self.closes else None
        if places is not None:
            named = {name: closed(tensor, places) for name, tensor in named.items()}
        with padded_exactly(self.model, named.get("attention_mask")):
            result = self.model(**named, return_dict=True)
        return tuple(
            result[spec.name] if places is None or "length" not in spec.axes else opened(result[spec.name], places)
            for spec in self.outputs
        )


def _trace(model: nn.Module, plan: EncoderPlan, graph: EncoderGraph) -> Program:
    inputs = example(plan.inputs, graph.sizes)
    program = _Encoder(model, list(inputs), plan.outputs).eval()
    with make_traceable(model):
        exported = export_program(program, tuple(inputs.values()), None)
    return Program(plan.describe(graph), exported)
