"""What the caches hold from one call is used in the next, and the answer is the one from scratch."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.runtime import CompiledModelForCausalLM
from precast.runtime.generation import session as sessions
from precast.runtime.generation.session import Session

CAPACITY = 48
SHAPES = {
    "free": {},
    "static": {"prefill_lengths": (4, 16)},
    "batch": {"batch_size": 3},
    "static batch": {"batch_size": 3, "prefill_lengths": (4, 16)},
    "slices": {"dynamic_batch_size": True},
}
# The same examples each time: of random ones, one in a million has two likeliest tokens as close as rounding.
many = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
tokens = st.integers(3, 6)


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("llama")


@pytest.fixture(scope="module", params=SHAPES)
def model(request, source, artifact):
    return CompiledModelForCausalLM.from_pretrained(artifact(source, **SHAPES[request.param]))


@pytest.fixture
def single(decoder):
    return CompiledModelForCausalLM.from_pretrained(decoder)


@pytest.fixture
def fed(monkeypatch):
    """Per step, how many tokens it took after how many others, for the first row."""
    steps: list[tuple[int, int]] = []
    init = sessions._Call.__init__

    def recording(self, *arguments):
        init(self, *arguments)
        run = self.run

        def step():
            steps.append((int(self.past[0]), int(self.new[0])))
            run()

        self.run = step

    monkeypatch.setattr(sessions._Call, "__init__", recording)
    return steps


def answers(model, rows, new=6):
    ids, mask = oracle.padded(rows, "left")
    return model.generate(ids, mask, max_new_tokens=new, eos_token_id=[])[:, ids.shape[1] :].tolist()


conversation = st.lists(
    st.tuples(st.integers(0, 20), st.lists(tokens, min_size=1, max_size=9), st.integers(1, 6)), min_size=2, max_size=5
)


@many
@given(turns=conversation)
def test_any_conversation_is_answered_as_from_scratch(model, turns):
    """Each prompt is some beginning of the text so far — all of it, part, or none — and something new."""
    width = model.batch_size if model.batch_size > 1 else 2 if model.artifact.contract.shapes.dynamic_batch_size else 1
    fresh = model.new_session()
    rows = [[] for _ in range(width)]
    for cut, new, count in turns:
        rows = [[*row[: max(0, len(row) - cut * (index + 1) // 2)], *new][-30:] for index, row in enumerate(rows)]
        fresh.reset()
        found = answers(model, rows, count)
        assert found == answers(fresh, rows, count)
        rows = [row + answer for row, answer in zip(rows, found, strict=True)]


@pytest.mark.parametrize("family", ["mistral", "gpt2", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_windows_and_learned_positions_can_go_back(family, checkpoint, artifact):
    """Windows of 8 tokens: what a longer text pushed out of sight is in sight again after going back."""
    source = checkpoint(family)
    model = CompiledModelForCausalLM.from_pretrained(artifact(source))
    row = [(7 * n) % 300 + 3 for n in range(20)]
    for prompt in (row, [*row[:11], 9, 8], row[:13], [*row, 5, 6, 7]):
        assert answers(model, [prompt], 12) == [oracle.greedy(source, prompt, max_new_tokens=12, eos_token_id=None)]


def test_only_what_is_new_is_computed(single, fed):
    prompt = [5, 9, 30, 7, 200, 31]
    [answer] = answers(single, [prompt])
    assert fed == [(0, 6), *((6 + step, 1) for step in range(5))]
    fed.clear()
    turn = [*prompt, *answer, 40, 41, 42]
    answers(single, [turn], 1)
    assert fed == [(11, 4)], "the last token of an answer was never fed"
    fed.clear()
    answers(single, [turn], 1)
    assert fed == [(14, 1)], "logits need one token at least"
    fed.clear()
    answers(single, [[*turn[:8], 77, 78]], 1)
    assert fed == [(8, 2)]
    fed.clear()
    single.reset()
    answers(single, [turn], 1)
    assert fed == [(0, 15)]


def test_static_graphs_read_anew_where_that_is_quicker(source, artifact, fed):
    """Twelve new tokens are one prefill of 16 or, unpadded, three of 4; three are 16 tokens or three steps."""
    model = CompiledModelForCausalLM.from_pretrained(artifact(source, prefill_lengths=(16,)))
    answers(model, [[5, 6]], 1)
    fed.clear()
    answers(model, [[5, 6, *range(10, 22)]], 1)
    assert fed == [(0, 14)]
    fed.clear()
    answers(model, [[5, 6, *range(10, 22), 30]], 1)
    assert fed == [(14, 1)]


def test_a_batch_goes_on_where_each_row_lacks_one_token(source, artifact, fed):
    model = CompiledModelForCausalLM.from_pretrained(artifact(source, batch_size=3))
    rows = [[5, 9, 30, 7], [8], [9, 9, 9]]
    found = answers(model, rows, 4)
    fed.clear()
    more = answers(model, [row + answer for row, answer in zip(rows, found, strict=True)], 4)
    assert fed == [(7 + step, 1) for step in range(4)]
    fed.clear()
    assert [a + b for a, b in zip(found, more, strict=True)] == answers(model, rows, 8)
    assert fed[0] == (3, 1), "the same prompts again lack their last tokens"
    fed.clear()
    answers(model, [[*rows[0], 5, 6], *rows[1:]], 1)
    assert fed == [(0, 6)], "where one row lacks two, all are read anew"


def test_rows_that_ended_early_are_remembered_rightly(source, artifact):
    """A row that rests while others go on: its memory still says what its cache holds."""
    model = CompiledModelForCausalLM.from_pretrained(artifact(source, batch_size=3))
    rows = [[5, 9, 30, 7], [8, 4], [9, 9, 9]]
    ids, mask = oracle.padded(rows, "left")
    ends = list(range(3, 120))
    found = model.generate(ids, mask, max_new_tokens=20, eos_token_id=ends, pad_token_id=0)[:, ids.shape[1] :]
    continued = [[*row, *(int(t) for t in answer if t)] for row, answer in zip(rows, found, strict=True)]
    assert len({len(row) for row in continued}) > 1
    expected = [oracle.greedy(source, row, max_new_tokens=6, eos_token_id=None) for row in continued]
    assert answers(model, continued) == expected


class _Broken(Exception):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_fails_anywhere_leaves_a_true_memory(single, monkeypatch, when):
    """Before the step the caches do not hold its tokens, after it they do; either way what comes next is right."""
    prompt = [5, 9, 30, 7, 200, 31]
    [answer] = answers(single, [prompt], 24)
    for failing in range(10):
        broken = single.new_session()
        broken.reset()
        with monkeypatch.context() as patch:
            _break(patch, failing, when)
            with pytest.raises(_Broken):
                answers(broken, [prompt], 24)
        broken._session._appending.clear()
        broken._session._bound.clear()
        assert len(broken._session.tokens[0]) == (len(prompt) + failing - 1 if failing else 0), "completed steps only"
        assert answers(broken, [prompt + answer[:12]], 12) == [answer[12:]]


def _break(patch, failing, when):
    """Let the step fail that comes after `failing` others."""
    init, left = sessions._Call.__init__, [failing]

    def breaking(self, *arguments):
        init(self, *arguments)
        run = self.run

        def step():
            left[0] -= 1
            if left[0] >= 0 or when == "after":
                run()
            if left[0] < 0:
                raise _Broken

        self.run = step

    patch.setattr(sessions._Call, "__init__", breaking)


def test_scores_between_two_turns_change_nothing(single):
    prompt = [5, 9, 30, 7, 200, 31]
    expected = answers(single, [prompt], 12)
    single(np.array([prompt[:3] + [99] * 20]))
    assert answers(single, [prompt], 12) == expected


def test_sessions_remember_for_themselves(single):
    prompt = [5, 9, 30, 7, 200, 31]
    other = single.new_session()
    expected = answers(single, [prompt], 12)
    answers(other, [prompt[::-1]], 12)
    assert answers(single, [prompt], 12) == answers(other, [prompt], 12) == expected


@pytest.mark.parametrize("shapes", SHAPES)
def test_prompts_up_to_the_capacity(source, artifact, shapes):
    """Longer than the largest prefill, in chunks, and once more over what is there."""
    model = CompiledModelForCausalLM.from_pretrained(artifact(source, **SHAPES[shapes]))
    row = [(11 * n) % 300 + 3 for n in range(CAPACITY - 1)]
    for length in (15, 17, 33, CAPACITY - 1, 30):
        assert answers(model, [row[:length]], 1) == [oracle.greedy(source, row[:length], max_new_tokens=1)]
    logits = model(np.array([[*row, 3]])).logits[0]
    assert np.abs(logits - oracle.logits(source, [*row, 3])).max() < 1e-4


def test_memory_is_of_what_was_fed(single):
    """The session's own books: all but the newest token."""
    session: Session = single._session
    prompt = [5, 9, 30]
    [answer] = answers(single, [prompt], 5)
    assert session.tokens == [[*prompt, *answer[:-1]]]
    assert max(answer) < tiny.VOCABULARY
