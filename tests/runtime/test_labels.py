"""Labels in, loss out: what eager transformers computes on the same rows, padded or not."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tiny
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.runtime import CompiledModel
from precast.runtime.errors import InputError

few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
rows = st.lists(st.lists(st.integers(3, tiny.VOCABULARY - 1), min_size=2, max_size=16), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def pair(checkpoint, artifact):
    """`pair(auto, …)`: the eager model and the compiled one."""

    def make(auto, model_type="bert", **changes):
        path = checkpoint(model_type, auto, **changes)
        shapes = {"sequence_length": (16, 48), "dynamic_batch_size": True} if model_type == "bert" else {}
        if auto == "AutoModelForMultipleChoice":
            shapes["num_choices"] = 2
        return oracle.eager(path, auto), CompiledModel.from_pretrained(artifact(path, batch_size=3, **shapes))

    return make


SUMMARIZERS = {
    "T5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "MBart": {
        "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
        "decoder_start_token_id": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def summarizer(tmp_path_factory, artifact):
    """`summarizer("T5")`: the eager model and the compiled one."""
    made = {}

    def make(family):
        if family not in made:
            ids = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            config = getattr(transformers, f"{family}Config")(**ids, **SUMMARIZERS[family])
            path = tmp_path_factory.mktemp(family)
            tiny.save_checkpoint(path, config, transformers.AutoModelForSeq2SeqLM)
            shapes = {"batch_size": 3, "sequence_length": (16,), "decoder_sequence_length": 24}
            compiled = artifact(path, task="text2text-generation", **shapes)
            made[family] = oracle.eager(path, "AutoModelForSeq2SeqLM"), CompiledModel.from_pretrained(compiled)
        return made[family]

    return make


def losses(pair, ids, mask, **labels):
    """Eager's loss, and ours from numpy arrays; ours from tensors is the same tensor."""
    eager, compiled = pair
    tensors = {"input_ids": ids, "attention_mask": mask, **labels}
    with torch.inference_mode():
        expected = eager(**{name: torch.from_numpy(value) for name, value in tensors.items()}).loss
    answer = compiled(**tensors)
    assert next(iter(answer)) == "loss"
    again = compiled(**{name: torch.from_numpy(value) for name, value in tensors.items()}).loss
    assert isinstance(again, torch.Tensor)
    assert again.item() == answer.loss
    return answer.loss, expected.item()


def some_labels(ids, mask, most, seed):
    """A class for every token but padding and some others."""
    random = np.random.default_rng(seed)
    labels = np.where(random.random(ids.shape) < 0.3, -100, random.integers(0, most, ids.shape))
    labels[mask == 0] = -100
    labels[:, 1] = np.where(mask[:, 1] == 1, 1, -100)
    return labels


@few
@given(rows=rows, seed=st.integers(0, 99))
@pytest.mark.parametrize(
    ("auto", "model_type", "classes"),
    [
        ("AutoModelForMaskedLM", "bert", tiny.VOCABULARY),
        ("AutoModelForTokenClassification", "bert", 2),
        ("AutoModelForCausalLM", "llama", tiny.VOCABULARY),
    ],
)
def test_tokens(pair, auto, model_type, classes, rows, seed):
    ids, mask = oracle.padded(rows, "right")
    found, expected = losses(pair(auto, model_type), ids, mask, labels=some_labels(ids, mask, classes, seed))
    assert found == pytest.approx(expected, abs=1e-4)


@few
@given(rows=rows, seed=st.integers(0, 99))
@pytest.mark.parametrize(
    ("problem", "count"),
    [
        *((kind, 3) for kind in (None, "single_label_classification", "multi_label_classification", "regression")),
        *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in ("regression", None)),
    ],
)
def test_sequences_by_problem_type(pair, problem, count, rows, seed):
    ids, mask = oracle.padded(rows, "right")
    random = np.random.default_rng(seed)
    if problem == "single_label_classification" or (problem is None and count > 1):
        labels = random.integers(0, count, len(rows))
    elif problem == "multi_label_classification":
        labels = random.integers(0, 2, (len(rows), count)).astype(np.float32)
    else:
        labels = random.normal(size=(len(rows), count)).astype(np.float32)
        labels = labels[:, 0] if count == 1 else labels
    eager, compiled = pair("AutoModelForSequenceClassification", num_labels=count)
    # transformers settles a problem type that is None at the first call.
    eager.config.problem_type = compiled.config["problem_type"] = problem
    found, expected = losses((eager, compiled), ids, mask, labels=labels)
    assert found == pytest.approx(expected, abs=1e-4)


@few
@given(rows=rows, seed=st.integers(0, 99), side=st.sampled_from(["left", "right"]))
def test_answers_of_padded_rows_are_those_of_the_rows_alone(pair, rows, seed, side):
    """transformers counts the logits of padding among those of an answer; here a row's loss is its own."""
    eager, compiled = pair("AutoModelForQuestionAnswering")
    ids, mask = oracle.padded(rows, side)
    random = np.random.default_rng(seed)
    places = [sorted(random.integers(0, len(row), 2).tolist()) for row in rows]
    alone = []
    for row, (start, end) in zip(rows, places, strict=True):
        with torch.inference_mode():
            answer = eager(
                torch.tensor([row]), start_positions=torch.tensor([start]), end_positions=torch.tensor([end])
            )
        alone.append(answer.loss.item())
    shift = mask.argmax(1)
    starts, ends = (np.array(each) + shift for each in zip(*places, strict=True))
    found = compiled(ids, mask, start_positions=starts, end_positions=ends).loss
    assert found == pytest.approx(np.mean(alone), abs=1e-4)


@few
@given(rows=rows, seed=st.integers(0, 99))
def test_choices(pair, rows, seed):
    ids, mask = oracle.padded(rows, "right")
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, len(rows))
    pairs = {name: np.stack([each, each[::-1]], 1) for name, each in (("ids", ids), ("mask", mask))}
    found, expected = losses(pair("AutoModelForMultipleChoice"), *pairs.values(), labels=labels)
    assert found == pytest.approx(expected, abs=1e-4)


@few
@given(rows=rows, seed=st.integers(0, 99))
@pytest.mark.slow
@pytest.mark.parametrize("family", ["T5", "MBart"])
def test_answers_of_encoder_decoders(summarizer, family, rows, seed):
    ids, mask = oracle.padded(rows, "right")
    labels = some_labels(ids, mask, tiny.VOCABULARY, seed)
    labels[:, 0] = np.where(labels[:, 0] == -100, 5, labels[:, 0])
    found, expected = losses(summarizer(family), ids, mask, labels=labels)
    assert found == pytest.approx(expected, abs=1e-4)


def test_mistakes_are_named(pair):
    _, tagger = pair("AutoModelForTokenClassification")
    ids = np.array([[5, 6, 7]])
    for labels, message in (
        (np.array([[0, 1]]), r"labels has the shape \[1, 2\]; this model's are \[1, 3\]"),
        (np.array([[0, 1, 2]]), r"labels hold 2; the classes are 0..1"),
        (np.full((1, 3), -100), "Nothing is labelled"),
        (np.zeros((1, 3)), "whole numbers"),
    ):
        with pytest.raises(InputError, match=message):
            tagger(ids, labels=labels)
    _, reader = pair("AutoModelForQuestionAnswering")
    with pytest.raises(InputError, match="has its loss from end_positions and start_positions, not from labels"):
        reader(ids, labels=ids)
    _, plain = pair("AutoModel")
    with pytest.raises(InputError, match="The loss of feature-extraction is not computed here"):
        plain(ids, labels=ids)
    assert list(plain(ids, labels=None)) == ["last_hidden_state"]
