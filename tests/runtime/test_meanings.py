"""Values of generate() mean what they mean in transformers: None, padding without a mask, seeds."""

from __future__ import annotations

import random

import numpy as np
import oracle
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.runtime import CompiledModelForCausalLM, GenerationConfig
from precast.runtime.errors import InputError

tokens = st.integers(0, 12)
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SAID = {
    "eos_token_id": 76,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [76, 130],
    "min_new_tokens": 3,
    "forced_eos_token_id": 9,
    "max_new_tokens": 6,
}


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def wide(source, artifact):
    return CompiledModelForCausalLM.from_pretrained(artifact(source, batch_size=3, dynamic_batch_size=True))


def theirs(source, ids, **asked):
    model, ids = oracle.eager(source), torch.tensor(ids)
    with torch.inference_mode():
        return model.generate(ids, do_sample=False, **asked).tolist()


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
@pytest.mark.parametrize("name", SAID)
def test_none_in_a_call_switches_off_what_a_file_says(wide, source, name, monkeypatch):
    monkeypatch.setattr(wide, "generation_config", GenerationConfig(pad_token_id=0, **SAID))
    monkeypatch.setattr(
        oracle.eager(source), "generation_config", transformers.GenerationConfig(pad_token_id=0, **SAID)
    )
    ids = [[5, 9, 30], [80, 81, 82]]
    expected = theirs(source, ids, **{name: None})
    assert wide.generate(ids, **{name: None}).tolist() == expected
    assert wide.generate(ids, generation_config={name: None}).tolist() == theirs(source, ids)


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_ids_are_ids_as_scalars_of_tensors_too(wide, make):
    ids, asked = [[5, 9, 30]], {"max_new_tokens": 6, "pad_token_id": make(0)}
    expected = wide.generate(ids, eos_token_id=76, **asked).tolist()
    for config in (GenerationConfig(eos_token_id=make(76)), transformers.GenerationConfig(eos_token_id=make([76]))):
        assert wide.generate(ids, generation_config=config, **asked).tolist() == expected
    assert wide.generate(ids, eos_token_id=make(76), **asked).tolist() == expected
    assert wide.generate(ids, eos_token_id=[], **asked).tolist() != expected


def test_none_draws_from_all_tokens_where_the_default_is_fifty(wide):
    config = wide._merge_config(GenerationConfig(top_k=7, temperature=0.5), {"top_k": None, "do_sample": True})
    assert (config.top_k, config.temperature) == (0, 0.5)
    assert wide._merge_config(None, {"typical_p": None, "do_sample": True}).top_k is None


@few
@given(
    rows=st.lists(st.lists(tokens, min_size=6, max_size=6), min_size=1, max_size=3),
    pad=st.sampled_from([None, 0, 3]),
    eos=st.sampled_from([None, 3, [3, 4]]),
)
def test_without_a_mask_padding_is_what_transformers_takes_for_it(wide, source, rows, pad, eos):
    """But at a row's end, from which transformers would go on."""
    rows = [[*row, 7] for row in rows]
    asked = {"pad_token_id": pad, "eos_token_id": eos, "max_new_tokens": 6}
    found = wide.generate(rows, **asked).tolist()
    for row, expected in zip(found, theirs(source, rows, **asked), strict=True):
        assert row[: len(expected)] == expected


def test_a_row_of_nothing_but_padding_is_refused_without_a_mask(wide):
    with pytest.raises(InputError, match=r"Row 1 of input_ids holds nothing but pad_token_id=3.*pass attention_mask"):
        wide.generate([[5, 3], [3, 3]], pad_token_id=3)
    assert wide.generate([[3, 3]], [[1, 1]], pad_token_id=3, max_new_tokens=2).shape == (1, 4)


@pytest.mark.parametrize(
    "seed", [transformers.set_seed, torch.manual_seed, np.random.seed], ids=lambda each: each.__name__
)
def test_the_framework_s_seed_is_the_seed(wide, seed):
    states = np.random.get_state(), torch.get_rng_state(), random.getstate()
    asked = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 6, "eos_token_id": []}
    try:
        # As in a process where nobody seeded torch.
        torch.default_generator.manual_seed(torch.Generator().initial_seed())
        answers = []
        for number in (1, 1, 2):
            seed(number)
            answers += [wide.generate([[5, 9, 30]], **asked).tolist() for _ in range(2)]
        assert answers[:2] == answers[2:4]
        assert answers[0] != answers[1], "one call goes on from the other"
        assert answers[0] != answers[4]
        assert len(list(wide.stream([[5, 9, 30]], seed=3, **asked))) == 6
    finally:
        np.random.set_state(states[0])
        torch.set_rng_state(states[1])
        random.setstate(states[2])
