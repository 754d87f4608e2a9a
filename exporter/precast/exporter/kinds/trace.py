"""Trace a model into programs.

A program is a `torch.export.ExportedProgram` with typed inputs and outputs, described as in the artifact's contract. A
backend turns it into a file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from precast.runtime.artifact.schema import Graph
from precast.runtime.errors import ExportError, PrecastError

from . import kind_of
from .plan import Plan

__all__ = ["Program", "export_program", "functional", "trace"]


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
        try:
            return _export(program, example, shapes, is_oblivious=False)
        except UserError:
            return _export(program, example, shapes, is_oblivious=True)
    except GuardOnDataDependentSymNode as error:
        raise ExportError(
            f"This model decides by its inputs' values what to compute, which one graph cannot ({error.cond}): only "
            f"models that compute the same for every input can be compiled."
        ) from error
    except PrecastError:
        raise
    except Exception as error:
        # Modelling code and torch's tracer may raise anything.
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else 'no reason given'}"
        hint = "" if shapes is None else " Fixed lengths may do where a free one does not: prefill_lengths=64."
        raise ExportError(f"This model cannot be traced as one graph. {reason}{hint}") from error


def functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program in functional operators, none of which writes to its inputs."""
    with warnings.catch_warnings():
        # torch warns of code that is its own.
        warnings.simplefilter("ignore", FutureWarning)
        found: torch.export.ExportedProgram = exported.run_decompositions({})
    return found


def _export(
    program: nn.Module, example: tuple[Any, ...], shapes: Any, *, is_oblivious: bool
) -> torch.export.ExportedProgram:
    """`is_oblivious` keeps torch from deciding by whether a free length is 1. Some models can only be traced with it;
    others, whose matrix products run over such a length, only without."""
    settings: Any = torch.fx.experimental._config
    with torch.no_grad(), settings.patch(backed_size_oblivious=is_oblivious):
        return torch.export.export(program, example, dynamic_shapes=shapes, strict=False)
