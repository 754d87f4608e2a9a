"""Each formula against transformers' own processor, on random logits and histories."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from precast.runtime.generation import processors, sampling, warpers
from precast.runtime.generation.config import GenerationConfig
from precast.runtime.generation.prompt import Prompt

seeds = st.integers(0, 2**32 - 1)
some = settings(max_examples=60, deadline=None)
VOCABULARY = 40
ONE = Prompt(np.array([1]), np.array([1]))


def make(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that repeat now and then, and logits."""
    numbers = np.random.default_rng(seed)
    return numbers.integers(0, 6, numbers.integers(1, 12)), (3 * numbers.normal(size=VOCABULARY)).astype(np.float32)


def ours_and_theirs(ours, processor, tokens, logits):
    expected = processor(torch.from_numpy(tokens)[None], torch.from_numpy(logits.copy())[None])[0].numpy()
    assert np.allclose(ours, expected, rtol=1e-6)


@some
@given(seeds, st.floats(0.2, 3))
def test_repetition_penalty(seed, penalty):
    tokens, logits = make(seed)
    found = processors.repetition_penalty(tokens, logits, penalty)
    ours_and_theirs(found, theirs.RepetitionPenaltyLogitsProcessor(penalty), tokens, logits)


@some
@given(seeds, st.integers(1, 4))
def test_no_repeat_ngram(seed, size):
    tokens, logits = make(seed)
    found = processors.no_ngram_of(tokens, tokens, logits, size)
    ours_and_theirs(found, theirs.NoRepeatNGramLogitsProcessor(size), tokens, logits)


@some
@given(seeds, st.integers(0, 15))
def test_minimum_length(seed, least):
    tokens, logits = make(seed)
    config = GenerationConfig(min_length=least, eos_token_id=[2, 5])
    found = sampling.Processors(config, Prompt(tokens[:1], tokens[:1]), 20)(tokens, logits)
    ours_and_theirs(found, theirs.MinLengthLogitsProcessor(least, [2, 5]), tokens, logits)


@some
@given(seeds, st.integers(1, 50))
def test_top_k(seed, count):
    tokens, logits = make(seed)
    ours_and_theirs(warpers.top_k(logits, count), theirs.TopKLogitsWarper(count), tokens, logits)


@some
@given(seeds, st.floats(0.01, 0.99))
def test_top_p(seed, mass):
    tokens, logits = make(seed)
    ours_and_theirs(warpers.top_p(logits, mass), theirs.TopPLogitsWarper(mass), tokens, logits)


@some
@given(seeds, st.floats(0, 1))
def test_min_p(seed, share):
    tokens, logits = make(seed)
    ours_and_theirs(warpers.min_p(logits, share), theirs.MinPLogitsWarper(share), tokens, logits)


@some
@given(seeds, st.floats(0.05, 0.95), st.integers(1, 3))
def test_rare_warpers(seed, share, least):
    """Those that keep something else than the likeliest, too, where some tokens are ruled out."""
    tokens, logits = make(seed)
    logits[seed % 7 :: 7] = -np.inf
    small = share / 20
    ours_and_theirs(warpers.top_h(logits, share), theirs.TopHLogitsWarper(share), tokens, logits)
    found = warpers.typical_p(logits, share, least)
    ours_and_theirs(found, theirs.TypicalLogitsWarper(share, min_tokens_to_keep=least), tokens, logits)
    found = warpers.epsilon_cutoff(logits, small, least)
    ours_and_theirs(found, theirs.EpsilonLogitsWarper(small, min_tokens_to_keep=least), tokens, logits)
    found = warpers.eta_cutoff(logits, small, least)
    ours_and_theirs(found, theirs.EtaLogitsWarper(small, min_tokens_to_keep=least), tokens, logits)


def test_penalties_of_openai():
    """By the formula of its API reference: counts of what was generated, not of the prompt."""
    _, logits = make(1)
    config = GenerationConfig(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={"7": 3, 9: -100})
    prompt = Prompt(np.array([4, 4, 5]), np.array([4, 4, 5]))
    found = sampling.Processors(config, prompt, 8)(np.array([4, 4, 5, 6, 6, 8]), logits)
    expected = logits.copy()
    expected[[6, 8, 7, 9]] += [-0.5 - 2 * 0.25, -0.5 - 0.25, 3, -100]
    assert np.allclose(found, expected)


def test_draws_follow_the_distribution():
    """20,000 draws with temperature 0.7 and top-k 5: frequencies within five standard deviations."""
    _, logits = make(3)
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=5)
    sampler = sampling.Sampler(sampling.Processors(config, ONE, 8), np.random.default_rng(0))
    scores = sampler.process([1], logits)
    drawn = np.bincount([sampler.pick(scores) for _ in range(20_000)], minlength=VOCABULARY) / 20_000
    kept = np.sort(logits)[-5]
    expected = np.where(logits >= kept, np.exp(logits / 0.7), 0)
    expected /= expected.sum()
    assert (np.abs(drawn - expected) < 5 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-12).all()


@pytest.mark.parametrize("flag", [None, False])
def test_without_sampling_the_shape_of_the_distribution_plays_no_part(flag):
    _, logits = make(4)
    config = GenerationConfig(do_sample=flag, temperature=9.0, top_k=1, top_p=0.1, min_p=0.5)
    sampler = sampling.Sampler(sampling.Processors(config, ONE, 8), None)
    assert sampler.pick(sampler.process([1], logits)) == logits.argmax()
