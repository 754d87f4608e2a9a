"""Decoders that carry states: whatever rows rest, begin or go on, each gets the answer that it gets alone."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo.decoders import CONFIGS
from zoo.shrink import tiny_config

from precast.exporter import ExportOptions, export, preview
from precast.runtime import CompiledModelForCausalLM
from precast.runtime.artifact import read_artifact
from precast.runtime.errors import InputError, UsageError

CAPACITY = 24
BATCH = 3
# Only states; keys, values and states in each layer.
FAST = ["mamba", "falcon_h1"]
PUBLISHED_IN = {"mamba": "bfloat16"}
"""What a checkpoint was published in is not what it is compiled in, and states are like what is compiled."""
SLOW = ["lfm2", "falcon_mamba", "jamba", "mamba2", "qwen3_next"]

tokens = st.integers(3, tiny.VOCABULARY - 1)
rows_of_any_length = st.lists(st.lists(tokens, min_size=1, max_size=CAPACITY), min_size=1, max_size=5)
sides = st.sampled_from(["left", "right", "middle"])
steps = st.lists(st.lists(st.none() | tokens, min_size=BATCH, max_size=BATCH), min_size=1, max_size=12)
few = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=[*FAST, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)])
def source(request, tmp_path_factory):
    """The directory of a tiny random checkpoint."""
    config = tiny_config(request.param, CONFIGS.get(request.param))
    config.dtype = PUBLISHED_IN.get(request.param)
    return tiny.save_checkpoint(tmp_path_factory.mktemp("states") / request.param, config)


@pytest.fixture(scope="module")
def model(source, artifact):
    """Batch 3, more rows in slices."""
    compiled = artifact(source, batch_size=BATCH, sequence_length=(CAPACITY,), dynamic_batch_size=True)
    return CompiledModelForCausalLM.from_pretrained(compiled)


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max()))


@few
@given(rows=rows_of_any_length, side=sides)
def test_logits_are_those_of_the_unpadded_row(source, model, rows, side):
    ids, mask = oracle.padded(rows, side)
    for row, values, keep in zip(rows, model(ids, mask).logits, mask, strict=True):
        assert close(values[keep == 1], oracle.logits(source, row))


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_greedy_tokens_are_transformers_own(source, model, side):
    rows = [[5, 9, 30, 7, 200], [80], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]]
    ids, mask = oracle.padded(rows, side)
    found = model.generate(ids, mask, max_new_tokens=12, do_sample=False)
    for row, values in zip(rows, found, strict=True):
        expected = oracle.greedy(source, row, max_new_tokens=12)
        assert values[ids.shape[1] :][: len(expected)].tolist() == expected


@few
@given(prompts=st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=BATCH), script=steps)
def test_rows_go_on_and_rest_in_any_order(source, model, prompts, script):
    session = model._session
    logits = list(session.prefill([np.array(row) for row in prompts])[: len(prompts)].copy())
    rows = [list(row) for row in prompts]
    for step in script:
        asked = step[: len(rows)]
        found = session.decode(asked)
        for index, token in enumerate(asked):
            if token is not None:
                rows[index].append(token)
                logits[index] = found[index].copy()
    for row, values in zip(rows, logits, strict=True):
        assert close(values, oracle.logits(source, row)[-1])


def test_beams(source, model):
    """Beams change places, and their states with them."""
    row = [5, 9, 30, 7, 200]
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    found = model.generate(np.array([row]), **options)[0, len(row) :].tolist()
    expected = oracle.greedy(source, row, **options)
    assert found[: len(expected)] == expected


def test_a_chat_goes_on_from_its_states_and_a_new_one_does_not(source, artifact):
    """At batch 1: a prompt that continues what was read, one that parts from it, and the first again."""
    model = CompiledModelForCausalLM.from_pretrained(artifact(source, sequence_length=(CAPACITY,)))
    row = [7, 8, 9, 10, 11, 12]
    for prompt in (row[:3], row, [*row[:4], 77, 5], row[:2], row):
        found = model.generate(np.array([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
        expected = oracle.greedy(source, prompt, max_new_tokens=6)
        assert found[: len(expected)] == expected
    assert list(model.stream(np.array([row]), max_new_tokens=4, do_sample=False)) == oracle.greedy(
        source, row, max_new_tokens=4
    )
    with pytest.raises(InputError, match=r"prompt_lookup_num_tokens=4.*states, which cannot be taken back"):
        model.generate(np.array([row]), max_new_tokens=4, prompt_lookup_num_tokens=4)


def test_the_plan_says_that_tokens_are_read_one_at_a_time(source, model):
    facts = preview(str(source), ExportOptions(sequence_length=(CAPACITY,))).as_json()
    assert facts["states"] == "tokens are read one at a time"
    assert facts["graphs"] == ["decode"]
    assert facts["cache_bytes"] > 0
    assert model.variant.compiler.options["states"] == facts["states"]


def test_fixed_lengths_are_refused(source):
    options = ExportOptions(sequence_length=(CAPACITY,), prefill_lengths=(8,))
    with pytest.raises(UsageError, match=r"prefill_lengths=8: .*states.*Leave it out"):
        preview(str(source), options)


@pytest.mark.slow
def test_a_validated_export_repeats_to_the_byte(source, tmp_path):
    options = ExportOptions(sequence_length=(CAPACITY,), batch_size=2)
    one, other = (export(str(source), tmp_path / name, options) for name in ("one", "other"))
    assert one.contract.variants[0].accuracy.status == "passed"
    assert one.contract.digest == other.contract.digest == read_artifact(tmp_path / "one").contract.digest
