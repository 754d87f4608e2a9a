"""Calibration samples, and how the loss by rounding activations is measured on them, by kind of model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from precast.runtime.errors import UsageError

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.sentence_transformers import output_names
from ..kinds.plan import Plan
from ..kinds.samples import make_calibration_inputs, token_ids
from ..options import ExportOptions
from ..validation.metrics import encoder_floor_for, floor_for
from .activations import Call, replay
from .int8 import Meter, quantize_activations
from .mixture import DivergenceMeter
from .outliers import quantize_around_outliers
from .recipe import find_layers

__all__ = [
    "activation_samples",
    "calibration_inputs",
    "calibration_rows",
    "longest_row",
    "round_activations",
    "takes_texts",
]

ROW = 512
"""Tokens per row of calibration text."""
FEWEST = 2
FEWEST_FOR_RANGES = 256
"""Tokens from which a range of activations can be told."""
SHARE = 0.7
"""The share of what may be lost that rounding activations takes: held-out text differs from that of calibration, and
the rest of the weights is rounded, too."""


def round_activations(
    model: nn.Module,
    checkpoint: Checkpoint,
    plan: Plan,
    options: ExportOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Quantize weights and activations of `model` in place where that loses little; returns descriptions by layer.

    Raises UsageError for a text that is too short to tell ranges from.
    """
    layers = [layer for layer in find_layers(model, options.skip) if layer.linear and not layer.is_vocabulary]
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    uncached = {"use_cache": False} if takes_cache else {}
    calls = [{**inputs, **uncached} for inputs in activation_samples(checkpoint, plan, options)]
    if options.quantization.keeps_outliers:
        return quantize_around_outliers(model, layers, calls, progress)
    meter, allowed = _make_meter(model, plan, calls, options)
    return quantize_activations(
        model, layers, calls, meter, SHARE * allowed, str(options.smooth), progress,
        is_static=options.quantize == "a8w8",
    )  # fmt: skip


def activation_samples(checkpoint: Checkpoint, plan: Plan, options: ExportOptions) -> list[dict[str, Tensor]]:
    """The inputs that ranges of activations are told from, by the names of the model's arguments."""
    return calibration_inputs(plan, _calibration_texts(checkpoint, plan, options))


def _make_meter(model: nn.Module, plan: Plan, calls: Sequence[Call], options: ExportOptions) -> tuple[Meter, float]:
    """What the validation of such a model measures, and how much of it may be."""
    if plan.task.kind != "encoder":
        return DivergenceMeter(model, calls), floor_for(options).max_kl or torch.inf
    return CosineMeter(model, calls, output_names(model, plan.task.outputs)), 1 - (
        encoder_floor_for(options).min_cosine or -1
    )


class CosineMeter:
    """Measures by how much less than 1 the mean cosine of an encoder's answers is with those at the time this was made,
    in the output where it is least."""

    def __init__(self, model: nn.Module, calls: Sequence[Call], outputs: Sequence[str]) -> None:
        self._model, self._calls, self._outputs = model, calls, outputs
        self._before = self._answer()

    def divergence(self) -> float:
        after = self._answer()
        return max(1 - _mean_cosine(self._before[name], after[name]) for name in self._outputs)

    def _answer(self) -> dict[str, list[Tensor]]:
        answers: list[Any] = [replay(self._model, call) for call in self._calls]
        return {name: [answer[name].double().flatten() for answer in answers] for name in self._outputs}


def _mean_cosine(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    pairs = zip(expected, found, strict=True)
    return float(torch.stack([torch.cosine_similarity(one, other, dim=0) for one, other in pairs]).mean())


def calibration_inputs(plan: Plan, texts: list[list[int]]) -> list[dict[str, Tensor]]:
    """Inputs of a model, by its arguments' names, with these texts or with what stands for pictures and sound."""
    found = make_calibration_inputs(plan.task, plan.outline(), texts)
    return [{name: torch.from_numpy(array) for name, array in inputs.items()} for inputs in found]


def takes_texts(plan: Plan) -> bool:
    """Whether calibration texts are given to the model: what hears and writes is given them as answers."""
    return plan.reads_text or plan.task.kind != "encoder"


def longest_row(plan: Plan) -> int:
    """The tokens that a row of calibration has at most: what the graphs take."""
    return min(ROW, max(plan.lengths, default=ROW) or ROW)


def calibration_rows(checkpoint: Checkpoint, options: ExportOptions, longest: int = ROW) -> list[Tensor]:
    """The calibration text in rows of ROW token ids, or of `longest`; without a tokenizer, random ids, always the same.

    Raises UsageError for a file that is no UTF-8 text, or of fewer tokens than it takes.
    """
    tokenizer: Any = checkpoint.tokenizer
    length = min(ROW, longest, getattr(checkpoint.text_config, "max_position_embeddings", None) or ROW)
    if tokenizer is None:
        numbers = torch.Generator().manual_seed(0)
        return list(torch.randint(checkpoint.vocabulary, (4, length), generator=numbers))
    ids = torch.tensor(token_ids(tokenizer, _calibration_text(options)), dtype=torch.int64)
    _check_tokens(len(ids), options)
    return [row for row in ids.split(length) if len(row) > 1]


def _calibration_texts(checkpoint: Checkpoint, plan: Plan, options: ExportOptions) -> list[list[int]]:
    """Token ids: rows of the text for a decoder; else its paragraphs, each with the special tokens around it that texts
    have, on which encoders put much of their weight; none for models of pictures or sound alone."""
    if not takes_texts(plan):
        return []
    tokenizer: Any = checkpoint.tokenizer
    if plan.task.kind == "decoder" or tokenizer is None:
        return [row.tolist() for row in calibration_rows(checkpoint, options, longest_row(plan))]
    lines = _calibration_text(options).splitlines()
    found = [token_ids(tokenizer, line)[: longest_row(plan)] for line in lines if line.strip()]
    _check_tokens(sum(map(len, found)), options)
    return found


def _calibration_text(options: ExportOptions) -> str:
    built_in = resources.files(__package__).joinpath("calibration.txt")
    try:
        return (options.calibration or built_in).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"calibration={options.calibration} is not text in UTF-8: {error}.") from error


def _check_tokens(count: int, options: ExportOptions) -> None:
    fewest = FEWEST_FOR_RANGES if options.quantize == "a8w8" else FEWEST
    if count < fewest:
        dynamic = f"; quantize='a8w8-dynamic' takes {FEWEST}" if options.quantize == "a8w8" else ""
        raise UsageError(
            f"calibration={options.calibration} holds {count} tokens; it takes {fewest} at least{dynamic}."
        )
