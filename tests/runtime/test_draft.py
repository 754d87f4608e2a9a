"""Assisted decoding: a draft changes when tokens come, never which."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import decoders

from precast.runtime import CompiledModelForCausalLM
from precast.runtime.errors import InputError
from precast.runtime.generation.draft import Draft
from precast.runtime.generation.session import Session

some = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
prompts = st.lists(st.integers(3, 319), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def model(source, artifact):
    return CompiledModelForCausalLM.from_pretrained(artifact(source))


@pytest.fixture(scope="module", params=["another", "itself"])
def assistant(request, source, checkpoint, artifact):
    """A model that is hardly ever right, and one that always is."""
    chosen = checkpoint("llama", num_hidden_layers=1) if request.param == "another" else source
    return CompiledModelForCausalLM.from_pretrained(artifact(chosen))


@some
@given(prompt=prompts, count=st.integers(1, 36), most=st.sampled_from([None, 1, 3, 20]), sampled=st.booleans())
def test_a_draft_changes_nothing(source, model, assistant, prompt, count, most, sampled):
    asked = {"max_new_tokens": count, "eos_token_id": [7, 65], "num_assistant_tokens": most}
    asked |= {"do_sample": True, "seed": 5, "temperature": 0.7} if sampled else {"repetition_penalty": 1.2}
    expected = model.generate([prompt], **asked)
    found = model.generate([prompt], assistant_model=assistant, return_dict_in_generate=True, **asked)
    assert found.sequences.tolist() == expected.tolist()
    assert 0 <= found.accepted_draft_tokens <= found.draft_tokens
    assert list(model.stream([prompt], assistant_model=assistant, **asked)) == expected[0, len(prompt) :].tolist()


def test_it_is_transformers_assisted_generation(source, model, assistant):
    prompt = [5, 9, 30, 7, 200, 31]
    with torch.inference_mode():
        expected = oracle.eager(source).generate(
            torch.tensor([prompt]), assistant_model=oracle.eager(source), max_new_tokens=20, do_sample=False,
            eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
    found = model.generate([prompt], assistant_model=assistant, max_new_tokens=20, eos_token_id=2)
    assert found.tolist() == expected.tolist()


class Counted:
    """A session that says what it is told to, and counts its steps."""

    capacity = 10_000

    def __init__(self, says) -> None:
        self.tokens, self.says, self.steps = [[]], says, 0

    def _answer(self):
        self.steps += 1
        logits = np.zeros(10)
        logits[self.says(len(self.tokens[0]))] = 1
        return logits[None]

    def prefill(self, rows):
        self.tokens = [rows[0].tolist()]
        return self._answer()

    def append(self, tokens):
        self.tokens[0] += tokens
        return self._answer()

    def drop(self, count):
        del self.tokens[0][len(self.tokens[0]) - count :]


def run(draft, length):
    """Steps that a model takes whose row is the numbers 0..9 again and again, and what was guessed in each."""
    row, counts = [0], []
    while len(row) < length:
        guesses = draft.guess(length - len(row) - 1)
        counts.append(len(guesses))
        right = next((i for i, token in enumerate(guesses) if token != (len(row) + i) % 10), len(guesses))
        for _ in range(right + 1):
            row.append(len(row) % 10)
            draft.append(row[-1])
        draft.adapt_count(len(guesses), right)
    return counts


def test_a_draft_that_is_right_guesses_more():
    draft = Draft(Counted(lambda length: length % 10), [0], 16, 0.1)
    counts = run(draft, 400)
    assert max(counts) == 16
    assert sum(counts) > 300


def test_a_draft_that_is_wrong_rests():
    """And is tried again now and then; its steps are a twentieth of the model's."""
    session = Counted(lambda length: (length + 1) % 10)
    counts = run(Draft(session, [0], 16, 0.3), 2000)
    assert sum(counts[-500:]) in range(1, 10)
    assert session.steps * 0.3 < 0.05 * len(counts)


def test_one_that_is_right_again_is_used_again():
    session = Counted(lambda length: (length + (length < 200)) % 10)
    counts = run(Draft(session, [0], 16, 0.2), 1500)
    assert max(counts[-20:]) >= 8


def test_a_draft_that_is_no_quicker_is_hardly_asked():
    session = Counted(lambda length: length % 10)
    assert sum(run(Draft(session, [0], 16, 3.0), 1000)) < 30


def test_drafts_that_cannot_be(model, source, checkpoint, artifact, tmp_path):
    wide = CompiledModelForCausalLM.from_pretrained(artifact(source, batch_size=3))
    other = CompiledModelForCausalLM.from_pretrained(artifact(checkpoint("llama", vocab_size=tiny.VOCABULARY - 8)))
    states = CompiledModelForCausalLM.from_pretrained(artifact(decoders.make(tmp_path / "mamba", "mamba")))
    for opened, draft, message in (
        (model, wide, r"cannot be the assistant_model: .* compiled for batch 3"),
        (wide, model, r"assistant_model checks several tokens .* compiled for batch 3.*assistant_model=None"),
        (model, other, rf"another vocabulary: {tiny.VOCABULARY - 8} tokens, and this model {tiny.VOCABULARY}"),
        (model, states, r"cannot be the assistant_model: .* carries states"),
        (states, model, r"assistant_model takes back tokens .* carries states"),
        (model, 5, "assistant_model must be a CompiledModelForCausalLM, not 5"),
    ):
        with pytest.raises(InputError, match=message):
            opened.generate([[5, 6]], assistant_model=draft, max_new_tokens=3)
    for options in ({"prompt_lookup_num_tokens": 3}, {"guidance_scale": 2.0}):
        with pytest.raises(InputError, match=rf"assistant_model does not go together with {next(iter(options))}"):
            model.generate([[5, 6]], assistant_model=model, max_new_tokens=3, **options)


def test_the_draft_has_caches_of_its_own(model, assistant, monkeypatch):
    """What the caller does with the assistant beside it, and what a call before left, plays no part."""
    stream = assistant.stream([[9, 8, 7]], max_new_tokens=9, eos_token_id=[])
    first = next(stream)
    asked = {"assistant_model": assistant, "max_new_tokens": 20, "eos_token_id": []}
    one = model.generate([[5, 9, 30]], **asked)
    assert [first, *stream] == assistant.generate([[9, 8, 7]], max_new_tokens=9, eos_token_id=[])[0, 3:].tolist()
    made: list[Session] = []
    start = Session.__init__
    monkeypatch.setattr(Session, "__init__", lambda self, *args: (made.append(self), start(self, *args))[1])
    assert model.generate([[5, 9, 30]], **asked).tolist() == one.tolist()
    assert not made
