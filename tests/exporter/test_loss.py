"""What rounding costs, measured and judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.exporter import ExportOptions
from precast.exporter.kinds.samples import Answer, ValidationSample
from precast.exporter.validation.metrics import Floor, Scores, check_floor, floor_for, log_softmax, score_rows
from precast.exporter.validation.reference import Reference
from precast.exporter.validation.rules import judge_loss
from precast.runtime.errors import AccuracyError

VOCABULARY = 40
seeds = st.integers(0, 2**31)


def made(seed: int, lengths: list[int], noise: float):
    """Rows of (ids, reference logits, other logits)."""
    random = np.random.default_rng(seed)
    for length in lengths:
        logits = random.normal(size=(length, VOCABULARY)).astype(np.float32) * 5
        other = (logits + noise * random.normal(size=logits.shape)).astype(np.float32)
        yield random.integers(0, VOCABULARY, length).tolist(), logits, other


@settings(max_examples=40, deadline=None)
@given(seed=seeds, lengths=st.lists(st.integers(2, 12), min_size=1, max_size=4), noise=st.sampled_from([0.0, 0.1, 3.0]))
def test_figures_are_those_of_torch(seed, lengths, noise):
    rows = list(made(seed, lengths, noise))
    found = score_rows(rows)
    mine, theirs = (torch.from_numpy(np.concatenate([row[which] for row in rows])).double() for which in (1, 2))
    kl = torch.nn.functional.kl_div(
        theirs.log_softmax(-1), mine.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert found.tokens == sum(lengths)
    assert found.kl_divergence == pytest.approx(float(kl), abs=1e-9)
    assert found.top1_agreement == pytest.approx(float((mine.argmax(-1) == theirs.argmax(-1)).double().mean()))
    for which, perplexity in ((1, found.reference_perplexity), (2, found.perplexity)):
        losses = [
            torch.nn.functional.cross_entropy(
                torch.from_numpy(row[which][:-1]).double(), torch.tensor(row[0][1:]), reduction="none"
            )
            for row in rows
        ]
        assert perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-9)


def test_the_same_model_loses_nothing():
    found = score_rows(made(0, [5, 9], 0.0))
    assert (found.kl_divergence, found.top1_agreement) == (0, 1)
    assert found.perplexity == found.reference_perplexity


def test_log_softmax_of_large_logits_is_finite():
    logs = log_softmax(np.array([[1e4, -1e4, 0]], np.float32))
    assert np.isfinite(logs).all()
    assert np.exp(logs).sum() == pytest.approx(1)


# ---------------------------------------------------------------- floors


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quantize": "int8"}, Floor(0.01, 0.95)),
        ({"quantize": "int4"}, Floor(0.1, None)),
        ({"quantize": "source"}, Floor(0.01, 0.95)),
        ({"quantize": "int8", "max_kl": 0.5}, Floor(0.5, None)),
        ({"quantize": "int4", "min_agreement": 0.7}, Floor(None, 0.7)),
        ({"kv_cache": "int8"}, Floor(0.01, 0.95)),
        ({"quantize": "int8", "dtype": "bfloat16"}, Floor(0.015, 0.94)),
        ({"quantize": "int4", "auto_cast": "matmul", "auto_cast_type": "fp16"}, Floor(0.1005, None)),
        ({"kv_cache": "int8", "dtype": "float16"}, Floor(0.0105, 0.95)),
    ],
)
def test_floors(options, expected):
    found = floor_for(ExportOptions(**options))
    assert (found.max_kl, found.min_agreement) == (pytest.approx(expected.max_kl), expected.min_agreement)


def scores(kl: float, agreement: float) -> Scores:
    return Scores(500, 20.0, 24.5, kl, agreement)


@settings(max_examples=60, deadline=None)
@given(kl=st.floats(0, 1), agreement=st.floats(0, 1), max_kl=st.floats(1e-3, 1), least=st.floats(0, 1))
def test_below_a_floor_both_numbers_are_said(kl, agreement, max_kl, least):
    is_fine = kl <= max_kl and agreement >= least
    try:
        check_floor(scores(kl, agreement), Floor(max_kl, least), "quantized to int4 in groups of 32")
    except AccuracyError as error:
        message = str(error)
        assert not is_fine
        assert ("max_kl" in message, "min_agreement" in message) == (kl > max_kl, agreement < least)
        for part in ("int4 in groups of 32", "500 tokens", "24.5", "20", "quantize_method='gptq'", "accept_loss=True"):
            assert part in message
    else:
        assert is_fine


def test_the_message_word_by_word():
    with pytest.raises(AccuracyError) as caught:
        check_floor(scores(0.25, 0.6), Floor(0.01, 0.95), "quantized to int8 in groups of 64")
    assert str(caught.value) == (
        "Quantized to int8 in groups of 64, the model loses too much on 500 tokens of held-out text: a KL divergence "
        "of 0.25 where max_kl allows 0.01 and a top-1 agreement of 0.6 where min_agreement asks for 0.95 "
        "(perplexity 24.5, in fp32 20). Nothing was written. Try quantize_method='gptq', a smaller group_size, "
        "quantize='int8', or quantize='auto', which keeps the worst layers in int8; accept_loss=True takes it as it is."
    )


@pytest.mark.parametrize(
    ("kl", "agreement", "words"),
    [
        (0.01000001, 1.0, "of 0.01000001 where max_kl allows 0.01 "),
        (0.0, 0.94999, "of 0.94999 where min_agreement asks for 0.95 "),
        (float("nan"), 1.0, "of nan where max_kl allows 0.01 "),
    ],
)
def test_two_numbers_that_differ_look_different(kl, agreement, words):
    with pytest.raises(AccuracyError) as caught:
        check_floor(scores(kl, agreement), Floor(0.01, 0.95), "int8")
    assert words in str(caught.value)


# ---------------------------------------------------------------- the verdict


def reference(noise: float, at_edges: float):
    """A held-out text and one at the edge of shapes, with answers that are off by so much."""
    samples, mine, theirs = [], [], []
    for kind, amount, seed in (("score", noise, 1), ("logits", at_edges, 2)):
        ids, logits, other = next(made(seed, [60], amount))
        samples.append(ValidationSample(kind, kind, [ids], positions=[list(range(60))]))
        mine.append([Answer({"logits": logits})])
        theirs.append([{"logits": other}])
    return Reference(samples, mine), theirs


def test_what_is_within_the_floors_passes():
    verdict = judge_loss(*reference(0.01, 0.01), ExportOptions(quantize="int8"), "int8")
    assert verdict.status == "passed"
    assert verdict.figures.keys() == {
        "heldout_tokens", "reference_perplexity", "perplexity", "kl_divergence", "top1_agreement",
        "kl_divergence_at_edges", "max_abs_difference", "greedy_tokens_equal", "greedy_tokens",
    }  # fmt: skip
    assert verdict.figures["kl_divergence"] < 0.01


def test_a_loss_is_refused_or_accepted():
    with pytest.raises(AccuracyError, match="KL divergence"):
        judge_loss(*reference(2.0, 2.0), ExportOptions(quantize="int8"), "int8")
    verdict = judge_loss(*reference(2.0, 2.0), ExportOptions(quantize="int8", accept_loss=True), "int8")
    assert verdict.status == "accepted"
    assert "KL divergence <= 0.01" in verdict.reason
    assert verdict.figures["kl_divergence"] > 0.01


def test_a_fault_at_the_edges_is_no_rounding():
    """Held-out text is fine, the padded one is of another model."""
    with pytest.raises(AccuracyError, match=r"edges of its shapes.*fault of the compiled graph"):
        judge_loss(*reference(0.01, 50.0), ExportOptions(quantize="int8"), "int8")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_number_is_never_accepted(value):
    held, theirs = reference(0.01, 0.01)
    theirs[0][0]["logits"][3, 5] = value
    with pytest.raises(AccuracyError, match="NaN or infinity"):
        judge_loss(held, theirs, ExportOptions(quantize="int8", accept_loss=True), "int8")
