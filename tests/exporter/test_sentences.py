"""Sentence embeddings are sentence-transformers', whatever the padding; the oracle pools unpadded rows by hand."""

from __future__ import annotations

import json
import shutil

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from precast.exporter import ExportOptions, export
from precast.runtime import CompiledModel
from precast.runtime.errors import CheckpointError

ROOT = "sentence_transformers.models."
WAYS = {
    "cls_token": lambda states: states[0],
    "max_tokens": lambda states: states.max(0),
    "mean_tokens": lambda states: states.mean(0),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / np.sqrt(len(states)),
    "weightedmean_tokens": lambda states: np.average(states, 0, np.arange(1, len(states) + 1)),
    "lasttoken": lambda states: states[-1],
}


def _with_modules(source, target, kinds, pooling=()):
    shutil.copytree(source, target)
    modules = [{"idx": 0, "name": "0", "path": "", "type": ROOT + "Transformer"}]
    for index, kind in enumerate(kinds, 1):
        folder = target / f"{index}_{kind}"
        folder.mkdir()
        modules.append({"idx": index, "name": str(index), "path": folder.name, "type": ROOT + kind})
        if kind == "Pooling":
            config = {f"pooling_mode_{way}": way in pooling for way in WAYS}
            (folder / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **config}))
        if kind == "Dense":
            generator = torch.Generator().manual_seed(1)
            width = 64 * len(pooling)
            config = {"in_features": width, "out_features": 12, "bias": True}
            (folder / "config.json").write_text(
                json.dumps({**config, "activation_function": "torch.nn.modules.activation.Tanh"})
            )
            weights = {
                "linear.weight": torch.randn(12, width, generator=generator) / 8,
                "linear.bias": torch.ones(12) / 9,
            }
            save_file(weights, folder / "model.safetensors")
    (target / "modules.json").write_text(json.dumps(modules))
    return target


@pytest.fixture(scope="module")
def sentences(checkpoint, tmp_path_factory):
    source = checkpoint("bert", "AutoModel")
    folder = tmp_path_factory.mktemp("sentences")
    made = _with_modules(source, folder / "source", ["Pooling", "Dense", "Normalize"], tuple(WAYS))
    options = ExportOptions(batch_size=2, sequence_length=(24,), dynamic_batch_size=True)
    artifact = export(str(made), folder / "out", options)
    assert artifact.contract.variants[0].accuracy.status == "passed"
    return source, made, CompiledModel.from_pretrained(artifact.path)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(st.integers(3, 300), min_size=1, max_size=24), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
)
def test_all_ways_of_pooling_then_dense_then_normalize(sentences, rows, side):
    source, made, model = sentences
    ids, mask = oracle.padded(rows, side)
    output = model(ids, mask)
    assert list(output) == ["last_hidden_state", "sentence_embedding"]
    assert output.sentence_embedding.shape == (len(rows), 12)
    with torch.inference_mode():
        for row, found in zip(rows, output.sentence_embedding, strict=True):
            states = oracle.eager(source, "AutoModel")(torch.tensor([row])).last_hidden_state[0].numpy()
            pooled = np.concatenate([pool(states) for pool in WAYS.values()])
            assert np.abs(found - _dense(made, pooled)).max() < 1e-5


def _dense(made, pooled):
    from safetensors.numpy import load_file

    weights = load_file(made / "2_Dense" / "model.safetensors")
    vector = np.tanh(weights["linear.weight"] @ pooled + weights["linear.bias"])
    return vector / np.linalg.norm(vector)


def test_the_hash_of_the_weights_covers_every_module(sentences, checkpoint):
    from precast.exporter.resolve import resolve

    source, _, model = sentences
    plain = resolve(str(source), ExportOptions()).weights_sha256()
    assert model.artifact.contract.source.weights_sha256 != plain


def test_other_modules_are_refused_by_name(checkpoint, tmp_path):
    made = _with_modules(checkpoint("bert", "AutoModel"), tmp_path / "source", ["Pooling", "CNN"], ("mean_tokens",))
    with pytest.raises(CheckpointError, match="a module of the kind CNN; precast knows Transformer, Pooling, Dense"):
        export(str(made), tmp_path / "out", ExportOptions(batch_size=1, sequence_length=(8,)))
