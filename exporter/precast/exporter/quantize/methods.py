"""Methods of quantization: one function and one row of the table per method.

A method takes a weight [N, K], the scheme and, if it is calibrated, the Hessian of the layer's inputs
(`calibration.py`). `rtn` rounds over each group's range, `search` minimizes the error of the weights, `gptq` and `awq`
the error of the layer's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from precast.runtime.errors import UsageError

from .scheme import QuantizedWeight, QuantParams, encode, select_params, split_groups

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
    return encode(groups, _search_params(groups, scheme), scheme.bits, weight.shape[1])


def gptq(weight: Tensor, scheme: Scheme, hessian: Tensor | None = None) -> QuantizedWeight:
    """Round column by column, and correct the columns to come for the error (Frantar et al. 2022, GPTQ).

    `hessian` [K, K] is the mean of x xᵀ over calibration inputs. Each group's parameters are searched when its turn
    comes, on the weights as corrected so far. A layer that no calibration token reached (an expert, say) is only
    searched.
    """
    if hessian is None:
        return search(weight, scheme)
    work, columns = weight.float().clone(), weight.shape[1]
    correction = _correction(hessian)
    parts = []
    for start in range(0, columns, scheme.group):
        stop = min(start + scheme.group, columns)
        part, error = _round_group(work[:, start:stop], correction[start:stop, start:stop], scheme)
        work[:, stop:] -= error @ correction[start:stop, stop:]
        parts.append(part)
    return _join_columns(parts, scheme.bits, columns)


def awq(weight: Tensor, scheme: Scheme, hessian: Tensor | None = None) -> QuantizedWeight:
    """Scale up the columns that matter before they are rounded, and scale down their inputs by as much (Lin et al.
    2023, AWQ: Activation-aware Weight Quantization).

    Of several channel scales, those of the least output error are taken: the trace of E `hessian` Eᵀ for weight errors
    E [N, K]. A layer that no calibration token reached is rounded to nearest.
    """
    if hessian is None or not hessian.any():
        return round_to_nearest(weight, scheme)
    sample = weight[:: -(-weight.numel() // SAMPLE_SIZE)].float()
    candidates = _channel_scales(sample, hessian)
    best = min(candidates, key=lambda scales: _output_error(sample, _round_scaled(sample, scales, scheme), hessian))
    return _round_scaled(weight, best, scheme)


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


def _search_params(groups: Tensor, scheme: Scheme) -> QuantParams:
    importance = groups.abs() + groups.square().mean(-1, keepdim=True).sqrt()
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

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean: GPTQ's own default."""


def _correction(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse Hessian, rows divided by their diagonal: row i says by how much each
    later column makes up for an error of 1 in column i."""
    damped = hessian.double().clone()
    dead = damped.diagonal() == 0
    damped.diagonal()[dead] = 1.0
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    result: Tensor = (factor / factor.diagonal()[:, None]).float()
    return result


def _round_group(weight: Tensor, correction: Tensor, scheme: Scheme) -> tuple[QuantizedWeight, Tensor]:
    """Quantize one group's columns [N, g]; returns the error of each column, too, [N, g]."""
    groups, top = split_groups(weight, scheme.group), 2**scheme.bits - 1
    scales, zeros, offsets = _search_params(groups, scheme)
    scales = torch.where(scales == 0, 1.0, scales)
    scale, zero = scales[:, 0], zeros[:, 0]
    shift = -scale * zero if offsets is None else offsets[:, 0] - scale * zero
    work, error = weight.clone(), torch.empty_like(weight)
    codes = torch.zeros(*groups.shape, dtype=torch.uint8)
    for index in range(weight.shape[1]):
        code = ((work[:, index] - shift) / scale).round_().clamp_(0, top)
        codes[:, 0, index] = code
        error[:, index] = work[:, index] - torch.addcmul(shift, code, scale)
        work[:, index + 1 :].addr_(error[:, index], correction[index, index + 1 :], alpha=-1)
    return QuantizedWeight(scheme.bits, codes, scales, zeros.to(torch.uint8), offsets, weight.shape[1]), error


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
    return replace(round_to_nearest(weight * scales, scheme), channel_scales=scales)


def _output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    error = quantized.dequantize() - weight
    return float(((error @ hessian) * error).sum())
