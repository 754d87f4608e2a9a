"""Pipelines of images and sounds beside transformers' own: the same answers from the same files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import wave
from contextlib import suppress
from types import SimpleNamespace
from unittest import mock

import numpy as np
import oracle
import pytest
import speech
import tiny
import torch
import transformers
from compare import assert_same, assert_steps_are_the_call, silence
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES

from precast.runtime import CompiledModel, pipeline
from precast.runtime.errors import ArtifactError, FormatError, InputError, PrecastError, UsageError
from precast.runtime.pipelines.audio import AudioClassificationPipeline
from precast.runtime.pipelines.processors import ImageProcessor, SoundProcessor, interpolate, open_image
from precast.runtime.pipelines.transcripts import language_names

LABELS = {"id2label": {0: "猫", 1: "Hund", 2: "bird"}, "label2id": {"猫": 0, "Hund": 1, "bird": 2}}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
IMAGES = {**SMALL, "image_size": 32, "patch_size": 8, **LABELS}
SOUNDS = {
    **SMALL, "conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 10, "classifier_proj_size": 16,
}  # fmt: skip
SQUARE = {"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def save(root, name, config, auto, *companions):
    """A checkpoint with what else it carries."""
    path = tiny.save_checkpoint(root / name, config, getattr(transformers, auto))
    for each in companions:
        each.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def pictures():
    """Of several sizes, one of them lying down, one standing."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)) for size in ((40, 64), (70, 33), (32, 32))]


@pytest.fixture(scope="module")
def sounds():
    random = np.random.default_rng(0)
    return [random.normal(size=length).astype(np.float32) * 0.1 + 0.3 for length in (900, 1200, 333)]


def theirs(task, path, auto, **parts):
    model = getattr(transformers, auto).from_pretrained(path).eval()
    return transformers.pipeline(task, model=model, device="cpu", **parts)


def test_image_classification(root, artifact, pictures, tmp_path):
    processor = transformers.ViTImageProcessorPil(**SQUARE)
    path = save(root, "vit", transformers.ViTConfig(**IMAGES), "AutoModelForImageClassification", processor)
    compiled = artifact(path, batch_size=2, sequence_length=())
    eager = theirs("image-classification", path, "AutoModelForImageClassification", image_processor=processor)
    ours = pipeline("image-classification", compiled)
    assert_same(ours(pictures), eager(pictures))
    assert_same(ours(pictures[0], top_k=2), eager(pictures[0], top_k=2))
    assert_same(pipeline(model=compiled, image_processor=processor)(images=pictures), eager(pictures))
    pictures[1].save(tmp_path / "图.png")
    assert_same(ours(str(tmp_path / "图.png")), eager(pictures[1]))
    assert_same(ours(np.asarray(pictures[1])), eager(pictures[1]))
    with silence():
        passed = transformers.pipeline(
            "image-classification", model=CompiledModel.from_pretrained(compiled), image_processor=processor
        )
        assert_same(passed(pictures), eager(pictures))
    assert_steps_are_the_call("image-classification", compiled, pictures, top_k=1)
    with pytest.raises(InputError, match=r"nothing.png cannot be read as an image"):
        ours("nothing.png")


def test_image_segmentation(root, artifact, pictures):
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, **LABELS,
    )  # fmt: skip
    processor = transformers.SegformerImageProcessorPil(**SQUARE)
    path = save(root, "segformer", config, "AutoModelForSemanticSegmentation", processor)
    ours = pipeline("image-segmentation", artifact(path, batch_size=2, image_size=(32,), sequence_length=()))
    eager = theirs("image-segmentation", path, "AutoModelForSemanticSegmentation", image_processor=processor)
    for found, expected in zip(ours(pictures), eager(pictures), strict=True):
        assert [each["label"] for each in found] == [each["label"] for each in expected]
        for one, other in zip(found, expected, strict=True):
            assert np.mean(np.asarray(one["mask"]) != np.asarray(other["mask"])) < 1e-3
    assert_steps_are_the_call("image-segmentation", ours.model.artifact.path, pictures)


def test_object_detection(root, artifact, pictures):
    config = transformers.YolosConfig(**{**IMAGES, "image_size": [32, 32]}, num_detection_tokens=5)
    processor = transformers.YolosImageProcessorPil(size={"height": 32, "width": 32})
    path = save(root, "yolos", config, "AutoModelForObjectDetection", processor)
    ours = pipeline("object-detection", artifact(path, batch_size=2, sequence_length=()))
    eager = theirs("object-detection", path, "AutoModelForObjectDetection", image_processor=processor)
    found = ours(pictures, threshold=0.2)
    assert any(found)
    assert_same(found, eager(pictures, threshold=0.2))
    assert_steps_are_the_call("object-detection", ours.model.artifact.path, pictures, threshold=0.2)


def test_zero_shot_images(root, artifact, pictures):
    text = {**SMALL, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_convert_rgb=True
    )
    path = save(root, "clip", config, "AutoModelForZeroShotImageClassification", processor)
    shapes = {"batch_size": 2, "text_batch_size": 4, "sequence_length": (16,)}
    ours = pipeline(model=artifact(path, **shapes))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    eager = theirs(
        "zero-shot-image-classification", path, "AutoModelForZeroShotImageClassification", image_processor=processor,
        tokenizer=tokenizer,
    )  # fmt: skip
    options = {"candidate_labels": ["猫", "a dog", "water"], "hypothesis_template": "It is {}</s>"}
    assert_same(ours(pictures, **options), eager(pictures, **options))
    named = {"hypothesis_template": options["hypothesis_template"]}
    assert_same(ours(pictures, options["candidate_labels"], **named), eager(pictures, **options))
    assert_steps_are_the_call(None, ours.model.artifact.path, pictures, **options)


def test_audio_classification_and_speech(root, artifact, sounds, tmp_path):
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    (tmp_path / "vocab.json").write_text(
        json.dumps(dict(zip([*"ab天气c", "<s>", "</s>", "<unk>", "|", "<pad>"], range(10), strict=True)))
    )
    speller = transformers.Wav2Vec2CTCTokenizer(tmp_path / "vocab.json")
    config = transformers.Wav2Vec2Config(**SOUNDS, **LABELS, feat_extract_norm="layer")
    path = save(root, "audio", config, "AutoModelForAudioClassification", extractor)
    shapes = {"batch_size": 2, "audio_sequence_length": (1200,), "sequence_length": ()}
    eager = theirs("audio-classification", path, "AutoModelForAudioClassification", feature_extractor=extractor)
    compiled = artifact(path, **shapes)
    ours = pipeline(model=compiled)
    assert_same(ours(sounds), eager(sounds))
    assert_steps_are_the_call(None, compiled, sounds, top_k=1)
    long = np.concatenate([sounds[1]] * 2)
    assert_same(ours(long, truncation=True), ours(long[:1200]))
    with silence():
        passed = transformers.pipeline(
            "audio-classification", model=CompiledModel.from_pretrained(compiled), feature_extractor=extractor
        )
        assert_same(passed(sounds), eager(sounds))
    path = save(root, "ctc", config, "AutoModelForCTC", extractor)
    for old in path.glob("tokenizer*"):
        old.unlink()
    speller.save_pretrained(path)
    parts = {"feature_extractor": extractor, "tokenizer": speller}
    eager = theirs("automatic-speech-recognition", path, "AutoModelForCTC", **parts)
    compiled = artifact(path, **shapes)
    ours = pipeline("automatic-speech-recognition", compiled)
    expected = eager(sounds)
    assert any(each["text"] for each in expected)
    assert_same(ours(sounds), expected)
    assert_steps_are_the_call(None, compiled, sounds)
    with silence():
        passed = transformers.pipeline(
            "automatic-speech-recognition", model=CompiledModel.from_pretrained(compiled), **parts
        )
        assert_same(passed(sounds), expected)
    with pytest.raises(InputError, match=r"8000 samples per second; the model takes 16000"):
        ours({"raw": sounds[0], "sampling_rate": 8000})
    with pytest.raises(InputError, match=r"no.wav cannot be read: No such file"):
        ours("no.wav")
    with pytest.raises(InputError, match=r"stride=\(0, 400\) of a sound, .*is not done here"):
        ours({"raw": sounds[0], "sampling_rate": 16_000, "stride": (0, 400)})
    with pytest.raises(InputError, match=r"A sound is a .wav file"):
        ours(3)


def test_transcription(root, artifact, sounds, tmp_path):
    """The text of the tokens that eager Whisper generates from the same spectrograms."""
    config = transformers.WhisperConfig(
        vocab_size=tiny.VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=50,
        max_target_positions=24, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    path = save(root, "whisper", config, "AutoModelForSpeechSeq2Seq", extractor)
    ours = pipeline(model=artifact(path, batch_size=2, sequence_length=()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    features = extractor(sounds, sampling_rate=16000, return_tensors="pt")["input_features"]
    with torch.inference_mode():
        ids = oracle.eager(path, "AutoModelForSpeechSeq2Seq").generate(features, max_new_tokens=6, do_sample=False)
    expected = [{"text": tokenizer.decode(row, skip_special_tokens=True)} for row in ids]
    assert_same(ours(sounds, max_new_tokens=6), expected)
    assert_same(ours(sounds[1], max_new_tokens=6), expected[1])
    told = pipeline(model=ours.model, feature_extractor=extractor)
    assert_same(told(sounds, generate_kwargs={"max_new_tokens": 6}), expected)
    assert_steps_are_the_call(None, ours.model.artifact.path, sounds, max_new_tokens=6)
    long = np.concatenate([sounds[1]] * 15)
    with pytest.raises(
        InputError, match=r"no tokens for times, .* no more than 100 frames, and these are 112: .*trunc"
    ):
        ours(long)
    assert ours(long, truncation=True, max_new_tokens=6) == ours(long[:16000], max_new_tokens=6)
    code = f"""
import json, sys
import numpy as np
from precast.runtime import pipeline
sound = np.load({str(tmp_path / "sound.npy")!r})
print(json.dumps(pipeline(model={str(ours.model.artifact.path)!r})(sound, max_new_tokens=6)))
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    np.save(tmp_path / "sound.npy", sounds[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected[1]


@pytest.fixture(scope="module")
def speaking(root, artifact):
    """A Whisper that writes times and languages: transformers' pipeline and ours."""
    path = speech.whisper(root / "speaking")
    parts = {"tokenizer": transformers.AutoTokenizer.from_pretrained(path),
             "feature_extractor": transformers.AutoFeatureExtractor.from_pretrained(path)}  # fmt: skip
    eager = theirs("automatic-speech-recognition", path, "AutoModelForSpeechSeq2Seq", **parts)
    return eager, pipeline(model=artifact(path, batch_size=2, sequence_length=())), parts


TOLD = [
    {"return_timestamps": True},
    {"return_timestamps": True, "return_language": True},
    {"return_timestamps": True, "generate_kwargs": {"language": "german", "task": "translate"}},
    {"return_timestamps": True, "generate_kwargs": {"condition_on_prev_tokens": True, "max_new_tokens": 12}},
]
NO_TIMES = {"suppress_tokens": list(range(268, 1769))}
SHORT_TOLD = [
    {},
    {"return_language": True, "generate_kwargs": NO_TIMES},
    {"generate_kwargs": {"language": "zh", **NO_TIMES}, "return_language": True},
]
SPEECH = [
    pytest.param(seconds, asked, marks=pytest.mark.slow if seconds == 30 or (seconds == 95 and at == 1) else ())
    for seconds in (3, 30, 95)
    for at, asked in enumerate([*TOLD, *(SHORT_TOLD if seconds <= 30 else [])])
]


@pytest.mark.parametrize(("seconds", "asked"), SPEECH, ids=range(len(SPEECH)))
def test_speech_of_any_length_is_told_as_by_transformers(speaking, seconds, asked):
    """Its text, and the times and languages of its pieces."""
    eager, ours, _ = speaking
    heard = speech.sound(seconds)
    # transformers' pipeline searches with five beams where nobody says otherwise.
    expected = eager({"raw": heard.copy(), "sampling_rate": speech.RATE}, num_beams=1, **asked)
    assert ours(heard, **asked) == expected
    assert asked == {} or len(expected["text"]) > 3
    assert asked == {} or len(expected["chunks"]) >= (4 if "return_timestamps" in asked else 1)


def test_long_and_short_sounds_are_answered_together(speaking):
    _, ours, _ = speaking
    several = [speech.sound(seconds, seed) for seed, seconds in enumerate((2, 40, 1, 30, 31, 3))]
    told = {"language": "en", "max_new_tokens": 9, "return_timestamps": True}
    assert ours(several, batch_size=6, **told) == [ours(one, **told) for one in several]
    assert_steps_are_the_call(None, ours.model.artifact.path, several[:2], **told)
    plain = ours(several[1], max_new_tokens=9)
    assert plain == {"text": ours(several[1], max_new_tokens=9, return_timestamps=True)["text"]}, "times are needed"
    assert ours(several[1], truncation=True) == ours(several[1][: 30 * speech.RATE])
    passed = CompiledModel.from_pretrained(ours.model.artifact.path)
    theirs_ = transformers.pipeline("automatic-speech-recognition", model=passed, **speaking[2])
    given = {"raw": several[1].copy(), "sampling_rate": speech.RATE}
    asked = {"return_timestamps": True, "return_language": True}
    assert theirs_(given, num_beams=1, **asked) == ours(several[1], **asked)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"return_timestamps": "word"}, UsageError, "return_timestamps='word' is not done here: times of single words"),
        ({"return_timestamps": "char"}, UsageError, "return_timestamps=True gives the times of segments"),
        ({"chunk_length_s": 30}, UsageError, "chunk_length_s and stride_length_s.*Leave them out.*window by window"),
        ({"return_timestamps": False}, InputError, "3500 frames, more than the 3000 .* Pass return_timestamps=True"),
        ({"task": "sing"}, InputError, "task='sing' is none that this model knows: transcribe, translate"),
        ({"return_timestamp": True}, UsageError, r"Did you mean return_timestamps\?"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_what_is_not_done_with_speech_is_named(speaking, asked, error, message):
    with pytest.raises(error, match=message):
        speaking[1](speech.sound(35), **asked)


def test_languages_have_transformers_names():
    table = transformers.models.whisper.tokenization_whisper.LANGUAGES
    tokenizer = SimpleNamespace(added_tokens={f"<|{code}|>": index for index, code in enumerate([*table, "notimes"])})
    assert language_names(tokenizer) == dict(enumerate(table.values()))


@pytest.mark.parametrize("changes", [{}, {"feature_size": 128, "hop_length": 200}, {"n_fft": 401}, {"dither": 1e-4}])
def test_long_spectrograms_are_transformers(tmp_path, changes):
    """Whatever part of one is asked for; the loudest moment of all counts, wherever it is."""
    extractor = transformers.WhisperFeatureExtractor(**changes)
    extractor.save_pretrained(tmp_path)
    heard = speech.sound(70)
    heard[-8000:] *= 30
    found = SoundProcessor(tmp_path).spectrogram(heard)
    with mock.patch(f"{type(extractor).__module__}.is_torch_available", return_value=False):
        expected = extractor(heard, sampling_rate=16000, truncation=False, padding="longest", return_tensors="np")
    expected = expected["input_features"][0]
    assert found.shape == expected.shape
    for start, stop in ((0, found.shape[1]), (3, 4), (2999, 3101), (found.shape[1] - 7, found.shape[1])):
        # Noise is drawn otherwise.
        close = 1e-5 if "dither" not in changes else 0.2
        assert np.abs(found[:, start:stop] - expected[:, start:stop]).max() < close


def test_feature_extraction(root, artifact, pictures, sounds):
    processor = transformers.ViTImageProcessorPil(**SQUARE)
    path = save(root, "see", transformers.ViTConfig(**IMAGES), "AutoModel", processor)
    ours = pipeline("feature-extraction", artifact(path, batch_size=2, sequence_length=()))
    eager = theirs("image-feature-extraction", path, "AutoModel", image_processor=processor)
    assert_same(ours(pictures), eager(pictures))
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    config = transformers.Wav2Vec2Config(**SOUNDS, feat_extract_norm="layer")
    path = save(root, "hear", config, "AutoModel", extractor)
    ours = pipeline(model=artifact(path, batch_size=2, audio_sequence_length=(1200,), sequence_length=()))
    for sound, found in zip(sounds, ours(sounds), strict=True):
        batch = extractor(sound, sampling_rate=16000, return_tensors="pt")
        with torch.inference_mode():
            expected = oracle.eager(path, "AutoModel")(**batch).last_hidden_state
        assert_same(found, expected.tolist())
    assert_steps_are_the_call(None, ours.model.artifact.path, sounds)


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    rule=st.sampled_from([{"height": 24, "width": 17}, {"shortest_edge": 20}]),
    crop=st.sampled_from([None, {"height": 16, "width": 30}, {"height": 31, "width": 9}]),
    resample=st.sampled_from([0, 2, 3]),
)
@settings(max_examples=30, deadline=None)
def test_images_are_prepared_as_by_transformers(tmp_path_factory, size, rule, crop, resample):
    theirs = transformers.CLIPImageProcessorPil(
        size=rule, crop_size=crop, do_center_crop=crop is not None, resample=resample,
        image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("rules")
    theirs.save_pretrained(path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    found = ImageProcessor(path)([image])["pixel_values"]
    expected = theirs(images=[image], return_tensors="np")["pixel_values"]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "CLIP", "Siglip", "Segformer", "Bit", "Beit"])
@pytest.mark.parametrize("suffix", ["ImageProcessor", "FeatureExtractor"])
@pytest.mark.parametrize("lacking", [(), ("do_center_crop",), ("resample", "image_mean"), ("crop_size", "do_resize")])
def test_old_and_sparse_files_are_read_as_by_transformers(tmp_path, kind, suffix, lacking):
    """Names from before version 4.27, sizes of one number, and what a file leaves to the class."""
    rules = {
        "do_resize": True, "size": 20, "resample": 3, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4], "do_center_crop": kind in ("DeiT", "CLIP", "Bit"), "crop_size": 16,
    }  # fmt: skip
    key = {"ImageProcessor": "image_processor_type", "FeatureExtractor": "feature_extractor_type"}[suffix]
    rules = {key: kind + suffix, **{name: value for name, value in rules.items() if name not in lacking}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(rules))
    theirs = getattr(transformers, f"{kind}ImageProcessorPil").from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 31, 3), np.uint8))
    ours = ImageProcessor(tmp_path)
    found, expected = ours([image])["pixel_values"], theirs(images=[image], return_tensors="np")["pixel_values"]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5
    assert lacking or ours._rules, "without transformers"


TONE = np.sin(np.arange(16000) / 6).astype(np.float32)
SETTINGS = {
    "n_fft": 400, "hop_length": 160, "feature_size": 80, "chunk_length": 2, "padding_value": 0.0,
    "return_attention_mask": False, "do_normalize": False,
}  # fmt: skip


@given(
    kind=st.sampled_from(["noise", "tone", "click", "silence", "quiet", "steps"]),
    length=st.integers(1, 32000),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "feature_size": st.sampled_from([80, 128, 16]),
            "n_fft": st.sampled_from([400, 401, 512]),
            "hop_length": st.sampled_from([160, 200, 333]),
            "padding_value": st.sampled_from([0.0, 0.5]),
            "padding_side": st.sampled_from(["left", "right"]),
            "return_attention_mask": st.booleans(),
            "do_normalize": st.booleans(),
        },
    ),
)
@settings(max_examples=40, deadline=None)
def test_whispers_spectrograms_are_transformers(tmp_path_factory, kind, length, changes):
    sound = {
        "noise": lambda: np.random.default_rng(length).normal(size=length) * 0.1,
        "tone": lambda: np.resize(TONE, length),
        "click": lambda: np.eye(1, length, length // 2)[0],
        "silence": lambda: np.zeros(length),
        "quiet": lambda: np.resize(TONE, length) * 1e-5,
        "steps": lambda: np.round(np.resize(TONE, length) * 50) / 32768,
    }[kind]().astype(np.float32)  # fmt: skip
    theirs = transformers.WhisperFeatureExtractor(**{**SETTINGS, **changes})
    path = tmp_path_factory.mktemp("whisper")
    theirs.save_pretrained(path)
    found = SoundProcessor(path)([sound])["input_features"]
    assert_same_spectrograms(found, theirs, [sound])


def assert_same_spectrograms(found, extractor, sounds):
    """Without torch transformers computes in float64, as we do; with it in float32, which shows in quiet bands."""
    assert found.dtype == np.float32
    for has_torch, close in ((False, 1e-6), (True, 1e-4)):
        with mock.patch(f"{type(extractor).__module__}.is_torch_available", lambda here=has_torch: here):
            expected = extractor(sounds, sampling_rate=16000, return_tensors="np")["input_features"]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < close


@pytest.mark.parametrize("mels", [80, 128])
def test_whispers_spectrograms_of_half_a_minute(tmp_path, mels):
    theirs = transformers.WhisperFeatureExtractor(feature_size=mels)
    theirs.save_pretrained(tmp_path)
    ours, random = SoundProcessor(tmp_path), np.random.default_rng(0)
    # A voice's beat, and pauses.
    whole = (random.normal(size=480000) * np.maximum(0.001, np.sin(np.arange(480000) / 4000)) * 0.2).astype(np.float32)
    batch = [whole, whole[:160001], whole[:7]]
    assert_same_spectrograms(ours(batch)["input_features"], theirs, batch)
    with pytest.raises(InputError, match=r"480001 samples \(30.00 seconds\); the model hears 480000 \(30.00 seconds\)"):
        ours([np.zeros(480001, np.float32)])


def test_dither_is_the_same_noise_every_time(tmp_path):
    transformers.WhisperFeatureExtractor(chunk_length=1, dither=0.01).save_pretrained(tmp_path)
    found = [SoundProcessor(tmp_path)([TONE])["input_features"] for _ in range(2)]
    assert np.array_equal(*found)
    transformers.WhisperFeatureExtractor(chunk_length=1).save_pretrained(tmp_path)
    plain = SoundProcessor(tmp_path)([TONE])["input_features"]
    assert 0.01 < np.abs(found[0] - plain).max() < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hop_length": 0}, r"Expected `int` >= 1 - at `\$.hop_length`"),
        ({"feature_size": "many"}, r"Expected `int`, got `str` - at `\$.feature_size`"),
        ({"dither": -1.0}, "dither"),
        ({"padding_side": "middle"}, "Invalid enum value 'middle'"),
        ({"n_fft": 40000, "chunk_length": 1}, "n_fft 40000 is too much for chunks of 16000 samples"),
        ({"hop_length": 1, "chunk_length": 30}, "480000 samples in steps of 1 are more than memory is kept for"),
    ],
)
def test_spectrograms_that_cannot_be_made_are_refused(tmp_path, changes, message):
    text = json.dumps({"feature_extractor_type": "WhisperFeatureExtractor", **changes})
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        SoundProcessor(tmp_path)([TONE])


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_spectrogram_transformers_hear_ten_seconds(tmp_path):
    """transformers cuts what is longer without a word."""
    transformers.ASTFeatureExtractor(max_length=8).save_pretrained(tmp_path)
    ours = SoundProcessor(tmp_path)
    fits = ours.longest
    assert ours([TONE[:fits]])["input_values"].shape == (1, 8, 128)
    longer = transformers.ASTFeatureExtractor(max_length=9)
    last = [longer(TONE[:end], sampling_rate=16000)["input_values"][0][8] for end in (fits, fits + 1)]
    assert np.ptp(last[0]) == 0
    assert np.ptp(last[1]) > 0.1
    with pytest.raises(InputError, match=rf"{fits + 1} samples"):
        ours([TONE[: fits + 1]])


def without_its_class(path, extractor, model_type):
    """An extractor's file that does not say whose it is, as some that are published, beside its model's config.json."""
    rules = {**extractor.to_dict(), "feature_extractor_type": None}
    rules.pop("mel_filters", None)
    (path / "preprocessor_config.json").write_text(json.dumps(rules))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return SoundProcessor(path)


def test_a_file_that_does_not_say_its_class_has_its_models(tmp_path):
    """transformers makes a Whisper of it, too, and hears half a minute of what is longer."""
    theirs = transformers.WhisperFeatureExtractor(chunk_length=1)
    ours = without_its_class(tmp_path, theirs, "whisper")
    assert_same_spectrograms(ours([TONE])["input_features"], theirs, [TONE])
    with pytest.raises(InputError, match=r"32000 samples \(2.00 seconds\); the model hears 16000 \(1.00 seconds\)"):
        ours([np.concatenate([TONE, TONE])])
    theirs = transformers.Wav2Vec2FeatureExtractor()
    found = without_its_class(tmp_path, theirs, "hubert")([TONE])["input_values"]
    assert np.abs(found - theirs(TONE, sampling_rate=16000, return_tensors="np")["input_values"]).max() < 1e-5


def test_extractors_of_transformers_hear_the_end(tmp_path):
    """Which of them leave out the end is found by changing it; `extractors` of the slow lane are all there are."""
    theirs = transformers.Gemma3nAudioFeatureExtractor()
    assert_hears_the_end(theirs, tmp_path, 31)


EXTRACTORS = sorted({name for names in FEATURE_EXTRACTOR_MAPPING_NAMES.values() for name in np.atleast_1d(names)})


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXTRACTORS)
@pytest.mark.filterwarnings("ignore")
def test_every_extractor_hears_the_end(tmp_path, kind):
    try:
        theirs = getattr(transformers, kind)()
    except ImportError as error:
        pytest.skip(str(error))
    assert_hears_the_end(theirs, tmp_path, 65)


def assert_hears_the_end(extractor, path, seconds):
    """What is made of a sound depends on its end, or it is refused."""
    extractor.save_pretrained(path)
    sound = np.random.default_rng(0).normal(size=extractor.sampling_rate * seconds).astype(np.float32) * 0.1
    other = np.concatenate([sound[: -len(sound) // 100], sound[: len(sound) // 100]])
    ours = SoundProcessor(path)
    try:
        found, changed = ours([sound]), ours([other])
    except InputError as error:
        said = str(error)
        assert "the model hears" in said or "does not prepare these sounds" in said
    else:
        assert any(not np.array_equal(found[name], changed[name]) for name in found)


def test_an_extractor_that_does_not_fit_its_model_is_named(tmp_path):
    graph = SimpleNamespace(inputs=[SimpleNamespace(name="input_values", shape=[1, 1200])])
    model = SimpleNamespace(
        variant=SimpleNamespace(graphs=[graph]), artifact=SimpleNamespace(path=tmp_path), batch_size=1
    )
    transformers.WhisperFeatureExtractor(chunk_length=1).save_pretrained(tmp_path)
    ours = AudioClassificationPipeline(model)
    ours.processor = SoundProcessor(tmp_path)
    with pytest.raises(ArtifactError, match="makes input_features, and the model takes input_values"):
        ours(TONE)


@pytest.mark.parametrize("kind", ["ASTFeatureExtractor", "SeamlessM4TFeatureExtractor", "ClapFeatureExtractor"])
def test_sounds_that_take_transformers_say_so(tmp_path, monkeypatch, kind):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"feature_extractor_type": kind}))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=rf"{kind} is prepared by transformers.*pip install 'precast\[export\]'"):
        SoundProcessor(tmp_path)([TONE[:100]])


@given(old=st.tuples(st.integers(1, 9), st.integers(1, 9)), new=st.tuples(st.integers(1, 20), st.integers(1, 20)))
@settings(max_examples=30, deadline=None)
def test_resizing_is_torchs(old, new):
    values = np.random.default_rng(0).normal(size=(3, *old)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(values)[None], new, mode="bilinear")[0].numpy()
    assert np.abs(interpolate(values, *new) - expected).max() < 1e-5


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_files(tmp_path, width, channels):
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    wanted = np.sin(np.arange(50) / 5) * 0.9
    levels = np.round(wanted * 2 ** (8 * width - 1)).astype(np.int64) + (128 if width == 1 else 0)
    raw = b"".join(int(each).to_bytes(width, "little", signed=width > 1) * channels for each in levels)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setnchannels(channels), file.setsampwidth(width), file.setframerate(16000)
        file.writeframes(raw)
    found = SoundProcessor(tmp_path).open_sound(tmp_path / "sound.wav")
    assert np.abs(found - wanted).max() < 2 ** (2 - 8 * min(width, 3))


def write_wave(path, frames, *, rate=16000, channels=1, width=2, told=None):
    """A .wav file of whole numbers [frames, channels], whose header says `told` bytes of sound."""
    data = np.asarray(frames, "<i2").tobytes()
    size = len(data) if told is None else told
    form = struct.pack(
        "<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * channels * width, channels * width, 8 * width
    )
    whole = b"WAVE" + form + struct.pack("<4sI", b"data", size) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", min(size + 36, 2**32 - 1)) + whole)
    return path


BAD_WAVES = [
    ({"told": 64}, "is cut off: its header says 32 samples, and it holds 16"),
    ({"told": 31}, None),
    ({"told": 2**32 - 1}, None),
    ({"told": 0x7FFFF000}, None),
    ({"told": 2**30}, f"header says {2**29} samples, and it holds 16"),
    ({"told": 0}, "holds no samples"),
    ({"frames": []}, "holds no samples"),
    ({"channels": 0}, "cannot be read as a .wav file: bad # of channels"),
    ({"channels": 3}, None),
    ({"width": 8}, "has samples of 64 bits; up to 32"),
    ({"rate": 44100}, "has 44100 samples per second; the model takes 16000.*ffmpeg -i FILE -ac 1 -ar 16000"),
    ({"rate": 0}, "has 0 samples per second"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_WAVES, ids=range(len(BAD_WAVES)))
def test_files_that_lie_are_refused_or_read_to_their_end(tmp_path, changes, message):
    """A header of a sound that was written into a pipe says the largest number there is."""
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    path = write_wave(tmp_path / "sound.wav", **{"frames": np.arange(16), **changes})
    ours = SoundProcessor(tmp_path)
    if message is None:
        found = ours.open_sound(path)
        whole = np.arange(min(16, changes.get("told", 32) // 2)) / 32768
        size = changes.get("channels", 1)
        assert np.allclose(found, whole[: len(whole) // size * size].reshape(-1, size).mean(1))
    else:
        with pytest.raises(InputError, match=message):
            ours.open_sound(path)


def test_no_wave_file_makes_a_traceback(tmp_path):
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    path, ours = tmp_path / "sound.wav", SoundProcessor(tmp_path)
    good = write_wave(path, np.arange(70)).read_bytes()

    @given(cut=st.integers(0, 200), data=st.binary(max_size=12), at=st.integers(0, 60))
    @settings(max_examples=200, deadline=None)
    def read_or_refuse(cut, data, at):
        whole = bytearray(good)
        whole[at : at + len(data)] = data
        path.write_bytes(whole[:cut])
        with suppress(InputError):
            assert ours.open_sound(path).ndim == 1

    read_or_refuse()


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (np.zeros(0, np.float32), "A sound is a .wav file"),
        ([], "list of inputs is empty"),
        (None, "A sound is a .wav file"),
        (np.zeros((2, 2, 9), np.float32), "A sound is a .wav file"),
        (np.zeros((900, 2), np.float32), r"900x2 values, and of \[channels, samples\] there are two .* Transpose it"),
        (np.zeros(900, np.int16), r"array of int16.*Give sound.astype\('float32'\) / 32768"),
        (np.r_[TONE[:9], np.nan, TONE], "Sample 9 of the sound is nan"),
        (np.r_[TONE[:3], -np.inf, np.inf], "Sample 3 of the sound is -inf"),
        (np.array([0.0, 0.1, 0.2, 1e300]), "Sample 3 of the sound is inf"),
        ({"raw": TONE, "sampling_rate": 8000}, "8000 samples per second; the model takes 16000. Resample it"),
        ("none.mp3", "none.mp3 cannot be read: No such file"),
    ],
    ids=range(11),
)
def test_sounds_that_are_none_are_refused(speaking, given_, message):
    with pytest.raises(InputError, match=message):
        speaking[1](given_)


def test_two_channels_are_heard_as_one(speaking):
    """As by transformers' pipeline, which takes them first; and tensors are taken."""
    eager, ours, _ = speaking
    both = np.stack([speech.sound(3), speech.sound(3, 1)])
    expected = eager(both.copy(), num_beams=1, return_timestamps=True)
    assert ours(both, return_timestamps=True) == expected
    assert ours(torch.from_numpy(both.mean(0)), return_timestamps=True) == expected


def test_a_long_sound_takes_the_memory_of_its_samples(tmp_path):
    """Ten minutes: 38 MB as float32, whose spectrogram of 128 mels would take 31 MB, and its frames 190 MB."""
    transformers.WhisperFeatureExtractor(feature_size=128).save_pretrained(tmp_path)
    path, minute = tmp_path / "long.wav", (speech.sound(60) * 9000).astype("<i2").tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(speech.RATE)
        for _ in range(10):
            file.writeframes(minute)
    code = f"""
import resource
from pathlib import Path
from precast.runtime.pipelines.processors import SoundProcessor
ours = SoundProcessor(Path({str(tmp_path)!r}))
ours.spectrogram(ours.open_sound({{"raw": __import__("numpy").ones(500000), "sampling_rate": 16000}}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = ours.spectrogram(ours.open_sound({str(path)!r}))
assert found.shape == (128, 60000)
assert found[:, 57000:].shape == (128, 3000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    samples = 600 * speech.RATE * 4 / 1024
    assert int(done.stdout) < 1.5 * samples


IMAGE = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "do_resize": True, "resample": 3,
         "size": {"shortest_edge": 8}, "crop_size": 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"image_processor_type": "OddImageProcessor"},
        {"size": "large"},
        {"size": {"shortest_edge": "8"}},
        {"crop_size": {"shortest_edge": 8}},
        {"image_mean": [0.5]},
        {"image_std": "none"},
        {"resample": 99},
        {"rescale_factor": "tiny"},
        {"do_center_crop": None, "crop_size": -3},
    ],
)
def test_what_a_file_says_of_images_is_prepared_or_refused(tmp_path, changes):
    """As transformers makes something of it, or a typed error."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**IMAGE, **changes}))
    image = Image.fromarray(np.zeros((9, 12, 3), np.uint8))
    try:
        expected = transformers.AutoImageProcessor.from_pretrained(tmp_path)(images=[image], return_tensors="np")
    except Exception:
        with pytest.raises(PrecastError, match="transformers"):
            ImageProcessor(tmp_path)([image])
    else:
        found = ImageProcessor(tmp_path)([image])["pixel_values"]
        assert np.abs(found - expected["pixel_values"]).max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling_rate": "fast"}, 'sampling_rate: "fast"'),
        ({"sampling_rate": 0}, "sampling_rate: 0"),
        ({"do_normalize": []}, r"do_normalize: \[\]"),
        ({"feature_extractor_type": 3}, "feature_extractor_type: 3"),
        (
            {"feature_extractor_type": "OddFeatureExtractor"},
            "makes no processor of preprocessor_config.json, OddFeatureExtractor",
        ),
        ({"feature_extractor_type": "ASTFeatureExtractor", "std": "wide"}, "ASTFeatureExtractor does not prepare"),
    ],
)
@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_what_a_file_says_of_sounds_is_refused_by_name(tmp_path, changes, message):
    text = json.dumps({"feature_extractor_type": "Wav2Vec2FeatureExtractor", **changes})
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(PrecastError, match=message):
        SoundProcessor(tmp_path)([TONE[:4000]])


def test_images_that_make_no_batch_are_refused(tmp_path, pictures):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**IMAGE, "do_center_crop": False}))
    with pytest.raises(InputError, match=r"8x12, 16x8 pixels once they are prepared"):
        ImageProcessor(tmp_path)(pictures[:2])


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(ArtifactError, match="does not say how images are prepared"):
        ImageProcessor(tmp_path)
    with pytest.raises(InputError, match="An image is a file, an array"):
        open_image(3)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "OddImageProcessor"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"OddImageProcessor is prepared by transformers.*precast\[export\]"):
        ImageProcessor(tmp_path)([Image.new("RGB", (2, 2))])
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UsageError, match=r"Images take Pillow: pip install 'precast\[vision\]'"):
        open_image("x.png")
