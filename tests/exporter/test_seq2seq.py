"""Every encoder-decoder: logits, greedy tokens and beams are transformers' own, whatever lengths and padding."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir
import oracle
import processes
import pytest
import tiny
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import seq2seq as zoo

from precast.exporter import ExportOptions, export
from precast.runtime import CompiledModel, CompiledModelForSeq2SeqLM, CompiledModelForSpeechSeq2Seq
from precast.runtime.errors import CheckpointError, InputError, UsageError

LONGEST, CAPACITY = 24, 24
FAST = ("bart", "t5")
PAD = 1  # transformers takes 0 for none, and fills with the end instead
tokens = st.integers(3, tiny.VOCABULARY - 1)
sources = st.lists(st.lists(tokens, min_size=1, max_size=LONGEST), min_size=1, max_size=5)
sides = st.sampled_from(["left", "right", "middle"])
few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
text_types = [
    (model_type, "onnx") if model_type in FAST else pytest.param((model_type, "onnx"), marks=pytest.mark.slow)
    for model_type, task in zoo.pairs()
    if task == zoo.TEXT and model_type not in zoo.REFUSED
]
NATIVE = [("t5", "export"), ("bart", "export"), ("t5", "aoti"), ("bart", "aoti")]
native = [pytest.param(each, marks=pytest.mark.slow) for each in NATIVE]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made("t5")`: a checkpoint and its artifact: two source lengths, batch 3, more rows in slices."""
    root, found = tmp_path_factory.mktemp("seq2seq"), {}

    def make(model_type, task=zoo.TEXT, backend="onnx"):
        key = f"{model_type}-{backend}"
        if key not in found:
            source = zoo.make(root / key, model_type, task)
            options = ExportOptions(task=task, backend=backend, validate=False, **zoo.OPTIONS[task])
            found[key] = source, export(str(source), root / f"{key}-out", options).path
        source, compiled = found[key]
        return source, CompiledModel.from_pretrained(compiled)

    return make


@pytest.fixture(scope="module", params=text_types + native, ids="-".join)
def family(request, made):
    model_type, backend = request.param
    return made(model_type, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("family", NATIVE[2:], ids="-".join, indirect=True)
def test_native_code_needs_no_torch(family):
    source, model = family
    assert model.artifact.contract.variants[0].requires_torch == []
    row = [5, 9, 30, 7, 200, 41, 17]
    [found] = processes.generate_without_torch(model.artifact.path, [row], 10)
    assert found == eager_answer(source, row, max_new_tokens=10)


def eager_logits(source, row, answer):
    model = oracle.eager(source, "AutoModelForSeq2SeqLM")
    with torch.inference_mode():
        return model(input_ids=torch.tensor([row]), decoder_input_ids=torch.tensor([answer])).logits[0].numpy()


def eager_answer(source, row, **options):
    """What transformers' own generate() answers to one source, the start included."""
    model = oracle.eager(source, "AutoModelForSeq2SeqLM")
    with torch.inference_mode():
        return model.generate(torch.tensor([row]), do_sample=False, pad_token_id=PAD, **options)[0].tolist()


def check_answers(family, rows, side, **options):
    source, model = family
    ids, mask = oracle.padded(rows, side)
    found = model.generate(ids, mask, do_sample=False, pad_token_id=PAD, **options)
    for row, values in zip(rows, found.tolist(), strict=True):
        expected = eager_answer(source, row, **options)
        assert values[: len(expected)] == expected
        assert set(values[len(expected) :]) <= {PAD}


@few
@given(rows=sources, side=sides, data=st.data())
def test_logits_are_those_of_the_unpadded_row(family, rows, side, data):
    source, model = family
    answers = [data.draw(st.lists(tokens, min_size=1, max_size=CAPACITY)) for _ in rows]
    ids, mask = oracle.padded(rows, side)
    answer_ids, answer_mask = oracle.padded(answers, data.draw(sides))
    found = model(ids, mask, answer_ids, answer_mask).logits
    for row, answer, values, keep in zip(rows, answers, found, answer_mask, strict=True):
        expected = eager_logits(source, row, answer)
        assert np.abs(values[keep == 1] - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


@few
@given(rows=sources, side=sides, beams=st.integers(1, 3), ends=st.sampled_from([[2], [2, *range(3, 60)]]))
def test_answers_are_transformers_own(family, rows, side, beams, ends):
    check_answers(family, rows, side, num_beams=beams, eos_token_id=ends, max_new_tokens=18)


SETTINGS = [
    {"forced_bos_token_id": 77},
    {"forced_eos_token_id": 2, "max_new_tokens": 5},
    {"max_length": 12, "min_length": 6, "eos_token_id": list(range(2, 160))},
    {"bad_words_ids": [[30], [40, 41]], "suppress_tokens": list(range(100, 200)), "begin_suppress_tokens": [50, 60]},
    {"no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 1, "repetition_penalty": 1.3},
    {"length_penalty": 2.0, "early_stopping": True, "eos_token_id": list(range(2, 60))},
    {"decoder_start_token_id": 99},
]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("asked", SETTINGS, ids=",".join)
def test_settings_do_what_they_do_in_transformers(made, asked, beams):
    given_ = {"max_new_tokens": 16, **asked} if "max_length" not in asked else asked
    if beams == 1:
        given_ = {name: value for name, value in given_.items() if name not in ("length_penalty", "early_stopping")}
    check_answers(made("bart"), [[5, 9, 30, 7, 200], [80, 81]], "left", num_beams=beams, **given_)


@pytest.mark.parametrize("first", [[[0, 70], [80, 81]], [[70, 71], [80, 81]]], ids=["one begins", "none begins"])
@pytest.mark.parametrize("mask", [None, [[1, 1], [0, 1]]], ids=["whole", "masked"])
def test_what_answers_begin_with_has_the_start_in_front(made, first, mask):
    """Where no row has it, all get it."""
    source, model = made("t5")
    rows, asked = torch.tensor([[5, 9, 30, 7], [6, 8, 200, 11]]), {"max_length": 8, "min_length": 6, "do_sample": False}
    if mask is not None:
        asked["decoder_attention_mask"] = torch.tensor(mask)
    asked |= {"decoder_input_ids": torch.tensor(first), "pad_token_id": PAD, "eos_token_id": [*range(2, 160)]}
    with torch.inference_mode():
        expected = oracle.eager(source, "AutoModelForSeq2SeqLM").generate(rows, **asked)
    assert model.generate(rows, **asked).tolist() == expected.tolist()


def test_a_stream_gives_the_answer(made):
    _, model = made("t5")
    row = np.array([[5, 9, 30]])
    whole = model.generate(row, max_new_tokens=8, eos_token_id=[])
    abandoned = model.stream(row[:, ::-1], max_new_tokens=8)
    next(abandoned)
    assert list(model.stream(row, max_new_tokens=8, eos_token_id=[])) == whole[0, 1:].tolist()
    with pytest.raises(InputError, match=r"stream\(\) answers one row; this batch has 2"):
        model.stream([[5, 9], [6, 7]])


def _every_third(tokens, logits):
    return logits.masked_fill(torch.arange(logits.shape[-1]) % 3 != tokens.shape[1] % 3, -torch.inf)


STREAMED = [
    {"logits_processor": [_every_third]},
    {"stopping_criteria": [lambda tokens, _: torch.tensor([tokens.shape[1] == 5])]},
    {"prefix_allowed_tokens_fn": lambda index, tokens: [70 + index + len(tokens), 9, 5]},
    {"decoder_input_ids": torch.tensor([[70, 71]])},
    {
        "decoder_input_ids": torch.tensor([[70, 71, 72]]),
        "decoder_attention_mask": torch.tensor([[0, 1, 1]]),
        "min_length": 6,
        "eos_token_id": [*range(2, 160)],
    },
    {"decoder_start_token_id": 99, "generation_config": {"repetition_penalty": 2.0}},
    {"attention_mask": torch.tensor([[1, 1, 1, 0]]), "encoder_no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize("asked", STREAMED, ids=",".join)
def test_a_stream_takes_what_generate_takes(made, asked):
    source, model = made("t5")
    rows, asked = torch.tensor([[5, 9, 30, 7]]), {"max_new_tokens": 8, "eos_token_id": 2, "pad_token_id": PAD, **asked}
    settings_ = {**asked, **asked.get("generation_config", {})}
    settings_.pop("generation_config", None)
    with torch.inference_mode():
        expected = oracle.eager(source, "AutoModelForSeq2SeqLM").generate(rows, do_sample=False, **settings_)[0]
    assert model.generate(rows, **asked)[0].tolist() == expected.tolist()
    new = list(model.stream(rows, **asked))
    assert 0 < len(new) < len(expected)
    assert new == expected[-len(new) :].tolist()
    assert new == list(model.stream(inputs=rows, **asked))


def test_the_same_source_is_encoded_anew_for_each_call(made):
    """A source whose array changes between calls is another source."""
    _, model = made("t5")
    ids = np.array([[5, 9, 30]])
    model.generate(ids, max_new_tokens=4)
    ids[:] = [[200, 201, 202]]
    fresh = model.new_session().generate(ids.copy(), max_new_tokens=4)
    assert model.generate(ids, max_new_tokens=4).tolist() == fresh.tolist()


def test_census(made):
    """One operator per layer for either attention; caches and encoded states go straight into them, and no copy of
    the encoder is in the decoder, nor of its weights in the file."""
    for model_type in FAST:
        source, model = made(model_type)
        graph = onnx_ir.load(model.artifact.path / "decoder.onnx").graph
        counts = Counter(node.op_type for node in graph.all_nodes())
        assert (counts["GroupQueryAttention"], counts["MultiHeadAttention"]) == (2, 2)
        assert not counts.keys() & {"ScatterND", "Softmax", "Where"}
        wanted = {"past_key_values": "GroupQueryAttention", "encoder.": "MultiHeadAttention"}
        for value in graph.inputs:
            for start, operator in wanted.items():
                if value.name.startswith(start):
                    assert [user.op_type for user, _ in value.uses()] == [operator], value.name
        stored = (model.artifact.path / "model.onnx.data").stat().st_size
        assert stored <= 1.1 * (source / "model.safetensors").stat().st_size


def test_an_export_is_validated(tmp_path, made):
    source, _ = made("t5")
    artifact = export(str(source), tmp_path / "out", ExportOptions(task="translation", **zoo.OPTIONS[zoo.TEXT]))
    accuracy = artifact.contract.variants[0].accuracy
    assert accuracy.status == "passed"
    assert accuracy.figures["greedy_tokens_equal"] > 0
    assert accuracy.figures["questions"] == 13
    assert artifact.contract.task == zoo.TEXT


BAD_EXPORTS = [
    ({}, UsageError, r"fixed shapes: sequence_length\. Add sequence_length=N"),
    (
        {"sequence_length": (8,), "prefill_lengths": (4,)},
        UsageError,
        "prefill_lengths is not for the task 'text2text-generation'",
    ),
    ({"sequence_length": (65,)}, UsageError, "sequence_length=65 is more"),
    (
        {"sequence_length": (8,), "decoder_sequence_length": 65},
        UsageError,
        "decoder_sequence_length=65.*64 positions",
    ),
    (
        {"sequence_length": (8,), "decoder_sequence_length": 0},
        UsageError,
        "decoder_sequence_length must be at least 1",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_EXPORTS, ids=range(len(BAD_EXPORTS)))
def test_what_cannot_be_exported_is_explained(made, tmp_path, options, error, message):
    source, _ = made("bart")
    with pytest.raises(error, match=message):
        export(str(source), tmp_path / "out", ExportOptions(task=zoo.TEXT, **options))


def test_a_default_length_is_what_fits(made):
    _, model = made("t5")
    found = model.generate([[5, 9]], decoder_input_ids=[[0, *range(70, 79)]], eos_token_id=[])
    assert found.shape == (1, 24)


def test_what_does_not_fit_is_explained(made):
    _, model = made("t5")
    assert isinstance(model, CompiledModelForSeq2SeqLM)
    with pytest.raises(InputError, match=r"25 tokens; the model was compiled for 24.*--sequence-length 25"):
        model.generate(np.ones((1, 25), int))
    with pytest.raises(InputError, match=r"compiled 24\. Ask for max_new_tokens=23.*--decoder-sequence-length 25"):
        model.generate(np.ones((1, 2), int), max_new_tokens=24)
    with pytest.raises(InputError, match="decoder_input_ids has 2 rows; there are 1 sources"):
        model.generate(np.ones((1, 2), int), decoder_input_ids=np.ones((2, 1), int))
    with pytest.raises(InputError, match=r"pass decoder_input_ids, or use generate\(\)"):
        model(np.ones((1, 2), int))


# ---------------------------------------------------------------- speech


@pytest.fixture(scope="module")
def whisper(made):
    return made("whisper", zoo.SPEECH)


FEATURES = np.random.default_rng(0).normal(0, 0.5, (4, 16, 120)).astype(np.float32)
LONG = np.random.default_rng(1).normal(0, 0.5, (1, 16, 490)).astype(np.float32)
"""Four windows and a bit."""
SPOKEN = [
    {},
    {"language": "fr"},
    {"language": "French", "task": "translate"},
    {"language": "<|zh|>"},
    {"task": "transcribe"},
    {"language": ["en", "zh", "fr", "en"]},
    {"num_beams": 3},
    {"max_new_tokens": 9},
    {"eos_token_id": [2, *range(200, 300)], "num_beams": 2},
    {"eos_token_id": [2, *range(200, 300)]},
]


@pytest.mark.parametrize("asked", SPOKEN, ids=lambda asked: ",".join(asked) or "defaults")
def test_speech_is_written_down_as_by_transformers(whisper, asked):
    source, model = whisper
    eager = oracle.eager(source, "WhisperForConditionalGeneration")
    found = model.generate(FEATURES, **asked)
    for row, values in zip(range(4), found, strict=True):
        alone = {**asked, "language": asked["language"][row]} if isinstance(asked.get("language"), list) else asked
        with torch.inference_mode():
            expected = eager.generate(torch.from_numpy(FEATURES[row : row + 1]), **alone)[0].tolist()
        # With several ends transformers leaves the end in.
        expected = expected[:-1] if expected and expected[-1] in (asked.get("eos_token_id") or [2]) else expected
        assert values[: len(expected)].tolist() == expected
        assert not values[len(expected) :].any(), "what follows the end is padding"


def test_a_streamer_is_told_as_by_transformers(whisper):
    """First what the answer begins with, which those of transformers leave out by skip_prompt."""
    source, model = whisper
    asked, heard = {"language": "fr", "max_new_tokens": 9}, []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            heard[-1].append(value.reshape(-1).tolist())

        def end(self):
            heard[-1].append("end")

    for generate in (model.generate, oracle.eager(source, "WhisperForConditionalGeneration").generate):
        heard.append([])
        with torch.inference_mode():
            generate(torch.from_numpy(FEATURES[:1]), streamer=Streamer(), **asked)
    assert heard[0] == heard[1]
    assert len(heard[0]) > 3


WRITTEN = [
    ([5, 245, 250, 7, 8], True), ([5, 6, 245, 250], True), ([245, 250, 7, 8, 246, 247, 9], True),
    ([245, 250, 7, 246], False), ([5, 6, 250], False), ([5, 6], False), ([5, 301, 302, 7], False),
]  # fmt: skip
"""What the model writes, and whether the sound goes on after it."""


@pytest.mark.parametrize(("written", "goes_on"), WRITTEN, ids=range(len(WRITTEN)))
def test_an_answer_with_times_that_nobody_asked_for_is_gone_on_from(whisper, monkeypatch, written, goes_on):
    """Times from 241 on: two in a row end a segment, after which the rest of the sound is heard again."""
    source, model = whisper
    eager = oracle.eager(source, "WhisperForConditionalGeneration")
    monkeypatch.setattr(eager.generation_config, "no_timestamps_token_id", 240)
    monkeypatch.setattr(model, "_file_settings", {**model._file_settings, "no_timestamps_token_id": 240})
    after = dict(zip([240, *written], [*written, 2], strict=True))

    def dictate(ids, scores):
        for row, values in zip(ids, scores, strict=True):
            values[:] = -np.inf
            values[after[int(row[-1])]] = 0
        return scores

    asked = {"logits_processor": [dictate], "max_new_tokens": 9}
    with torch.inference_mode():
        expected = eager.generate(torch.from_numpy(FEATURES[:2]), **asked).tolist()
    assert (len(expected[0]) > len(written)) is goes_on
    assert model.generate(FEATURES[:2], **asked).tolist() == expected
    if goes_on:
        with pytest.raises(InputError, match=r"stopped at 0\.\d\d s.*Pass return_timestamps=True"):
            model.generate(FEATURES[:1], **asked, return_dict_in_generate=True)


@pytest.mark.parametrize("beams", [1, 3])
def test_named_outputs_are_of_whole_rows(whisper, beams):
    """As with transformers, whose scores have a step for each token that was generated."""
    source, model = whisper
    eager = oracle.eager(source, "WhisperForConditionalGeneration")
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "num_beams": beams,
             "eos_token_id": [2, *range(200, 300)], "language": "fr", "max_new_tokens": 12}  # fmt: skip
    ended = 0
    for row in range(4):
        with torch.inference_mode():
            expected = eager.generate(torch.from_numpy(FEATURES[row : row + 1]), **asked)
        found = model.generate(FEATURES[row : row + 1], **asked)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert len(found.scores) == len(expected.scores)
        ended += found.sequences.shape[1] < 4 + 12
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            assert np.abs(ours[: len(theirs)] - theirs.numpy()).max() < 1e-3
        if beams > 1:
            assert found.beam_indices.tolist() == expected.beam_indices.tolist()
    assert ended or beams > 1, "or there is no end to be kept"


BEFORE = np.array([11, 12, 13])
IN_WINDOWS = [
    {},
    {"language": "fr", "task": "translate"},
    {"num_beams": 3},
    {"max_new_tokens": 9},
    {"condition_on_prev_tokens": True, "max_new_tokens": 9},
    {"prompt_ids": BEFORE},
    {"prompt_ids": BEFORE, "condition_on_prev_tokens": True, "max_new_tokens": 8},
    {"prompt_ids": BEFORE, "prompt_condition_type": "all-segments", "condition_on_prev_tokens": True,
     "max_new_tokens": 8},
    {"logprob_threshold": -4.0, "temperature": (0.0,)},
    {"logprob_threshold": -4.5, "num_beams": 2, "temperature": (0.0,)},
    {"compression_ratio_threshold": 1.1, "temperature": (0.0, 0.0)},
    {"logprob_threshold": -1.0, "no_speech_threshold": 0.001, "temperature": (0.0,)},
    {"logprob_threshold": -1.0, "no_speech_threshold": 0.0031, "temperature": (0.0,)},
]  # fmt: skip


@pytest.fixture
def timed(whisper, monkeypatch):
    """A model whose tokens from 241 on are times, eager and compiled."""
    source, model = whisper
    eager = oracle.eager(source, "WhisperForConditionalGeneration")
    told = {"no_timestamps_token_id": 240, "prev_sot_token_id": 239, "max_initial_timestamp_index": 30}
    for name, value in told.items():
        monkeypatch.setattr(eager.generation_config, name, value, raising=False)
    monkeypatch.setattr(model, "_file_settings", {**model._file_settings, **told})
    return eager, model


@pytest.mark.parametrize("asked", IN_WINDOWS, ids=lambda asked: ",".join(asked) or "defaults")
@pytest.mark.parametrize("sound", [LONG, LONG[:, :, :120]], ids=["long", "a window"])
def test_sounds_of_any_length_are_written_down_as_by_transformers(timed, asked, sound):
    """Tokens, and the segments' times."""
    eager, model = timed
    shared = {"return_timestamps": True, "return_segments": True}
    tensors = {name: torch.tensor(value) if isinstance(value, np.ndarray) else value for name, value in asked.items()}
    with torch.inference_mode():
        expected = eager.generate(torch.from_numpy(sound), **shared, **tensors)
    found = model.generate(sound, **shared, **asked)
    assert found.sequences[0].tolist() == expected["sequences"][0].tolist()
    assert len(found.segments[0]) == len(expected["segments"][0])
    for ours, theirs in zip(found.segments[0], expected["segments"][0], strict=True):
        assert ours["tokens"].tolist() == theirs["tokens"].tolist()
        assert (ours["start"], ours["end"]) == pytest.approx((float(theirs["start"]), float(theirs["end"])))


def test_several_long_sounds_are_each_heard_to_their_end(timed):
    _, model = timed
    sounds = np.concatenate([LONG, LONG[:, :, ::-1], np.roll(LONG, 100, 2)])
    lengths = [490, 130, 300]
    mask = np.arange(490)[None] < np.array(lengths)[:, None]
    seen: list = []
    found = model.generate(sounds, attention_mask=mask, max_new_tokens=9, return_segments=True, return_timestamps=True,
                           monitor_progress=lambda at: seen.append(at.tolist()[0]))  # fmt: skip
    for row, length in enumerate(lengths):
        alone = model.generate(sounds[row : row + 1, :, :length], max_new_tokens=9, return_timestamps=True)[0]
        assert found.sequences[row][: len(alone)].tolist() == alone.tolist()
        assert [0, length] in seen
    with pytest.raises(InputError, match="3 long sounds; pass attention_mask="):
        model.generate(sounds, return_timestamps=True)


def test_a_bad_answer_is_drawn_anew_and_repeatably(timed):
    _, model = timed
    asked = {
        "temperature": (0.0, 0.8, 1.0),
        "logprob_threshold": -0.001,
        "return_timestamps": True,
        "max_new_tokens": 9,
    }
    one = model.generate(LONG, seed=3, **asked)
    assert model.generate(LONG, seed=3, **asked).tolist() == one.tolist()
    assert model.generate(LONG, seed=4, **asked).tolist() != one.tolist()
    plain = model.generate(LONG, return_timestamps=True, max_new_tokens=9)
    assert plain.tolist() != one.tolist()


def test_speech_goes_by_its_configurations_language_and_task(whisper):
    """Given with the call, set on the model, and in its file; an English model is told neither by a call."""
    source, model = whisper
    eager, one = oracle.eager(source, "WhisperForConditionalGeneration"), FEATURES[:1]
    given = transformers.GenerationConfig(language="fr", task="translate", max_new_tokens=9)

    def check(**asked):
        with torch.inference_mode():
            expected = eager.generate(torch.from_numpy(one), **asked)[0].tolist()
        found = model.generate(one, **asked)[0].tolist()
        assert found == [token for token in expected if token != 2]
        return found

    answers = [check(max_new_tokens=9), check(generation_config=given), check(generation_config=given, language="zh")]
    for theirs in (model, eager):
        theirs.generation_config.language, theirs.generation_config.task = "zh", "translate"
    answers.append(check(max_new_tokens=9))
    assert answers[2] == answers[3]
    assert len({*map(tuple, answers)}) == 3, "they change the answer"
    for theirs in (model, eager):
        theirs.generation_config.is_multilingual = False
        with pytest.raises((InputError, ValueError), match=r"English.only"):
            theirs.generate(one if theirs is model else torch.from_numpy(one), language="fr")
    assert check(max_new_tokens=9, is_multilingual=True, language="zh") == answers[3]
    model.generation_config.language = 5
    with pytest.raises(InputError, match=r"generation_config has language: 5\. Expected"):
        model.generate(one)
    model.generation_config = None
    oracle.eager.cache_clear()


def test_speech_logits(whisper):
    source, model = whisper
    assert isinstance(model, CompiledModelForSpeechSeq2Seq)
    answers = np.random.default_rng(1).integers(3, 300, (4, 20))
    eager = oracle.eager(source, "WhisperForConditionalGeneration")
    with torch.inference_mode():
        expected = eager(torch.from_numpy(FEATURES), decoder_input_ids=torch.from_numpy(answers)).logits.numpy()
    found = model(torch.from_numpy(FEATURES), torch.from_numpy(answers)).logits
    assert np.abs(found.numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_mask_of_frames_changes_nothing(whisper):
    """As with transformers: a feature extractor gives one where it is asked for it, and Whisper hears all frames."""
    source, model = whisper
    given = {"input_features": torch.from_numpy(FEATURES), "attention_mask": torch.arange(120).expand(4, 120) < 50}
    eager, answers = oracle.eager(source, "WhisperForConditionalGeneration"), torch.full((4, 3), 5)
    with torch.inference_mode():
        expected = eager(**given, decoder_input_ids=answers).logits
    assert (model(**given, decoder_input_ids=answers).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert model.generate(**given).tolist() == model.generate(FEATURES).tolist()


BAD_SPEECH = [
    ({"language": "klingon"}, "language='klingon' is none that this model knows: en, fr, zh"),
    ({"language": ["en", "fr"]}, "names 2 languages; there are 4 rows"),
    ({"task": "sing"}, "task='sing' is none that this model knows: transcribe, translate"),
    ({"return_timestamps": True}, r"no tokens for times.*return_timestamps=False"),
    ({"return_token_timestamps": True}, "return_token_timestamps=True, times of single words, is not done"),
    ({"input_features": FEATURES[:, :, :100]}, r"padded or cut to 120 frames, 30 seconds.* these have 100"),
    ({"input_features": FEATURES[:, :8]}, r"float32 \[batch, 16, 120\] or longer; these are float32 \[4, 8, 120\]"),
    ({"input_features": LONG}, "have 490 frames, more than the 120 .* Pass return_timestamps=True"),
    ({"no_speech_threshold": 0.5, "return_timestamps": False}, "pass logprob_threshold, too"),
    ({"prompt_ids": [5], "prompt_condition_type": "none"}, "prompt_condition_type must be 'first-segment' or"),
    ({"prompt_ids": [5, 400]}, "prompt_ids"),
    ({"max_new_tokens": 31}, r"--decoder-sequence-length"),
]


@pytest.mark.parametrize(("asked", "message"), BAD_SPEECH, ids=range(len(BAD_SPEECH)))
def test_what_speech_models_cannot_do_is_explained(whisper, asked, message):
    _, model = whisper
    with pytest.raises(InputError, match=message):
        model.generate(**{"input_features": FEATURES, **asked})


def test_only_whisper_of_its_kind(tmp_path):
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40, "max_target_positions": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    Speech2TextForConditionalGeneration(Speech2TextConfig(**small, **heads)).save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match="encoder-decoders of type 'whisper' can"):
        export(str(tmp_path / "source"), tmp_path / "out", ExportOptions(task=zoo.SPEECH))
