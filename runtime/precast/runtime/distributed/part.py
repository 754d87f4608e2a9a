"""What one rank has of a model: its part of every layer, or all of some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..artifact import Artifact
from ..artifact.schema import Graph, Variant
from ..engines import Arrays, Settings, Step
from ..engines.aoti import Member, StandaloneEngine
from .shared_memory import TIME_LIMIT, GroupMemory
from .stages import StageEngine

__all__ = ["Part", "caches_of", "open_part"]


class Part(Protocol):
    """The engine of one rank. `graphs` are the graphs as this rank has them, by name."""

    graphs: Mapping[str, Graph]

    def bind(self, graph: str, inputs: Arrays, outputs: Arrays) -> Step:
        """As of Engine; what this rank does not read or write may be left out, or be there."""
        ...


def open_part(artifact: Artifact, variant: Variant, rank: int, settings: Settings, memory: GroupMemory) -> Part:
    """Open what a rank has of a variant for several. Raises ArtifactError."""
    if variant.stages:
        return StageEngine(artifact, variant, rank, settings, memory)
    member = Member(memory.address, rank, settings.rank_timeout or TIME_LIMIT, memory)
    return StandaloneEngine(artifact, variant, settings, member)


def caches_of(graph: Graph) -> dict[str, str]:
    """The name in of each cache by its name out."""
    pairs = [
        pair for layer in graph.cache for pair in ((layer.key_out, layer.key_in), (layer.value_out, layer.value_in))
    ]
    return dict(pairs)
