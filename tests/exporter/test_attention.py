"""The operator's meaning, against a loop that follows its definition word by word."""

from __future__ import annotations

import importlib
import math

import numpy as np
import onnx_ir
import onnxruntime
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

from precast.exporter.architectures import ADAPTERS, TRACEABLE, attention_interface
from precast.exporter.backends.onnx.lowering import lower
from precast.exporter.kinds.trace import Program
from precast.exporter.operators.attention import cached_attention
from precast.runtime.artifact.schema import Dim, Graph, Input, Output
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


@pytest.mark.parametrize(("rows", "function"), [(ADAPTERS, "use_cached_attention"), (TRACEABLE, "make_traceable")])
def test_every_row_of_the_architectures_names_a_function_that_is_there(rows, function):
    assert [module for module in set(rows.values()) if not hasattr(importlib.import_module(module), function)] == []


def test_masks_are_recognised_by_what_they_are_made_of():
    assert attention_interface._mask_function(mask_function=causal_mask_function).kind == "causal"
    window = attention_interface._mask_function(mask_function=sliding_window_causal_mask_function(5), local_size=5)
    assert (window.kind, window.window) == ("window", 5)
    chunk = attention_interface._mask_function(
        mask_function=chunked_causal_mask_function(7, torch.zeros(1)), local_size=7
    )
    assert (chunk.kind, chunk.window) == ("chunk", 7)


def test_an_unknown_mask_is_refused_by_name():
    def around_images(batch, head, q, k):
        return k > q

    with pytest.raises(ExportError, match="around_images"):
        attention_interface._mask_function(mask_function=or_masks(causal_mask_function, around_images))


def test_keys_changed_after_the_cache_are_refused():
    past = [(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))]
    lengths = torch.zeros(1, dtype=torch.int32)
    with attention_interface.use_caches(attention_interface.Caches(past, lengths, lengths)) as cache:
        key, value = cache.update(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), 0)
        with pytest.raises(ExportError, match="between the cache and attention"):
            attention_interface.attend(key, key * 2, value, scale=1.0)


def test_an_argument_that_would_change_the_result_is_refused():
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ExportError, match="alibi_bias"):
        attention_interface._attention_function(torch.nn.Identity(), x, x, x, None, alibi_bias=x)


def test_layers_may_share_the_keys_of_another():
    """Gemma 3n: the second layer attends to what the first has cached, and the cache holds it once."""
    torch.manual_seed(0)
    past = [(torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8))]
    lengths, new = torch.tensor([3], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    caches = attention_interface.Caches(past, lengths, new)
    queries = torch.randn(2, 1, 1, 2, 8)
    with attention_interface.use_caches(caches) as cache:
        key, value = cache.update(torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8), 0)
        first = attention_interface.attend(queries[0], key, value, scale=1.0)
        shared = attention_interface.attend(queries[1], key, value, scale=1.0)
        alone = attention_interface.Caches(past, lengths, new)
    with attention_interface.use_caches(alone) as cache:
        again = attention_interface.attend(queries[1], *cache.update(key, value, 0), scale=1.0)
    assert not torch.equal(first, shared)
    assert torch.equal(shared, again)
    assert torch.equal(caches.present[0][0], alone.present[0][0])


def test_the_mask_of_an_encoder_is_refused_where_a_decoder_attends():
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ExportError, match="bidirectional"):
        attention_interface.attend(x, x, x, scale=1.0, mask=attention_interface.Mask("bidirectional", 0))


class Attention(torch.nn.Module):
    """The operator alone, with 8 wide heads as ONNX Runtime wants them; `more` are its last arguments by name."""

    def __init__(self, mask, window, slopes=None, softcap=0.0, **more):
        super().__init__()
        self.mask, self.window, self.slopes, self.softcap, self.more = mask, window, slopes, softcap, more

    def forward(self, q, k, v, k_cache, v_cache, past, new):
        return cached_attention(
            q, k, v, k_cache, v_cache, past, new, 0.3, self.mask, self.window, self.softcap,
            **{"sinks": None, **self.more}, slopes=self.slopes,
        )  # fmt: skip


NAMES = ["q", "k", "v", "k_cache", "v_cache", "past", "new"]


def lowered(module, batch, *, is_standard=False, cache="float32"):
    """The operator in ONNX Runtime, for any number of new tokens."""
    example = inputs(batch, [0] * batch, [4] * batch, cache)
    length = torch.export.Dim("length", min=1, max=CAPACITY)
    free = {2: length}
    exported = torch.export.export(module, example, dynamic_shapes=(free, free, free, None, None, None, None))
    specs = [
        Input(name=name, dtype="float32", shape=[Dim(min=1, max=CAPACITY)], pad=0) for name in NAMES
    ]  # fmt: skip
    outputs = [Output(name=f"out{index}", dtype="float32", shape=[1], slice=[None]) for index in range(3)]
    graph = Graph(
        name="model", role="decoder", file="pending", batch=batch, length=Dim(min=1, max=CAPACITY), capacity=CAPACITY,
        inputs=specs, outputs=outputs, cache=[],
    )  # fmt: skip
    made = lower(Program(graph, exported), is_standard=is_standard)
    assert {node.domain for node in made.graph} == ({""} if is_standard else {"", "com.microsoft"})
    model = onnx_ir.to_proto(made).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return lambda example: session.run(None, {name: x.numpy() for name, x in zip(NAMES, example, strict=True)})


def inputs(batch, past, new, cache="float32"):
    q = torch.randn(batch, HEADS, max(new), WIDTH)
    k, v = torch.randn(2, batch, KV_HEADS, max(new), WIDTH)
    k_cache, v_cache = torch.randn(2, batch, KV_HEADS, CAPACITY, WIDTH)
    if cache == "int8":
        k_cache, v_cache = (each.mul(40).to(torch.int8) for each in (k_cache, v_cache))
    return q, k, v, k_cache, v_cache, torch.tensor(past, dtype=torch.int32), torch.tensor(new, dtype=torch.int32)


CALLS = {
    "a ragged prompt": (3, [0, 0, 0], [7, 1, 4]),
    "a step after ragged pasts": (3, [9, 0, 4], [1, 1, 1]),
    "a whole cache": (1, [0], [CAPACITY]),
    "more of a prompt": (1, [5], [4]),
    "the last row": (1, [CAPACITY - 1], [1]),
}


def check_calls(module, *, is_standard, cache="float32"):
    """The answers at every kind of call that the runtime makes, and the caches as far as they are in use."""
    sessions = {batch: lowered(module, batch, is_standard=is_standard, cache=cache) for batch in (1, 3)}
    for name, (batch, past, new) in CALLS.items():
        example = inputs(batch, past, new, cache)
        expected, found = module(*example), sessions[batch](example)
        for row in range(batch):
            total = past[row] + new[row]
            assert np.allclose(found[0][row, :, : new[row]], expected[0][row, :, : new[row]], atol=1e-5), name
            assert np.array_equal(found[1][row, :, :total], expected[1][row, :, :total].numpy()), name


KINDS = [(kind, with_slopes) for kind in (("causal", 0), ("window", 3), ("chunk", 4)) for with_slopes in (False, True)]


@pytest.mark.parametrize(("kind", "with_slopes"), KINDS)
def test_onnx_runtime_attends_as_the_operator_means(kind, with_slopes):
    """ALiBi and chunks below the capacity."""
    torch.manual_seed(0)
    slopes = torch.tensor([0.5, 0.07, 1.0, 0.003]) if with_slopes else None
    check_calls(Attention(*kind, slopes), is_standard=False)


FAST = [(("window", 3), False), (("chunk", 4), True)]


@pytest.mark.parametrize(
    ("kind", "with_slopes"), [pytest.param(*each, marks=() if each in FAST else pytest.mark.slow) for each in KINDS]
)
def test_attention_in_standard_operators(kind, with_slopes):
    torch.manual_seed(0)
    check_calls(Attention(*kind, torch.rand(HEADS) if with_slopes else None), is_standard=True)


def test_all_else_that_attention_may_have_in_standard_operators():
    """Caps, sinks, a bias; caches of int8."""
    torch.manual_seed(0)
    bias = torch.randn(1, HEADS, 1, CAPACITY)
    check_calls(Attention("causal", 0, softcap=3.0, sinks=torch.randn(HEADS), bias=bias), is_standard=True)
    k_scales, v_scales = torch.rand(2, KV_HEADS, WIDTH) / 40 + 0.01
    check_calls(Attention("causal", 0, k_scales=k_scales, v_scales=v_scales), is_standard=True, cache="int8")
