"""Checks before each call of a torch operator, since graphs may come from strangers and torch trusts its caller.

Three things are checked. Some operators read or write outside their arguments' memory where shapes disagree, or abort
the process on a value. Some make a result of any size from a few numbers. And Python's integers have no largest number.
Every check raises ValueError with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..hosts.machine import memory_bytes
from .operator_sizes import SIZES, broadcast_numel, count_columns

__all__ = ["bound_arithmetic", "guard_operator"]

_Function = Callable[..., Any]

_MOST_PIECES = 2**16
"""Tensors that one call may give."""
_SMALL = 2**16
"""Results of no more elements are never too large."""


def guard_operator(name: str, function: _Function, tensors: int) -> _Function:
    """Wrap the operator `name`, which takes `tensors` tensors, in its checks."""
    condition, size = _ARGUMENT_CHECKS.get(name), SIZES.get(name, broadcast_numel if tensors > 1 else None)
    function = _REPLACED.get(name) or (_with_contiguous(function) if name in _CONTIGUOUS else function)
    if condition is None and size is None:
        return function

    def checked(*args: Any, **keywords: Any) -> Any:
        if condition is not None:
            condition(*args, **keywords)
        if size is not None and (elements := size(*args, **keywords)) > _SMALL:
            _check_size(elements, args, keywords)
        return function(*args, **keywords)

    return checked


def bound_arithmetic(function: _Function) -> _Function:
    """Limit arithmetic on sizes to numbers of 64 bits. A sum takes a list of them."""

    def bounded(*values: Any) -> Any:
        numbers = values[0] if function is torch.sym_sum else values
        if not all(isinstance(each, int | float) for each in numbers):
            raise ValueError(f"sizes are numbers, not {', '.join(type(each).__name__ for each in numbers)}")
        if function in (operator.pow, operator.lshift) and numbers[1] > 64:
            # Seen before it is computed: 10 ** 10 ** 9 takes for ever.
            raise ValueError(f"a size would be {numbers[0]} to the {numbers[1]}, or moved by so many bits")
        result = function(*values)
        if isinstance(result, int) and not -(2**63) <= result < 2**63:
            raise ValueError("a size has more than 64 bits")
        return result

    return bounded


@cache
def _memory_limit() -> int:
    return memory_bytes()


def _check_size(elements: float, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    given = [each.dtype for each in args if isinstance(each, Tensor)]
    dtype = keywords.get("dtype") or next(iter(given), torch.float32)
    if elements * dtype.itemsize > _memory_limit():
        raise ValueError(
            f"its result would have {elements:,.0f} elements of {dtype}, more than memory's {_memory_limit():,}"
        )


def _with_contiguous(function: _Function) -> _Function:
    def contiguous(value: Any) -> Any:
        return value.contiguous() if isinstance(value, Tensor) else value

    return lambda *args, **keywords: function(*map(contiguous, args), **keywords)


_CONTIGUOUS = frozenset({"_weight_int4pack_mm_for_cpu", "median", "native_group_norm"})
"""Operators that rely on an argument's layout, and read beyond it where it has another."""


def _fft_by_dimension(one: str, last: str, default: list[int] | None, *, is_last_first: bool = False) -> _Function:
    """Fourier transforms along several dimensions, as one after the other: all at once, MKL writes outside its memory
    for some lengths (1000 of them along the middle one, say)."""

    def transform(
        self: Tensor, s: list[int] | None = None, dim: list[int] | None = default, norm: str | None = None
    ) -> Tensor:
        dims = range(-len(s) if s else -self.ndim, 0) if dim is None else dim
        lengths = [None if length == -1 else length for length in s or [-1] * len(dims)]
        steps = [*zip([one] * (len(dims) - 1) + [last], lengths, dims, strict=True)]
        for name, length, at in reversed(steps) if is_last_first else steps:
            self = guard_operator(name, getattr(torch.ops.aten, name).default, 1)(self, length, at, norm)
        return self

    return transform


_REPLACED: dict[str, _Function] = {
    f"fft_{kind}{many}": _fft_by_dimension(
        one, f"fft_{kind}", [-2, -1] if many == "2" else None, is_last_first=kind == "rfft"
    )
    for kind, one in (("fft", "fft_fft"), ("ifft", "fft_ifft"), ("rfft", "fft_fft"), ("irfft", "fft_ifft"))
    for many in ("2", "n")
}


# What each operator assumes of its arguments and does not check.


def _check_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, *_: Any
) -> None:
    if x.ndim < 2:
        raise ValueError(f"{list(x.shape)} has no channels")
    for each in (weight, bias, mean, var):
        _check_shape(each, (x.shape[1],), f"the channels of {list(x.shape)}")


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> None:
    if not 0 <= dim < v.ndim:
        raise ValueError(f"{list(v.shape)} has no dimension {dim}")
    if not v.numel():
        # It divides by the length of what has none, which ends the process.
        raise ValueError(f"{list(v.shape)} has no elements")
    _check_shape(g, tuple(size if at == dim else 1 for at, size in enumerate(v.shape)), f"dimension {dim} of v")


def _check_shape(tensor: Tensor | None, shape: tuple[int, ...], why: str) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{list(tensor.shape)} where {why} need {list(shape)}")


def _check_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0, *_: Any,
               **__: Any) -> None:  # fmt: skip
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"keys {list(key.shape)} and values {list(value.shape)} do not belong together")
    if dropout_p:
        raise ValueError("it drops values at random")


def _check_normalization(
    x: Tensor, weight: Any, bias: Any, mean: Tensor | None, var: Tensor | None, training: bool, *_: Any
) -> None:
    if training and (mean is not None or var is not None):
        raise ValueError("it changes the statistics that it is given")


def _check_dropout(input: Tensor, p: float, train: bool) -> None:  # noqa: A002
    if train:
        raise ValueError("it drops values at random")


def _check_int4_product(x: Tensor, weight: Tensor, group: int, scales: Tensor) -> None:
    if group < 1 or x.ndim != 2 or weight.ndim != 2 or scales.ndim != 3:
        raise ValueError(f"{list(x.shape)}, {list(weight.shape)} in groups of {group} are no int4 product")
    groups = -(-x.shape[1] // group)
    if tuple(scales.shape) != (groups, weight.shape[0], 2) or weight.shape[1] * 2 != x.shape[1]:
        raise ValueError(f"scales {list(scales.shape)} do not fit {list(weight.shape)} in groups of {group}")


def _check_division(self: Any, other: Any, *, rounding_mode: str | None = None) -> None:
    """The smallest integer by -1 has no result, and truncating division ends the process."""
    if rounding_mode != "trunc" or not isinstance(self, Tensor) or self.is_floating_point() or self.is_complex():
        return
    if bool(((self == torch.iinfo(self.dtype).min) & torch.as_tensor(other == -1)).any()):
        raise ValueError(f"the smallest {self.dtype} is divided by -1")


def _check_upsample(
    self: Tensor, output_size: Any, align_corners: bool = False, scales_h: Any = None, scales_w: Any = None, **_: Any
) -> None:
    """A scale that is given beside the size which it should lead to decides where is read."""
    for given, made, scale in zip(self.shape[-2:], output_size or (), (scales_h, scales_w), strict=False):
        if isinstance(scale, int | float) and scale > 0 and made > given * scale:
            raise ValueError(f"{given} times {scale} is not {made}")


def _check_col2im(self: Tensor, output_size: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> None:
    """torch counts columns in 32 bits, which a large padding goes beyond."""
    columns = count_columns(output_size, kernel_size, dilation, padding, stride)
    if not self.ndim or self.shape[-1] != columns:
        raise ValueError(f"{list(self.shape)} where {columns:,} columns make {output_size}")


def _check_pieces(self: Tensor, count: int) -> None:
    if count > _MOST_PIECES:
        raise ValueError(f"{list(self.shape)} in {count:,} pieces, of {_MOST_PIECES:,} at most")


def _check_split(self: Tensor, split_size: Any, dim: int = 0) -> None:
    if isinstance(split_size, int) and split_size > 0 and self.ndim:
        _check_pieces(self, -(-self.shape[dim] // split_size))


def _check_unbind(self: Tensor, dim: int = 0) -> None:
    _check_pieces(self, self.shape[dim])


def _check_chunk(self: Tensor, chunks: Any, dim: int = 0) -> None:
    if isinstance(chunks, int):
        _check_pieces(self, chunks)


_ARGUMENT_CHECKS: dict[str, _Function] = {
    "_native_batch_norm_legit_no_training": _check_batch_norm,
    "_weight_int4pack_mm_for_cpu": _check_int4_product,
    "_weight_norm": _weight_norm,
    "batch_norm": _check_normalization,
    "chunk": _check_chunk,
    "col2im": _check_col2im,
    "div": _check_division,
    "divide": _check_division,
    "dropout": _check_dropout,
    "instance_norm": _check_normalization,
    "scaled_dot_product_attention": _check_attention,
    "split": _check_split,
    "tensor_split": _check_chunk,
    "unbind": _check_unbind,
    "unsafe_chunk": _check_chunk,
    "unsafe_split": _check_split,
    **dict.fromkeys(("_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"), _check_upsample),
}
"""Operator -> the check that raises ValueError unless its arguments fit each other."""
