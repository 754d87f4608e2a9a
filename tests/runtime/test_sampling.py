"""Each formula against transformers' own processor, on random logits and histories."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from precast.runtime.generation import sampling
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
    found = sampling.repetition_penalty(tokens, logits, penalty)
    ours_and_theirs(found, theirs.RepetitionPenaltyLogitsProcessor(penalty), tokens, logits)


@some
@given(seeds, st.integers(1, 4))
def test_no_repeat_ngram(seed, size):
    tokens, logits = make(seed)
    found = sampling.no_ngram_of(tokens, tokens, logits, size)
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
    ours_and_theirs(sampling.top_k(logits, count), theirs.TopKLogitsWarper(count), tokens, logits)


@some
@given(seeds, st.floats(0.01, 0.99))
def test_top_p(seed, mass):
    tokens, logits = make(seed)
    ours_and_theirs(sampling.top_p(logits, mass), theirs.TopPLogitsWarper(mass), tokens, logits)


@some
@given(seeds, st.floats(0, 1))
def test_min_p(seed, share):
    tokens, logits = make(seed)
    ours_and_theirs(sampling.min_p(logits, share), theirs.MinPLogitsWarper(share), tokens, logits)


def test_draws_follow_the_distribution():
    """20,000 draws with temperature 0.7 and top-k 5: frequencies within five standard deviations."""
    _, logits = make(3)
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=5)
    sampler = sampling.Sampler(sampling.Processors(config, ONE, 8), np.random.default_rng(0))
    drawn = np.bincount([sampler([1], logits) for _ in range(20_000)], minlength=VOCABULARY) / 20_000
    kept = np.sort(logits)[-5]
    expected = np.where(logits >= kept, np.exp(logits / 0.7), 0)
    expected /= expected.sum()
    assert (np.abs(drawn - expected) < 5 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-12).all()


@pytest.mark.parametrize("flag", [None, False])
def test_without_sampling_the_shape_of_the_distribution_plays_no_part(flag):
    _, logits = make(4)
    config = GenerationConfig(do_sample=flag, temperature=9.0, top_k=1, top_p=0.1, min_p=0.5)
    assert sampling.Sampler(sampling.Processors(config, ONE, 8), None)([1], logits) == logits.argmax()
