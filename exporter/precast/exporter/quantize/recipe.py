"""Recipes: which layers of a model are quantized, and by which scheme and method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from precast.runtime.errors import UsageError

from .methods import WHOLE_ROW, Scheme

__all__ = ["Layer", "Recipe", "find_layers"]


@dataclass(frozen=True)
class Layer:
    """A linear layer or an embedding that can be quantized, or both where they share a table.

    Attributes:
        name: of the module.
        weight: [N, K], one row per output or per token.
        linear: the name of the linear layer that uses it, or None.
        table: the name of the embedding that uses it, or None.
        is_vocabulary: one row per token, on the way in or out.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    linear: str | None
    table: str | None
    is_vocabulary: bool

    def fit_scheme(self, scheme: Scheme) -> Scheme:
        """The scheme as this layer can hold it: whole rows as groups of their length, offsets where there is room."""
        fitting = scheme if scheme.group != WHOLE_ROW else replace(scheme, group=self.weight.shape[1])
        if fitting.zero_point == "float" and not self.can_hold_offsets(fitting.group):
            return replace(fitting, zero_point="integer")
        return fitting

    def can_hold_offsets(self, group: int) -> bool:
        """Offset columns need K divisible by the group size and no embedding table."""
        return self.table is None and self.weight.shape[1] % group == 0


@dataclass(frozen=True)
class Recipe:
    """`scheme` for all layers but those of `exceptions` (by name) and `skipped` (patterns; left as they are).

    With `keeps_source`, a layer whose weights were quantized already, in groups of `scheme.group`, keeps its codes.
    """

    scheme: Scheme
    method: str = "rtn"
    exceptions: Mapping[str, Scheme] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    keeps_source: bool = False

    def scheme_for(self, name: str) -> Scheme:
        return self.exceptions.get(name, self.scheme)


def find_layers(model: nn.Module, skipped: tuple[str, ...]) -> Iterator[Layer]:
    """The linear layers and the embedding of `model` in its own order, without those whose name matches a pattern of
    `skipped`.

    An embedding that shares its table with the output embedding goes with it; one that does more than look up rows is
    left as it is. Raises UsageError for a pattern that matches nothing.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    kinds = (nn.Linear, Conv1D)
    found: dict[str, Any] = {name: module for name, module in modules.items()
             if isinstance(module, kinds) or (module is embedding and type(module) is nn.Embedding)}  # fmt: skip
    _check_patterns(skipped, found)
    is_tied = head is not None and type(embedding) is nn.Embedding and embedding.weight is head.weight
    table = next((name for name, module in found.items() if module is embedding), None)
    for name, module in found.items():
        if any(fnmatchcase(name, pattern) for pattern in skipped) or (name == table and is_tied):
            continue
        if name == table:
            yield Layer(name, module.weight.detach(), None, None, name, True)
            continue
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        shared = table if module is head and is_tied else None
        yield Layer(name, weight.detach(), module.bias, name, shared, module is head)


def _check_patterns(patterns: tuple[str, ...], linear: Mapping[str, nn.Module]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linear):
            some = ", ".join(list(linear)[:3])
            raise UsageError(f"skip={pattern!r} matches no layer. Layers are called {some}, …, {list(linear)[-1]}.")
