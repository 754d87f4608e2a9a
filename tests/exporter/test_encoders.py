"""Every encoder family and task: any size, batch and padding side gives the eager answer of the unpadded row."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM
from zoo import encoders as zoo
from zoo.shrink import tiny_config

from precast.exporter import ExportOptions, export, preview, quiet_libraries
from precast.exporter.checkpoint.resolve import resolve
from precast.exporter.kinds.encoder.inner_padding import compact, compaction_index
from precast.exporter.quantize.calls import calibration_rows
from precast.runtime import CompiledModel
from precast.runtime.artifact.tasks import get_task
from precast.runtime.errors import CheckpointError, ExportError, InputError, UsageError
from precast.runtime.models.encoder_base import _check_segments

AUTO = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}
LENGTH = 48
rows_of_any_length = st.lists(
    st.lists(st.integers(3, tiny.VOCABULARY - 1), min_size=1, max_size=LENGTH), min_size=1, max_size=7
)
many = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FAST = (
    ("bert", "fill-mask"),
    ("distilbert", "text-classification"),
)


SLOW = (("convbert", "token-classification"), ("roberta", "token-classification"), ("electra", "question-answering"))


@pytest.fixture(
    scope="module", params=[*FAST, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)], ids="-".join
)
def pair(request, tmp_path_factory):
    """Checkpoint, class and artifact with lengths 16 and 48 at batch 3; more rows run in slices."""
    family, task = request.param
    source = zoo.make(tmp_path_factory.mktemp("pair") / "source", family, task)
    options = ExportOptions(batch_size=3, sequence_length=(16, LENGTH), dynamic_batch_size=True, validate=False)
    model = CompiledModel.from_pretrained(export(str(source), source.parent / "out", options).path)
    assert model.artifact.contract.task == task, "the task is inferred"
    return source, AUTO[task], model


@many
@given(rows=rows_of_any_length, side=st.sampled_from(["left", "right"]))
def test_outputs_are_those_of_the_unpadded_row(pair, rows, side):
    source, auto, model = pair
    ids, mask = oracle.padded(rows, side)
    outputs = model(ids, mask)
    cut = {spec.name: "length" in spec.slice for spec in model.variant.graphs[0].outputs}
    for index, row in enumerate(rows):
        with torch.inference_mode():
            expected = oracle.eager(source, auto)(torch.tensor([row]), attention_mask=torch.ones(1, len(row)))
        for name, values in outputs.items():
            found = values[index][mask[index] == 1] if cut[name] else values[index]
            assert values.shape[: 1 + cut[name]] == ids.shape[: 1 + cut[name]]
            assert np.abs(found - expected[name][0].numpy()).max() < 1e-4


@many
@given(
    rows=st.lists(st.lists(st.integers(2, 9), max_size=23).map(lambda row: [*row, 2]), min_size=1, max_size=2),
    side=st.sampled_from(["left", "right"]),
)
def test_encoder_decoders_classify_by_each_rows_last_end(made, rows, side):
    """Rows have any number of end-of-sequence tokens, 2, where transformers wants the same in all."""
    pair = made("bart", "text-classification")
    ids, mask = oracle.padded(rows, side)
    logits = pair.model(ids, mask).logits
    for found, row in zip(logits, rows, strict=True):
        with torch.inference_mode():
            expected = pair.eager(torch.tensor([row])).logits[0].numpy()
        assert np.abs(found - expected).max() < 1e-4
    with pytest.raises(InputError, match=r"Row 1 has no end-of-sequence token, 2; a \w+ model classifies by its last"):
        pair.model([[5, 2], [5, 6]])


@dataclass(frozen=True)
class Made:
    """A tiny checkpoint beside its artifact."""

    model: Any
    eager: Any


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made("vit", "image-classification", batch_size=2)`: once per module."""
    quiet_libraries()

    @lru_cache
    def make(family: str, task: str, **options: Any) -> Made:
        source = zoo.make(tmp_path_factory.mktemp(family) / "source", family, task)
        sizes = {**zoo.options(family, task), "validate": False, **options}
        compiled = export(str(source), source.parent / "out", ExportOptions(task=task, **sizes)).path
        return Made(CompiledModel.from_pretrained(compiled), oracle.eager(source, get_task(task, "encoder").auto))

    return make


@many
@given(
    rows=st.lists(
        st.lists(st.lists(st.integers(3, tiny.VOCABULARY - 1), min_size=1, max_size=24), min_size=2, max_size=2),
        min_size=1, max_size=3,
    ),
    side=st.sampled_from(["left", "right"]),
)  # fmt: skip
def test_every_choice_gets_the_answer_of_the_choice_alone(made, rows, side):
    """Two choices of three that were compiled for, each of a length of its own."""
    pair = made("bert", "multiple-choice")
    ids, mask = oracle.padded([choice for row in rows for choice in row], side)
    shape = (len(rows), 2, -1)
    found = [pair.model(ids.reshape(shape)[part], mask.reshape(shape)[part]).logits for part in _pairs(len(rows))]
    logits = np.concatenate(found)
    assert logits.shape == (len(rows), 2)
    for index, row in enumerate(rows):
        for place, choice in enumerate(row):
            with torch.inference_mode():
                expected = pair.eager(torch.tensor([[choice]])).logits[0, 0]
            assert abs(logits[index, place] - float(expected)) < 1e-4


def _pairs(count):
    return [slice(start, start + 2) for start in range(0, count, 2)]


@many
@given(numbers=st.integers(0, 1000), count=st.integers(1, 2))
def test_images_in_any_batch(made, numbers, count):
    pair = made("vit", "image-classification")
    pixels = np.random.default_rng(numbers).standard_normal((count, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        expected = pair.eager(torch.from_numpy(pixels)).logits.numpy()
    assert np.abs(pair.model(pixel_values=pixels).logits - expected).max() < 1e-4


def test_images_are_never_resized_nor_padded(made):
    pair = made("vit", "image-classification")
    with pytest.raises(InputError, match=r"pixel_values is 3x24x32 where the model was compiled for 3x32x32"):
        pair.model(np.zeros((1, 3, 24, 32), np.float32))
    with pytest.raises(InputError, match="these are uint8"):
        pair.model(np.zeros((1, 3, 32, 32), np.uint8))


LONGEST = 1200
sounds = st.lists(st.integers(60, LONGEST), min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("wav2vec2", "automatic-speech-recognition"),
        ("data2vec-audio", "feature-extraction"),
        pytest.param("wav2vec2", "audio-xvector", marks=pytest.mark.slow),
        pytest.param("sew", "audio-classification", marks=pytest.mark.slow),
    ],
)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=sounds, side=st.sampled_from(["left", "right"]), numbers=st.integers(0, 99))
def test_sound_of_any_length(made, family, task, lengths, side, numbers):
    """Norms over time, convolutions over frames and statistics see no padding, and frames of it never appear."""
    pair = made(family, task, batch_size=2, dynamic_batch_size=True)
    shortest = pair.model.variant.graphs[0].frames
    lengths = [max(length, (shortest.fewest - 1) * shortest.step + shortest.size) for length in lengths]
    random = np.random.default_rng(numbers)
    sounds = [random.standard_normal(length).astype(np.float32) for length in lengths]
    values, mask = np.full((len(lengths), max(lengths)), 7, np.float32), np.zeros((len(lengths), max(lengths)), int)
    for index, sound in enumerate(sounds):
        place = slice(max(lengths) - len(sound), None) if side == "left" else slice(len(sound))
        values[index, place], mask[index, place] = sound, 1
    outputs = pair.model(values, attention_mask=mask)
    for index, sound in enumerate(sounds):
        with torch.inference_mode():
            expected = pair.eager(torch.from_numpy(sound[None]))
        for name, found in outputs.items():
            mine = expected[name][0].numpy()
            if "frames" in {spec.name: spec.slice for spec in pair.model.variant.graphs[0].outputs}[name]:
                assert pair.model.frames(len(sound)) == len(mine)
                assert not found[index, len(mine) :].any()
                assert found.shape[1] == pair.model.frames(max(lengths))
            assert np.abs(found[index][: len(mine)] - mine).max() < 1e-4


def test_sound_that_is_too_short_or_has_a_hole(made):
    pair = made("wav2vec2", "automatic-speech-recognition", batch_size=2, dynamic_batch_size=True)
    with pytest.raises(InputError, match="A row has 29 samples; this model answers 40 or more"):
        pair.model(np.zeros((1, 29), np.float32))
    mask = np.ones((1, 100), int)
    mask[0, 50] = 0
    with pytest.raises(InputError, match="a hole"):
        pair.model(np.zeros((1, 100), np.float32), attention_mask=mask)


@many
@given(
    texts=st.lists(st.lists(st.integers(3, tiny.VOCABULARY - 1), min_size=1, max_size=14), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    count=st.integers(1, 5),
    ends=st.booleans(),
)
def test_texts_and_images_in_batches_of_their_own(made, texts, side, count, ends):
    pair = made("clip", "zero-shot-image-classification", batch_size=2, dynamic_batch_size=True)
    texts = [[*text, 2] if ends else text for text in texts]
    ids, mask = oracle.padded(texts, side)
    pixels = np.random.default_rng(len(texts)).standard_normal((count, 3, 32, 32)).astype(np.float32)
    outputs = pair.model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    assert outputs.logits_per_image.shape == (count, len(texts))
    for index, text in enumerate(texts):
        with torch.inference_mode():
            expected = pair.eager(input_ids=torch.tensor([text]), pixel_values=torch.from_numpy(pixels))
        assert np.abs(outputs.logits_per_image[:, index] - expected.logits_per_image[:, 0].numpy()).max() < 1e-4
        assert np.abs(outputs.text_embeds[index] - expected.text_embeds[0].numpy()).max() < 1e-4
    assert np.abs(outputs.image_embeds - expected.image_embeds.numpy()).max() < 1e-4
    with pytest.raises(InputError, match="There are 4 texts; the model was compiled for 3"):
        pair.model(input_ids=np.ones((4, 2), int), pixel_values=pixels)


def test_siglip_reads_every_position(made):
    pair = made("siglip", "zero-shot-image-classification")
    pixels, ids = np.ones((2, 3, 32, 32), np.float32), np.arange(32).reshape(2, 16) + 3
    with torch.inference_mode():
        expected = pair.eager(input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(pixels))
    found = pair.model(input_ids=ids, pixel_values=pixels)
    assert np.abs(found.logits_per_image - expected.logits_per_image.numpy()).max() < 1e-4
    with pytest.raises(InputError, match="input_ids is 15 where the model was compiled for 16"):
        pair.model(input_ids=ids[:, 1:], pixel_values=pixels)
    with pytest.raises(InputError, match="none can be masked"):
        pair.model(input_ids=ids, pixel_values=pixels, attention_mask=(ids > 4).astype(int))


def test_segments_count(checkpoint, artifact):
    """token_type_ids reach the model, and being all zero is what leaving them out means."""
    source = checkpoint("bert", "AutoModel")
    model = CompiledModel.from_pretrained(artifact(source, batch_size=3, sequence_length=(16, LENGTH)))
    ids = np.array([[5, 6, 7, 8]])
    types = np.array([[0, 0, 1, 1]])
    with torch.inference_mode():
        expected = oracle.eager(source, "AutoModel")(torch.from_numpy(ids), token_type_ids=torch.from_numpy(types))
    found = model(ids, token_type_ids=types).last_hidden_state
    assert np.abs(found - expected.last_hidden_state.numpy()).max() < 1e-4
    zeros = model(ids, token_type_ids=np.zeros_like(ids)).last_hidden_state
    assert np.array_equal(model(ids).last_hidden_state, zeros)
    assert not np.allclose(found, zeros, atol=1e-3)


def test_the_smallest_bucket_that_fits_is_used(encoder, monkeypatch):
    model = CompiledModel.from_pretrained(encoder)
    used = []
    bind = model._engine.bind
    monkeypatch.setattr(model._engine, "bind", lambda name, *arrays: used.append(name) or bind(name, *arrays))
    for length in (1, 16, 17, 48):
        model(np.ones((1, length), np.int64) * 5)
    assert used == ["model_16", "model_16", "model_48", "model_48"]


def test_attention_holes_mean_what_they_mean_to_transformers(checkpoint, artifact):
    """A zero between ones is no padding: the token keeps its position and is not attended to."""
    source = checkpoint("bert", "AutoModel")
    model = CompiledModel.from_pretrained(artifact(source, batch_size=3, sequence_length=(16, LENGTH)))
    ids, mask = np.array([[5, 6, 7, 8, 9]]), np.array([[1, 1, 0, 1, 1]])
    with torch.inference_mode():
        expected = oracle.eager(source, "AutoModel")(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    found = model(ids, mask).last_hidden_state
    assert np.abs(found - expected.last_hidden_state.numpy())[mask == 1].max() < 1e-4


def test_tokens_are_moved_to_the_front_of_their_own_text():
    """Of every choice of a row, too."""
    mask = torch.tensor([[[0, 1, 0, 1], [1, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 1]]])
    ids = torch.arange(16).reshape(2, 2, 4)
    moved = compact(ids, compaction_index(mask))
    assert moved.tolist() == [[[1, 3, 0, 2], [4, 5, 6, 7]], [[8, 9, 10, 11], [15, 12, 13, 14]]]
    assert compact(ids[0], compaction_index(mask[0])).tolist() == moved[0].tolist()


DECODERS_AT_ONCE = [
    pytest.param("llama", "text-classification", {"pad_token_id": None}, id="grouped heads, no padding token"),
    *(
        pytest.param(*case, id="-".join(case[:2]), marks=pytest.mark.slow)
        for case in [
            ("gpt2", "text-classification", {"pad_token_id": 2}),
            ("mistral", "token-classification", {}),
            ("qwen3", "question-answering", {}),
            ("gpt_neox", "feature-extraction", {}),
        ]
    ),
]


@pytest.mark.parametrize(("family", "task", "changes"), DECODERS_AT_ONCE)
def test_a_decoder_that_reads_at_once_takes_padding_anywhere(checkpoint, artifact, family, task, changes):
    """On either side and inside, with any ids: a row is its tokens. The last that is not the model's padding token is
    classified."""
    source = checkpoint(family, AUTO[task], **changes)
    model = CompiledModel.from_pretrained(artifact(source, batch_size=3, sequence_length=(24,), task=task))
    rows = [[5, 9, 30, 7, 200], [80, 2], [11, 12, 13, 14, 15, 16, 17, 18, 0, 20, 21, 2]]
    for side in ("left", "right", "inside"):
        ids, mask = oracle.padded(rows, side)
        outputs = model(np.where(mask == 1, ids, 77), mask, **_segments(model, ids))
        for index, row in enumerate(rows):
            with torch.inference_mode():
                expected = oracle.eager(source, AUTO[task])(torch.tensor([row]), **_segments(model, [row]))
            for name, values in outputs.items():
                found = values[index] if task == "text-classification" else values[index][mask[index] == 1]
                assert np.abs(found - expected[name][0].numpy()).max() < 1e-4, (side, name)


def _segments(model, rows):
    """The tiny tokenizer makes segments of 0 for every model."""
    return {"token_type_ids": torch.zeros_like(torch.tensor(rows))} if "token_type_ids" in model.inputs else {}


def test_segments_are_an_input_where_a_tokenizer_makes_them(checkpoint, tmp_path):
    """GPT-2 adds an embedding to segments of 0, and none where it is given no segments."""
    source = shutil.copytree(checkpoint("gpt2", AUTO["token-classification"]), tmp_path / "gpt2")
    options = ExportOptions(task="token-classification", batch_size=1, sequence_length=(8,))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for names in (["input_ids", "attention_mask"], ["input_ids", "attention_mask", "token_type_ids"]):
        (source / "tokenizer_config.json").write_text(json.dumps(settings | {"model_input_names": names}))
        assert [spec.name for spec in preview(str(source), options).inputs] == names


def test_segments_of_nothing_are_not_segments_of_0_to_all():
    """To GPT-2, XLM and their kin, which embed segments as words, and to BigBird, which finds where a question ends; to
    BERT they are the same."""
    names = ["input_ids", "attention_mask"]
    segments = {"token_type_ids": [[0, 0]]}
    answers = "question-answering"
    for kind in ("gpt2", "xlm", "big_bird"):
        with pytest.raises(InputError, match=rf"This {kind} model needs token_type_ids: its tokenizer makes them"):
            _check_segments(kind, answers, [*names, "token_type_ids"], {"input_ids": [[5, 6]]})
        with pytest.raises(InputError, match=rf"This {kind} model was compiled without token_type_ids"):
            _check_segments(kind, answers, names, segments)
        _check_segments(kind, answers, [*names, "token_type_ids"], segments)
    for kind, task in (("bert", answers), ("big_bird", "fill-mask")):
        _check_segments(kind, task, names, segments)
        _check_segments(kind, task, [*names, "token_type_ids"], {})


@pytest.mark.parametrize("makes", [False, True])
def test_bigbird_tells_a_question_from_its_text(tmp_path, makes):
    """By its first separator where its tokenizer makes no segments, as transformers' own does not."""
    source = zoo.make(tmp_path / "source", "big_bird", "question-answering")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if makes else [])]
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"model_input_names": names}))
    options = ExportOptions(task="question-answering", batch_size=2, sequence_length=(16,))
    model = CompiledModel.from_pretrained(export(str(source), tmp_path / "out", options).path)
    assert list(model.inputs) == names
    eager = oracle.eager(source, "AutoModelForQuestionAnswering")
    separator = eager.config.sep_token_id
    row = [5, 9, separator, 30, 7, 200, separator]
    for padded in ([row, [8, separator, 9, separator, 0, 0, 0]], [[8, separator, 9, separator], [6, 7, 8, 9]]):
        mask = [[int(token != 0) for token in each] for each in padded]
        found = model(padded, mask, **({"token_type_ids": np.zeros_like(padded)} if makes else {}))
        for index, each in enumerate(padded):
            kept = torch.tensor([[token for token in each if token != 0]])
            with torch.inference_mode():
                expected = eager(kept, **({"token_type_ids": torch.zeros_like(kept)} if makes else {})).start_logits[0]
            # Those of the question are less a million.
            np.testing.assert_allclose(found.start_logits[index][: len(expected)], expected, rtol=1e-6, atol=1e-4)


def test_positions_that_transformers_caches_without_values(tmp_path):
    """BEiT's, by the size of the image alone: planned on empty weights, the reference computed with what had none."""
    source = zoo.make(tmp_path / "beit", "beit", "image-classification")
    options = ExportOptions(task="image-classification", **zoo.options("beit", "image-classification"))
    model = CompiledModel.from_pretrained(export(str(source), tmp_path / "out", options).path)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        expected = oracle.eager(source, "AutoModelForImageClassification")(torch.from_numpy(pixels)).logits.numpy()
    assert np.abs(model(pixel_values=pixels).logits - expected).max() < 1e-5


def test_a_tokenizer_that_takes_words_is_not_asked_to_read_texts(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("bert", AUTO["token-classification"]), tmp_path / "bert")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "LayoutLMv3Tokenizer"}))
    options = ExportOptions(batch_size=2, sequence_length=(8,))
    assert export(str(source), tmp_path / "out", options).contract.variants[0].accuracy.status == "passed"
    with pytest.raises(CheckpointError, match=r"LayoutLMv3Tokenizer cannot read plain text: Words must be"):
        calibration_rows(resolve(str(source), options), options)


BLOCKS = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}


def test_rows_that_big_bird_reads_in_blocks_are_refused(tmp_path):
    tiny_config("big_bird", BLOCKS).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"sequence_length=29: .*rows of more than 28 tokens.*Give at most 28"):
        preview(str(tmp_path), ExportOptions(task="fill-mask", batch_size=1, sequence_length=(29,)))


def test_the_decoder_alone_of_bigbird_pegasus_has_no_blocks(tmp_path):
    tiny_config("bigbird_pegasus", BLOCKS).save_pretrained(tmp_path)
    assert preview(str(tmp_path), ExportOptions(task="text-generation", batch_size=1, sequence_length=(24,)))


@pytest.mark.slow
def test_big_bird_as_published(tmp_path):
    """What is too short for blocks is attended fully, by transformers too."""
    source = tiny.save_checkpoint(tmp_path / "bird", tiny_config("big_bird", BLOCKS), AutoModelForMaskedLM)
    options = ExportOptions(task="fill-mask", batch_size=2, sequence_length=(28,))
    model = CompiledModel.from_pretrained(export(str(source), tmp_path / "out", options).path)
    rows = [[(7 * place) % 300 + 3 for place in range(length)] for length in (28, 9)]
    ids, mask = oracle.padded(rows, "left")
    for row, logits, keep in zip(rows, model(ids, mask).logits, mask, strict=True):
        with torch.inference_mode():
            expected = AutoModelForMaskedLM.from_pretrained(source).eval()(torch.tensor([row])).logits[0].numpy()
        assert np.abs(logits[keep == 1] - expected).max() < 1e-4


def test_the_smallest_of_all_combinations_is_used(made, monkeypatch):
    sizes = {"batch_size": (1, 4), "sequence_length": (8, 24), "dynamic_batch_size": True}
    model = made("bert", "feature-extraction", **sizes).model
    used = []
    bind = model._engine.bind
    monkeypatch.setattr(model._engine, "bind", lambda name, *arrays: used.append(name) or bind(name, *arrays))
    for rows, length in ((1, 8), (1, 9), (2, 3), (4, 24), (9, 8)):
        model(np.ones((rows, length), np.int64) * 5)
    assert used == ["model_1x8", "model_1x24", "model_4x8", "model_4x24", "model_4x8", "model_4x8", "model_1x8"]
    weights = {graph.file for graph in model.variant.graphs}
    assert len(weights) == 4
    assert len(model.variant.weights) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "compiled for fixed shapes: batch_size, sequence_length. Add sequence_length=N"),
        ({"batch_size": 1, "sequence_length": (8,), "image_size": (32,)}, "image_size fixes nothing here"),
        ({"batch_size": (1, 1), "sequence_length": (8,)}, "batch_size names a size twice: 1,1"),
    ],
)
def test_sizes_that_do_not_fit_the_model(checkpoint, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        export(str(checkpoint("bert", "AutoModel")), tmp_path / "out", ExportOptions(**options))


def test_inputs_that_the_model_does_not_have(encoder):
    model = CompiledModel.from_pretrained(encoder)
    with pytest.raises(InputError, match=r"no input 'pixels'. It has: input_ids, attention_mask, token_type_ids"):
        model(np.ones((1, 2), int), pixels=1)
    with pytest.raises(InputError, match="needs 'input_ids'"):
        model(attention_mask=np.ones((1, 2), int))
    with pytest.raises(InputError, match="given twice"):
        model(np.ones((1, 2), int), input_ids=np.ones((1, 2), int))


def test_models_of_images_and_texts_name_their_task(tmp_path):
    source = zoo.make(tmp_path / "clip", "clip", "zero-shot-image-classification")
    with pytest.raises(CheckpointError, match="zero-shot-image-classification"):
        export(str(source), tmp_path / "out", ExportOptions(task="feature-extraction", batch_size=1))


def test_images_of_a_size_that_the_model_cannot_have(tmp_path):
    source = zoo.make(tmp_path / "vit", "vit", "image-classification")
    with pytest.raises(ExportError, match=r"cannot have images of image_size=40: without it"):
        export(str(source), tmp_path / "out", ExportOptions(batch_size=1, image_size=(40,)))
