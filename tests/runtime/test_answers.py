"""Question answering by the rules of transformers 4's pipeline, which are written out here: its release 4.57,
pipelines/question_answering.py, for fast tokenizers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import transformers
from compare import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from wordpiece import wordpiece

from precast.runtime.errors import InputError, UsageError
from precast.runtime.inputs.tensors import ModelOutput
from precast.runtime.inputs.tokenizer import Tokenizer
from precast.runtime.pipelines.answers import QuestionAnsweringPipeline


def logits_of(ids, none):
    """What a model says of a row of ids: anything, with `none` for the first token."""
    random = np.random.default_rng(list(ids))
    found = random.normal(size=(2, len(ids))).astype(np.float32) * 3
    found[:, 0] = none
    return found


def compiled(path, none, length):
    """A model of these logits, compiled for up to `length` tokens."""
    tokenizer = Tokenizer(path)

    def call(input_ids, attention_mask, token_type_ids=None):
        start, end = np.full((2, *input_ids.shape), 9.0, np.float32)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask.astype(bool), strict=True)):
            start[row, mask], end[row, mask] = logits_of(ids[mask], none)
        return ModelOutput(start_logits=start, end_logits=end)

    class Model(SimpleNamespace):
        def __call__(self, **arrays):
            return call(**arrays)

    shapes = SimpleNamespace(sequence_length=[length])
    artifact = SimpleNamespace(contract=SimpleNamespace(shapes=shapes))
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    return QuestionAnsweringPipeline(Model(tokenizer=tokenizer, inputs=inputs, batch_size=2, artifact=artifact))


def transformers_4(
    tokenizer, none, question, context, *, length, doc_stride, top_k, handle_impossible_answer, max_answer_len,
    align_to_words,
):  # fmt: skip
    first = tokenizer.padding_side == "right"
    batch = tokenizer(
        *((question, context) if first else (context, question)), truncation="only_second" if first else "only_first",
        max_length=length, stride=doc_stride, return_overflowing_tokens=True,
    )  # fmt: skip
    least, answers = 1000000, []
    for index, ids in enumerate(batch["input_ids"]):
        outside = [owner != (1 if first else 0) for owner in batch.sequence_ids(index)]
        outside = np.array(outside) & (np.array(ids) != tokenizer.cls_token_id)
        start, end = (np.where(outside, -10000.0, each) for each in logits_of(ids, none))
        start, end = (np.exp(each - each.max()) / np.exp(each - each.max()).sum() for each in (start, end))
        if handle_impossible_answer:
            least = min(least, float(start[0] * end[0]))
        start[0] = end[0] = 0.0
        scores = np.tril(np.triu(np.outer(start, end)), max_answer_len - 1)
        best = np.argsort(-scores.flatten(), kind="stable")[: top_k * 2 + 10 if align_to_words else top_k]
        encoding = batch[index]
        for one, other in zip(*np.unravel_index(best, scores.shape), strict=True):
            # Without this condition of ours theirs has answers that end before they begin, all of them with score 0.
            if outside[one] or outside[other] or not scores[one, other]:
                continue
            place = encoding.offsets[one][0], encoding.offsets[other][1]
            if align_to_words and None not in (words := [encoding.token_to_word(each) for each in (one, other)]):
                place = [encoding.word_to_chars(word, int(first))[side] for side, word in enumerate(words)]
            text = context[place[0] : place[1]]
            for known in answers:
                if known["answer"].lower() == text.lower():
                    known["score"] += float(scores[one, other])
                    break
            else:
                answers.append({"score": float(scores[one, other]), "start": place[0], "end": place[1], "answer": text})
    if handle_impossible_answer:
        answers.append({"score": least, "start": 0, "end": 0, "answer": ""})
    answers = sorted(answers, key=lambda each: -each["score"])[:top_k]
    return answers[0] if top_k == 1 and answers else answers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tokenizers that pad on the right, and on the left, where the question goes behind its context."""
    made = {}
    for side in ("right", "left"):
        made[side] = tmp_path_factory.mktemp(side)
        tokenizer = wordpiece()
        tokenizer.padding_side = side
        tokenizer.save_pretrained(made[side])
    return made


@given(
    side=st.sampled_from(["right", "left"]),
    count=st.integers(1, 7),
    none=st.sampled_from([-8, 2, 6, 12, 40]),
    length=st.sampled_from([24, 32]),
    options=st.fixed_dictionaries(
        {
            "doc_stride": st.integers(0, 8),
            "top_k": st.integers(1, 4),
            "handle_impossible_answer": st.booleans(),
            "max_answer_len": st.sampled_from([1, 5, 15]),
            "align_to_words": st.booleans(),
        }
    ),
)
@settings(max_examples=40, deadline=None)
def test_answers_are_transformers(folders, side, count, none, length, options):
    question, context = "What boils?", " ".join(tiny.TEXTS[:count])
    expected = transformers_4(
        transformers.AutoTokenizer.from_pretrained(folders[side]), none, question, context, length=length, **options
    )
    if expected:
        ours = compiled(folders[side], none, length)
        assert_same(ours({"question": question, "context": context}, **options), expected)


def test_a_sure_model_of_no_answer_has_none(folders):
    ours = compiled(folders["right"], 30, 32)
    asked = {"question": "What boils?", "context": tiny.TEXTS[0]}
    assert ours(asked, handle_impossible_answer=True)["answer"] == ""
    assert compiled(folders["right"], 5000, 32)(asked)["answer"]
    assert ours(asked)["score"] < 0.01 < 0.9 < ours(asked, handle_impossible_answer=True)["score"]


def test_questions_are_given_in_transformers_ways(folders):
    ours = compiled(folders["right"], 0, 32)
    question, context = "What boils?", tiny.TEXTS[0]
    asked = {"question": question, "context": context}
    expected = ours(asked)
    assert ours(question, context) == ours(question=question, context=context) == ours([asked]) == expected
    assert ours(question, context=context, top_k=2)[0] == expected
    two = [expected, ours(tiny.TEXTS[1], context)]
    assert ours(question=[question, tiny.TEXTS[1]], context=context) == two
    assert ours([question, tiny.TEXTS[1]], [context, context]) == two
    with pytest.raises(InputError, match="There are 1 questions and 2 contexts"):
        ours([question], [context, context])
    with pytest.raises(InputError, match="An input is"):
        ours(question=question)


def test_pieces_are_as_long_as_transformers(folders):
    """384 tokens, or what the tokenizer says, however long a model was compiled for."""
    ours = compiled(folders["right"], 0, 512)
    ours.tokenizer._config.pop("model_max_length")
    asked = {"question": "What boils?", "context": "Paris is sea level. " * 120}
    assert len(ours.preprocess(asked).notes["encodings"][0].ids) == 384
    ours.tokenizer._config["model_max_length"] = 48.0
    assert len(ours.preprocess(asked).notes["encodings"][0].ids) == 48
    assert {len(each.ids) for each in ours.preprocess(asked, max_seq_len=100).notes["encodings"][:-1]} == {100}
    with pytest.raises(UsageError, match="max_seq_len=600 is more than the 512 tokens"):
        ours(asked, max_seq_len=600)
    for name in ("top_k", "max_answer_len"):
        with pytest.raises(UsageError, match=f"{name}=0 must be at least 1"):
            ours(asked, **{name: 0})
