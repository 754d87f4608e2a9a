"""How weights get onto a grid: one function and one row per method.

A method takes a weight [N, K], the scheme it is to follow and, if it is calibrated, what `calibration.py` learned
about the layer's inputs. `rtn` looks at each group's ends, `search` at the error that remains, `gptq` and `awq` at the
error that reaches the layer's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from precast.runtime.errors import UsageError

from .scheme import Ends, Grid, choose, encode, grouped

__all__ = ["METHODS", "WHOLE_ROW", "Method", "Scheme", "Zero", "get_method"]

Zero = Literal["middle", "whole", "free"]
"""Where a group's zero lies: in the middle of its codes (symmetric), on any code (asymmetric), or anywhere, by an
offset beside the zero point."""


WHOLE_ROW = 0
"""As a group's size: all weights of a row share one scale."""


@dataclass(frozen=True)
class Scheme:
    """The grid that is asked for: `group` weights share a scale and a zero."""

    bits: int
    group: int
    zero: Zero

    def __str__(self) -> str:
        kind = {"middle": "symmetric", "whole": "asymmetric", "free": "asymmetric with offsets"}[self.zero]
        groups = "with a scale per row" if self.group == WHOLE_ROW else f"in groups of {self.group}"
        return f"int{self.bits} {groups}, {kind}"


@dataclass(frozen=True)
class Method:
    """`quantize(weight [N, K], scheme, hessian [K, K] or None)`."""

    name: str
    quantize: Callable[[Tensor, Scheme, Tensor | None], Grid]
    is_calibrated: bool = False


def round_to_nearest(weight: Tensor, scheme: Scheme, hessian: Tensor | None = None) -> Grid:
    """Spread each group's codes from its smallest to its largest weight."""
    groups = grouped(weight, scheme.group)
    return encode(groups, *_fit_range(groups, scheme), scheme.bits, weight.shape[1])


def search(weight: Tensor, scheme: Scheme, hessian: Tensor | None = None) -> Grid:
    """Of several ranges around each group's own, the one with the least squared error after a least-squares fit.

    Large weights count for more, since they do more: the weighting |w| + rms and the refit after rounding are those of
    llama.cpp's k-quants (`make_qkx2_quants` in ggml-quants.c).
    """
    groups = grouped(weight, scheme.group)
    return encode(groups, *_search(groups, scheme), scheme.bits, weight.shape[1])


def gptq(weight: Tensor, scheme: Scheme, hessian: Tensor | None = None) -> Grid:
    """Round column by column, and let the columns to come make up for the error (Frantar et al. 2022, GPTQ).

    `hessian` [K, K] is the mean of x xᵀ over calibration inputs. Each group's grid is searched when its turn comes, on
    the weights as corrected so far. A layer that no calibration token reached (an expert, say) is only searched.
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
    return _joined(parts, scheme.bits, columns)


def awq(weight: Tensor, scheme: Scheme, hessian: Tensor | None = None) -> Grid:
    """Scale up the columns that matter before they are rounded, and scale down their inputs by as much (Lin et al.
    2023, AWQ: Activation-aware Weight Quantization).

    Of several scales, those whose error E [N, K] reaches the outputs least: the trace of E `hessian` Eᵀ. A
    layer that no calibration token reached is rounded to nearest.
    """
    if hessian is None or not hessian.any():
        return round_to_nearest(weight, scheme)
    sample = weight[:: -(-weight.numel() // SAMPLED)].float()
    candidates = _channel_scales(sample, hessian)
    best = min(candidates, key=lambda scales: _lost(sample, _rounded(sample, scales, scheme), hessian))
    return _rounded(weight, best, scheme)


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


def _fit_range(groups: Tensor, scheme: Scheme, factor: float = 1.0) -> Ends:
    """The grid over `factor` of each group's range."""
    top = 2**scheme.bits - 1
    if scheme.zero == "middle":
        ends = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        scales = ends * factor / -(2 ** (scheme.bits - 1))
        return scales, torch.full_like(scales, 2 ** (scheme.bits - 1)), None
    low, high = groups.amin(-1) * factor, groups.amax(-1) * factor
    if scheme.zero == "whole":
        low, high = low.clamp(max=0), high.clamp(min=0)
    scales = (high - low) / top
    zeros = (-low / torch.where(scales == 0, 1.0, scales)).round().clamp(0, top)
    return scales, zeros, low + scales * zeros if scheme.zero == "free" else None


FACTORS = tuple(0.7 + 0.05 * step for step in range(8))


def _search(groups: Tensor, scheme: Scheme) -> Ends:
    importance = groups.abs() + groups.square().mean(-1, keepdim=True).sqrt()
    best, least = _fit_range(groups, scheme), torch.full(groups.shape[:-1], torch.inf)
    for factor in FACTORS:
        found = _refit(groups, importance, _fit_range(groups, scheme, factor), scheme)
        error = _error(groups, importance, found, scheme)
        best, least = choose(error < least, found, best), torch.minimum(error, least)
    return best


def _refit(groups: Tensor, importance: Tensor, ends: Ends, scheme: Scheme) -> Ends:
    """Scales (and offsets) that fit best to the codes which `ends` give: weighted least squares of x on the steps."""
    scales, zeros, offsets = ends
    steps = encode(groups, *ends, scheme.bits, 0).codes.float() - zeros[..., None]
    xs, ss = (importance * groups * steps).sum(-1), (importance * steps.square()).sum(-1)
    if offsets is None:
        return torch.where(ss > 0, xs / ss, scales), zeros, None
    total, s, x = importance.sum(-1), (importance * steps).sum(-1), (importance * groups).sum(-1)
    determinant = total * ss - s.square()
    is_solvable = determinant > 1e-6 * total * ss
    slope = torch.where(is_solvable, (total * xs - s * x) / determinant, scales)
    return slope, zeros, torch.where(is_solvable, (x - slope * s) / total, offsets)


def _error(groups: Tensor, importance: Tensor, ends: Ends, scheme: Scheme) -> Tensor:
    found = encode(groups, *ends, scheme.bits, groups.shape[1] * groups.shape[2]).dequantize()
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


def _round_group(weight: Tensor, correction: Tensor, scheme: Scheme) -> tuple[Grid, Tensor]:
    """The grid of one group's columns [N, g], and the error that each of them left."""
    groups, top = grouped(weight, scheme.group), 2**scheme.bits - 1
    scales, zeros, offsets = _search(groups, scheme)
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
    return Grid(scheme.bits, codes, scales, zeros.to(torch.uint8), offsets, weight.shape[1]), error


def _joined(parts: list[Grid], bits: int, columns: int) -> Grid:
    codes, scales, zeros = (
        torch.cat([getattr(part, name) for part in parts], 1) for name in ("codes", "scales", "zeros")
    )
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return Grid(bits, codes, scales, zeros, torch.cat(offsets, 1) if offsets else None, columns)


# ---------------------------------------------------------------- awq

STRENGTHS = (0.0, 0.15, 0.3, 0.45, 0.6)
"""How much a column's inputs, and how much its largest weight, say about its scale."""
SAMPLED = 2**17
"""Weights by which scales are chosen."""
LEAST = 1e-4
"""Of the largest column, what the smallest counts for."""


def _channel_scales(weight: Tensor, hessian: Tensor) -> Iterator[Tensor]:
    """[K] each: wide where inputs are large, narrow where weights are, with a geometric mean of 1."""
    inputs, weights = _bounded(hessian.diagonal().sqrt()), _bounded(weight.abs().amax(0))
    for one, other in product(STRENGTHS, STRENGTHS):
        scales = inputs**one / weights**other
        yield scales / scales.log().mean().exp()


def _bounded(sizes: Tensor) -> Tensor:
    return sizes.clamp(min=max(float(sizes.max()) * LEAST, torch.finfo(torch.float32).tiny))


def _rounded(weight: Tensor, scales: Tensor, scheme: Scheme) -> Grid:
    return replace(round_to_nearest(weight * scales, scheme), channel_scales=scales)


def _lost(weight: Tensor, grid: Grid, hessian: Tensor) -> float:
    error = grid.dequantize() - weight
    return float(((error @ hessian) * error).sum())
