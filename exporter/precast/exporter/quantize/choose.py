"""Quantization options -> a recipe for this model, and the model quantized by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from precast.runtime.artifact.backends import get_backend
from precast.runtime.errors import CheckpointError

from ..checkpoint.checkpoint import Checkpoint
from ..kinds.plan import Plan
from ..options import GROUP_SIZES, ExportOptions
from ..validation.metrics import floor_for
from . import quantize
from .calls import calibration_inputs, calibration_rows, longest_row, round_activations, takes_texts
from .methods import METHODS, WHOLE_ROW, Scheme, ZeroPoint, get_method
from .mixture import choose_mixture
from .recipe import Recipe, find_layers

__all__ = ["quantize_model"]

GROUP = 32
"""Weights that share a scale, unless something else is asked for."""
EXACT_GROUP = 64
"""The same for the layers that `auto` keeps in 8 bits, which larger groups cost next to nothing."""
DEFAULT_METHODS = {"source": "rtn", "int8": "rtn", "int4": "search", "auto": "gptq"}
FOUR_BITS_SHARE = 0.4
"""The share of the allowed KL divergence that `auto` spends on 4-bit weights. The rest is for the rounding of
activations to int8, which calibration in float32 does not see: it alone cost half of the default 0.01 on SmolLM2."""


def quantize_model(
    model: nn.Module,
    checkpoint: Checkpoint,
    plan: Plan,
    options: ExportOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Quantize `model` in place as `options` say; returns a description for people.

    Raises UsageError for patterns and methods that do not exist and for too short a calibration text, CheckpointError
    where `source` finds no quantization to keep.
    """
    if options.quantization.rounds_activations:
        done = round_activations(model, checkpoint, plan, options, progress)
        if options.quantization.keeps_outliers:
            # Its vocabulary stays as it is, too.
            return _describe_layers(done)[0]
        # The vocabulary, and what would lose too much by rounding activations.
        rest = _choose_recipe(model, checkpoint, options.replace(quantize="int8"), "rtn", [], progress)
        return _describe_result(_describe_layers(done | quantize(model, rest)), rest)
    method = options.quantize_method or _default_method(options)
    needs_text = get_method(method).is_calibrated or options.quantize == "auto"
    rows = calibration_rows(checkpoint, options, longest_row(plan)) if needs_text and takes_texts(plan) else []
    recipe = _choose_recipe(model, checkpoint, options, method, rows, progress)
    inputs = calibration_inputs(plan, [row.tolist() for row in rows]) if needs_text else []
    done = quantize(model, recipe, inputs, progress)
    if recipe.keeps_source and not any(words.startswith("the source's") for words in done.values()):
        raise CheckpointError(
            f"quantize='source' keeps the grid that weights lie on already, and those of {checkpoint.name} lie on none "
            f"of 4 or 8 bits in groups of {recipe.scheme.group}. Use quantize='int8' or int4 to round them, or "
            f"group_size if the checkpoint was quantized in groups of another size."
        )
    return _describe_result([*_describe_experts(model), *_describe_layers(done)], recipe)


def _choose_recipe(
    model: nn.Module,
    checkpoint: Checkpoint,
    options: ExportOptions,
    method: str,
    rows: list[Tensor],
    progress: Callable[[int, int], None],
) -> Recipe:
    if options.quantize == "source":
        return Recipe(Scheme(8, _source_group(checkpoint, options), "integer"), method, {}, options.skip, True)
    if options.quantize == "int8":
        group = _int8_group(options)
        is_symmetric = group != WHOLE_ROW if options.symmetric is None else options.symmetric
        zero_point: ZeroPoint = "symmetric" if is_symmetric else "integer"
        return Recipe(Scheme(8, group, zero_point), method, {}, options.skip)
    if options.quantize == "auto":
        layers, schemes = list(find_layers(model, options.skip)), _schemes_to_mix(options)
        budget = FOUR_BITS_SHARE * (floor_for(options).max_kl or 0.0)
        plain, rounding = METHODS["search"], get_method(method)
        chosen = choose_mixture(model, layers, schemes, plain, rows, budget, progress, rounding)
        return Recipe(schemes[0], method, chosen, options.skip)
    return Recipe(_four_bits(options), method, _vocabulary_in_int8(model, options), options.skip)


def _default_method(options: ExportOptions) -> str:
    """The method where none is asked for. With one scale per row, awq's choice of channel scales pays off (SmolLM2: KL
    0.0044 by rtn and symmetric, 0.0023 so)."""
    is_by_row = options.quantize == "int8" and _int8_group(options) == WHOLE_ROW
    return "awq" if is_by_row else DEFAULT_METHODS[options.quantize]


def _int8_group(options: ExportOptions) -> int:
    """The group size of int8: as asked, or the one that the backend is fastest with; 8 bits are exact enough in
    either."""
    return options.group_size or (WHOLE_ROW if get_backend(options.backend).scales_rows else GROUP)


def _four_bits(options: ExportOptions) -> Scheme:
    """Offsets in small groups only: as columns they fill whole groups, which in larger ones takes up to a bit per
    weight."""
    group = options.group_size or GROUP
    free: ZeroPoint = "float" if group <= GROUP else "integer"
    return Scheme(4, group, "symmetric" if options.symmetric else free)


def _schemes_to_mix(options: ExportOptions) -> list[Scheme]:
    """What `auto` chooses from, the most exact first: 8 bits, and 4 in groups of several sizes or of the one asked for,
    with offsets or without."""
    zero_point: ZeroPoint = "symmetric" if options.symmetric else "integer"
    sizes = [options.group_size] if options.group_size else [32, 64, 128]
    exact = Scheme(8, options.group_size or EXACT_GROUP, "symmetric")
    return [exact, _four_bits(options), *(Scheme(4, size, zero_point) for size in sizes)]


def _vocabulary_in_int8(model: nn.Module, options: ExportOptions) -> Mapping[str, Scheme]:
    """Schemes that keep input and output embeddings in int8: 4 bits there cost more than in all other layers together
    (measured on SmolLM2: KL 0.09 against 0.002)."""
    scheme = Scheme(8, options.group_size or GROUP, "symmetric")
    return {layer.name: scheme for layer in find_layers(model, ()) if layer.is_vocabulary}


def _source_group(checkpoint: Checkpoint, options: ExportOptions) -> int:
    scheme = checkpoint.source_scheme
    return options.group_size or GROUP if scheme is None or scheme.group_size not in GROUP_SIZES else scheme.group_size


def _describe_experts(model: nn.Module) -> list[str]:
    """Say how many weights of experts stay unquantized: in one tensor [experts, N, K] they are no layers to replace."""
    left = sum(
        parameter.numel()
        for module in model.modules()
        if not isinstance(module, nn.Conv1d | ParametrizationList)
        for parameter in module.parameters(recurse=False)
        # One of a first dimension of 1 is a table of positions or a token of pictures.
        if parameter.ndim == 3 and len(parameter) > 1
    )
    return [f"experts stay float32 ({left:,} weights)"] if left else []


def _describe_layers(done: Mapping[str, str]) -> list[str]:
    return [f"{words} ({count} layers)" for words, count in Counter(done.values()).most_common()]


def _describe_result(parts: list[str], recipe: Recipe) -> str:
    return f"{'; '.join(parts)}; by {recipe.method}"[:256]
