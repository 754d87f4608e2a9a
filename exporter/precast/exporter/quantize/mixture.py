"""Mixed precision: quantize every family of layers in as few bits as a budget of KL divergence allows.

Each family of layers (those of one parent: a block's attention, its feed-forward part) is quantized by itself, and the
KL divergence that this costs on calibration text is measured once, in the coarsest scheme. What another scheme would
cost follows from the squared errors of the weights: divergence grows in proportion to them. From the most exact scheme
everywhere, the step to a smaller one that costs least per bit saved is taken again and again while the sum stays within
the budget, since small costs add up nearly linearly; the choice is then measured as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .activations import Call, replay
from .calibration import Calibration
from .methods import Method, Scheme, round_to_nearest
from .recipe import Layer
from .scheme import CHUNK

__all__ = ["DivergenceMeter", "choose_mixture", "count_affordable", "group_families"]

TOKENS = 512
"""Tokens, if there are as many, on which a divergence is measured."""
SAMPLE_ROWS = 256
"""Rows of a weight that schemes are compared on."""
CALIBRATED_CHUNK = 2**20
"""Weights that a calibrated method is given at a time: it goes over them column by column, for all rows at once."""
SCALE_BITS = 32
_NO_TEXT: Mapping[str, Tensor] = {}
Family = list[Layer]


@dataclass(frozen=True)
class _Choice:
    """A scheme for a family, the bits that it takes, and the KL divergence that it is expected to cost: as `measured`
    without activations, and by the method that is going to round."""

    scheme: Scheme
    bits: float
    measured: float
    cost: float


Ladder = list[_Choice]


def choose_mixture(
    model: nn.Module,
    layers: Sequence[Layer],
    schemes: Sequence[Scheme],
    method: Method,
    rows: Sequence[Tensor],
    budget: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
    rounding: Method | None = None,
) -> dict[str, Scheme]:
    """Choose one of `schemes` for each layer, at a joint KL divergence of at most `budget` nats per token beyond that
    of the first, which is the most exact; `model` is unchanged.

    `rows` are calibration token ids [S]. `method` measures without activations; what `rounding` loses less, if it has
    activations, is measured for the output layer and for one family of a block, with the first row, from the others.
    """
    families = group_families(layers)
    calls = [{"input_ids": row[None], "use_cache": False} for row in rows]
    meter, ladders = DivergenceMeter(model, calls[:1]), []
    for family in families:
        ladders.append(_find_choices(family, schemes, method, meter))
        progress(len(ladders), len(families))
    if rounding and rounding.is_calibrated and len(rows) > 1:
        text = Calibration(model, [{"input_ids": row[None]} for row in rows[1:]], {})
        ladders = _count_gains(families, ladders, schemes[-1], rounding, text, meter)
    limit = budget
    while limit > SMALLEST_SHARE * budget:
        chosen = _spend(ladders, limit)
        found = {layer.name: choice.scheme for family, choice in zip(families, chosen, strict=True) for layer in family}
        coarser = [layer for layer in layers if found[layer.name] != schemes[0]]
        with _quantized_weights(coarser, found, method):
            divergence = meter.divergence()
        measured = sum(choice.measured for choice in chosen)
        # Together they may cost more than one by one, by whichever method.
        expected = divergence * sum(choice.cost for choice in chosen) / measured if measured else divergence
        if expected <= budget:
            return found
        # Spend less, by so much that the search ends soon.
        limit *= min(0.9, budget / expected)
    return {layer.name: schemes[0] for layer in layers}


SMALLEST_SHARE = 1e-3
"""Below this share of the budget nothing is spent at all."""


def group_families(layers: Iterable[Layer]) -> list[Family]:
    """Group layers by the module that holds them: those that read one input stay together and can be packed into
    one. Input and output embeddings are families of their own."""
    found: dict[str, Family] = {}
    for layer in layers:
        found.setdefault(layer.name if layer.is_vocabulary else layer.name.rpartition(".")[0], []).append(layer)
    return list(found.values())


def count_affordable(costs: Sequence[float], budget: float) -> int:
    """Count the first of the ascending costs that add up to at most the budget."""
    spent = torch.tensor(costs).cumsum(0)
    return int((spent <= budget).sum())


def _find_choices(family: Family, schemes: Sequence[Scheme], method: Method, meter: DivergenceMeter) -> Ladder:
    """The schemes in this order; the last one's cost is measured, the others' follow from their errors."""
    probe = schemes[-1]
    with _quantized_weights(family, {layer.name: probe for layer in family}, method):
        measured = meter.divergence()
    errors = [sum(_squared_error(layer, scheme) for layer in family) for scheme in schemes]
    sizes = [sum(_count_bits(layer, scheme) for layer in family) for scheme in schemes]
    costs = [error * measured / errors[-1] if errors[-1] else 0.0 for error in errors]
    return [_Choice(*each, each[-1]) for each in zip(schemes, sizes, costs, strict=True)]


def _count_gains(
    families: Sequence[Family],
    ladders: Sequence[Ladder],
    probe: Scheme,
    rounding: Method,
    text: Calibration,
    meter: DivergenceMeter,
) -> list[Ladder]:
    """The same with what each is going to cost by `rounding`. Tables cost as before, since rows are only looked up."""
    kinds = [_kind(family) for family in families]
    shares = {"table": 1.0}
    for kind in set(kinds) - {"table"}:
        places = [index for index, each in enumerate(kinds) if each == kind]
        middle = places[len(places) // 2]
        hessians = text.collect_hessians([layer.name for layer in families[middle]])
        with _quantized_weights(
            families[middle], {layer.name: probe for layer in families[middle]}, rounding, hessians
        ):
            found, plain = meter.divergence(), ladders[middle][-1].measured
        shares[kind] = min(1.0, max(LEAST_SHARE, found / plain)) if plain else 1.0
    return [
        [replace(choice, cost=choice.measured * shares[kind]) for choice in ladder]
        for kind, ladder in zip(kinds, ladders, strict=True)
    ]


def _kind(family: Family) -> str:
    if any(layer.tables for layer in family):
        return "table"
    return "head" if family[0].is_vocabulary else "block"


LEAST_SHARE = 0.1
"""Of what a method costs that does without activations: less is not believed of one family."""


def _squared_error(layer: Layer, scheme: Scheme) -> float:
    sample = layer.weight[:: -(-len(layer.weight) // SAMPLE_ROWS)].float()
    error = (round_to_nearest(sample, layer.fit_scheme(scheme)).dequantize() - sample).square().mean()
    return float(error) * layer.weight.numel()


def _count_bits(layer: Layer, scheme: Scheme) -> float:
    """Of codes, padding included, scales and zero points; offsets are further columns."""
    scheme, (rows, columns) = layer.fit_scheme(scheme), layer.weight.shape
    groups = -(-columns // scheme.group)
    groups += -(-groups // scheme.group) if scheme.zero_point == "float" else 0
    zeros = 0 if scheme.zero_point == "symmetric" else scheme.bits
    return float(rows * groups * (scheme.group * scheme.bits + SCALE_BITS + zeros))


def _spend(ladders: Sequence[Ladder], limit: float) -> list[_Choice]:
    """From each ladder's first choice, take the step that costs least per bit saved while the sum is within the limit.

    A step may leave out choices between.
    """
    chosen = [ladder[0] for ladder in ladders]
    spent = 0.0
    while True:
        steps = [
            ((choice.cost - now.cost) / (now.bits - choice.bits), index, choice)
            for index, (now, ladder) in enumerate(zip(chosen, ladders, strict=True))
            for choice in ladder
            if choice.bits < now.bits and spent + choice.cost - now.cost <= limit
        ]
        if not steps:
            return chosen
        _, index, choice = min(steps, key=lambda step: step[:2])
        spent += choice.cost - chosen[index].cost
        chosen[index] = choice


@contextmanager
def _quantized_weights(
    family: Iterable[Layer], schemes: Mapping[str, Scheme], method: Method, hessians: Mapping[str, Tensor] = _NO_TEXT
) -> Iterator[None]:
    """Quantize the layers' weights to their schemes within this block, and restore them after it."""
    kept = []
    with torch.no_grad():
        for layer in family:
            kept.append((layer.weight, layer.weight.clone()))
            scheme = layer.fit_scheme(schemes[layer.name])
            most = CALIBRATED_CHUNK if method.is_calibrated else CHUNK
            for rows in layer.weight.split(max(1, most // layer.weight.shape[1])):
                rows.copy_(method.quantize(rows, scheme, hessians.get(layer.name)).dequantize())
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
