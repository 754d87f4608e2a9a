"""Estimate how many elements an operator's result has from its arguments, before memory is allocated for it.

An estimate is never less than the result has, and not much more. Each `_…_numel` takes the operator's own parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

__all__ = ["SIZES", "broadcast_numel", "count_columns"]

Estimate = Callable[..., float]
_Sizes = Sequence[int]


def broadcast_numel(*args: Any, **_: Any) -> int:
    """Elements of an elementwise result, 0 where nothing is broadcast. The operator refuses shapes that do not fit."""
    shapes = [each.shape for each in args if isinstance(each, Tensor)]
    if all(shape == shapes[0] for shape in shapes):
        return 0
    total = 1
    for sizes in _align_shapes(*shapes):
        different = {*sizes} - {1}
        if len(different) > 1:
            return 0
        total *= different.pop() if different else 1
    return total


def _size_numel(size: _Sizes, *_: Any, **__: Any) -> int:
    return math.prod(size)


def _new_size_numel(self: Tensor, size: _Sizes, *_: Any, **__: Any) -> int:
    return math.prod(size)


def _expand_numel(self: Tensor, size: _Sizes, *_: Any, **__: Any) -> int:
    """-1 leaves a size as it is."""
    return math.prod(max(sizes) for sizes in _align_shapes(self.shape, size))


def _repeat_numel(self: Tensor, repeats: _Sizes) -> int:
    return self.numel() * math.prod(repeats)


def _tile_numel(self: Tensor, dims: _Sizes) -> int:
    return self.numel() * math.prod(dims)


def _repeat_interleave_numel(self: Tensor, repeats: Any = None, *_: Any, **__: Any) -> float:
    """The counts are in a tensor, whose sum may have more than 64 bits."""
    times, each = (self, 1) if repeats is None else (repeats, self.numel())
    return each * (times.double().sum().item() if isinstance(times, Tensor) else float(times))


def _arange_numel(first: float, end: float | None = None, step: float = 1, **_: Any) -> float:
    return abs((first if end is None else end - first) / step) + 1 if step else 0


def _linspace_numel(start: Any, end: Any, steps: int, **_: Any) -> int:
    return steps


def _eye_numel(n: int, m: int | None = None, **_: Any) -> int:
    return n * (n if m is None else m)


def _window_numel(window_length: int, *_: Any, **__: Any) -> int:
    return window_length


def _triangle_indices_numel(row: int, col: int, *_: Any, **__: Any) -> int:
    return 2 * row * col


def _one_hot_numel(self: Tensor, num_classes: int = -1) -> int:
    return self.numel() * (int(self.max()) + 1 if num_classes < 0 and self.numel() else num_classes)


def _nonzero_numel(self: Tensor, *, size: int, **_: Any) -> int:
    return size * self.ndim


def _pad_numel(self: Tensor, pad: _Sizes, *_: Any, **__: Any) -> int:
    sides = [*pad, *[0] * (len(pad) % 2)]
    added = [sum(sides[at : at + 2]) for at in range(0, len(sides), 2)][: self.ndim]
    return math.prod(map(sum, zip_longest(reversed(self.shape), added, fillvalue=0)))


def _count_windows(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // max(1, stride) + 1


def _unfold_numel(self: Tensor, dimension: int, size: int, step: int) -> int:
    return self.numel() * size


def _im2col_numel(self: Tensor, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> int:
    columns = count_columns(self.shape[-2:], kernel_size, dilation, padding, stride)
    return math.prod(self.shape[:-2]) * math.prod(*_per_dimension(2, kernel_size)) * columns


def count_columns(image: _Sizes, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> int:
    """How many columns an image of this height and width makes."""
    sizes = zip(*_per_dimension(2, image, kernel_size, stride, padding, dilation), strict=False)
    return math.prod(_count_windows(*each) for each in sizes)


def _col2im_numel(self: Tensor, output_size: Any, *_: Any, **__: Any) -> int:
    return math.prod(self.shape[:-1]) * math.prod(*_per_dimension(2, output_size))


def _upsample_numel(self: Tensor, output_size: _Sizes | None, *rest: Any, **keywords: Any) -> float:
    if output_size is None:
        scales = next((each for each in [*rest, *keywords.values()] if isinstance(each, list)), [])
        return self.numel() * float(math.prod(max(0, each) for each in scales))
    return math.prod(self.shape[:2]) * math.prod(output_size)


def _pool_numel(dims: int, self: Tensor, output_size: Any) -> int:
    return math.prod(self.shape[:-dims]) * math.prod(*_per_dimension(dims, output_size))


def _affine_grid_numel(theta: Tensor, size: _Sizes, *_: Any) -> int:
    return math.prod(size) * 3


def _conv_numel(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    *rest: Any, **__: Any,
) -> int:  # fmt: skip
    if rest and rest[0] is True:
        _, output_padding, groups = rest
        return _conv_transpose_numel(x, weight, bias, stride, padding, output_padding, groups, dilation)
    dims = weight.ndim - 2
    # In words, it is none or what leaves sizes as they are.
    padding = weight.shape[2:] if isinstance(padding, str) else padding
    sizes = zip(x.shape[-dims:], weight.shape[2:], *_per_dimension(dims, stride, padding, dilation), strict=False)
    windows = math.prod(max(0, _count_windows(*each)) for each in sizes)
    return math.prod(x.shape[: -dims - 1]) * weight.shape[0] * windows


def _conv_transpose_numel(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> int:  # fmt: skip
    dims = weight.ndim - 2
    sizes = zip(
        x.shape[-dims:], weight.shape[2:], *_per_dimension(dims, stride, output_padding, dilation), strict=False
    )
    made = (int((size - 1) * step + gap * (kernel - 1) + more + 1) for size, kernel, step, more, gap in sizes)
    return math.prod(x.shape[: -dims - 1]) * weight.shape[1] * groups * math.prod(made)


def _per_dimension(dims: int, *values: Any) -> Iterable[list[int]]:
    """Expand each argument to one number per dimension: torch takes one for all, too."""
    for value in values:
        given = list(value) if isinstance(value, list | tuple) else [value]
        yield given * dims if len(given) == 1 else given


def _matmul_numel(self: Tensor, mat2: Tensor, *_: Any, **__: Any) -> int:
    """A product of matrices, with any dimensions before the last two, or of vectors."""
    before = math.prod(max(sizes) for sizes in _align_shapes(self.shape[:-2], mat2.shape[:-2]))
    return before * math.prod(self.shape[-2:-1]) * (mat2.shape[-1] if mat2.ndim > 1 else 1)


def _align_shapes(*shapes: _Sizes) -> Iterable[tuple[int, ...]]:
    """The sizes of shapes along each dimension, from the last one on, as broadcasting aligns them."""
    return zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)


def _addmm_numel(self: Tensor, mat1: Tensor, mat2: Tensor, *_: Any, **__: Any) -> int:
    return _matmul_numel(mat1, mat2)


def _linear_numel(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return math.prod(x.shape[:-1]) * math.prod(weight.shape[:1])


def _outer_numel(self: Tensor, other: Tensor, *_: Any, **__: Any) -> int:
    return self.numel() * other.numel()


def _addr_numel(self: Tensor, vec1: Tensor, vec2: Tensor, *_: Any, **__: Any) -> int:
    return vec1.numel() * vec2.numel()


def _inner_numel(self: Tensor, other: Tensor) -> int:
    if not self.ndim or not other.ndim:
        return self.numel() * other.numel()
    return math.prod(self.shape[:-1]) * math.prod(other.shape[:-1])


def _tensordot_numel(self: Tensor, other: Tensor, dims_self: _Sizes, dims_other: _Sizes) -> int:
    kept = (
        size
        for tensor, dims in ((self, dims_self), (other, dims_other))
        for at, size in enumerate(tensor.shape)
        if at not in {each % tensor.ndim for each in dims}
    )
    return math.prod(kept)


def _einsum_numel(equation: str, tensors: Sequence[Tensor], *_: Any, **__: Any) -> int:
    sizes: dict[str, int] = {}
    given, *made = equation.replace(" ", "").split("->")
    for term, tensor in zip(given.split(","), tensors, strict=False):
        sizes |= {letter: size for letter, size in zip(term, tensor.shape, strict=False) if size > 1}
    return math.prod(sizes.get(letter, 1) for letter in (made or [given])[0])


def _meshgrid_numel(tensors: Sequence[Tensor], *_: Any, **__: Any) -> int:
    return len(tensors) * math.prod(each.numel() for each in tensors)


def _block_diag_numel(tensors: Sequence[Tensor]) -> int:
    return math.prod(sum(max(1, *each.shape[-2:][at:], 0) for each in tensors) for at in (0, 1))


def _cat_numel(tensors: Sequence[Tensor], *_: Any, **__: Any) -> int:
    return sum(each.numel() for each in tensors)


def _cdist_numel(x1: Tensor, x2: Tensor, *_: Any, **__: Any) -> int:
    return _matmul_numel(x1, x2.transpose(-1, -2)) if x1.ndim > 1 and x2.ndim > 1 else 0


def _diag_numel(self: Tensor, diagonal: int = 0) -> int:
    return _diag_embed_numel(self, diagonal) if self.ndim == 1 else self.numel()


def _diag_embed_numel(self: Tensor, offset: int = 0, *_: Any, **__: Any) -> int:
    return math.prod(self.shape[:-1]) * (math.prod(self.shape[-1:]) + abs(offset)) ** 2


def _diagflat_numel(self: Tensor, offset: int = 0) -> int:
    return (self.numel() + abs(offset)) ** 2


def _embedding_numel(weight: Tensor, indices: Tensor, *_: Any, **__: Any) -> int:
    return indices.numel() * math.prod(weight.shape[1:])


def _index_select_numel(self: Tensor, dim: int, index: Tensor) -> int:
    return self.numel() // max(1, self.shape[dim] if self.ndim else 1) * index.numel()


def _index_numel(self: Tensor, indices: Sequence[Tensor | None], *_: Any) -> int:
    """Indices are broadcast, and take the place of a dimension each; a mask, of as many as it has."""
    kept, found, at = 1, 1, 0
    for index in indices:
        if index is None:
            kept *= math.prod(self.shape[at : at + 1])
            at += 1
        elif index.dtype in (torch.bool, torch.uint8):
            found = max(found, index.numel())
            at += index.ndim
        else:
            at += 1
    given = [index for index in indices if index is not None and index.dtype not in (torch.bool, torch.uint8)]
    found = max(found, broadcast_numel(*given), *(index.numel() for index in given))
    return found * kept * math.prod(self.shape[at:])


def _bilinear_numel(input1: Tensor, input2: Tensor, weight: Tensor, *_: Any) -> int:
    return input1.numel() * math.prod(weight.shape[:1])


def _quantile_numel(self: Tensor, q: Any, *_: Any, **__: Any) -> int:
    return self.numel() * (q.numel() if isinstance(q, Tensor) else 1)


def _fft_numel(self: Tensor, n: int | None = None, dim: int = -1, norm: str | None = None) -> int:
    """The inverse of a real one gives twice as many."""
    return 2 * self.numel() // max(1, self.shape[dim]) * max(n or 0, self.shape[dim])


def _stft_numel(self: Tensor, n_fft: int, hop_length: int | None = None, *_: Any, **__: Any) -> int:
    frames = (self.shape[-1] + n_fft) // max(1, n_fft // 4 if hop_length is None else hop_length) + 1
    return math.prod(self.shape[:-1]) * frames * (n_fft + 2)


def _istft_numel(self: Tensor, n_fft: int, hop_length: int | None = None, win_length: Any = None, window: Any = None,
              center: Any = True, normalized: Any = False, onesided: Any = None, length: int | None = None, *_: Any,
              **__: Any) -> int:  # fmt: skip
    frames = self.numel() // max(1, self.shape[-2] if self.ndim > 1 else 1)
    return max(length or 0, frames * max(n_fft, hop_length or 0))


def _operators(names: str, size: Estimate | None) -> dict[str, Estimate | None]:
    return dict.fromkeys(names.split(), size)


SIZES: dict[str, Estimate | None] = {
    **_operators("""
        batch_norm gather group_norm index_add index_copy index_fill index_put instance_norm layer_norm masked_fill
        native_group_norm native_layer_norm rms_norm scatter scatter_add scatter_reduce select_scatter slice_scatter
        _native_batch_norm_legit_no_training
        """, None),
    **_operators("empty full ones zeros", _size_numel),
    **_operators("new_empty new_full new_ones new_zeros as_strided", _new_size_numel),
    **_operators("expand broadcast_to expand_copy", _expand_numel),
    **_operators("cat concat concatenate stack hstack vstack dstack row_stack column_stack", _cat_numel),
    **_operators("""
        constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d replication_pad3d
        """, _pad_numel),
    **_operators("""
        upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
        upsample_nearest3d upsample_trilinear3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
        """, _upsample_numel),
    **_operators("adaptive_avg_pool1d adaptive_max_pool1d", partial(_pool_numel, 1)),
    **_operators("_adaptive_avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d", partial(_pool_numel, 2)),
    **_operators("_adaptive_avg_pool3d adaptive_avg_pool3d", partial(_pool_numel, 3)),
    **_operators("conv1d conv2d conv3d convolution", _conv_numel),
    **_operators("conv_transpose1d conv_transpose2d conv_transpose3d", _conv_transpose_numel),
    **_operators("mm bmm matmul linalg_matmul _int_mm", _matmul_numel),
    **_operators("addmm baddbmm addbmm", _addmm_numel),
    **_operators("linear _weight_int8pack_mm _weight_int4pack_mm_for_cpu", _linear_numel),
    **_operators("outer kron", _outer_numel),
    **_operators("meshgrid cartesian_prod broadcast_tensors", _meshgrid_numel),
    **_operators("tril_indices triu_indices", _triangle_indices_numel),
    **_operators("fft_fft fft_ifft fft_rfft fft_irfft", _fft_numel),
    **_operators("fft_fft2 fft_fftn fft_ifft2 fft_ifftn fft_rfft2 fft_rfftn fft_irfft2 fft_irfftn", None),
    "addr": _addr_numel,
    "affine_grid_generator": _affine_grid_numel,
    "arange": _arange_numel,
    "bilinear": _bilinear_numel,
    "block_diag": _block_diag_numel,
    "cdist": _cdist_numel,
    "col2im": _col2im_numel,
    "diag": _diag_numel,
    "diag_embed": _diag_embed_numel,
    "diagflat": _diagflat_numel,
    "einsum": _einsum_numel,
    "embedding": _embedding_numel,
    "eye": _eye_numel,
    "hann_window": _window_numel,
    "im2col": _im2col_numel,
    "index": _index_numel,
    "index_select": _index_select_numel,
    "inner": _inner_numel,
    "istft": _istft_numel,
    "linspace": _linspace_numel,
    "nonzero_static": _nonzero_numel,
    "one_hot": _one_hot_numel,
    "quantile": _quantile_numel,
    "repeat": _repeat_numel,
    "repeat_interleave": _repeat_interleave_numel,
    "stft": _stft_numel,
    "tensordot": _tensordot_numel,
    "tile": _tile_numel,
    "unfold": _unfold_numel,
}  # fmt: skip
"""Operator -> how many elements its result has, of its arguments: where it works on all tensors element by element
unless it stands here, and None where it gives no more than it is given."""
