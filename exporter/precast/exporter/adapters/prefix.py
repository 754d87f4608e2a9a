"""A prefix as keys and values: computed once, stored in the artifact, and before the prompts of the eager model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from safetensors.torch import load, save_file
from torch import Tensor, nn
from transformers import DynamicCache

from precast.runtime.artifact import Artifact
from precast.runtime.artifact.schema import Graph, Prefix

from ..architectures.cache_names import cache_argument, find_cache
from .prefix_files import LayerSizes, PrefixFile

__all__ = ["PREFIX_FILE", "PrefixedModel", "after_prefix", "compute_prefix", "load_prefix", "store_prefix"]

PREFIX_FILE = "prefix.safetensors"


def compute_prefix(prefix: PrefixFile, model: nn.Module, layers: Sequence[LayerSizes]) -> list[Tensor]:
    """Keys and values of each layer in turn, [heads, length, width]. Those of virtual tokens depend on nothing that
    comes after them, so `model` computes them here, once."""
    if prefix.method == "pre-caches":
        return list(prefix.tensor.flatten(0, 1))
    if not prefix.is_embedded:
        heads, width = layers[0]
        return list(prefix.tensor.view(prefix.length, 2 * len(layers), heads, width).permute(1, 2, 0, 3))
    # Without a configuration no layer drops what lies before its window.
    given = {cache_argument(model): DynamicCache(), "inputs_embeds": prefix.tensor[None]}
    with torch.no_grad():
        cache = find_cache(model(**given, use_cache=True, return_dict=True))
    return [tensor[0].float() for layer in cache.layers for tensor in (layer.keys, layer.values)]


def store_prefix(prefix: PrefixFile, tensors: Sequence[Tensor], graph: Graph, folder: Path) -> Prefix:
    """Write keys and values by the names of a graph's caches; returns what the contract says of them."""
    names = [name for layer in graph.cache for name in (layer.key_in, layer.value_in)]
    save_file({name: tensor.contiguous() for name, tensor in zip(names, tensors, strict=True)}, folder / PREFIX_FILE)
    return Prefix(
        file=PREFIX_FILE,
        length=prefix.length,
        method=prefix.method,
        positions=prefix.positions,
        source_sha256=prefix.sha256,
    )


def load_prefix(artifact: Artifact, graph: Graph) -> list[Tensor]:
    """Keys and values as `store_prefix` wrote them into an artifact that has a prefix. Raises IntegrityError."""
    assert artifact.contract.prefix, "the caller has looked"
    held = load(artifact.contents.read(artifact.contract.prefix.file))
    return [held[name] for layer in graph.cache for name in (layer.key_in, layer.value_in)]


def after_prefix(graphs: Sequence[Graph], length: int) -> list[Graph]:
    """The graphs with the capacity that a prefix of so many positions leaves."""
    return [replace(graph, capacity=graph.capacity - length) for graph in graphs]


class PrefixedModel(nn.Module):
    """The eager model with a prefix before every prompt, as PEFT runs it; all else is the model's own."""

    def __init__(self, model: nn.Module, tensors: Sequence[Tensor], positions: str) -> None:
        super().__init__()
        self.model, self.argument = model, cache_argument(model)
        self.tensors, self.counts_from_zero = tensors, positions == "from-zero"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, input_ids: Tensor, **arguments: Any) -> Any:
        """As the model's own; without a cache a row begins after the prefix."""
        cache = find_cache(arguments)
        if cache is None:
            cache = self._begin_cache()
        given = {**arguments, self.argument: cache, "input_ids": input_ids, "use_cache": True}
        if self.counts_from_zero:
            first = cache.get_seq_length() - self.tensors[0].shape[1]
            given["position_ids"] = torch.arange(first, first + input_ids.shape[1])[None]
        return self.model(**given)

    def _begin_cache(self) -> DynamicCache:
        cache = DynamicCache()
        for layer, pair in enumerate(zip(self.tensors[0::2], self.tensors[1::2], strict=True)):
            cache.update(*(tensor[None] for tensor in pair), layer)
        return cache
