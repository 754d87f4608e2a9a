"""What is wrong with a pipeline's options, inputs or published rules is a PrecastError that names it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from precast.runtime import pipeline
from precast.runtime.artifact.published_json import select
from precast.runtime.errors import FormatError, InputError, UsageError
from precast.runtime.generation.unsupported import SPEECH
from precast.runtime.pipelines import pipeline_class
from precast.runtime.pipelines.audio import _SPELLING
from precast.runtime.pipelines.choices import fill_template, labels_of
from precast.runtime.pipelines.scores import label, labels


@pytest.mark.parametrize("names", [None, [1, 2], "x", {"a": "b"}, 5])
def test_classes_without_usable_names_have_numbers(names):
    assert labels({"id2label": names}) == {}
    assert label({"id2label": names}, 1) == "LABEL_1"


def test_names_of_classes_are_texts():
    assert labels({"id2label": {"0": 7, "1": "b"}}) == {0: "7", 1: "b"}


@pytest.mark.parametrize("template", ["This is {", "{0.x}", "{name}", "{1}", "plain"])
def test_a_template_that_takes_no_label_is_refused(template):
    assert fill_template("This is {}.", "a") == "This is a."
    with pytest.raises(InputError, match="hypothesis_template="):
        fill_template(template, "a")


@pytest.mark.parametrize("given", ["", [], " , ", [5], [None, 5]])
def test_labels_are_texts(given):
    with pytest.raises(InputError, match="Name the labels"):
        labels_of(given)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"truncation": "yes"}, "truncation='yes' is of the wrong type: Invalid enum value 'yes'"),
        ({"pooling": 5}, "pooling=5 is of the wrong type"),
    ],
)
def test_an_option_of_another_type_is_refused(encoder, option, message):
    ours = pipeline(model=encoder, prepack=False)
    with pytest.raises(UsageError, match=message):
        ours("abc", **option)
    with pytest.raises(UsageError, match=message):
        pipeline(model=ours.model, **option)


@pytest.mark.parametrize(
    ("task", "option", "message"),
    [
        ("fill-mask", {"top_k": -1}, "top_k=-1 must not be below 0"),
        ("fill-mask", {"targets": 5}, "targets=5 is of the wrong type"),
        ("question-answering", {"doc_stride": -2}, "doc_stride=-2 must not be below 0"),
        ("question-answering", {"max_answer_len": "x"}, "max_answer_len='x'"),
        ("token-classification", {"stride": 1.5}, "stride=1.5"),
        ("token-classification", {"aggregation_strategy": 5}, "aggregation_strategy=5"),
        ("object-detection", {"threshold": "x"}, "threshold='x'"),
        ("text-generation", {"return_full_text": "no"}, "return_full_text='no'"),
    ],
)
def test_options_have_the_types_that_their_steps_say(task, option, message):
    with pytest.raises(UsageError, match=message):
        pipeline_class(task)(None, **option)


def test_numbers_of_numpy_are_options_too():
    assert pipeline_class("fill-mask")(None, top_k=np.int64(3)).options == {"top_k": 3}


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("question-answering", {"question": 5, "context": "x"}),
        ("multiple-choice", {"prompt": "x", "choices": "abc"}),
        ("multiple-choice", {"prompt": "x", "choices": 5}),
        ("text2text-generation", 5),
        ("summarization", b"bytes"),
    ],
)
def test_inputs_of_another_type_are_refused(task, given):
    model = SimpleNamespace(generate=lambda input_ids: None, config={})
    with pytest.raises(InputError, match="An input is"):
        pipeline_class(task)(model).preprocess(given)


@pytest.mark.parametrize(
    ("types", "values"),
    [
        (SPEECH, {"lang_to_id": ["fr"]}), (SPEECH, {"task_to_id": {"translate": "x"}}), (SPEECH, {"language": 5}),
        (SPEECH, {"forced_decoder_ids": [1]}), (SPEECH, {"no_timestamps_token_id": "x"}),
        (_SPELLING, {"target_lang": 5}), (_SPELLING, {"pad_token": 5}),
        (_SPELLING, {"added_tokens_decoder": {"x": {}}}),
    ],
    ids=range(8),
)  # fmt: skip
def test_what_speech_reads_of_published_files_has_types(types, values):
    with pytest.raises(FormatError, match=f"a file has {next(iter(values))}: "):
        select(values, types, "a file")


def test_published_files_as_they_are_pass():
    decoder = {"added_tokens_decoder": {"0": {"content": "[PAD]", "lstrip": False, "special": True}}}
    assert select(decoder, _SPELLING, "a file")["added_tokens_decoder"][0].content == "[PAD]"
    whisper = {"forced_decoder_ids": [[1, None], [2, 50359]], "language": None, "alignment_heads": [[2, 2]]}
    assert select(whisper, SPEECH, "a file") == {"forced_decoder_ids": [(1, None), (2, 50359)]}
