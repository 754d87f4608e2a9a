"""Which layers may have fewer bits: the cheapest mixture of two schemes whose loss stays within a budget.

Each family of layers (those of one parent: a block's attention, its feed-forward part) is rounded to the coarse scheme
by itself, and the KL divergence that this costs on calibration text is measured. Families that cost least are taken
first, since small losses add up nearly linearly; what was taken is then measured together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .methods import Method, Scheme
from .recipe import Layer

__all__ = ["families", "mixture"]

TOKENS = 512
"""How much calibration text each family is measured on."""
Family = list[Layer]


def mixture(
    model: nn.Module,
    layers: Sequence[Layer],
    coarse: Scheme,
    method: Method,
    rows: Sequence[Tensor],
    budget: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Scheme]:
    """The layers that take `coarse` at a joint KL divergence of at most `budget` nats per token; `model` is unchanged.

    `rows` are calibration token ids [S]. Embeddings, on the way in or out, are never among them.
    """
    meter, groups = _Meter(model, rows), families(layer for layer in layers if not layer.is_vocabulary)
    costs = []
    for family in groups:
        with _rounded(family, coarse, method):
            costs.append(meter.divergence())
        progress(len(costs), len(groups))
    order = sorted(range(len(groups)), key=lambda index: costs[index])
    count = _affordable([costs[index] for index in order], budget)
    while count:
        chosen = [layer for index in order[:count] for layer in groups[index]]
        with _rounded(chosen, coarse, method):
            if meter.divergence() <= budget:
                return {layer.name: coarse for layer in chosen}
        # Together they cost more than one by one: do with fewer, in steps that soon come to an end.
        count = min(count - 1, int(0.9 * count))
    return {}


def families(layers: Iterable[Layer]) -> list[Family]:
    """Layers by the module that holds them; those that read one input stay together and can be packed into one."""
    found: dict[str, Family] = {}
    for layer in layers:
        found.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    return list(found.values())


def _affordable(costs: Sequence[float], budget: float) -> int:
    """How many of the ascending costs add up to at most the budget."""
    spent = torch.tensor(costs).cumsum(0)
    return int((spent <= budget).sum())


@contextmanager
def _rounded(family: Iterable[Layer], scheme: Scheme, method: Method) -> Iterator[None]:
    """Within this block the layers' weights are those of `scheme`."""
    kept = []
    with torch.no_grad():
        for layer in family:
            kept.append((layer.weight, layer.weight.clone()))
            layer.weight.copy_(method.quantize(layer.weight, scheme, None).dequantize())
        try:
            yield
        finally:
            for weight, before in kept:
                weight.copy_(before)


class _Meter:
    """The mean KL divergence of a model's predictions from those that it made at the beginning."""

    def __init__(self, model: nn.Module, rows: Sequence[Tensor]) -> None:
        self._model, self._row = model, torch.cat(list(rows))[:TOKENS]
        self._before = self._predict()

    def divergence(self) -> float:
        """In nats per token."""
        after = self._predict()
        return float((self._before.exp() * (self._before - after)).sum(-1).mean().clamp(min=0))

    @torch.no_grad()
    def _predict(self) -> Tensor:
        result: Tensor = self._model(input_ids=self._row[None], use_cache=False).logits[0].float().log_softmax(-1)
        return result
