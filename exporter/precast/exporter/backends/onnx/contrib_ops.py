"""Schemas of the `com.microsoft` operators that we emit, and of our own: onnxscript writes only nodes whose schema it
knows.

They have the inputs and attributes that we use. Source: ONNX Runtime's docs/ContribOperators.md.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx.defs
from onnx.defs import OpSchema
from onnxscript.values import Opset

__all__ = ["LORA", "microsoft", "own"]

_DOMAIN = "com.microsoft"
_OWN_DOMAIN, LORA = "precast", "Lora"
"""An operator that no runtime has: a pass writes others in its place."""
_OPTIONAL = OpSchema.FormalParameterOption.Optional
_INT, _FLOAT, _STRING = OpSchema.AttrType.INT, OpSchema.AttrType.FLOAT, OpSchema.AttrType.STRING


@cache
def microsoft() -> Any:
    """The opset `com.microsoft` 1, with our schemas registered."""
    for schema in (
        _group_query_attention(),
        _multi_head_attention(),
        _matmul_nbits(),
        _gather_block_quantized(),
        _matmul_integer_to_float(),
    ):
        onnx.defs.register_schema(schema)
    return Opset(_DOMAIN, 1)


@cache
def own() -> Any:
    """The opset `precast` 1, with our schemas registered."""
    onnx.defs.register_schema(
        OpSchema(
            LORA,
            _OWN_DOMAIN,
            1,
            inputs=[*(_parameter(name, "T") for name in ("y", "x", "weights")), _parameter("slots", "I")],
            outputs=[_parameter("sum", "T")],
            type_constraints=[("T", ["tensor(float)"], ""), ("I", ["tensor(int64)"], "")],
        )
    )
    return Opset(_OWN_DOMAIN, 1)


def _group_query_attention() -> OpSchema:
    optional = ["cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink"]
    return OpSchema(
        "GroupQueryAttention",
        _DOMAIN,
        1,
        inputs=[
            *(_parameter(name, "T") for name in ("query", "key", "value")),
            *(_parameter(name, "T_CACHE") for name in ("past_key", "past_value")),
            *(_parameter(name, "M") for name in ("seqlens_k", "total_sequence_length")),
            *(_parameter(name, "P" if name == "position_ids" else "T", _OPTIONAL) for name in optional),
            *(_parameter(name, "T_KV_SCALE", _OPTIONAL) for name in ("k_scale", "v_scale")),
        ],
        outputs=[
            _parameter("output", "T"),
            *(_parameter(name, "T_CACHE") for name in ("present_key", "present_value")),
        ],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)"], ""),
            ("T_CACHE", ["tensor(float)", "tensor(float16)", "tensor(int8)"], ""),
            ("T_KV_SCALE", ["tensor(float)"], ""),
            ("M", ["tensor(int32)"], ""),
            ("P", ["tensor(int64)"], ""),
        ],
        attributes=[
            *(OpSchema.Attribute(name, _INT, required=True) for name in ("num_heads", "kv_num_heads")),
            *(OpSchema.Attribute(name, _FLOAT, required=False) for name in ("scale", "softcap")),
            *(OpSchema.Attribute(name, _INT, required=False) for name in ("local_window_size", "kv_cache_bit_width")),
            *(OpSchema.Attribute(name, _STRING, required=False) for name in ("k_quant_type", "v_quant_type")),
        ],
    )


def _multi_head_attention() -> OpSchema:
    return OpSchema(
        "MultiHeadAttention",
        _DOMAIN,
        1,
        inputs=[
            *(_parameter(name, "T") for name in ("query", "key", "value")),
            _parameter("bias", "T", _OPTIONAL),
            _parameter("key_padding_mask", "M", _OPTIONAL),
        ],
        outputs=[_parameter("output", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], ""), ("M", ["tensor(int32)"], "")],
        attributes=[
            OpSchema.Attribute("num_heads", _INT, required=True),
            OpSchema.Attribute("scale", _FLOAT, required=False),
        ],
    )


def _matmul_nbits() -> OpSchema:
    return OpSchema(
        "MatMulNBits",
        _DOMAIN,
        1,
        inputs=[
            _parameter("A", "T1"),
            _parameter("B", "T2"),
            _parameter("scales", "T1"),
            _parameter("zero_points", "T2", _OPTIONAL),
            _parameter("g_idx", "T4", _OPTIONAL),
            _parameter("bias", "T1", _OPTIONAL),
        ],
        outputs=[_parameter("Y", "T1")],
        type_constraints=[
            ("T1", ["tensor(float)"], ""),
            ("T2", ["tensor(uint8)"], ""),
            ("T4", ["tensor(int32)"], ""),
        ],
        attributes=[
            OpSchema.Attribute(name, _INT, required=True) for name in ("K", "N", "bits", "block_size", "accuracy_level")
        ],
    )


def _gather_block_quantized() -> OpSchema:
    return OpSchema(
        "GatherBlockQuantized",
        _DOMAIN,
        1,
        inputs=[
            _parameter("data", "T1"),
            _parameter("indices", "Tind"),
            _parameter("scales", "T2"),
            _parameter("zero_points", "T1", _OPTIONAL),
        ],
        outputs=[_parameter("output", "T2")],
        type_constraints=[
            ("T1", ["tensor(uint8)"], ""),
            ("T2", ["tensor(float)"], ""),
            ("Tind", ["tensor(int64)"], ""),
        ],
        attributes=[
            OpSchema.Attribute(name, _INT, required=True)
            for name in ("bits", "block_size", "gather_axis", "quantize_axis")
        ],
    )


def _matmul_integer_to_float() -> OpSchema:
    return OpSchema(
        "MatMulIntegerToFloat",
        _DOMAIN,
        1,
        inputs=[
            _parameter("A", "T1"),
            _parameter("B", "T2"),
            *(_parameter(name, "T3") for name in ("a_scale", "b_scale")),
            _parameter("a_zero_point", "T1", _OPTIONAL),
            _parameter("b_zero_point", "T2", _OPTIONAL),
            _parameter("bias", "T3", _OPTIONAL),
        ],
        outputs=[_parameter("Y", "T3")],
        type_constraints=[
            ("T1", ["tensor(uint8)"], ""),
            ("T2", ["tensor(int8)"], ""),
            ("T3", ["tensor(float)"], ""),
        ],
    )


def _parameter(name: str, kind: str, option: Any = OpSchema.FormalParameterOption.Single) -> OpSchema.FormalParameter:
    return OpSchema.FormalParameter(name, kind, param_option=option)
