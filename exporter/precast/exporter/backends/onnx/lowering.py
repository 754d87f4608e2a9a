"""ExportedProgram -> onnx_ir.Model, with cached attention as one GroupQueryAttention node."""

from __future__ import annotations

import re
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import FLOAT, INT32, INT64
from onnxscript import opset20 as op
from torch.onnx.errors import OnnxExporterError

from precast.runtime.artifact.schema import Graph
from precast.runtime.errors import ExportError

from ...kinds.trace import Program
from ...operators import attention  # noqa: F401  (registers an operator that is lowered here)
from ...operators import lora as _lora_operator  # noqa: F401  (registers another)
from ...quantize import int8_linear, linear  # noqa: F401  (registers the others)
from ...quantize.int8_linear import DYNAMIC_STEPS, LEAST_SCALE
from ...quiet import silence
from . import standard_attention
from .contrib_ops import microsoft, own
from .torch_patches import keep_translations

__all__ = ["LOGGERS", "lower"]

OPSET = 20
STANDARD_OPSET = 21
"""The first whose DequantizeLinear takes weights of 4 bits, and a scale for each group of them."""
LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")


def lower(program: Program, *, is_standard: bool = False) -> ir.Model:
    """Convert to ONNX with the graph's own input and output names; with `is_standard` attention in standard operators.
    Quantized layers are ONNX Runtime's either way. Raises ExportError."""
    try:
        with silence(*LOGGERS), keep_translations():
            converted = _convert(program, is_standard)
    except OnnxExporterError as error:
        raise ExportError(f"This model cannot be converted to ONNX. {_first_cause(error)}") from error
    assert converted is not None, "torch.onnx.export returns a program when it is given no file"
    return converted.model


def _convert(program: Program, is_standard: bool) -> torch.onnx.ONNXProgram | None:
    attention_for = standard_attention.attention_for if is_standard else _attention_for
    return torch.onnx.export(
        program.exported,
        (),
        input_names=[spec.name for spec in program.graph.inputs],
        output_names=[spec.name for spec in program.graph.outputs],
        opset_version=STANDARD_OPSET if is_standard else OPSET,
        custom_translation_table={
            torch.ops.precast.cached_attention.default: attention_for(program.graph),
            torch.ops.precast.cross_attention.default: (
                standard_attention.cross_attention if is_standard else _cross_attention
            ),
            torch.ops.precast.lora.default: _lora,
            torch.ops.precast.quantized_linear.default: _quantized_linear,
            torch.ops.precast.quantized_embedding.default: _quantized_embedding,
            torch.ops.precast.int8_linear.default: _int8_linear,
        },
        verbose=False,
    )


def _first_cause(error: BaseException) -> str:
    """The first line of the error at the end of the chain of causes, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def _attention_for(graph: Graph) -> Any:
    """Make the translation of cached attention. Windows and chunks of at least the capacity are plain causal masks."""

    def cached_attention(  # type: ignore[no-untyped-def]
        q, k, v, k_cache, v_cache, past_lengths, new_lengths,
        scale: float, mask: str, window: int, softcap: float, sinks=None, slopes=None, k_scales=None, v_scales=None,
        bias=None,
    ):  # fmt: skip
        """`GroupQueryAttention` of com.microsoft.

        It takes [B, S, heads * D]; its `seqlens_k` is the index of the last key (total - 1); it recognizes a first
        prompt by `total_sequence_length == S`, so the total counts padded queries too. A `local_window_size` of w
        covers w keys, the query's own included, as transformers' sliding_window does.
        """
        bounded = mask != "causal" and window < graph.capacity
        length = op.Cast(op.Shape(q, start=2, end=3), to=INT32.dtype)
        total = op.Squeeze(op.Add(op.ReduceMax(past_lengths, keepdims=1), length))
        last = op.Sub(op.Add(past_lengths, new_lengths), op.Constant(value=ir.tensor([1], ir.DataType.INT32)))
        options: dict[str, Any] = {"softcap": softcap} if softcap else {}
        if bias is not None:
            bias = _slice_bias(bias, total)
        if slopes is not None:
            bias = _add_bias(bias, _slope_bias(slopes, length, total))
        if bounded and mask == "chunk":
            bias = _add_bias(bias, _chunk_bias(past_lengths, length, total, window))
        elif bounded:
            options["local_window_size"] = window
        if k_scales is not None:
            options |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        output, k_new, v_new = microsoft().GroupQueryAttention(
            _merge_heads(q), _merge_heads(k), _merge_heads(v), k_cache, v_cache, last, total, None, None, None, bias,
            sinks, k_scales, v_scales,
            num_heads=q.shape[1], kv_num_heads=k.shape[1], scale=scale, **options,
        )  # fmt: skip
        split = op.Constant(value_ints=[0, 0, q.shape[1], q.shape[3]])
        return op.Transpose(op.Reshape(output, split), perm=[0, 2, 1, 3]), k_new, v_new

    return cached_attention


def _cross_attention(q, k, v, mask, scale: float):  # type: ignore[no-untyped-def]
    """`MultiHeadAttention`, which takes keys and values [B, H, L, D] without a transpose."""
    padding = None if mask is None else op.Cast(mask, to=INT32.dtype)
    output = microsoft().MultiHeadAttention(_merge_heads(q), k, v, None, padding, num_heads=q.shape[1], scale=scale)
    split = op.Constant(value_ints=[0, 0, q.shape[1], v.shape[3]])
    return op.Transpose(op.Reshape(output, split), perm=[0, 2, 1, 3])


def _add_bias(one: Any, other: Any) -> Any:
    return other if one is None else op.Add(one, other)


def _slice_bias(bias: Any, total: Any) -> Any:
    """[..., C] -> [..., T]: the part for cache positions in use."""
    end = op.Cast(op.Reshape(total, op.Constant(value_ints=[1])), to=INT64.dtype)
    return op.Slice(bias, op.Constant(value_ints=[0]), end, op.Constant(value_ints=[3]))


def _slope_bias(slopes: Any, length: Any, total: Any) -> Any:
    """[1, H, S, T]: slope times the key's distance from the last key. The operator defines the distance from the query,
    but a softmax is unchanged by a constant per query."""
    distance = op.Cast(op.Sub(_count_up_to(total), op.Sub(total, _int32(1))), to=FLOAT.dtype)
    by_head = op.Mul(op.Reshape(slopes, op.Constant(value_ints=[1, -1, 1, 1])), distance)
    one = op.Constant(value_ints=[1])
    return op.Expand(by_head, op.Concat(one, one, op.Cast(length, to=INT64.dtype), one, axis=0))


def _chunk_bias(past_lengths: Any, length: Any, total: Any, chunk: int) -> Any:
    """[B, 1, S, T]: 0 for keys in the query's own chunk, else the lowest number."""
    first = op.Reshape(past_lengths, op.Constant(value_ints=[-1, 1, 1, 1]))
    steps = op.Reshape(_count_up_to(op.Squeeze(length)), op.Constant(value_ints=[1, 1, -1, 1]))
    is_seen = op.Equal(op.Div(_count_up_to(total), _int32(chunk)), op.Div(op.Add(first, steps), _int32(chunk)))
    return op.Where(is_seen, _float32(0.0), _float32(torch.finfo(torch.float32).min))


def _count_up_to(limit: Any) -> Any:
    """int32 0, 1, … below a scalar."""
    return op.Range(_int32(0), limit, _int32(1))


def _int32(value: int) -> Any:
    return op.Constant(value=ir.tensor(value, ir.DataType.INT32))


INT8_ACTIVATIONS = 4
"""MatMulNBits' accuracy_level that rounds activations to int8, group by group: the only one with a fast kernel."""


def _quantized_linear(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, bias, bits: int, group: int, columns: int, extra: int
):
    """`MatMulNBits`; where offsets are held in extra columns, x is followed by the means of its groups."""
    if extra:
        x = op.Concat(x, _group_means(x, group), axis=-1)
    return microsoft().MatMulNBits(
        x, codes, scales, zeros, None, bias,
        K=columns + extra, N=codes.shape[0], bits=bits, block_size=group, accuracy_level=INT8_ACTIVATIONS,
    )  # fmt: skip


def _lora(y, x, weights, slots):  # type: ignore[no-untyped-def]
    """`Lora` of our own, for `passes` to write out."""
    return own().Lora(y, x, weights, slots)


def _group_means(x: Any, group: int) -> Any:
    """`AveragePool`, which needs three dimensions at least; a router's input has two, and latents that are expanded for
    each head have four."""
    if (between := len(x.shape) - 3) >= 0:
        window = [1] * between + [group]
        return op.AveragePool(x, kernel_shape=window, strides=window)
    front = op.Constant(value_ints=[0])
    return op.Squeeze(op.AveragePool(op.Unsqueeze(x, front), kernel_shape=[group], strides=[group]), front)


def _quantized_embedding(ids, codes, scales, zeros, bits: int, group: int):  # type: ignore[no-untyped-def]
    """`GatherBlockQuantized` over the rows of a table."""
    return microsoft().GatherBlockQuantized(
        codes, ids, scales, zeros, bits=bits, block_size=group, gather_axis=0, quantize_axis=1
    )


def _int8_linear(x, codes, scales, bias, balance, x_scale, x_zero):  # type: ignore[no-untyped-def]
    """`MatMulIntegerToFloat` of activations without a sign: the only codes that it has fast kernels for. It takes one
    scale of them, so that those of tokens go around it."""
    x = x if balance is None else op.Mul(x, balance)
    if x_scale is not None:
        rounded = op.QuantizeLinear(x, x_scale, x_zero)
        return microsoft().MatMulIntegerToFloat(rounded, codes, x_scale, scales, x_zero, None, bias)
    one, middle = _float32(1.0), op.Constant(value=ir.tensor(128, ir.DataType.UINT8))
    largest = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]), keepdims=1)
    steps = op.Max(op.Mul(largest, _float32(1 / DYNAMIC_STEPS)), _float32(LEAST_SCALE))
    rounded = op.QuantizeLinear(op.Div(x, steps), one, middle)
    product = op.Mul(microsoft().MatMulIntegerToFloat(rounded, codes, one, scales, middle), steps)
    return product if bias is None else op.Add(product, bias)


def _float32(value: float) -> Any:
    return op.Constant(value=ir.tensor(value, ir.DataType.FLOAT))


def _merge_heads(x: Any) -> Any:
    """[B, heads, S, D] -> [B, S, heads * D]."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
