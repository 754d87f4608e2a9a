"""Cached and cross attention in operators of the ONNX standard, which every runtime has."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import FLOAT, INT8, INT64
from onnxscript import opset20 as op

from precast.runtime.artifact.schema import Dim, Graph

__all__ = ["attention_for", "cross_attention"]

_LOWEST = float(np.finfo(np.float32).min)


def attention_for(graph: Graph) -> Any:
    """Make the translation of cached attention. Where the length is free it reads as many cache positions as are in
    use; a graph of fixed sizes reads them all, so that no size inside depends on a value."""
    is_free = isinstance(graph.length, Dim)

    def cached_attention(  # type: ignore[no-untyped-def]
        q, k, v, k_cache, v_cache, past_lengths, new_lengths,
        scale: float, mask: str, window: int, softcap: float, sinks=None, slopes=None, k_scales=None, v_scales=None,
        bias=None,
    ):  # fmt: skip
        """`ScatterND` into the caches, so that a runtime which gives input and output the same memory copies nothing,
        and two `MatMul`. Padding is written, too, at positions that the operator leaves undefined."""
        length = op.Shape(q, start=2, end=3)
        positions = op.Add(op.Unsqueeze(op.Cast(past_lengths, to=INT64.dtype), _ints(1)), _count_up_to(length))
        places = _cache_places(positions, k_cache.shape[0], k_cache.shape[1])
        k_new = op.ScatterND(k_cache, places, _round(k, k_scales))
        v_new = op.ScatterND(v_cache, places, _round(v, v_scales))
        total = op.Reshape(op.Add(op.ReduceMax(positions), _ints(1)), _ints(1)) if is_free else None
        keys, values, bias = (_take(each, total, axis) for each, axis in ((k_new, 2), (v_new, 2), (bias, 3)))
        seen = _ints(graph.capacity) if total is None else total
        distance = op.Sub(_count_up_to(seen), op.Unsqueeze(positions, _ints(2)))
        scores = _scores(q, _widen(keys, k_scales), k.shape[1], scale, softcap, length)
        for each in (_slope_bias(slopes, distance), bias, _mask_bias(distance, positions, seen, mask, window)):
            scores = scores if each is None else op.Add(scores, each)
        return _weigh(_softmax(scores, sinks), _widen(values, v_scales), k.shape[1], q), k_new, v_new

    return cached_attention


def cross_attention(q, k, v, mask, scale: float):  # type: ignore[no-untyped-def]
    """Two `MatMul` with a `Softmax` in between."""
    scores = op.MatMul(op.Mul(q, _floats(scale)), op.Transpose(k, perm=[0, 1, 3, 2]))
    if mask is not None:
        is_padding = op.Equal(op.Cast(mask, to=INT64.dtype), _ints(0))
        scores = op.Add(scores, op.Unsqueeze(op.Where(is_padding, _floats(_LOWEST), _floats(0.0)), _ints(1, 2)))
    return op.MatMul(op.Softmax(scores, axis=-1), v)


def _cache_places(positions: Any, batch: int, heads: int) -> Any:
    """int64 [B, Hkv, S, 3]: slot, head and cache position of each new token."""
    by_slot = op.Unsqueeze(positions, _ints(1, 3))
    shape = op.Concat(_ints(batch, heads), op.Shape(positions, start=1), _ints(1), axis=0)
    slots, of_heads = _column(batch, 0), _column(heads, 1)
    return op.Concat(*(op.Expand(each, shape) for each in (slots, of_heads, by_slot)), axis=-1)


def _column(count: int, axis: int) -> Any:
    """int64 0, 1, … along one of four axes."""
    shape = [count if each == axis else 1 for each in range(4)]
    return op.Constant(value=ir.tensor(np.arange(count).reshape(shape)))


def _round(x: Any, scales: Any) -> Any:
    """New keys or values [B, Hkv, S, D] as caches of int8 hold them."""
    if scales is None:
        return x
    steps = op.Round(op.Div(x, op.Unsqueeze(scales, _ints(0, 2))))
    return op.Cast(op.Clip(steps, _floats(-128.0), _floats(127.0)), to=INT8.dtype)


def _widen(cache: Any, scales: Any) -> Any:
    if scales is None:
        return cache
    return op.Mul(op.Cast(cache, to=FLOAT.dtype), op.Unsqueeze(scales, _ints(0, 2)))


def _take(x: Any, total: Any, axis: int) -> Any:
    """The first `total` positions along an axis; all where that is None."""
    return x if x is None or total is None else op.Slice(x, _ints(0), total, _ints(axis))


def _scores(q: Any, keys: Any, shared: int, scale: float, softcap: float, length: Any) -> Any:
    """[B, H, S, T]; the query heads that read one of the `shared` key heads are rows of one product."""
    heads = q.shape[1]
    scaled = op.Mul(q, _floats(scale))
    grouped = scaled if heads == shared else op.Reshape(scaled, _ints(0, shared, -1, q.shape[3]))
    scores = op.MatMul(grouped, op.Transpose(keys, perm=[0, 1, 3, 2]))
    if heads != shared:
        scores = op.Reshape(scores, op.Concat(_ints(q.shape[0], heads), length, _ints(-1), axis=0))
    return op.Mul(op.Tanh(op.Div(scores, _floats(softcap))), _floats(softcap)) if softcap else scores


def _slope_bias(slopes: Any, distance: Any) -> Any:
    """[B, H, S, T]: ALiBi."""
    if slopes is None:
        return None
    return op.Mul(op.Reshape(slopes, _ints(1, -1, 1, 1)), op.Cast(op.Unsqueeze(distance, _ints(1)), to=FLOAT.dtype))


def _mask_bias(distance: Any, positions: Any, seen: Any, mask: str, window: int) -> Any:
    """[B, 1, S, T]: 0 for keys that a query sees, else the lowest number."""
    visible = op.LessOrEqual(distance, _ints(0))
    if mask == "window":
        visible = op.And(visible, op.Greater(distance, _ints(-window)))
    if mask == "chunk":
        own = op.Unsqueeze(op.Div(positions, _ints(window)), _ints(2))
        visible = op.And(visible, op.Equal(op.Div(_count_up_to(seen), _ints(window)), own))
    return op.Unsqueeze(op.Where(visible, _floats(0.0), _floats(_LOWEST)), _ints(1))


def _softmax(scores: Any, sinks: Any) -> Any:
    """[B, H, S, T], with a column that has no value where there are sinks [H]."""
    if sinks is None:
        return op.Softmax(scores, axis=-1)
    column = op.Expand(op.Reshape(sinks, _ints(1, -1, 1, 1)), op.Concat(op.Shape(scores, end=3), _ints(1), axis=0))
    whole = op.Softmax(op.Concat(scores, column, axis=-1), axis=-1)
    return op.Slice(whole, _ints(0), _ints(-1), _ints(3))


def _weigh(probabilities: Any, values: Any, shared: int, q: Any) -> Any:
    """[B, H, S, D]."""
    if q.shape[1] == shared:
        return op.MatMul(probabilities, values)
    seen = op.Shape(probabilities, start=3)
    grouped = op.Reshape(probabilities, op.Concat(_ints(0, shared, -1), seen, axis=0))
    return op.Reshape(op.MatMul(grouped, values), op.Shape(q))


def _count_up_to(limit: Any) -> Any:
    """int64 0, 1, … below the number in a tensor [1]."""
    return op.Range(_int(0), op.Squeeze(limit), _int(1))


def _int(value: int) -> Any:
    return op.Constant(value=ir.tensor(value, ir.DataType.INT64))


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _floats(value: float) -> Any:
    return op.Constant(value=ir.tensor(value, ir.DataType.FLOAT))
