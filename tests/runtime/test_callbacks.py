"""What is called in the middle of generate() — processors, criteria, streamers — and what it is given."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
import transformers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs
from transformers.generation import stopping_criteria as stopping

from precast.runtime import CompiledModelForCausalLM
from precast.runtime.errors import InputError, PrecastError


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("llama")


@pytest.fixture(scope="module")
def wide(source, artifact):
    return CompiledModelForCausalLM.from_pretrained(artifact(source, batch_size=3, dynamic_batch_size=True))


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}, {"forced_bos_token_id": 5}])
def test_logits_that_are_no_numbers_are_told_with_their_step(wide, options, monkeypatch):
    """Wherever NaN stands, and whatever else would have been chosen or ruled out."""
    session, decode = wide._session, wide._session.decode

    def spoilt(tokens):
        logits = decode(tokens)
        if len(session.tokens[0]) == 4:
            logits[0, 7] = np.nan
        return logits

    monkeypatch.setattr(session, "decode", spoilt)
    with pytest.raises(PrecastError, match="logits for new token 3 hold NaN"):
        wide.generate([[5, 6]], max_new_tokens=5, eos_token_id=[], suppress_tokens=[7], **options)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"max_new_tokens": 1}, {"num_beams": 2, "max_new_tokens": 1}]
)
def test_a_processor_may_not_use_the_caches_that_it_is_asked_about(wide, rows, options):
    """A second row's logits would be those of that call."""

    def nested(tokens, logits):
        wide.logits_at([np.array([9, 9, 9])], [[2]])
        return logits

    ids, asked = [[5, 6], [7, 8]][:rows], {"max_new_tokens": 4, **options}
    for called in ({"logits_processor": [nested]}, {"stopping_criteria": [lambda *row: nested(*row) is None]}):
        with pytest.raises(PrecastError, match=r"taken over its caches: .* logits_processor .*new_session\(\)"):
            wide.generate(ids, **asked, **called)
    apart = wide.new_session()

    def beside(tokens, logits):
        apart.generate([[9, 9, 9]], max_new_tokens=2)
        return logits

    assert wide.generate(ids, logits_processor=[beside], **asked).tolist() == wide.generate(ids, **asked).tolist()


def eager(source, ids, mask, **asked):
    asked = {"do_sample": False, "pad_token_id": 0, **asked}
    with torch.inference_mode():
        return oracle.eager(source).generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **asked).tolist()


class Theirs(theirs.LogitsProcessor):
    """As people write them, with what only tensors have."""

    def __call__(self, input_ids, scores):
        assert input_ids.dtype == torch.long
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == input_ids.shape[1] % 2, -torch.inf)


class Stopping(stopping.StoppingCriteria):
    def __call__(self, input_ids, scores, **others):
        assert scores is None
        return torch.isin(input_ids[:, -1], torch.arange(0, 320, 5))


PROCESSORS = [
    [],
    [Theirs()],
    [theirs.SuppressTokensLogitsProcessor([*range(10, 40)])],
    [theirs.RepetitionPenaltyLogitsProcessor(3.0), theirs.RepetitionPenaltyLogitsProcessor(2.0)],
    [theirs.NoRepeatNGramLogitsProcessor(1), theirs.TemperatureLogitsWarper(2.0)],
    [theirs.MinLengthLogitsProcessor(12, [*range(4, 320, 4)])],
    [theirs.ExponentialDecayLengthPenalty((2, 1.5), torch.tensor([8]), 5)],
    [theirs.WatermarkLogitsProcessor(320, "cpu")],
    [*[Theirs()] * 2, theirs.SequenceBiasLogitsProcessor([[[60], 9.0]])],
]
CRITERIA = [
    lambda tokenizer: [],
    lambda tokenizer: [stopping.EosTokenCriteria([*range(0, 320, 3)])],
    lambda tokenizer: [Stopping()],
    lambda tokenizer: [stopping.StopStringCriteria(tokenizer, ["e", "a", "o"])],
    lambda tokenizer: [stopping.MaxLengthCriteria(11)],
    lambda tokenizer: [stopping.MaxTimeCriteria(1e9), stopping.StoppingCriteriaList([Stopping()])],
]
settings_ = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.just(1.5),
        "no_repeat_ngram_size": st.just(2),
        "min_length": st.integers(4, 12),
        "min_new_tokens": st.integers(1, 6),
        "begin_suppress_tokens": st.just([*range(200, 300)]),
        "forced_bos_token_id": st.just(9),
        "num_beams": st.integers(2, 3),
        "stop_strings": st.just(["i"]),
    },
)
rows = st.lists(st.lists(st.integers(3, 319), min_size=1, max_size=6), min_size=1, max_size=3)


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints:UserWarning")
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows, st.sampled_from(PROCESSORS), st.sampled_from(CRITERIA), settings_)
def test_classes_of_transformers_do_what_they_do_there(wide, source, rows, processors, criteria, asked):
    """Of left-padded batches, too, where lengths count the padding; in place of a setting of the same kind."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ids, mask = oracle.padded(rows, "left")
    # One token forced and ruled out leaves none, which is an error here.
    assume(not any(isinstance(each, Theirs) for each in processors) or "forced" not in repr(asked))
    asked = {"max_new_tokens": 8, "eos_token_id": [*range(4, 320, 4)], **asked}
    limits = criteria(tokenizer)
    # transformers' beams have no room for more than max_new_tokens, and end in an IndexError.
    is_beyond = any(isinstance(each, stopping.MaxLengthCriteria) for each in limits) and ids.shape[1] + 8 < 11
    assume(not is_beyond or "num_beams" not in asked)
    given_ = {
        "logits_processor": theirs.LogitsProcessorList(processors),
        "stopping_criteria": stopping.StoppingCriteriaList(limits),
    }
    found = wide.generate(ids, mask, pad_token_id=0, **asked, **given_).tolist()
    for row, answer, keep in zip(ids, found, mask, strict=True):
        # Alone: of a batch transformers lets rows go on that no end-of-sequence token has ended.
        (expected,) = eager(source, row[None], keep[None], tokenizer=tokenizer, **asked, **given_)
        assert answer[: len(expected)] == expected
        assert not any(answer[len(expected) :])


def test_with_tensors_for_input_whoever_is_called_gets_tensors(wide):
    seen: list = []

    class Streamer:
        def put(self, tokens):
            seen.append(type(tokens))

        def end(self):
            pass

    def process(tokens, logits):
        seen.extend([type(tokens), type(logits)])
        return logits

    def stop(tokens, logits):
        seen.extend([type(tokens), type(logits)])
        return False

    given_ = {"logits_processor": [process], "stopping_criteria": [stop], "streamer": Streamer(), "max_new_tokens": 2}
    for ids, kind in ((np.array([[5, 6]]), np.ndarray), (torch.tensor([[5, 6]]), torch.Tensor)):
        seen.clear()
        wide.generate(ids, **given_)
        assert set(seen) == {kind}


def test_what_needs_a_whole_batch_is_refused_for_several_rows(wide, source):
    prefix = theirs.PrefixConstrainedLogitsProcessor(lambda batch, tokens: [5 + batch, 9], num_beams=1)
    found = wide.generate([[5, 6]], logits_processor=[prefix], max_new_tokens=4).tolist()
    assert found == eager(
        source, [[5, 6]], [[1, 1]], logits_processor=theirs.LogitsProcessorList([prefix]), max_new_tokens=4
    )
    with pytest.raises(InputError, match=r"PrefixConstrainedLogitsProcessor tells the rows of a batch apart.* 2 is"):
        wide.generate([[5, 6], [7, 8]], logits_processor=[prefix], max_new_tokens=4)


def test_a_length_given_as_a_criterion_is_a_length(wide):
    longest = stopping.StoppingCriteriaList([stopping.MaxLengthCriteria(40)])
    assert wide.generate([[5, 6]], stopping_criteria=longest, eos_token_id=[]).shape == (1, 40)
    with pytest.raises(InputError, match="do not fit"):
        wide.generate([[5, 6]], stopping_criteria=[stopping.MaxLengthCriteria(400)], eos_token_id=[])
