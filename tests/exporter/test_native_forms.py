"""The native backends' attention and linear layers mean what our operators mean, eagerly, number by number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.exporter.backends.aten import linear
from precast.exporter.backends.aten.attention import AttentionContext, cached_attention, cross_attention
from precast.exporter.operators import attention as ours
from precast.exporter.quantize.linear import Packed, multiply
from precast.exporter.quantize.methods import Scheme, round_to_nearest, search
from precast.exporter.quantize.scheme import QuantParams, encode, split_groups

HEADS, KV_HEADS, WIDTH, CAPACITY = 4, 2, 8, 12


def same(x):
    return x


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    past=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    length=st.sampled_from([1, 1, 2, 5]),
    mask=st.sampled_from(["causal", "window", "chunk"]),
    window=st.integers(1, 6),
    softcap=st.sampled_from([0.0, 3.0]),
    extras=st.sets(st.sampled_from(["sinks", "slopes", "bias", "int8"])),
    data=st.data(),
)
def test_attention_in_place_is_the_operator(seed, past, length, mask, window, softcap, extras, data):
    new = torch.tensor([data.draw(st.integers(1, length)) for _ in past], dtype=torch.int32)
    past = torch.tensor(past, dtype=torch.int32)
    needed = int((past + length).max())
    looked = data.draw(st.integers(max(2, min(needed, CAPACITY)), CAPACITY))
    torch.manual_seed(seed)
    batch = len(past)
    q = torch.randn(batch, HEADS, length, WIDTH)
    k, v = torch.randn(2, batch, KV_HEADS, length, WIDTH)
    if "int8" in extras:
        caches = torch.randint(-128, 128, (2, batch, KV_HEADS, CAPACITY + 1, WIDTH)).to(torch.int8)
    else:
        caches = torch.randn(2, batch, KV_HEADS, CAPACITY + 1, WIDTH)
    scales = torch.rand(2, KV_HEADS, WIDTH) / 20 + 0.01
    optional = [
        torch.randn(HEADS) if "sinks" in extras else None,
        torch.rand(HEADS) if "slopes" in extras else None,
        *(scales if "int8" in extras else (None, None)),
        torch.randn(1, HEADS, length, CAPACITY) if "bias" in extras else None,
    ]
    common = (past, new, 0.3, mask, window, softcap, *optional)
    expected, keys, values = ours.cached_attention(q, k, v, caches[0, :, :, :-1], caches[1, :, :, :-1], *common)
    held = caches.clone()
    found = cached_attention(AttentionContext(torch.arange(looked), same), q, k, v, held[0], held[1], *common)
    for row in range(batch):
        count, total = int(new[row]), int(past[row] + new[row])
        assert torch.allclose(found[row, :, :count], expected[row, :, :count], atol=2e-5)
        assert torch.equal(held[0, row, :, :total], keys[row, :, :total])
        assert torch.equal(held[1, row, :, :total], values[row, :, :total])
        assert torch.equal(held[0, row, :, total:], caches[0, row, :, total:]), "a padded row was written"


def test_attention_to_an_encoder_is_the_operator():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 6)
    for mask in (None, torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])):
        expected = ours.cross_attention(q, k, v, mask, 0.4)
        found = cross_attention(AttentionContext(torch.arange(7), same), q, k, v, mask, 0.4)
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (1, 40)])
@pytest.mark.parametrize("outputs", [3, 7, 24, 26])
@pytest.mark.parametrize(
    "scheme",
    [Scheme(8, 48, "symmetric"), Scheme(8, 16, "integer"), Scheme(8, 32, "integer"), Scheme(4, 16, "symmetric"),
     Scheme(4, 16, "float"), Scheme(8, 48, "integer")],
    ids=str,
)  # fmt: skip
def test_products_with_codes_are_the_operator(scheme, outputs, rows):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(outputs, 48), torch.randn(outputs), torch.randn(*rows, 48)
    packed = Packed(search(weight, scheme) if scheme.bits == 4 else round_to_nearest(weight, scheme))
    parts = (packed.codes, packed.scales, packed.zeros)
    sizes = (packed.bits, packed.group, packed.columns, packed.extra)
    expected = multiply(x, *parts, bias, *sizes)
    for is_few in {linear.has_few_rows(x), True}:
        found = linear.quantized_linear(x, linear.PackedWeight(*parts, *sizes), bias, same, torch.float32, None, is_few)
        assert torch.allclose(found, expected, atol=1e-4)
        assert found.is_contiguous(), "what comes after counts on it"


def test_a_row_with_one_scale_is_exact_in_bfloat16():
    weight = torch.randn(5, 64)
    groups = split_groups(weight, 64)
    scales = groups.abs().amax(-1) / 127
    grid = encode(groups, QuantParams(scales, torch.full_like(scales, 128), None), 8, 64)
    packed = Packed(grid)
    codes = linear.PackedWeight(packed.codes, packed.scales, packed.zeros, 8, 64, 64, 0)
    matrix, left = codes.dequantize(torch.bfloat16, None)
    assert torch.equal(matrix.float() * left[:, None], grid.dequantize())


@pytest.mark.parametrize("outputs", [1, 6, 7, 64])
def test_few_rows_are_summed_and_many_multiplied(outputs):
    weight, bias = torch.randn(outputs, 16).bfloat16(), torch.randn(outputs)
    x = torch.randn(1, linear.FEW, 16)
    assert linear.has_few_rows(x)
    assert not linear.has_few_rows(torch.randn(1, linear.FEW + 1, 16))
    found = linear.gemv(x, weight, bias, same)
    assert torch.allclose(found, torch.nn.functional.linear(x, weight.float(), bias), atol=1e-5)
