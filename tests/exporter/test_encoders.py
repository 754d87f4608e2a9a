"""Every encoder family and task: any length, batch and padding side gives the eager answer of the unpadded row."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.runtime import CompiledModel

AUTO = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}
LENGTH = 48
rows_of_any_length = st.lists(
    st.lists(st.integers(3, tiny.VOCABULARY - 1), min_size=1, max_size=LENGTH), min_size=1, max_size=7
)
many = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=[(family, task) for family in tiny.ENCODERS for task in AUTO], ids="-".join)
def pair(request, checkpoint, artifact):
    """Checkpoint, class and artifact with lengths 16 and 48 at batch 3; more rows run in slices."""
    family, task = request.param
    source = checkpoint(family, AUTO[task])
    compiled = artifact(source, batch_size=3, sequence_length=(16, LENGTH), dynamic_batch_size=True)
    model = CompiledModel.from_pretrained(compiled)
    assert model.artifact.contract.task == task, "the task is inferred"
    return source, AUTO[task], model


@many
@given(rows=rows_of_any_length, side=st.sampled_from(["left", "right"]))
def test_outputs_are_those_of_the_unpadded_row(pair, rows, side):
    source, auto, model = pair
    ids, mask = oracle.padded(rows, side)
    outputs = model(ids, mask)
    cut = {spec.name: "length" in spec.slice for spec in model.variant.graphs[0].outputs}
    for index, row in enumerate(rows):
        with torch.inference_mode():
            expected = oracle.eager(source, auto)(torch.tensor([row]), attention_mask=torch.ones(1, len(row)))
        for name, values in outputs.items():
            found = values[index][mask[index] == 1] if cut[name] else values[index]
            assert values.shape[: 1 + cut[name]] == ids.shape[: 1 + cut[name]]
            assert np.abs(found - expected[name][0].numpy()).max() < 1e-4


def test_segments_count(checkpoint, artifact):
    """token_type_ids reach the model, and being all zero is what leaving them out means."""
    source = checkpoint("bert", "AutoModel")
    model = CompiledModel.from_pretrained(artifact(source, batch_size=3, sequence_length=(16, LENGTH)))
    ids = np.array([[5, 6, 7, 8]])
    types = np.array([[0, 0, 1, 1]])
    with torch.inference_mode():
        expected = oracle.eager(source, "AutoModel")(torch.from_numpy(ids), token_type_ids=torch.from_numpy(types))
    found = model(ids, token_type_ids=types).last_hidden_state
    assert np.abs(found - expected.last_hidden_state.numpy()).max() < 1e-4
    zeros = model(ids, token_type_ids=np.zeros_like(ids)).last_hidden_state
    assert np.array_equal(model(ids).last_hidden_state, zeros)
    assert not np.allclose(found, zeros, atol=1e-3)


def test_the_smallest_bucket_that_fits_is_used(encoder, monkeypatch):
    model = CompiledModel.from_pretrained(encoder)
    used = []
    bind = model._engine.bind
    monkeypatch.setattr(model._engine, "bind", lambda name, *arrays: used.append(name) or bind(name, *arrays))
    for length in (1, 16, 17, 48):
        model(np.ones((1, length), np.int64) * 5)
    assert used == ["model_16", "model_16", "model_48", "model_48"]


def test_attention_holes_mean_what_they_mean_to_transformers(checkpoint, artifact):
    """A zero between ones is no padding: the token keeps its position and is not attended to."""
    source = checkpoint("bert", "AutoModel")
    model = CompiledModel.from_pretrained(artifact(source, batch_size=3, sequence_length=(16, LENGTH)))
    ids, mask = np.array([[5, 6, 7, 8, 9]]), np.array([[1, 1, 0, 1, 1]])
    with torch.inference_mode():
        expected = oracle.eager(source, "AutoModel")(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    found = model(ids, mask).last_hidden_state
    assert np.abs(found - expected.last_hidden_state.numpy())[mask == 1].max() < 1e-4
