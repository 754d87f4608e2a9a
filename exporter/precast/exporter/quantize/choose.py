"""What the user asked for -> a recipe for this model, and the model quantized by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from precast.runtime.artifact.backends import get_backend
from precast.runtime.errors import CheckpointError, UsageError

from ..checkpoint.resolve import Checkpoint
from ..kinds.samples import token_ids
from ..options import GROUP_SIZES, ExportOptions
from ..validation.metrics import floor_for
from . import quantize
from .methods import METHODS, WHOLE_ROW, Scheme, Zero, get_method
from .mixture import mixture
from .recipe import Recipe, find_layers

__all__ = ["calibration_rows", "quantize_model"]

GROUP = 32
"""Weights that share a scale, unless something else is asked for."""
ROW = 512
"""Tokens per row of calibration text."""
DEFAULT_METHODS = {"source": "rtn", "int8": "rtn", "int4": "search", "auto": "search"}
FOUR_BITS_SHARE = 0.4
"""Of the allowed loss, what `auto` spends on 4-bit weights. The rest is for what calibration in fp32 does not see: the
rounding of activations to int8, which alone cost half of the default 0.01 on SmolLM2."""


def quantize_model(
    model: nn.Module,
    checkpoint: Checkpoint,
    options: ExportOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Quantize `model` in place as `options` say; returns in words what was done.

    Raises UsageError for patterns and methods that do not exist, CheckpointError where `source` has no grid to keep.
    """
    method = options.quantize_method or _method(options)
    needs_text = get_method(method).is_calibrated or options.quantize == "auto"
    rows = calibration_rows(checkpoint, options) if needs_text else []
    recipe = _recipe(model, checkpoint, options, method, rows, progress)
    done = quantize(model, recipe, rows, progress)
    if recipe.keeps_source and not any(words.startswith("the source's") for words in done.values()):
        raise CheckpointError(
            f"--quantize source keeps the grid that weights lie on already, and those of {checkpoint.name} lie on none "
            f"of 4 or 8 bits in groups of {recipe.scheme.group}. Use --quantize int8 or int4 to round them, or "
            f"--group-size if the checkpoint was quantized in groups of another size."
        )
    return _in_words([*_experts(model), *_counted(done)], recipe)


def _recipe(
    model: nn.Module,
    checkpoint: Checkpoint,
    options: ExportOptions,
    method: str,
    rows: list[Tensor],
    progress: Callable[[int, int], None],
) -> Recipe:
    if options.quantize == "source":
        return Recipe(Scheme(8, _source_group(checkpoint, options), "whole"), method, {}, options.skip, True)
    if options.quantize == "int8":
        is_symmetric = _group(options) != WHOLE_ROW if options.symmetric is None else options.symmetric
        zero: Zero = "middle" if is_symmetric else "whole"
        return Recipe(Scheme(8, _group(options), zero), method, {}, options.skip)
    four = Scheme(4, options.group_size or GROUP, "middle" if options.symmetric else "free")
    if options.quantize == "auto":
        layers = list(find_layers(model, options.skip))
        budget = FOUR_BITS_SHARE * (floor_for(options).max_kl or 0.0)
        chosen = mixture(model, layers, four, METHODS["search"], rows, budget, progress)
        return Recipe(Scheme(8, options.group_size or GROUP, "middle"), method, chosen, options.skip)
    return Recipe(four, method, _head_in_int8(model, options), options.skip)


def _method(options: ExportOptions) -> str:
    """A scale for a whole row leaves more to choose (SmolLM2: KL 0.0044 by rtn and symmetric, 0.0023 so)."""
    is_by_row = options.quantize == "int8" and _group(options) == WHOLE_ROW
    return "awq" if is_by_row else DEFAULT_METHODS[options.quantize]


def _group(options: ExportOptions) -> int:
    """Of int8: as asked, or as the backend is fastest with; 8 bits are fine enough for either."""
    return options.group_size or (WHOLE_ROW if get_backend(options.backend).scales_rows else GROUP)


def _head_in_int8(model: nn.Module, options: ExportOptions) -> Mapping[str, Scheme]:
    """The output embedding decides between tokens, and as the input embedding it feeds every layer: 4 bits there cost
    more than in all other layers together (measured on SmolLM2: KL 0.09 against 0.002)."""
    scheme = Scheme(8, options.group_size or GROUP, "middle")
    return {layer.name: scheme for layer in find_layers(model, ()) if layer.is_vocabulary}


def _source_group(checkpoint: Checkpoint, options: ExportOptions) -> int:
    grid = checkpoint.grid
    return options.group_size or GROUP if grid is None or grid.group_size not in GROUP_SIZES else grid.group_size


def _experts(model: nn.Module) -> list[str]:
    """Experts in one tensor of three dimensions are no layers that could be replaced: that must not go unsaid."""
    left = sum(
        parameter.numel()
        for module in model.modules()
        if not isinstance(module, nn.Conv1d)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 3
    )
    return [f"experts stay float32 ({left:,} weights)"] if left else []


def _counted(done: Mapping[str, str]) -> list[str]:
    return [f"{words} ({count} layers)" for words, count in Counter(done.values()).most_common()]


def _in_words(parts: list[str], recipe: Recipe) -> str:
    return f"{'; '.join(parts)}; by {recipe.method}"[:256]


def calibration_rows(checkpoint: Checkpoint, options: ExportOptions) -> list[Tensor]:
    """The calibration text in rows of ROW token ids; without a tokenizer, random ids, always the same."""
    tokenizer: Any = checkpoint.tokenizer
    length = min(ROW, getattr(checkpoint.text_config, "max_position_embeddings", None) or ROW)
    if tokenizer is None:
        numbers = torch.Generator().manual_seed(0)
        return list(torch.randint(checkpoint.text_config.vocab_size, (4, length), generator=numbers))
    built_in = resources.files(__package__).joinpath("calibration.txt")
    try:
        text = (options.calibration or built_in).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--calibration {options.calibration} is not text in UTF-8: {error}.") from error
    ids = torch.tensor(token_ids(tokenizer, text), dtype=torch.int64)
    rows = [row for row in ids.split(length) if len(row) > 1]
    if not rows:
        raise UsageError(f"--calibration {options.calibration} holds {len(ids)} tokens; it takes 2 at least.")
    return rows
