"""Arguments of generate(), alone and together: transformers' tokens, scores and logits, or a refusal by name."""

from __future__ import annotations

import contextlib
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import transformers
from zoo import seq2seq

from precast.runtime import CompiledModel, GenerationConfig
from precast.runtime.errors import InputError

SMOLLM2 = Path(__file__).parents[2] / "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = [5, 9, 30, 7, 200, 31, 9, 30]
BEAMS = 4
CLOSE = 2e-4


def _next_or_two(_: int, tokens: Any) -> list[int]:
    return [int(tokens[-1]) % 300 + 1, 7, 8]


ENDS = [*range(3, 320, 6)]
ALONE: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 1},
    {"max_length": 17, "max_new_tokens": None},
    {"eos_token_id": ENDS},
    {"eos_token_id": ENDS, "min_new_tokens": 6},
    {"eos_token_id": ENDS, "min_length": 12},
    {"eos_token_id": [], "max_new_tokens": 20},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"encoder_repetition_penalty": 1.8},
    {"encoder_repetition_penalty": 0.6},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[31], [9, 30], [7, 200, 31]]},
    {"sequence_bias": [[[31], 4.0], [[30, 7], 6.0], [[9], -3.5]]},
    {"sequence_bias": {(31,): -4.0, (9, 30): 8.0}},
    {"forced_bos_token_id": 11},
    {"forced_eos_token_id": 12},
    {"forced_eos_token_id": [12, 13]},
    {"suppress_tokens": [*range(40, 200)]},
    {"begin_suppress_tokens": [*range(3, 250)]},
    {"exponential_decay_length_penalty": (2, 1.7)},
    {"exponential_decay_length_penalty": (0, 1.2), "eos_token_id": ENDS},
    {"remove_invalid_values": True},
    {"renormalize_logits": True},
    {"guidance_scale": 1.7},
    {"guidance_scale": 0.0},
    {"guidance_scale": 0.4, "negative_prompt_ids": torch.tensor([[8, 9, 80]])},
    {"prefix_allowed_tokens_fn": _next_or_two},
    {"logits_processor": [transformers.generation.logits_process.TemperatureLogitsWarper(0.5)]},
    {"stopping_criteria": [transformers.MaxLengthCriteria(13)]},
    {"num_beams": 2},
    {"num_beams": BEAMS, "num_return_sequences": 3},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 2, "renormalize_logits": True, "repetition_penalty": 1.5},
]
# What is drawn depends on the generator, the first step's scores do not: with beams log-probabilities, else logits.
DRAWN: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_k": 0},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"typical_p": 0.3},
    {"epsilon_cutoff": 0.004},
    {"eta_cutoff": 0.01},
    {"top_h": 0.5},
    {"top_k": 9, "num_beams": 3, "temperature": 0.5},
    {"top_p": 0.2, "typical_p": 0.5, "num_beams": 2},
    {"min_p": 0.9, "epsilon_cutoff": 0.1, "num_beams": 2, "eos_token_id": [2, 3, 4]},
    {"renormalize_logits": True, "top_k": 5},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    # transformers 5 does these by code from the Hub alone, for which it wants trust_remote_code.
    ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
    ({"dola_layers": "low"}, "dola_layers"),
    ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "num_beam_groups"),
    ({"num_beams": 2, "force_words_ids": [[5]]}, "force_words_ids"),
    ({"num_beams": 2, "constraints": [5]}, "constraints"),
    # Other heads or layers than those that were compiled.
    ({"use_mtp": True}, "use_mtp"),
    ({"assistant_early_exit": 2}, "assistant_early_exit"),
    # Outputs of layers, which a compiled model keeps to itself.
    ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    # Greenlists are drawn by PyTorch's generator.
    ({"watermarking_config": {"greenlist_ratio": 0.5}}, "watermarking_config=.* random generator.*WatermarkLogitsProc"),
    # What would be answered has no meaning.
    ({"guidance_scale": 2.0, "num_beams": 2}, "guidance_scale"),
    ({"guidance_scale": 2.0, "prompt_lookup_num_tokens": 2}, "guidance_scale"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a number, not nan"),
    ({"negative_prompt_ids": [[5]]}, "negative_prompt_ids needs guidance_scale"),
    ({"negative_prompt_attention_mask": [[1]]}, "negative_prompt_ids needs guidance_scale"),
    ({"prefix_allowed_tokens_fn": lambda *_: [[1], [2, 3]]}, "prefix_allowed_tokens_fn has to return"),
    ({"exponential_decay_length_penalty": (0, 1e300)}, "exponential_decay_length_penalty must be"),
    ({"top_logprobs": 321}, "top_logprobs=321 is more than the model's 320 tokens"),
    ({"prefix_allowed_tokens_fn": lambda *_: []}, "prefix_allowed_tokens_fn"),
    ({"prefix_allowed_tokens_fn": lambda *_: [320]}, "prefix_allowed_tokens_fn"),
    ({"prefix_allowed_tokens_fn": "abc"}, "prefix_allowed_tokens_fn must be a function"),
    ({"exponential_decay_length_penalty": (1, 1.1), "eos_token_id": []}, "there is no eos_token_id"),
    ({"exponential_decay_length_penalty": (1, -1.1)}, "exponential_decay_length_penalty must be"),
    ({"exponential_decay_length_penalty": 1.1}, "exponential_decay_length_penalty=1.1 is of the wrong type"),
    ({"sequence_bias": []}, "sequence_bias"),
    ({"sequence_bias": [[[400], 1.0]]}, "sequence_bias=400 is none of the model's tokens"),
    ({"sequence_bias": [[[4], float("nan")]]}, "sequence_bias holds what is no number"),
    ({"logit_bias": {"400": 1}}, "logit_bias=400 is none"),
    ({"logit_bias": {4: 101}}, "logit_bias must lie between -100 and 100; of token 4 it is 101"),
    ({"presence_penalty": 2.5}, "presence_penalty must lie between -2 and 2, not 2.5"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty must lie between -2 and 2, not nan"),
    ({"max_time": 0.0}, "max_time must be above 0 seconds, not 0.0"),
    ({"do_sample": True, "typical_p": 0.0}, "typical_p must be above 0 and at most 1, not 0.0"),
    ({"do_sample": True, "top_h": 1.5}, "top_h must be above 0"),
    ({"do_sample": True, "eta_cutoff": 1.5}, "eta_cutoff must lie between 0 and 1"),
    ({"top_logprobs": -1}, "top_logprobs must be a whole number of at least 0"),
    ({"n": 2, "num_return_sequences": 2, "do_sample": True}, "'n' and 'num_return_sequences', which are two names"),
    ({"presence_penaltie": 1.0}, "Did you mean 'presence_penalty'"),
    ({"assistant_model": "gpt2"}, "assistant_model must be a CompiledModelForCausalLM, not 'gpt2'"),
]


def _together() -> list[dict[str, Any]]:
    """Every fifth pair of settings that do not say the same thing twice, with beams and without."""
    pairs = [{**one, **two} for one, two in combinations(ALONE[1:], 2) if not one.keys() & two.keys()]
    # Guided beams are refused, and of two ends that are equally likely beams take any.
    wild = {"guidance_scale", "negative_prompt_ids"}
    ties = [12, 13]
    kept = [
        pair for pair in pairs
        if "num_beams" not in pair or not (pair.keys() & wild or pair.get("forced_eos_token_id") == ties)
    ]  # fmt: skip
    return kept[::5]


COMBINED = _together()


def test_the_table_is_long_enough():
    assert len(ALONE) + len(DRAWN) + len(COMBINED) >= 120


class Family:
    """A tiny checkpoint in eager transformers, and compiled for one row and for several."""

    def __init__(self, source: Any, artifact: Any, auto: str = "AutoModelForCausalLM", **sizes: Any) -> None:
        self.eager = oracle.eager(source, auto)
        self.one = CompiledModel.from_pretrained(artifact(source, **sizes))
        self.several = CompiledModel.from_pretrained(artifact(source, batch_size=BEAMS, **sizes))

    def ask(self, options: dict[str, Any], **more: Any) -> tuple[Any, Any]:
        """Ours and theirs."""
        asked = {"eos_token_id": 2, "max_new_tokens": 12, "pad_token_id": 1, "return_dict_in_generate": True,
                 "output_scores": True, "output_logits": True, **options, **more}  # fmt: skip
        ids = torch.tensor([PROMPT])
        with torch.inference_mode(), warnings.catch_warnings(action="ignore"):
            expected = self.eager.generate(ids, attention_mask=torch.ones_like(ids), **asked)
        model = self.several if asked.get("num_beams", 1) > 1 else self.one
        return model.generate(ids, torch.ones_like(ids), **asked), expected


FAMILIES = ["llama", *[pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma2", "gptj", "qwen3")]]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, checkpoint, artifact):
    return Family(checkpoint(request.param), artifact)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "bart")])
def encoder_decoder(request, artifact, tmp_path_factory):
    source = seq2seq.make(tmp_path_factory.mktemp("zoo") / request.param, request.param)
    return Family(source, artifact, "AutoModelForSeq2SeqLM", decoder_sequence_length=32)


def _assert_equal(found: Any, expected: Any) -> None:
    assert found.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in ((found.scores, expected.scores), (found.logits, expected.logits)):
        assert len(ours) == len(theirs)
        for one, two in zip(ours, theirs, strict=True):
            assert torch.equal(torch.isinf(one), torch.isinf(two))
            assert torch.allclose(torch.nan_to_num(one), torch.nan_to_num(two), atol=CLOSE, rtol=CLOSE)
    if "beam_indices" in expected:
        assert found.beam_indices.tolist() == expected.beam_indices.tolist()
        assert torch.allclose(found.sequences_scores, expected.sequences_scores, atol=CLOSE)


@pytest.mark.parametrize("options", ALONE, ids=lambda options: ",".join(options) or "defaults")
def test_an_argument_is_transformers_own(family, options):
    _assert_equal(*family.ask(options, do_sample=False))


@pytest.mark.parametrize("part", range(4))
def test_arguments_together_are_transformers_own(family, part):
    for options in COMBINED[part::4]:
        _assert_equal(*family.ask(options, do_sample=False))


@pytest.mark.parametrize("part", range(4))
def test_arguments_of_encoder_decoders_are_transformers_own(encoder_decoder, part):
    for options in [*ALONE, *COMBINED][part::4]:
        if "guidance_scale" in options:
            with pytest.raises(
                InputError, match=r"guidance_scale=.* is for decoders|negative_prompt_ids=.* is not done"
            ):
                encoder_decoder.one.generate([PROMPT], **options)
            continue
        _assert_equal(*encoder_decoder.ask(options, do_sample=False))


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="`make models` fetches the checkpoint")
def test_arguments_of_smollm2_are_transformers_own(artifact, tmp_path):
    """A trained model, whose likeliest tokens are likely."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name, dtype="float32")
    # One that comes from GGUF cannot be saved.
    whole.config.quantization_config = None
    plain = type(whole)(whole.config)
    plain.load_state_dict(whole.state_dict())
    plain.save_pretrained(tmp_path / "smollm2")
    family = Family(tmp_path / "smollm2", artifact)
    for options in ALONE:
        _assert_equal(*family.ask(options, do_sample=False))


@pytest.mark.parametrize("options", DRAWN, ids=lambda options: ",".join(options) or "defaults")
def test_what_is_drawn_from_is_transformers_own(family, options):
    found, expected = family.ask(options, do_sample=True, max_new_tokens=1)
    one, two = found.scores[0], expected.scores[0]
    assert torch.equal(torch.isinf(one), torch.isinf(two))
    assert torch.allclose(torch.nan_to_num(one), torch.nan_to_num(two), atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused_is_refused_by_name(family, options, message):
    model = family.several if options.get("num_beams", 1) > 1 else family.one
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        model.generate([PROMPT], max_new_tokens=3, **options)


def test_log_probabilities_are_the_models_own(family):
    """Of every row of a batch, whatever changes the logits from which tokens are chosen."""
    rows = [[5, 9, 30], [80, 81, 7]]
    found = family.several.generate(
        rows, max_new_tokens=6, eos_token_id=[], top_logprobs=3, repetition_penalty=1.5, n=2, do_sample=True, seed=3
    )
    assert found.sequences.shape == (4, 9)
    assert found.logprobs.shape == (4, 6)
    for row, (ids, logprobs) in enumerate(zip(found.sequences, found.logprobs, strict=True)):
        with torch.inference_mode():
            logits = family.eager(torch.tensor([ids.tolist()])).logits[0, 2:-1].float().log_softmax(-1)
        assert np.allclose(logprobs, logits[torch.arange(6), torch.tensor(ids[3:])], atol=CLOSE)
        values, tokens = logits.topk(3)
        assert np.allclose(found.top_logprobs[row], values, atol=CLOSE)
        assert found.top_logprobs_ids[row].tolist() == tokens.tolist()
    assert list(family.one.generate([rows[0]], logprobs=True, max_new_tokens=2)) == ["sequences", "logprobs"]
    for asked in ({"logprobs": True}, {"return_dict_in_generate": True, "output_scores": True}):
        with pytest.raises(InputError, match=r"stream\(\) gives tokens and no logprobs"):
            family.one.stream([rows[0]], **asked)


def test_rows_that_ended_have_zeros(family):
    rows = [[5, 9, 30], [80, 81, 7], [12, 13, 14]]
    asked = {"max_new_tokens": 12, "eos_token_id": ENDS, "pad_token_id": 1, "return_dict_in_generate": True}
    found = family.several.generate(rows, output_scores=True, output_logits=True, logprobs=True, **asked)
    new = found.sequences[:, 3:]
    lengths = [1 + int(np.isin(row, ENDS).argmax()) if np.isin(row, ENDS).any() else len(row) for row in new]
    assert len({*lengths}) > 1, "rows end one after the other"
    for row, length in enumerate(lengths):
        for steps in (found.scores, found.logits):
            assert all(step[row].any() for step in steps[:length])
            assert not any(step[row].any() for step in steps[length:])
        assert found.logprobs[row, :length].all()
        assert not found.logprobs[row, length:].any()


def test_time_runs_out(family, monkeypatch):
    """After the step in which it does; a second is five steps here."""
    clock = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock) / 5)
    asked = {"max_new_tokens": 30, "eos_token_id": [], "max_time": 1.0}
    found = family.one.generate([PROMPT], **asked)
    assert found.shape == (1, len(PROMPT) + 6)
    stream = family.one.stream([PROMPT], **asked)
    assert list(stream) == found[0, len(PROMPT) :].tolist()


def test_the_time_of_a_stream_counts_from_its_call(family, monkeypatch):
    """As transformers counts it from generate()'s, and not from the first token that is asked for."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = family.one.stream([PROMPT], max_new_tokens=30, eos_token_id=[], max_time=1.0)
    now[0] = 1.5
    assert len(list(stream)) == 1


def test_guided_rows_of_a_batch_are_as_alone(family):
    rows = [[5, 9, 30], [80, 81, 7]]
    asked = {"max_new_tokens": 8, "eos_token_id": [], "guidance_scale": 2.5}
    negative = [[1, 8, 9], [30, 31, 32]]
    mask = [[0, 1, 1], [1, 1, 1]]
    found = family.several.generate(rows, negative_prompt_ids=negative, negative_prompt_attention_mask=mask, **asked)
    for row, alone, away in zip(found, rows, ([8, 9], negative[1]), strict=True):
        assert family.one.generate([alone], negative_prompt_ids=[away], **asked)[0].tolist() == row.tolist()
    streamed = list(family.one.stream([rows[0]], negative_prompt_ids=[[8, 9]], **asked))
    assert streamed == found[0, 3:].tolist()
    with pytest.raises(InputError, match="negative_prompt_ids has 1 rows and input_ids 2"):
        family.several.generate(rows, negative_prompt_ids=[[5]], **asked)


def test_openais_names(family):
    asked = {"max_new_tokens": 8, "eos_token_id": []}
    plain = family.one.generate([PROMPT], **asked)
    assert family.one.generate([PROMPT], stop=None, n=1, **asked).tolist() == plain.tolist()
    first = int(plain[0, len(PROMPT)])
    assert family.one.generate([PROMPT], logit_bias={str(first): -100}, **asked)[0, len(PROMPT)] != first
    drawn = {"do_sample": True, "seed": 1, **asked}
    two = family.several.generate([PROMPT], n=2, **drawn)
    assert two.tolist() == family.several.generate([PROMPT], num_return_sequences=2, **drawn).tolist()


def test_names_of_openai_are_attributes_too(family):
    config = GenerationConfig()
    config.n, config.stop = 2, ["x"]
    assert (config.num_return_sequences, config.stop_strings) == (2, ["x"])


def test_ends_that_there_are_not_change_nothing(family):
    """Files name them, where a checkpoint is a cut of another."""
    model = family.one.new_session()
    model.generation_config = {"eos_token_id": [2, 5000, 320, -1], "max_new_tokens": 8}
    asked = {"exponential_decay_length_penalty": (1, 1.5)}
    plain = family.one.generate([PROMPT], eos_token_id=2, max_new_tokens=8, **asked)
    assert model.generate([PROMPT], **asked).tolist() == plain.tolist()


def test_reset_forgets_what_guided_and_drafted(family):
    model = family.one.new_session()
    model.generate([PROMPT], guidance_scale=2.0, max_new_tokens=4)
    model.generate([PROMPT], assistant_model=family.one, max_new_tokens=4)
    assert model._second_session.tokens[0]
    assert model._draft[1]._session.tokens[0]
    model.reset()
    assert not model._second_session.tokens[0]
    assert not model._draft[1]._session.tokens[0]


def test_a_stream_can_be_closed(family):
    with contextlib.closing(family.one.stream([PROMPT], max_new_tokens=9, eos_token_id=[])) as stream:
        next(stream)
    assert list(stream) == []
