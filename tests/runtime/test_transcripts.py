"""Whisper's tokens are told as by transformers' tokenizer: texts, times and languages, whatever was written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import speech
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from precast.runtime.inputs.tokenizer import Tokenizer
from precast.runtime.pipelines.audio import TranscriptionPipeline

FIRST, LAST = 268, 1768
"""The first time, and the last."""
letters = st.integers(33, 120)
times = st.integers(FIRST, LAST)
pairs = times.map(lambda time: [time, time])
# 256 ends an answer, 264 to 267 are tasks and marks.
pieces = st.one_of(letters.map(lambda one: [one]), times.map(lambda one: [one]), pairs, st.sampled_from([[256], [263]]))
rows = st.lists(pieces, max_size=12).map(lambda found: [token for piece in found for token in piece])
languages = st.sampled_from([[], [258], [259], [261]])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """transformers' tokenizer, and a pipeline with nothing but ours."""
    path = tmp_path_factory.mktemp("words")
    theirs = speech.tokenizer()
    theirs.save_pretrained(path)
    model = SimpleNamespace(config={"max_source_positions": 1500}, tokenizer=Tokenizer(path), generate=print)
    pipe = TranscriptionPipeline(model)
    pipe.processor = SimpleNamespace(longest=480000, rate=16000)
    assert theirs.convert_tokens_to_ids("<|0.00|>") == FIRST
    return theirs, pipe


@given(language=languages, row=rows, other=languages, more=rows, with_times=st.booleans(), named=st.booleans())
@example(language=[], row=[300, 65, 400, 400, 66, 500], other=[], more=[268, 67, 290], with_times=True, named=False)
@example(language=[], row=[300, 65, 400, 66, 66, 500], other=[], more=[268, 67, 290], with_times=True, named=False)
@example(language=[258], row=[65, 66], other=[259], more=[67], with_times=False, named=True)
@settings(max_examples=400, deadline=None)
def test_tokens_are_told_as_by_transformers(both, language, row, other, more, with_times, named):
    theirs, pipe = both
    tokens = [*language, *row, *other, *more]
    text, told = theirs._decode_asr(
        [{"tokens": torch.tensor([tokens], dtype=torch.int64)}], return_timestamps=with_times, return_language=named,
        time_precision=30 / 1500,
    )  # fmt: skip
    assert pipe._tell(tokens, with_times, named) == {"text": text, **told}
