"""Prompt lookup: guesses come from what was there, and change nothing about the answer."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.runtime import CompiledModelForCausalLM
from precast.runtime.errors import InputError
from precast.runtime.generation.prompt_lookup import Lookup
from precast.runtime.generation.session import Session

CAPACITY = 48
# The same examples each time: of random ones, one in a million has two likeliest tokens as close as rounding.
some = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
words = st.lists(st.integers(3, 6), min_size=1, max_size=30)
prompts = st.lists(st.integers(3, 319), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def model(source, artifact):
    return CompiledModelForCausalLM.from_pretrained(artifact(source))


@pytest.fixture
def appended(monkeypatch):
    """How many tokens each step of a single row took."""
    counts: list[int] = []
    append = Session.append
    monkeypatch.setattr(Session, "append", lambda self, tokens: counts.append(len(tokens)) or append(self, tokens))
    return counts


def answer(model, row, **options):
    model.reset()
    return model.generate(np.array([row]), **options)[0, len(row) :].tolist()


def brute_guess(tokens, longest, count):
    """The definition: the latest earlier occurrence of the longest tail, copied on, over its own copy too."""
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                extended = list(tokens)
                for step in range(count):
                    extended.append(extended[start + size + step])
                return extended[len(tokens) :]
    return []


@some
@given(words, words, st.integers(1, 4), st.integers(1, 12))
def test_guesses_follow_the_latest_occurrence_of_the_longest_tail(prompt, rest, longest, room):
    lookup = Lookup(prompt, 4, longest)
    for token in rest:
        lookup.append(token)
    found = lookup.guess(room)
    assert found == brute_guess(prompt + rest, longest, len(found))
    assert bool(found) == bool(brute_guess(prompt + rest, longest, 1))
    assert len(found) in {0, min(4, 1 << room.bit_length() - 1)}


def test_success_guesses_more_and_failure_fewer():
    lookup = Lookup([5] * 4, 10, 2)
    sizes = []
    for is_right in (True, True, True, False, False, False, False, False, True):
        guessed = lookup.guess(99)
        sizes.append(len(guessed))
        lookup.adapt_count(len(guessed), len(guessed) if is_right else 0)
    assert sizes == [4, 8, 10, 10, 4, 2, 1, 1, 1]
    assert len(lookup.guess(99)) == 2
    assert lookup.guess(0) == []


OPTIONS = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 3},
    {"eos_token_id": list(range(3, 120))},
    {"eos_token_id": list(range(3, 120)), "min_new_tokens": 9},
    {"do_sample": True, "seed": 3, "temperature": 0.2},
    {"logits_processor": [lambda tokens, logits: np.where(np.arange(320) % (1 + len(tokens[0])), logits, logits - 1)]},
    {"stopping_criteria": [lambda tokens, logits: tokens[0, -1] % 7 == 0]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
@some
@given(row=prompts, repeats=st.integers(1, 3), most=st.integers(1, 12), longest=st.integers(1, 3))
def test_the_answer_is_the_one_without(model, options, row, repeats, most, longest):
    """Random text and text that repeats, up to the last token that fits."""
    row = row * repeats
    asked = {"max_new_tokens": CAPACITY - len(row), "eos_token_id": [], **options}
    expected = answer(model, row, **asked)
    assert answer(model, row, prompt_lookup_num_tokens=most, max_matching_ngram_size=longest, **asked) == expected


def test_it_is_transformers_answer(model, source):
    row = [5, 9, 30, 7, 200, 31] * 2
    with torch.inference_mode():
        theirs = oracle.eager(source).generate(
            torch.tensor([row]), do_sample=False, max_new_tokens=30, eos_token_id=None, pad_token_id=0,
            prompt_lookup_num_tokens=5, max_matching_ngram_size=2,
        )  # fmt: skip
    options = {"max_new_tokens": 30, "eos_token_id": [], "prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 2}
    assert answer(model, row, **options) == theirs[0, len(row) :].tolist()


def circling(model):
    """A prompt whose answer goes round in circles, so that guesses are right."""
    rows = ([first, second] for first in range(3, 60) for second in (7, 100))
    return next(row for row in rows if len(set(answer(model, row, max_new_tokens=40, eos_token_id=[])[8:])) < 6)


def test_right_guesses_save_steps(model, appended):
    row = circling(model)
    expected = answer(model, row, max_new_tokens=40, eos_token_id=[])
    appended.clear()
    assert answer(model, row, max_new_tokens=40, eos_token_id=[], prompt_lookup_num_tokens=8) == expected
    assert len(appended) < 20
    assert set(appended) <= {1, 2, 3, 5, 9}, "few sizes: 1 + 0, 1, 2, 4, 8"


def test_stop_strings_end_within_a_guess(model):
    row = circling(model)
    plain = {"max_new_tokens": 40, "eos_token_id": []}
    whole = answer(model, row, **plain)
    stop = model.tokenizer.decode(whole[17:20])
    expected = answer(model, row, stop_strings=[stop], **plain)
    assert len(expected) < 40
    assert answer(model, row, stop_strings=[stop], prompt_lookup_num_tokens=8, **plain) == expected


def test_streams_are_in_order_and_leave_a_true_memory(model):
    row = circling(model)
    plain = {"max_new_tokens": 40, "eos_token_id": []}
    expected = answer(model, row, **plain)
    assert list(model.stream([row], prompt_lookup_num_tokens=8, **plain)) == expected
    for taken in range(1, 40, 6):
        stream = model.stream([row], prompt_lookup_num_tokens=8, **plain)
        assert [next(stream) for _ in range(taken)] == expected[:taken]
        assert model.generate([row], **plain)[0, len(row) :].tolist() == expected, "on what the stream left"


def test_a_streamer_is_given_one_token_at_a_time(model):
    seen: list = []

    class Streamer:
        def put(self, tokens):
            seen.append(np.array(tokens).reshape(-1).tolist())

        def end(self):
            seen.append("end")

    row = circling(model)
    found = answer(model, row, streamer=Streamer(), max_new_tokens=20, eos_token_id=[], prompt_lookup_num_tokens=8)
    assert seen == [row, *([token] for token in found), "end"]


@pytest.mark.parametrize(
    ("shapes", "compiled"),
    [({"batch_size": 3}, "batch 3"), ({"prefill_lengths": (4, 16)}, "batch 1 and the fixed lengths .*4,16")],
    ids=["batch", "static"],
)
def test_a_model_that_cannot_check_guesses_says_so(source, artifact, shapes, compiled):
    model = CompiledModelForCausalLM.from_pretrained(artifact(source, **shapes))
    expected = rf"prompt_lookup_num_tokens=10 .*compiled for {compiled}\. Pass .*_tokens=0.*batch_size=1"
    for call in (model.generate, model.stream):
        with pytest.raises(InputError, match=expected):
            call([[5, 6]], prompt_lookup_num_tokens=10)
    assert model.generate([[5, 6]], prompt_lookup_num_tokens=0, max_new_tokens=2).shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": -1}, "prompt_lookup_num_tokens must be a whole number of at least 0, not -1"),
        ({"prompt_lookup_num_tokens": 2.5}, r"prompt_lookup_num_tokens=2\.5 is of the wrong type.*Expected `int"),
        ({"max_matching_ngram_size": 0}, "max_matching_ngram_size must be a whole number of at least 1, not 0"),
    ],
)
def test_values_out_of_range_are_named(model, options, message):
    with pytest.raises(InputError, match=message):
        model.generate([[5]], **options)
