"""What a call does not take is a UsageError that names the nearest that it takes; so is a value of another type."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from precast.runtime import CompiledModel, pipeline
from precast.runtime.artifact.schema import Input
from precast.runtime.errors import ArtifactError, InputError, UsageError
from precast.runtime.inputs.encoder_inputs import named_inputs


@pytest.fixture(scope="module")
def model(decoder):
    return CompiledModel.from_pretrained(decoder, prepack=False, threads=1)


@pytest.fixture(scope="module")
def vectors(encoder):
    return CompiledModel.from_pretrained(encoder, prepack=False, threads=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: CompiledModel.from_pretrained(m.artifact.path, thread=2),
         r"from_pretrained\(\) does not know thread\. Did you mean threads\?.*export=True.* Its options are: revision"),
        (lambda m: CompiledModel.from_pretrained("user/repo", export=True, batchsize=2),
         r"from_pretrained\(export=True\) does not know batchsize\. Did you mean batch_size\?"),
        (lambda m: CompiledModel.from_pretrained("user/repo", export=True, force=True), "does not know force"),
        (lambda m: m.push_to_hub("user/repo", commit_mesage="x"), "push_to_hub.* Did you mean commit_message?"),
        (lambda m: m.save_pretrained("out", forced=True), r"save_pretrained\(\) does not know forced"),
        (lambda m: m.new_session(threads=1), r"new_session\(\) does not know threads\. Its options are: prefix"),
        (lambda m: m.warm_up(times=2), "warm_up.* does not know times"),
        (lambda m: m.reset(all=True), "reset.* does not know all"),
        (lambda m: m(input_id=[[5]]), r"call does not know input_id\. Did you mean input_ids\?"),
        (lambda m: m.logits_at([[5]], position=[[0]]), "Did you mean positions?"),
        (lambda m: m.generate([[5]], max_new_token=3), "'max_new_token', which .* Did you mean 'max_new_tokens'"),
        (lambda m: m.stream([[5]], max_new_token=3), "Did you mean 'max_new_tokens'"),
        (lambda m: m.tokenizer("abc", padding=True), "does not know padding"),
        (lambda m: m.tokenizer.decode([5], skip_special_token=True), "Did you mean skip_special_tokens"),
        (lambda m: m.tokenizer.encode("abc", add_special_token=False), "Did you mean add_special_tokens"),
        (lambda m: pipeline(model=m.artifact.path, thread=2), r"pipeline\(\) .*thread\. Did you mean threads"),
        (lambda m: pipeline(model=m, threads=2), "TextGenerationPipeline does not know threads"),
        (lambda m: pipeline(model=m, max_new_token=2), "Did you mean max_new_tokens"),
        (lambda m: pipeline(model=m)("Hello", return_fulltext=False), "Did you mean return_full_text"),
    ],
    ids=range(19),
)  # fmt: skip
def test_an_unknown_argument_is_refused_with_the_nearest(model, call, message):
    with pytest.raises(UsageError, match=message):
        call(model)


def test_an_encoders_unknown_input_is_refused(vectors):
    with pytest.raises(UsageError, match="no input 'input_id'"):
        vectors(input_id=[[5]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "model must be a directory or a Hub repository, not None"),
        ({"threads": -1}, "threads must be a whole number from 0.* to 1024, not -1"),
        ({"threads": "two"}, "threads must be a whole number"),
        ({"threads": 10**9}, "threads must be a whole number"),
        ({"device": 5}, "device must be a str, not 5"),
        ({"variant": 5}, "variant must be a str"),
        ({"sha256": b"00"}, "sha256 must be a str"),
        ({"subfolder": 5}, "subfolder must be a str"),
    ],
)
def test_from_pretrained_refuses_values_of_another_type(decoder, arguments, message):
    with pytest.raises(UsageError, match=message):
        CompiledModel.from_pretrained(**{"model": decoder, **arguments})


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/out", "a\0b"])
def test_a_name_that_can_be_no_path_is_an_artifact_that_there_is_not(name):
    with pytest.raises(ArtifactError):
        CompiledModel.from_pretrained(f"/{name}" if name[0] == "x" else name)


@pytest.mark.parametrize("labels", ["abc", [["a"]], [[5, 6], [7]], [], None.__class__, {"a": 1}])
def test_labels_that_are_no_numbers_are_said(model, labels):
    with pytest.raises(InputError, match=r"labels (must be numbers|has rows of different lengths)"):
        model([[5, 6, 7]], labels=labels)


def test_labels_may_be_a_list(model):
    ids = [[5, 6, 7]]
    assert model(ids, labels=ids).loss == model(np.array(ids), labels=np.array(ids)).loss


def test_what_any_model_of_transformers_is_asked_is_taken_or_refused(model, vectors):
    ids, mask = [[0, 5, 6, 7]], [[0, 1, 1, 1]]
    logits = model(ids, mask).logits
    asked = {"use_cache": True, "output_attentions": False, "past_key_values": None, "position_ids": [[9, 0, 1, 2]]}
    assert np.array_equal(model(ids, mask, return_dict=True, **asked).logits, logits)
    for opened, outputs in ((model, [logits]), (vectors, vectors(ids, mask).values())):
        found = opened(torch.tensor(ids), torch.tensor(mask), return_dict=False, output_hidden_states=None)
        assert isinstance(found, tuple)
        assert all(np.array_equal(one, two) for one, two in zip(found, outputs, strict=True))
        with pytest.raises(InputError, match="output_hidden_states=True: the model was compiled with its answer alone"):
            opened(ids, mask, output_hidden_states=True)
    for positions in ([[0, 1, 2, 3]], [[0, 1]], [0, 1, 2, 3], "abc"):
        with pytest.raises(InputError, match=r"position_ids are counted .* the first row's are \[0, 1, 2\]"):
            model(ids, mask, position_ids=positions)
        with pytest.raises(InputError, match="position_ids are counted"):
            model.generate(ids, mask, position_ids=positions)
    with pytest.raises(InputError, match="Nothing was given: pass input_ids"):
        model()


def test_generate_takes_inputs_and_begins_with_bos_where_there_are_none(model, checkpoint):
    ids = torch.tensor([[5, 6, 7]])
    found = model.generate(inputs=ids, max_new_tokens=3, position_ids=torch.tensor([[0, 1, 2]]))
    assert torch.equal(found, model.generate(ids, max_new_tokens=3))
    expected = oracle.eager(checkpoint("llama")).generate(pad_token_id=0, max_new_tokens=20)
    assert model.generate().tolist() == expected.tolist()
    with pytest.raises(InputError, match="input_ids and inputs are two names of the same"):
        model.generate(ids, inputs=ids)
    nothing = {"max_time": None, "synced_gpus": False, "assistant_model": None, "prefix_allowed_tokens_fn": None}
    assert torch.equal(model.generate(ids, max_new_tokens=3, **nothing, negative_prompt_ids=None), found)


def test_segments_of_nothing_are_taken_of_torch_too():
    """As DistilBERT's own guide calls it: its tokenizer makes segments, the model has none."""
    specs, ids = [Input(name="input_ids", dtype="int64", shape=[1, 16], pad=0)], torch.tensor([[5, 6, 7]])
    assert list(named_inputs(specs, [ids], {"token_type_ids": torch.zeros_like(ids)})) == ["input_ids"]
    with pytest.raises(InputError, match="no input 'token_type_ids'"):
        named_inputs(specs, [ids], {"token_type_ids": torch.ones_like(ids)})
