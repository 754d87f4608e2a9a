"""Caches in int8, with scales from calibration text, and in float16: answers close to eager's, whatever the batch and
the padding."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from precast.exporter.architectures.cache_names import find_cache
from precast.exporter.operators.attention import cached_attention
from precast.exporter.quantize.kv_cache import cache_scales
from precast.runtime import CompiledModelForCausalLM
from precast.runtime.artifact import read_artifact

ROWS = [[5, 9, 3, 40, 41, 42, 7], [11, 12], [100, 3, 3, 9, 60, 61]]


@pytest.mark.parametrize("family", ["llama", "mistral", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_stay_close(checkpoint, artifact, family, side):
    source = checkpoint(family, num_hidden_layers=2)
    path = artifact(source, batch_size=3, kv_cache="int8")
    variant = read_artifact(path).contract.variants[0]
    assert (variant.kv_cache, {layer.dtype for layer in variant.graphs[0].cache}) == ("int8", {"int8"})
    ids, mask = oracle.padded(ROWS, side)
    found = CompiledModelForCausalLM.from_pretrained(path)(ids, mask).logits
    for row, values, keep in zip(ROWS, found, mask, strict=True):
        expected = oracle.logits(source, row)
        difference = np.abs(values[keep == 1] - np.asarray(expected)).max()
        assert 0 < difference < 0.05 * np.abs(np.asarray(expected)).max(), "rounded, and not by much"


@pytest.mark.parametrize("backend", ["export", pytest.param("aoti", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_caches_of_float16_are_closer(checkpoint, artifact, backend, family):
    source = checkpoint(family, num_hidden_layers=2)
    path = artifact(source, batch_size=3, backend=backend, kv_cache="float16")
    variant = read_artifact(path).contract.variants[0]
    assert (variant.kv_cache, {layer.dtype for layer in variant.graphs[0].cache}) == ("float16", {"float16"})
    ids, mask = oracle.padded(ROWS, "left")
    found = CompiledModelForCausalLM.from_pretrained(path)(ids, mask).logits
    for row, values, keep in zip(ROWS, found, mask, strict=True):
        expected = np.asarray(oracle.logits(source, row))
        difference = np.abs(values[keep == 1] - expected).max()
        assert 1e-6 < difference < 1e-3 * np.abs(expected).max(), "rounded, and by very little"


@pytest.mark.parametrize("stored", [{"kv_cache": "int8"}, {"kv_cache": "float16", "backend": "export"}])
def test_decoding_reads_what_was_written(checkpoint, artifact, stored):
    """Token by token, from the cache, the logits are those of one step over all."""
    model = CompiledModelForCausalLM.from_pretrained(
        artifact(checkpoint("llama", num_hidden_layers=2), batch_size=3, **stored)
    )
    whole = model.logits_at([np.array(ROWS[0])], [list(range(len(ROWS[0])))])[0]
    model.reset()
    session = model._session
    session.prefill([np.array(ROWS[0][:1])])
    for index, token in enumerate(ROWS[0][1:], start=1):
        np.testing.assert_allclose(session.append([token])[0], whole[index], atol=1e-3)


def test_scales_just_fit_what_is_cached(checkpoint):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint("llama", num_hidden_layers=2), attn_implementation="eager"
    ).eval()
    row = torch.tensor(ROWS[0])
    with torch.no_grad():
        layer = find_cache(model(input_ids=row[None], use_cache=True)).layers[0]
    keys, values = cache_scales(model, [row], [layer.keys.shape[-1] + 8] * 2)[:2]
    torch.testing.assert_close(127 * keys[:, :-8], layer.keys[0].abs().amax(1))
    torch.testing.assert_close(127 * values[:, :-8], layer.values[0].abs().amax(1))
    assert (keys[:, -8:] == 1).all(), "channels that only the compiled cache has"


def test_the_operator_rounds_to_the_scales():
    k, cache = torch.tensor([[[[0.26, -9.0]]]]), torch.zeros(1, 1, 4, 2, dtype=torch.int8)
    lengths, scales = torch.tensor([0], dtype=torch.int32), torch.tensor([[0.1, 0.05]])
    output, k_cache, _ = cached_attention(
        k, k, k, cache, cache, lengths, lengths + 1, 1.0, "causal", 0, 0.0, None, None, scales, scales
    )
    assert k_cache[0, 0, 0].tolist() == [3, -128]
    torch.testing.assert_close(output[0, 0, 0], torch.tensor([0.3, -6.4]))


def test_the_operator_rounds_to_the_caches_dtype():
    k, cache = torch.tensor([[[[0.1, 3000.3]]]]), torch.zeros(1, 1, 4, 2, dtype=torch.float16)
    lengths = torch.tensor([0], dtype=torch.int32)
    output, k_cache, _ = cached_attention(
        k, k, k, cache, cache, lengths, lengths + 1, 1.0, "causal", 0, 0.0, None, None
    )
    assert (k_cache.dtype, output.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(output[0, 0, 0], k.half().float()[0, 0, 0])
