"""Precision below float32: a pass over traced programs, before they are compiled.

Programs are traced in float32. The pass decides for every operator whether it computes in the cast type, inserts casts
where the two meet, and stores a weight in the cast type when an operator of the cast type reads it. Operators that only
move numbers keep the type of their inputs. Callers' inputs and outputs stay float32; only values that graphs pass to
each other (caches, an encoder's output) are of the cast type where everything is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from precast.runtime.artifact.backends import get_backend
from precast.runtime.artifact.schema import Graph

from ..kinds.trace import Program
from ..options import ExportOptions
from .analysis import Analysis, Cast, WeightKey
from .operators import MATMULS
from .rewrite import Rewrite

__all__ = ["MATMULS", "Cast", "cast_programs", "choose_cast"]


def choose_cast(options: ExportOptions) -> Cast | None:
    """The cast that the options ask for; None for programs that stay in float32."""
    if options.dtype != "float32":
        return Cast("weights", getattr(torch, options.dtype))
    if options.auto_cast == "none" or get_backend(options.backend).casts_itself:
        return None
    return Cast("matmul" if options.auto_cast == "matmul" else "all", getattr(torch, options.cast_dtype))


def cast_programs(programs: Sequence[Program], cast: Cast) -> list[Program]:
    """Rewrite part of the programs' operators to `cast.dtype`; their graphs are changed in place.

    A weight is cast once for all of them: programs that share a tensor share the cast one.
    """
    shared = _shared_names([program.graph for program in programs]) if cast.scope != "matmul" else frozenset()
    analyses = [Analysis(program, cast, shared) for program in programs]
    low_weights = {key for each in analyses for key in each.low_weights()}
    stored: dict[WeightKey, Tensor] = {}
    return [Rewrite(each, low_weights, stored).apply() for each in analyses]


def _shared_names(graphs: Sequence[Graph]) -> frozenset[str]:
    """Values that no caller sees: caches, and outputs of a graph that are inputs of another."""
    made = {output.name for graph in graphs for output in graph.outputs}
    taken = {spec.name for graph in graphs for spec in graph.inputs}
    layers = [layer for graph in graphs for layer in graph.cache if layer.dtype == "float32"]
    caches = {name for it in layers for name in (it.key_in, it.key_out, it.value_in, it.value_out)}
    return frozenset(caches | (made & taken))
