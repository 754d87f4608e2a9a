"""ExportedProgram -> onnx_ir.Model, with cached attention as one GroupQueryAttention node."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import INT32
from onnxscript import opset20 as op

from precast.runtime.artifact.schema import Graph
from precast.runtime.errors import ExportError

from ...decoder import attention  # noqa: F401  (registers an operator that is lowered here)
from ...quantize import linear  # noqa: F401  (registers the others)
from ...trace import Program
from .contrib import microsoft

__all__ = ["lower"]

OPSET = 20


def lower(program: Program) -> ir.Model:
    """Convert to ONNX with the graph's own input and output names. Raises ExportError."""
    with _quiet():
        converted = torch.onnx.export(
            program.exported,
            (),
            input_names=[spec.name for spec in program.graph.inputs],
            output_names=[spec.name for spec in program.graph.outputs],
            opset_version=OPSET,
            custom_translation_table={
                torch.ops.precast.cached_attention.default: _attention_for(program.graph),
                torch.ops.precast.quantized_linear.default: _quantized_linear,
                torch.ops.precast.quantized_embedding.default: _quantized_embedding,
            },
            verbose=False,
        )
    assert converted is not None, "torch.onnx.export returns a program when it is given no file"
    return converted.model


def _attention_for(graph: Graph) -> Any:
    """The translation of the operator. Windows and chunks that the cache cannot outgrow are plain causal masks."""

    def cached_attention(  # type: ignore[no-untyped-def]
        q, k, v, k_cache, v_cache, past_lengths, new_lengths,
        scale: float, mask: str, window: int, softcap: float, sinks=None, slopes=None, k_scales=None, v_scales=None,
    ):  # fmt: skip
        """`GroupQueryAttention` of com.microsoft.

        It takes [B, S, heads * D], counts `seqlens_k` up to the last key (total - 1), and knows a first prompt by
        `total_sequence_length == S`, so the total counts padded queries too. `local_window_size` w sees w keys, the
        query's own included, as transformers' sliding_window does.
        """
        bounded = mask != "causal" and window < graph.capacity
        if slopes is not None or (bounded and mask == "chunk"):
            what = "ALiBi slopes" if slopes is not None else f"chunks of {window} below the capacity {graph.capacity}"
            raise ExportError(f"The onnx backend cannot compile attention with {what} yet.")
        length = op.Cast(op.Shape(q, start=2, end=3), to=INT32.dtype)
        total = op.Squeeze(op.Add(op.ReduceMax(past_lengths, keepdims=1), length))
        last = op.Sub(op.Add(past_lengths, new_lengths), op.Constant(value=ir.tensor([1], ir.DataType.INT32)))
        options: dict[str, Any] = {"softcap": softcap} if softcap else {}
        if bounded:
            options["local_window_size"] = window
        if k_scales is not None:
            options |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        output, k_new, v_new = microsoft().GroupQueryAttention(
            _merge(q), _merge(k), _merge(v), k_cache, v_cache, last, total, None, None, None, None, sinks,
            k_scales, v_scales,
            num_heads=q.shape[1], kv_num_heads=k.shape[1], scale=scale, **options,
        )  # fmt: skip
        split = op.Constant(value_ints=[0, 0, q.shape[1], q.shape[3]])
        return op.Transpose(op.Reshape(output, split), perm=[0, 2, 1, 3]), k_new, v_new

    return cached_attention


INT8_ACTIVATIONS = 4
"""MatMulNBits' accuracy_level that rounds activations to int8, group by group: the only one with a fast kernel."""


def _quantized_linear(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, bias, bits: int, group: int, columns: int, extra: int
):
    """`MatMulNBits`; where offsets are held in extra columns, x is followed by the means of its groups."""
    if extra:
        x = op.Concat(x, _means(x, group), axis=-1)
    return microsoft().MatMulNBits(
        x, codes, scales, zeros, None, bias,
        K=columns + extra, N=codes.shape[0], bits=bits, block_size=group, accuracy_level=INT8_ACTIVATIONS,
    )  # fmt: skip


def _means(x: Any, group: int) -> Any:
    """`AveragePool`, which wants three dimensions; a router's input has two."""
    if len(x.shape) > 2:
        return op.AveragePool(x, kernel_shape=[group], strides=[group])
    front = op.Constant(value_ints=[0])
    return op.Squeeze(op.AveragePool(op.Unsqueeze(x, front), kernel_shape=[group], strides=[group]), front)


def _quantized_embedding(ids, codes, scales, zeros, bits: int, group: int):  # type: ignore[no-untyped-def]
    """`GatherBlockQuantized` over the rows of a table."""
    return microsoft().GatherBlockQuantized(
        codes, ids, scales, zeros, bits=bits, block_size=group, gather_axis=0, quantize_axis=1
    )


def _merge(x: Any) -> Any:
    """[B, heads, S, D] -> [B, S, heads * D]."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx and its helpers talk about their own internals; what matters to the user we say ourselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
