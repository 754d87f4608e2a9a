"""Published files about sounds give transformers' features: any class, any settings."""

from __future__ import annotations

import json
import random

import corpus
import numpy as np
import pytest
import transformers
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES

from precast.runtime.errors import PrecastError
from precast.runtime.pipelines.processors import _USUAL, SoundProcessor

SOUND = (np.sin(np.arange(9000) / 7) * np.linspace(0.1, 0.6, 9000) + 0.05).astype(np.float32)
EVERY = sorted(set(FEATURE_EXTRACTOR_MAPPING_NAMES.values()))
SWITCH = (True, False, None)
KEYS = {
    "feature_size": (80, 64, None, "x"), "sampling_rate": (16000, 8000, 48000, 0, "fast"), "hop_length": (160, 128),
    "padding_value": (0.0, 0, 0.5, 1), "padding_side": ("left", "right"), "return_attention_mask": SWITCH,
    "do_normalize": SWITCH, "chunk_length": (1, 2), "n_fft": (400, 256), "n_samples": (1000,), "mel_filters": ([[1]],),
    "nb_max_frames": (7,), "dither": (0.0,), "max_length": (1024, 50, None), "num_mel_bins": (80, 64, 128),
    "mean": (-4.2, 0), "std": (4.5, 2), "stride": (2,), "truncation": ("rand_trunc", True), "max_length_s": (10, 1),
    "reduction_factor": (2,), "do_ceptral_normalize": SWITCH, "normalize_means": SWITCH, "win_length": (400, 64),
    "preemphasis": (0.97, None), "processor_class": ("AProcessor",), "do_feature_extract": (True,), "fmin": (80,),
    "image_processor_type": ("ViTImageProcessor",), "auto_map": ({"AutoFeatureExtractor": "own.Own"},),
}  # fmt: skip
"""What extractors are told, and other keys that files have, with values that they have or should not."""


def write(path, settings, **config):
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    (path / "config.json").write_text(json.dumps(config))
    return path


def same(path) -> bool:
    """Whether there are features; they are transformers', and where it has none there is a typed error."""
    try:
        theirs = transformers.AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False)
        found = theirs([SOUND], sampling_rate=theirs.sampling_rate, return_tensors="np")
        expected = {name: np.asarray(value, float) for name, value in found.items()}
    except Exception:
        expected = None
    try:
        processor = SoundProcessor(path)
        ours = processor([processor.open_sound({"raw": SOUND, "sampling_rate": processor.rate})])
    except PrecastError:
        return False
    assert expected is not None
    assert expected.keys() - ours.keys() <= {"attention_mask"}
    # UnivNet's noise is drawn anew by every call.
    for name in expected.keys() & ours.keys() - {"noise_sequence"}:
        assert ours[name].shape == expected[name].shape
        # transformers' spectrograms round to float32 on the way.
        assert np.allclose(np.asarray(ours[name], float), expected[name], rtol=1e-4, atol=2e-4, equal_nan=True), name
    return True


def drawn(draw: random.Random, kind: str) -> dict[str, object]:
    names = draw.sample(sorted(KEYS), draw.randrange(2, 10))
    return {"feature_extractor_type": kind, **{name: draw.choice(KEYS[name]) for name in names}}


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_the_kinds_of_models_are_transformers():
    for kind, types in _USUAL.items():
        assert {FEATURE_EXTRACTOR_MAPPING_NAMES[each] for each in types} == {kind}
        assert getattr(transformers, kind)().sampling_rate == 16000


@pytest.mark.parametrize("kind", ["Wav2Vec2FeatureExtractor", "WhisperFeatureExtractor"])
@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_any_settings_of_a_file_are_obeyed_or_refused(tmp_path, kind):
    draw = random.Random(0)
    done = [same(write(tmp_path, drawn(draw, kind))) for _ in range(15)]
    assert sum(done) > 2
    assert same(write(tmp_path, {"feature_extractor_type": kind, "do_normalize": None}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.filterwarnings("ignore")
def test_any_settings_of_every_class_are_obeyed_or_refused(tmp_path, kind):
    draw = random.Random(kind)
    for index in range(20):
        same(write(tmp_path, drawn(draw, kind) if index else {"feature_extractor_type": kind}))


def test_the_rate_of_a_file_that_says_none_is_its_class(tmp_path):
    assert same(write(tmp_path, {"feature_extractor_type": "EncodecFeatureExtractor"}))
    assert SoundProcessor(tmp_path).rate == 24000


def test_the_part_of_processor_config_counts(tmp_path):
    write(tmp_path, {"feature_extractor_type": "WhisperFeatureExtractor"})
    for part in ("feature_extractor", "audio_processor"):
        rules = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": False}
        (tmp_path / "processor_config.json").write_text(json.dumps({part: rules}))
        assert same(tmp_path)
        assert SoundProcessor(tmp_path)([SOUND])["input_values"].shape == (1, 9000)


@pytest.mark.slow
@corpus.needs_corpus
@corpus.each_processor
@pytest.mark.filterwarnings("ignore")
def test_what_people_publish_is_prepared_as_by_transformers_or_refused(tmp_path, folder):
    corpus.copy_processor(folder, tmp_path)
    same(tmp_path)
