"""Mixed precision: quantize as many layers as a budget of KL divergence allows to the scheme of fewer bits.

Each family of layers (those of one parent: a block's attention, its feed-forward part) is quantized to the coarse
scheme by itself, and the KL divergence that this costs on calibration text is measured. Families that cost least are
taken first, since small costs add up nearly linearly; the chosen ones are then measured together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .activations import Call, replay
from .methods import Method, Scheme
from .recipe import Layer

__all__ = ["DivergenceMeter", "choose_mixture", "count_affordable", "group_families"]

TOKENS = 512
"""Calibration tokens that each family is measured on."""
Family = list[Layer]


def choose_mixture(
    model: nn.Module,
    layers: Sequence[Layer],
    coarse: Scheme,
    method: Method,
    rows: Sequence[Tensor],
    budget: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Scheme]:
    """Choose layers for `coarse`, at a joint KL divergence of at most `budget` nats per token; `model` is unchanged.

    `rows` are calibration token ids [S]. Input and output embeddings are never among the layers.
    """
    families = group_families(layer for layer in layers if not layer.is_vocabulary)
    meter = DivergenceMeter(model, [{"input_ids": row[None], "use_cache": False} for row in rows])
    costs = []
    for family in families:
        with _quantized_weights(family, coarse, method):
            costs.append(meter.divergence())
        progress(len(costs), len(families))
    order = sorted(range(len(families)), key=lambda index: costs[index])
    count = count_affordable([costs[index] for index in order], budget)
    while count:
        chosen = [layer for index in order[:count] for layer in families[index]]
        with _quantized_weights(chosen, coarse, method):
            if meter.divergence() <= budget:
                return {layer.name: coarse for layer in chosen}
        # Together they cost more than one by one: take a tenth fewer each time, so that the search ends soon.
        count = min(count - 1, int(0.9 * count))
    return {}


def group_families(layers: Iterable[Layer]) -> list[Family]:
    """Group layers by the module that holds them: those that read one input stay together and can be packed into
    one."""
    found: dict[str, Family] = {}
    for layer in layers:
        found.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    return list(found.values())


def count_affordable(costs: Sequence[float], budget: float) -> int:
    """Count the first of the ascending costs that add up to at most the budget."""
    spent = torch.tensor(costs).cumsum(0)
    return int((spent <= budget).sum())


@contextmanager
def _quantized_weights(family: Iterable[Layer], scheme: Scheme, method: Method) -> Iterator[None]:
    """Quantize the layers' weights to `scheme` within this block, and restore them after it."""
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


class DivergenceMeter:
    """Measures the mean KL divergence of a model's predictions from those at the time this was made, on the first calls
    of TOKENS tokens."""

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        self._model, self._calls, tokens = model, list[Call](), 0
        for call in calls:
            if tokens < TOKENS:
                self._calls.append(call)
                tokens += next(call[name] for name in _PREDICTED if name in call).numel()
        self._before = self._predict()

    def divergence(self) -> float:
        """In nats per token."""
        after = self._predict()
        return float((self._before.exp() * (self._before - after)).sum(-1).mean().clamp(min=0))

    def _predict(self) -> Tensor:
        """[tokens, vocabulary]."""
        rows = [replay(self._model, call).logits[0] for call in self._calls]
        return torch.cat(rows).float().log_softmax(-1)


_PREDICTED = ("decoder_input_ids", "input_ids")
"""The arguments that hold the tokens of which a model predicts the next."""
