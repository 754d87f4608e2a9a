"""What is done to which layer: the part of quantization that a user chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from precast.runtime.errors import UsageError

from .methods import Scheme

__all__ = ["Layer", "Recipe", "find_layers"]


@dataclass(frozen=True)
class Layer:
    """A layer that can be quantized: its module's name, its weight [N, K], and the names of modules that share it."""

    name: str
    weight: Tensor
    bias: Tensor | None
    is_head: bool
    table: str | None


@dataclass(frozen=True)
class Recipe:
    """`scheme` for all layers but those of `exceptions` (by name) and `skipped` (patterns; left as they are).

    With `keeps_source`, a layer whose weights lie on a grid already, in groups of `scheme.group`, keeps that grid.
    """

    scheme: Scheme
    method: str = "rtn"
    exceptions: Mapping[str, Scheme] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    keeps_source: bool = False

    def scheme_for(self, name: str) -> Scheme:
        return self.exceptions.get(name, self.scheme)


def find_layers(model: nn.Module, skipped: tuple[str, ...]) -> Iterator[Layer]:
    """The linear layers of `model` in its own order, without those whose name matches a pattern of `skipped`.

    An embedding that shares its table with the output embedding goes with it. Raises UsageError for a pattern that
    matches nothing.
    """
    modules = dict(model.named_modules())
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    _check_patterns(skipped, linear)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    for name, module in linear.items():
        if any(fnmatchcase(name, pattern) for pattern in skipped):
            continue
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        is_tied = module is head and type(table) is nn.Embedding and table.weight is module.weight
        shared = next(other for other, found in modules.items() if found is table) if is_tied else None
        yield Layer(name, weight.detach(), module.bias, module is head, shared)


def _check_patterns(patterns: tuple[str, ...], linear: Mapping[str, nn.Module]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linear):
            some = ", ".join(list(linear)[:3])
            raise UsageError(f"--skip {pattern!r} matches no layer. Layers are called {some}, …, {list(linear)[-1]}.")
