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
        tables: the names of the embeddings that use it.
        is_vocabulary: one row per token, on the way in or out.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    linear: str | None
    tables: tuple[str, ...]
    is_vocabulary: bool

    def fit_scheme(self, scheme: Scheme) -> Scheme:
        """The scheme as this layer can hold it: whole rows as groups of their length, offsets where there is room."""
        fitting = scheme if scheme.group != WHOLE_ROW else replace(scheme, group=self.weight.shape[1])
        if fitting.zero_point == "float" and not self.can_hold_offsets(fitting.group):
            return replace(fitting, zero_point="integer")
        return fitting

    def can_hold_offsets(self, group: int) -> bool:
        """Offset columns need K divisible by the group size and no embedding table."""
        return not self.tables and self.weight.shape[1] % group == 0


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


FEWEST_ROWS = 8
"""Layers of fewer outputs, such as a classifier of two labels, stay as they are: they weigh nothing, and everything
depends on them."""


def find_layers(model: nn.Module, skipped: tuple[str, ...]) -> Iterator[Layer]:
    """The linear layers and the token embedding of `model` in its own order, without those whose name matches a pattern
    of `skipped`.

    Embeddings that share the table go together, with the output embedding if that shares it, too; one that does more
    than look up rows is left as it is. Raises UsageError for a pattern that matches nothing.
    """
    linear: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    head, embedding = _embedding(model, "get_output_embeddings"), _embedding(model, "get_input_embeddings")
    groups = _group_tables(model, embedding)
    tied = next((names for table, names in groups if head is not None and table is head.weight), ())
    _check_patterns(skipped, [*(names[0] for _, names in groups), *linear])
    for table, names in groups:
        if names != tied and not _matches(names[0], skipped):
            yield Layer(names[0], table.detach(), None, None, names, True)
    for name, module in linear.items():
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        if len(weight) >= FEWEST_ROWS and not _matches(name, skipped):
            yield Layer(name, weight.detach(), module.bias, name, tied if module is head else (), module is head)


def _embedding(model: Any, getter: str) -> Any:
    """What a getter of transformers answers; None for models without it, or of pictures and sound."""
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _group_tables(model: nn.Module, embedding: Any) -> list[tuple[Tensor, tuple[str, ...]]]:
    """The tables of tokens, which have the shape of the input embedding's, each with the names of the embeddings that
    use it: an encoder-decoder has several of one table, or of several."""
    groups: dict[int, tuple[Tensor, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is type(embedding) is nn.Embedding and module.weight.shape == embedding.weight.shape:
            groups.setdefault(id(module.weight), (module.weight, []))[1].append(name)
    return [(table, tuple(names)) for table, names in groups.values()]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(patterns: tuple[str, ...], names: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"skip={pattern!r} matches no layer. Layers are called {', '.join(names[:3])}, …, {names[-1]}."
            )
