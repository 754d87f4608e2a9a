"""Beam search: transformers' own beams, whatever the settings, lengths, batches and padding."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.runtime import CompiledModelForCausalLM
from precast.runtime.errors import InputError
from precast.runtime.generation.beam_search import BeamSearch
from precast.runtime.generation.config import GenerationConfig
from precast.runtime.generation.prompt import Prompt
from precast.runtime.generation.sampling import Processors
from precast.runtime.generation.sequence import StoppingCriteria

BATCH = 6
PAD = 1  # transformers takes 0 for none, and fills with the end instead
tokens = st.integers(3, tiny.VOCABULARY - 1)
prompts = st.lists(st.lists(tokens, min_size=1, max_size=10), min_size=1, max_size=4)
sides = st.sampled_from(["left", "right", "middle"])
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
options = st.fixed_dictionaries(
    {"num_beams": st.integers(2, BATCH), "max_new_tokens": st.integers(1, 14)},
    optional={
        "length_penalty": st.sampled_from([-1.0, 0.0, 0.5, 2.0]),
        "early_stopping": st.sampled_from([True, False, "never"]),
        # Many ends, so that rows end early.
        "eos_token_id": st.sampled_from([[], 65, [*range(3, 40)], [*range(3, 120)]]),
        "min_new_tokens": st.integers(0, 6),
        "repetition_penalty": st.sampled_from([0.8, 1.5]),
        "no_repeat_ngram_size": st.integers(1, 3),
        "forced_eos_token_id": st.just(7),
        "suppress_tokens": st.just([*range(100, 200)]),
        "begin_suppress_tokens": st.just([*range(200, 300)]),
        "bad_words_ids": st.just([[50], [60, 61]]),
        "num_return_sequences": st.integers(1, 2),
        "renormalize_logits": st.just(True),
    },
)


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def family(request, checkpoint, artifact):
    source = checkpoint(request.param)
    compiled = artifact(source, batch_size=BATCH, dynamic_batch_size=True)
    return source, CompiledModelForCausalLM.from_pretrained(compiled)


def eager_beams(source, row, given):
    """Tokens and scores of transformers' own search of one prompt."""
    with torch.inference_mode():
        found = oracle.eager(source).generate(
            torch.tensor([row]), attention_mask=torch.ones(1, len(row)), do_sample=False, pad_token_id=PAD,
            return_dict_in_generate=True, output_scores=True, **given,
        )  # fmt: skip
    return found.sequences[:, len(row) :].numpy(), found.sequences_scores.numpy()


IMPOSSIBLE = -1e8


@few
@given(rows=prompts, side=sides, given_=options)
def test_beams_are_transformers_beams(family, rows, side, given_):
    source, model = family
    ids, mask = oracle.padded(rows, side)
    given_ = {"eos_token_id": 2, **given_}
    if "min_new_tokens" in given_:
        given_["min_new_tokens"] = min(given_["min_new_tokens"], given_["max_new_tokens"])
    found = model.generate(ids, mask, pad_token_id=PAD, return_dict_in_generate=True, output_scores=True, **given_)
    count = given_.get("num_return_sequences", 1)
    for index, row in enumerate(rows):
        expected, scores = eager_beams(source, row, given_)
        mine = slice(index * count, (index + 1) * count)
        assert np.allclose(found.sequences_scores[mine], scores, atol=1e-4)
        for values, theirs, score in zip(found.sequences[mine, ids.shape[1] :], expected, scores, strict=True):
            # Of answers that cannot be, none is the likelier.
            if score > IMPOSSIBLE:
                assert values[: len(theirs)].tolist() == theirs.tolist()
                assert (values[len(theirs) :] == PAD).all()


def test_when_a_search_stops(family):
    """The three ways to stop, where they give different answers."""
    source, model = family
    rows = [[(7 * k + n) % 300 + 3 for n in range(1 + k)] for k in range(8)]
    ids, mask = oracle.padded(rows, "left")
    shared = {"num_beams": 3, "max_new_tokens": 16, "eos_token_id": [*range(4, 320, 4)], "length_penalty": 2.0}
    answers = {}
    for way in (True, False, "never"):
        found = model.generate(ids, mask, pad_token_id=PAD, early_stopping=way, **shared)[:, ids.shape[1] :]
        for row, values in zip(rows, found, strict=True):
            expected, _ = eager_beams(source, row, {**shared, "early_stopping": way})
            assert values[: expected.shape[1]].tolist() == expected[0].tolist()
        answers[str(way)] = found.tolist()
    assert answers["True"] != answers["never"]


def test_a_batch_is_searched_as_its_rows_are(family):
    _, model = family
    rows = [[5, 9, 30, 7, 200], [80, 81], [11, 12, 13], [4], [100, 101, 102, 103, 104, 105, 106]]
    ids, mask = oracle.padded(rows, "left")
    whole = model.generate(ids, mask, num_beams=3, max_new_tokens=12)
    for row, values in zip(rows, whole, strict=True):
        alone = model.generate(np.array([row]), num_beams=3, max_new_tokens=12)[0, len(row) :]
        assert values[ids.shape[1] :][: len(alone)].tolist() == alone.tolist()


def test_without_a_dict_an_array_and_torch_for_torch(family):
    _, model = family
    ids = torch.tensor([[5, 9, 30]])
    found = model.generate(ids, num_beams=2, num_return_sequences=2, max_new_tokens=4, eos_token_id=[])
    assert isinstance(found, torch.Tensor)
    assert found.shape == (2, 7)
    given_ = {"num_beams": 2, "return_dict_in_generate": True}
    assert list(model.generate(ids, **given_)) == ["sequences", "beam_indices"]
    assert isinstance(model.generate(ids, output_scores=True, **given_).sequences_scores, torch.Tensor)


def test_several_draws_of_one_prompt(family):
    _, model = family
    ids = np.array([[5, 9, 30], [80, 81, 82]])
    asked = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 6, "eos_token_id": [], "seed": 1}
    found = model.generate(ids, num_return_sequences=5, **asked)
    assert found.shape == (10, 9)
    assert (found[:5, :3] == ids[0]).all()
    assert (found[5:, :3] == ids[1]).all()
    assert len({tuple(row) for row in found[:5].tolist()}) == 5


BAD_REQUESTS = [
    ({"num_beams": 7}, r"takes 7 rows.*compiled for 6\. Pass num_beams=1.*batch_size=7"),
    ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is more than num_beams=2"),
    ({"num_return_sequences": 3}, r"equal rows.*do_sample=True, or num_beams=3"),
    ({"num_beams": 2, "early_stopping": "always"}, "early_stopping must be True, False or 'never', not 'always'"),
    ({"num_beams": 2, "prompt_lookup_num_tokens": 2}, "pass one only"),
    ({"num_beams": 2, "top_logprobs": 3}, r"num_beams=2 has no logprobs; pass output_scores=True"),
    ({"num_beams": 2, "guidance_scale": 2.0}, r"num_beams=2 does not go together with guidance_scale=2\.0"),
    ({"num_beams": 2, "suppress_tokens": [*range(320)]}, "No token may come next: suppress_tokens"),
    ({"num_beams": 2, "length_penalty": 1e308}, r"length_penalty must lie between -20 and 20, not 1e\+308"),
    ({"num_beams": 0}, "num_beams must be a whole number of at least 1, not 0"),
]


@pytest.mark.parametrize(("asked", "message"), BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
def test_what_beams_cannot_do_is_explained(family, asked, message):
    _, model = family
    with pytest.raises(InputError, match=message):
        model.generate(np.array([[5]]), max_new_tokens=2, **asked)


def test_a_search_is_not_streamed(family):
    _, model = family
    with pytest.raises(InputError, match=r"num_beams=2.*cannot be streamed"):
        model.stream(np.array([[5]]), num_beams=2)


def test_beams_are_drawn_as_transformers_draws_them():
    """4,000 draws of the next beams from the same scores: frequencies of each candidate within five standard
    deviations. Transformers' with replacement of nothing, by PyTorch's multinomial."""
    width, vocabulary, count = 2, 12, 4000
    scores = torch.randn(width, vocabulary, generator=torch.Generator().manual_seed(5)).log_softmax(-1)
    config = GenerationConfig(num_beams=width, do_sample=True, top_k=0, eos_token_id=[])
    prompt = Prompt(np.array([3]), np.array([3]))
    search = BeamSearch(
        prompt.tokens, 9, config, Processors(config, prompt, 9), StoppingCriteria(config, prompt, [], None),
        np.random.default_rng(0), full=9,
    )  # fmt: skip
    flat = scores.numpy().ravel()
    mine = np.bincount([i for _ in range(count) for i in search._choose_candidates(flat)], minlength=flat.size)
    torch.manual_seed(0)
    drawn = torch.multinomial(scores.flatten().softmax(-1).expand(count, -1), 2 * width)
    theirs = np.bincount(drawn.numpy().ravel(), minlength=flat.size)
    share = (mine + theirs) / (2 * count)
    assert (np.abs(mine - theirs) <= 5 * np.sqrt(2 * count * share * (1 - share)) + 1).all()


def test_sampled_beams_are_beams(family):
    """Their scores are those of their tokens, they are repeatable, and rows of a batch are drawn by themselves."""
    source, model = family
    rows = [[5, 9, 30, 7, 200], [80, 81]]
    ids, mask = oracle.padded(rows, "left")
    asked = {"num_beams": 3, "num_return_sequences": 2, "do_sample": True, "max_new_tokens": 5, "eos_token_id": [],
             "temperature": 2.0, "output_scores": True, "return_dict_in_generate": True}  # fmt: skip
    found = model.generate(ids, mask, seed=4, **asked)
    assert model.generate(ids, mask, seed=4, **asked).sequences.tolist() == found.sequences.tolist()
    assert model.generate(ids, mask, seed=5, **asked).sequences.tolist() != found.sequences.tolist()
    for index, (answer, score) in enumerate(
        zip(found.sequences[:, ids.shape[1] :], found.sequences_scores, strict=True)
    ):
        row = rows[index // 2]
        with torch.inference_mode():
            logits = oracle.eager(source)(torch.tensor([[*row, *answer.tolist()]])).logits[0, len(row) - 1 : -1]
        # By temperature, which is a processor of log-probabilities, and what top_k leaves.
        values = logits.float().log_softmax(-1) / 2
        assert np.isclose(score, values[torch.arange(5), torch.tensor(answer)].sum() / 5, atol=1e-3)
