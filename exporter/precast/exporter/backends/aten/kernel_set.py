"""The set of kernels that a backend has of its own, in place of ATen's operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Kernels"]


@dataclass(frozen=True)
class Kernels:
    """Operators; their meaning is documented with those of the `aoti` backend.

    Attributes:
        gemv: weights times few rows.
        quantized_gemm: a quantized weight times many rows; None where there is no kernel for its groups.
        int8_gemm: a weight times activations, both of 8 bits; the weight is laid out by `pack_int8` before.
        dequantize: codes to a matrix of the dtype in the last argument.
        decode_attention: attention of one token per slot to caches.
        prefill_attention: attention of several tokens per slot to caches; the last argument is the dtype of its matrix
            products, as in the next.
        attention: attention of all queries to all keys.
        lora: adapters of each row, added to what a layer gives.
    """

    gemv: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], int], Tensor]
    quantized_gemm: Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor | None]
    pack_int8: Callable[[Tensor], Tensor]
    int8_gemm: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None], Tensor]
    dequantize: Callable[[Tensor, Tensor, Tensor | None, int, torch.dtype], Tensor]
    decode_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
    prefill_attention: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, str, int, Tensor | None, float, torch.dtype], Tensor
    ]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
    lora: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
