"""Checkpoint model -> traced programs.

A program is a `torch.export.ExportedProgram` with typed inputs and outputs, described in the words of the artifact
contract; what remains for a backend is to turn it into a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from precast.runtime.artifact.schema import Graph
from precast.runtime.errors import ExportError

from .kinds import kind_of
from .plan import Plan

__all__ = ["Program", "export_program", "trace"]


@dataclass(frozen=True)
class Program:
    """One traced graph. `graph` describes it; its `file` is the backend's to fill in."""

    graph: Graph
    exported: torch.export.ExportedProgram


def trace(model: nn.Module, plan: Plan, scales: Any = None) -> Iterator[Program]:
    """Trace `model` once per graph of the plan; `scales` are those of caches in int8.

    Raises ExportError where the model cannot be traced faithfully.
    """
    programs: Iterator[Program] = kind_of(plan.task).trace(model, plan, scales)
    return programs


def export_program(program: nn.Module, example: tuple[Any, ...], shapes: Any) -> torch.export.ExportedProgram:
    """`torch.export` of a program that takes `example`. Raises ExportError where it cannot be one graph."""
    try:
        with torch.no_grad():
            return torch.export.export(program, example, dynamic_shapes=shapes, strict=False)
    except GuardOnDataDependentSymNode as error:
        raise ExportError(
            f"This model decides by its inputs' values what to compute, which one graph cannot ({error.cond}). Rotary "
            f"scaling of the kind 'dynamic' does; so far only models that compute the same at every "
            f"length can be compiled."
        ) from error
