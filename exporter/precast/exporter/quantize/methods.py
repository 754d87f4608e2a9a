"""Methods of quantization: one function and one row of the table per method.

A method takes a weight [N, K], the scheme and, if it is calibrated, the Hessian of the layer's inputs
(`calibration.py`). `rtn` rounds over each group's range, `search` minimizes the error of the weights, `gptq` and `awq`
the error of the layer's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from precast.runtime.errors import UsageError

from .scheme import QuantizedWeight, QuantParams, apply_by_rows, encode, select_params, split_groups

__all__ = ["METHODS", "WHOLE_ROW", "Method", "Scheme", "ZeroPoint", "get_method"]

ZeroPoint = Literal["symmetric", "integer", "float"]
"""Zero points: the middle code (symmetric), any code (integer), or any number, as an integer and an offset (float)."""

WHOLE_ROW = 0
"""As a group's size: all weights of a row share one scale."""


@dataclass(frozen=True)
class Scheme:
    """A form of quantization that is asked for: `group` weights share a scale and a zero point."""

    bits: int
    group: int
    zero_point: ZeroPoint

    def __str__(self) -> str:
        names = {"symmetric": "symmetric", "integer": "asymmetric", "float": "asymmetric with offsets"}
        kind = names[self.zero_point]
        groups = "with a scale per row" if self.group == WHOLE_ROW else f"in groups of {self.group}"
        return f"int{self.bits} {groups}, {kind}"


@dataclass(frozen=True)
class Method:
    """`quantize(weight [N, K], scheme, hessian [K, K] or None)`."""

    name: str
    quantize: Callable[[Tensor, Scheme, Tensor | None], QuantizedWeight]
    is_calibrated: bool = False


def round_to_nearest(weight: Tensor, scheme: Scheme, hessian: Tensor | None = None) -> QuantizedWeight:
    """Quantize over the range from each group's smallest to its largest weight."""
    groups = split_groups(weight, scheme.group)
    return encode(groups, _fit_range(groups, scheme), scheme.bits, weight.shape[1])


def search(weight: Tensor, scheme: Scheme, hessian: Tensor | None = None) -> QuantizedWeight:
    """Try several ranges around each group's own, refit each by least squares, and keep the one of least error.

    Large weights weigh more, since they matter more: the weighting |w| + rms and the refit after rounding are those of
    llama.cpp's k-quants (`make_qkx2_quants` in ggml-quants.c).
    """
    groups = split_groups(weight, scheme.group)
    importance = groups.abs() + groups.square().mean(-1, keepdim=True).sqrt()
    return encode(groups, _search_params(groups, scheme, importance), scheme.bits, weight.shape[1])


def gptq(weight: Tensor, scheme: Scheme, hessian: Tensor | None = None) -> QuantizedWeight:
    """Round column by column, and correct the columns to come for the error (Frantar et al. 2022, GPTQ).

    `hessian` [K, K] is the mean of x xᵀ over calibration inputs. Groups with larger inputs come first, and so do
    columns within a group, since what is rounded last has nothing left to make up for it. Each group's parameters are
    searched when its turn comes, on the weights as corrected so far, for the least loss that no later column makes up
    for. A layer that no calibration token reached (an expert, say) is only searched.
    """
    if hessian is None or not hessian.any():
        return search(weight, scheme)
    groups = _order_columns(hessian.diagonal(), scheme.group)
    order = torch.cat(groups)
    correction, losses = _correction(hessian[order][:, order])
    work, parts, start = weight.float()[:, order], dict[int, QuantizedWeight](), 0
    for columns in groups:
        stop = start + len(columns)
        part, error = _round_group(work[:, start:stop], correction[start:stop, start:stop], losses[start:stop], scheme)
        work[:, stop:] -= error @ correction[start:stop, stop:]
        parts[int(columns.min()) // scheme.group] = _restore_order(part, columns)
        start = stop
    return _join_columns([parts[index] for index in range(len(parts))], scheme.bits, weight.shape[1])


def awq(weight: Tensor, scheme: Scheme, hessian: Tensor | None = None) -> QuantizedWeight:
    """Scale up the columns that matter before they are rounded, and scale down their inputs by as much (Lin et al.
    2023, AWQ: Activation-aware Weight Quantization).

    Of several channel scales, those of the least output error are taken: the trace of E `hessian` Eᵀ for weight errors
    E [N, K]. In 4 bits the groups' ranges are then searched for the least error of columns weighted by their inputs. A
    layer that no calibration token reached is rounded to nearest.
    """
    if hessian is None or not hessian.any():
        return round_to_nearest(weight, scheme)
    sample = weight[:: -(-weight.numel() // SAMPLE_SIZE)].float()
    candidates = _channel_scales(sample, hessian)
    best = min(candidates, key=lambda scales: _output_error(sample, _round_scaled(sample, scales, scheme), hessian))
    ways: list[Callable[[Tensor, Tensor, Scheme], QuantizedWeight]] = [_round_scaled]
    if scheme.bits <= SEARCHED_BITS:
        ways.append(partial(_search_scaled, inputs=hessian.diagonal()))
    way = min(ways, key=lambda each: _output_error(sample, each(sample, best, scheme), hessian))
    return way(weight, best, scheme)


METHODS = {
    each.name: each
    for each in (
        Method("rtn", round_to_nearest),
        Method("search", search),
        Method("gptq", gptq, is_calibrated=True),
        Method("awq", awq, is_calibrated=True),
    )
}


def get_method(name: str) -> Method:
    """The row of method `name`. Raises UsageError, which lists the methods."""
    if name not in METHODS:
        raise UsageError(f"There is no quantization method {name!r}. The methods are: {', '.join(METHODS)}.")
    return METHODS[name]


# ---------------------------------------------------------------- ranges


def _fit_range(groups: Tensor, scheme: Scheme, factor: float = 1.0) -> QuantParams:
    """Parameters that cover `factor` of each group's range."""
    top = 2**scheme.bits - 1
    if scheme.zero_point == "symmetric":
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        scales = largest * factor / -(2 ** (scheme.bits - 1))
        return QuantParams(scales, torch.full_like(scales, 2 ** (scheme.bits - 1)), None)
    low, high = groups.amin(-1) * factor, groups.amax(-1) * factor
    if scheme.zero_point == "integer":
        low, high = low.clamp(max=0), high.clamp(min=0)
    scales = (high - low) / top
    zeros = (-low / torch.where(scales == 0, 1.0, scales)).round().clamp(0, top)
    return QuantParams(scales, zeros, low + scales * zeros if scheme.zero_point == "float" else None)


FACTORS = tuple(0.7 + 0.05 * step for step in range(8))
"""Shares of a group's range that `search` tries."""


def _search_params(groups: Tensor, scheme: Scheme, importance: Tensor) -> QuantParams:
    best, least = _fit_range(groups, scheme), torch.full(groups.shape[:-1], torch.inf)
    for factor in FACTORS:
        found = _refit(groups, importance, _fit_range(groups, scheme, factor), scheme)
        error = _weighted_error(groups, importance, found, scheme)
        best, least = select_params(error < least, found, best), torch.minimum(error, least)
    return best


def _refit(groups: Tensor, importance: Tensor, params: QuantParams, scheme: Scheme) -> QuantParams:
    """Fit scales (and offsets) to the codes that `params` give: weighted least squares of the weights on the steps."""
    scales, zeros, offsets = params
    steps = encode(groups, params, scheme.bits, 0).codes.float() - zeros[..., None]
    xs, ss = (importance * groups * steps).sum(-1), (importance * steps.square()).sum(-1)
    if offsets is None:
        return QuantParams(torch.where(ss > 0, xs / ss, scales), zeros, None)
    total, s, x = importance.sum(-1), (importance * steps).sum(-1), (importance * groups).sum(-1)
    determinant = total * ss - s.square()
    is_solvable = determinant > 1e-6 * total * ss
    slope = torch.where(is_solvable, (total * xs - s * x) / determinant, scales)
    return QuantParams(slope, zeros, torch.where(is_solvable, (x - slope * s) / total, offsets))


def _weighted_error(groups: Tensor, importance: Tensor, params: QuantParams, scheme: Scheme) -> Tensor:
    found = encode(groups, params, scheme.bits, groups.shape[1] * groups.shape[2]).dequantize()
    return (importance * (groups - found.view_as(groups)).square()).sum(-1)


# ---------------------------------------------------------------- gptq

DAMPING = 0.001
"""Added to the Hessian's diagonal, as a share of its mean, so that it can be inverted: a tenth of GPTQ's own default,
since calibration has added what a short text asks for."""


def _order_columns(sizes: Tensor, group: int) -> list[Tensor]:
    """Each group's columns, those of larger inputs first; and the groups in that order, too."""
    found = [part[sizes[part].argsort(descending=True, stable=True)] for part in torch.arange(len(sizes)).split(group)]
    return sorted(found, key=lambda columns: -float(sizes[columns].mean()))


def _correction(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse Hessian, rows divided by their diagonal: row i says by how much each
    later column makes up for an error of 1 in column i. And [K] the loss that is left of it, relative to the mean."""
    damped = hessian.double().clone()
    dead = damped.diagonal() == 0
    damped.diagonal()[dead] = 1.0
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    losses = factor.diagonal().square().reciprocal()
    return (factor / factor.diagonal()[:, None]).float(), (losses / losses.mean()).float()


def _round_group(weight: Tensor, correction: Tensor, losses: Tensor, scheme: Scheme) -> tuple[QuantizedWeight, Tensor]:
    """Quantize one group's columns [N, g]; returns the error of each column, too, [N, g]."""
    groups, importance = (split_groups(each, scheme.group) for each in (weight, losses[None]))
    scales, zeros, offsets = _search_params(groups, scheme, importance.expand_as(groups))
    scales = torch.where(scales == 0, 1.0, scales)
    scale, zero, top = scales[:, 0], zeros[:, 0], 2**scheme.bits - 1
    shift = -scale * zero if offsets is None else offsets[:, 0] - scale * zero
    # A column at a time, so let columns be contiguous.
    work = weight.T.contiguous()
    error = torch.empty_like(work)
    codes = torch.zeros(*groups.shape, dtype=torch.uint8)
    for index in range(len(work)):
        code = ((work[index] - shift) / scale).round_().clamp_(0, top)
        codes[:, 0, index] = code
        error[index] = work[index] - torch.addcmul(shift, code, scale)
        work[index + 1 :].addr_(correction[index, index + 1 :], error[index], alpha=-1)
    return QuantizedWeight(scheme.bits, codes, scales, zeros.to(torch.uint8), offsets, weight.shape[1]), error.T


def _restore_order(part: QuantizedWeight, columns: Tensor) -> QuantizedWeight:
    """Codes where their columns are in the group; what lies behind them is padding."""
    codes = torch.zeros_like(part.codes)
    codes[..., columns - columns.min()] = part.codes[..., : len(columns)]
    return replace(part, codes=codes)


def _join_columns(parts: list[QuantizedWeight], bits: int, columns: int) -> QuantizedWeight:
    codes, scales, zeros = (
        torch.cat([getattr(part, name) for part in parts], 1) for name in ("codes", "scales", "zeros")
    )
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return QuantizedWeight(bits, codes, scales, zeros, torch.cat(offsets, 1) if offsets else None, columns)


# ---------------------------------------------------------------- awq

STRENGTHS = (0.0, 0.15, 0.3, 0.45, 0.6)
"""Exponents of a column's input size and of its largest weight in its scale: all pairs are tried."""
SAMPLE_SIZE = 2**17
"""Weights that channel scales are compared on."""
SEARCHED_BITS = 4
"""Up to so many bits ranges are searched: more are exact enough over the whole range."""
LEAST = 1e-4
"""The lower bound of a column's size, relative to the largest column's."""


def _channel_scales(weight: Tensor, hessian: Tensor) -> Iterator[Tensor]:
    """Channel scales to try, [K] each: large where inputs are, small where weights are, with a geometric mean of 1."""
    inputs, weights = _clamp_small(hessian.diagonal().sqrt()), _clamp_small(weight.abs().amax(0))
    for one, other in product(STRENGTHS, STRENGTHS):
        scales = inputs**one / weights**other
        yield scales / scales.log().mean().exp()


def _clamp_small(sizes: Tensor) -> Tensor:
    return sizes.clamp(min=max(float(sizes.max()) * LEAST, torch.finfo(torch.float32).tiny))


def _round_scaled(weight: Tensor, scales: Tensor, scheme: Scheme) -> QuantizedWeight:
    return _quantize_scaled(weight, scales, lambda rows: round_to_nearest(rows, scheme))


def _search_scaled(weight: Tensor, scales: Tensor, scheme: Scheme, inputs: Tensor) -> QuantizedWeight:
    """Ranges of the least error where columns weigh as much as their squared inputs."""
    importance = split_groups((inputs / scales.square())[None], scheme.group)

    def quantize(rows: Tensor) -> QuantizedWeight:
        groups = split_groups(rows, scheme.group)
        params = _search_params(groups, scheme, importance.expand_as(groups))
        return encode(groups, params, scheme.bits, rows.shape[1])

    return _quantize_scaled(weight, scales, quantize)


def _quantize_scaled(weight: Tensor, scales: Tensor, quantize: Callable[[Tensor], QuantizedWeight]) -> QuantizedWeight:
    """Quantize the weight with these channel scales, a chunk of rows at a time."""
    found = apply_by_rows(weight, lambda rows: quantize(rows * scales))
    assert found is not None, "each chunk has a result"
    return replace(found, channel_scales=scales)


def _output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    error = quantized.dequantize() - weight
    return float(((error @ hessian) * error).sum())
