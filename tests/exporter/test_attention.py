"""The operator's meaning, against a loop that follows its definition word by word."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from precast.exporter.decoder import hooks
from precast.exporter.decoder.attention import cached_attention
from precast.runtime.errors import ExportError

HEADS, KV_HEADS, WIDTH, CAPACITY = 4, 2, 8, 12


def by_the_book(q, keys, values, position, scale, mask, window, softcap, sink, slope):
    """One query of one head over the keys that its row has: scores, softmax, weighted sum, in plain Python."""
    scores = []
    for place, key in enumerate(keys):
        seen = place <= position
        if mask == "window":
            seen = seen and place > position - window
        if mask == "chunk":
            seen = seen and place // window == position // window
        score = float(q @ key) * scale
        if softcap:
            score = softcap * math.tanh(score / softcap)
        scores.append(score + slope * (place - position) if seen else -math.inf)
    weights = [math.exp(score) for score in scores]
    total = sum(weights) + (math.exp(sink) if sink is not None else 0)
    return sum(weight / total * value for weight, value in zip(weights, values, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    past=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    length=st.integers(1, 5),
    mask=st.sampled_from(["causal", "window", "chunk"]),
    window=st.integers(1, 6),
    softcap=st.sampled_from([0.0, 3.0]),
    with_sinks=st.booleans(),
    with_slopes=st.booleans(),
    data=st.data(),
)
def test_ragged_rows_attend_to_what_they_have(seed, past, length, mask, window, softcap, with_sinks, with_slopes, data):
    new = [data.draw(st.integers(1, length)) for _ in past]
    torch.manual_seed(seed)
    batch = len(past)
    q = torch.randn(batch, HEADS, length, WIDTH)
    k, v = torch.randn(2, batch, KV_HEADS, length, WIDTH)
    k_cache, v_cache = torch.randn(2, batch, KV_HEADS, CAPACITY, WIDTH)
    sinks, slopes = torch.randn(HEADS), torch.rand(HEADS)
    before = k_cache.clone()
    output, k_new, v_new = cached_attention(
        q, k, v, k_cache, v_cache, torch.tensor(past, dtype=torch.int32), torch.tensor(new, dtype=torch.int32),
        0.3, mask, window, softcap, sinks if with_sinks else None, slopes if with_slopes else None,
    )  # fmt: skip
    assert torch.equal(k_cache, before), "the operator is functional"
    for row in range(batch):
        total = past[row] + new[row]
        assert torch.equal(k_new[row, :, : past[row]], k_cache[row, :, : past[row]])
        assert torch.equal(k_new[row, :, past[row] : total], k[row, :, : new[row]])
        assert torch.equal(k_new[row, :, total:], k_cache[row, :, total:]), "a padded row was written"
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            for place in range(new[row]):
                expected = by_the_book(
                    q[row, head, place], k_new[row, shared, :total], v_new[row, shared, :total], past[row] + place,
                    0.3, mask, window, softcap,
                    float(sinks[head]) if with_sinks else None, float(slopes[head]) if with_slopes else 0.0,
                )  # fmt: skip
                assert torch.allclose(output[row, head, place], expected, atol=1e-5)


def test_masks_are_recognised_by_what_they_are_made_of():
    assert hooks._mask(mask_function=causal_mask_function).kind == "causal"
    window = hooks._mask(mask_function=sliding_window_causal_mask_function(5), local_size=5)
    assert (window.kind, window.window) == ("window", 5)
    chunk = hooks._mask(mask_function=chunked_causal_mask_function(7, torch.zeros(1)), local_size=7)
    assert (chunk.kind, chunk.window) == ("chunk", 7)


def test_an_unknown_mask_is_refused_by_name():
    def around_images(batch, head, q, k):
        return k > q

    with pytest.raises(ExportError, match="around_images"):
        hooks._mask(mask_function=or_masks(causal_mask_function, around_images))


def test_keys_changed_after_the_cache_are_refused():
    past = [(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))]
    lengths = torch.zeros(1, dtype=torch.int32)
    with hooks.tracing(hooks.Caches(past, lengths, lengths)) as cache:
        key, value = cache.update(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), 0)
        with pytest.raises(ExportError, match="between the cache and attention"):
            hooks.attend(key, key * 2, value, scale=1.0)


def test_an_argument_that_would_change_the_result_is_refused():
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ExportError, match="alibi_bias"):
        hooks._attention(torch.nn.Identity(), x, x, x, None, alibi_bias=x)
