"""Quantized encoders and encoder-decoders: their layers, their answers, and the gate that they pass."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from standard_graphs import check_standard

from precast.exporter import ExportOptions, export, validate_again
from precast.exporter.kinds.samples import Answer, ValidationSample
from precast.exporter.quantize import Recipe, Scheme, quantize
from precast.exporter.quantize.recipe import find_layers
from precast.exporter.validation.encoder_rules import judge_encoder
from precast.exporter.validation.reference import Reference
from precast.runtime.errors import AccuracyError, UsageError

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
CONFIGS = {
    "labels": (lambda: tiny.config_for("bert", num_labels=9), "AutoModelForSequenceClassification"),
    "vectors": (lambda: tiny.config_for("bert"), "AutoModel"),
    "masks": (lambda: tiny.config_for("roberta", type_vocab_size=1), "AutoModelForMaskedLM"),
    "answers": (lambda: tiny.config_for("distilbert"), "AutoModelForQuestionAnswering"),
    "tokens": (lambda: tiny.config_for("electra", num_labels=9), "AutoModelForTokenClassification"),
    "images": (
        lambda: transformers.ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=10),
        "AutoModelForImageClassification",
    ),
    "sounds": (
        lambda: transformers.Wav2Vec2Config(
            **SMALL, vocab_size=32, conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3),
            num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        ),
        "AutoModelForCTC",
    ),
    "t5": (
        lambda: transformers.T5Config(
            vocab_size=tiny.VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        ),
        "AutoModelForSeq2SeqLM",
    ),
    "bart": (
        lambda: transformers.BartConfig(
            vocab_size=tiny.VOCABULARY, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64,
        ),
        "AutoModelForSeq2SeqLM",
    ),
    "whisper": (
        lambda: transformers.WhisperConfig(
            vocab_size=tiny.VOCABULARY, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8, max_source_positions=32,
            max_target_positions=32, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        "AutoModelForSpeechSeq2Seq",
    ),
}  # fmt: skip
SHAPES = {
    "images": {"batch_size": (2,)},
    "sounds": {"batch_size": (1,), "audio_sequence_length": (4000,)},
    "t5": {"sequence_length": (32,), "decoder_sequence_length": 24},
    "bart": {"sequence_length": (32,), "decoder_sequence_length": 24},
    "whisper": {"decoder_sequence_length": 24},
}
TEXTS = {"batch_size": (2,), "sequence_length": (32,)}
WITHOUT_TOKENIZER = ("images", "sounds")
"""As models of pictures and sound are published."""
SEQ2SEQ = ("t5", "bart", "whisper")


@pytest.fixture(scope="module")
def source(run_folder):
    """`source("labels")`: the directory of a tiny random checkpoint."""

    def make(name: str) -> Path:
        path = run_folder / f"quantized-{name}"
        if not path.exists():
            config, auto = CONFIGS[name]
            tiny.save_checkpoint(path, config(), getattr(transformers, auto))
            for file in path.glob("*token*") if name in WITHOUT_TOKENIZER else ():
                file.unlink()
        return path

    return make


def exported(source: Path, target: Path, name: str, **options):
    shapes = SHAPES.get(name, TEXTS)
    # Random models are close to undecided about every token; what bounds them is the distance of their distributions.
    floor = {"max_kl": 0.1} if name in SEQ2SEQ else {"min_cosine": 0.98}
    return export(str(source), target, ExportOptions(**{**shapes, **floor, **options})).contract.variants[0]


EVERYTHING = [
    (name, scheme, backend) for name in CONFIGS for scheme in ("int8", "int4") for backend in ("onnx", "export")
]
FAST = [("labels", "int8", "onnx"), ("images", "int8", "onnx")]


@pytest.mark.parametrize(
    ("name", "scheme", "backend"),
    [pytest.param(*each, marks=() if each in FAST else pytest.mark.slow) for each in EVERYTHING],
)
def test_the_answers_stay_within_the_floor(source, tmp_path, name, scheme, backend):
    # Random weights bear 4 bits less than trained ones.
    finer = {"quantize_method": "gptq", "group_size": 16} if scheme == "int4" and name not in SEQ2SEQ else {}
    variant = exported(source(name), tmp_path / "out", name, quantize=scheme, backend=backend, **finer)
    assert variant.accuracy.status == "passed"
    assert scheme in variant.quantization
    assert "experts" not in variant.quantization
    figures = variant.accuracy.figures
    if name in SEQ2SEQ:
        assert figures["kl_divergence"] < (0.1 if scheme == "int4" else 0.01)
    else:
        assert figures["mean_cosine"] > (0.98 if scheme == "int4" else 0.999)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "a8w8", "a8w8-dynamic"])
@pytest.mark.parametrize("name", CONFIGS)
def test_standard_operators_alone(source, tmp_path, name, scheme):
    variant = exported(source(name), tmp_path / "out", name, quantize=scheme, format="qdq")
    assert variant.accuracy.status == "passed"
    check_standard(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["labels", "vectors", "images", "sounds", "t5", "whisper"])
@pytest.mark.parametrize(("scheme", "method"), [("int8", "awq"), ("int4", "gptq"), ("int4", "awq")])
def test_calibrated_methods_read_what_the_model_reads(source, tmp_path, name, scheme, method):
    variant = exported(source(name), tmp_path / "out", name, quantize=scheme, quantize_method=method)
    assert variant.accuracy.status == "passed"
    assert variant.quantization.endswith(f"by {method}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["labels", "images", "sounds", "t5"])
def test_native_code(source, tmp_path, name):
    assert exported(source(name), tmp_path / "out", name, quantize="int8", backend="aoti").accuracy.status == "passed"


def test_the_verdict_is_repeated_later(source, tmp_path):
    path = tmp_path / "out"
    exported(source("labels"), path, "labels", quantize="int8", min_cosine=0.99)
    accuracy = validate_again(path, str(source("labels")), ExportOptions(), keep=False)
    assert accuracy.reason == "compared with the eager fp32 model: mean cosine >= 0.99"
    assert (
        accuracy.figures
        == json.loads((path / "config.json").read_text())["precast"]["variants"][0]["accuracy"]["figures"]
    )


def test_a_classifier_of_two_labels_stays_as_it_is():
    config = tiny.config_for("bert", num_labels=2)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert "classifier" not in {layer.name for layer in find_layers(model, ())}


@pytest.mark.parametrize("ties", [True, False])
def test_a_table_of_many_names_is_quantized_once(ties):
    """T5's encoder, decoder and output read one table."""
    config, _ = CONFIGS["t5"]
    made = config()
    made.tie_word_embeddings = ties
    model = transformers.AutoModelForSeq2SeqLM.from_config(made).eval()
    before = {name: module.weight.detach().clone() for name, module in model.named_modules(remove_duplicate=False)
              if isinstance(module, torch.nn.Embedding) and len(module.weight) == tiny.VOCABULARY}  # fmt: skip
    quantize(model, Recipe(Scheme(8, 32, "symmetric")))
    tables = {name: model.get_submodule(name) for name in before}
    assert all(type(table).__name__ == "QuantizedEmbedding" for table in tables.values())
    assert len({table.packed.codes.data_ptr() for table in tables.values()}) == (1 if ties else len(tables))
    ids = torch.arange(tiny.VOCABULARY)
    for name, table in tables.items():
        torch.testing.assert_close(table(ids), before[name], atol=0.03, rtol=0)


def test_nothing_is_written_below_the_floor(source, tmp_path):
    with pytest.raises(AccuracyError) as caught:
        exported(source("labels"), tmp_path / "out", "labels", quantize="int4", min_cosine=1.0, min_agreement=1.0)
    message = str(caught.value)
    assert "32 held-out inputs" in message
    assert "where min_cosine asks for 1.0" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("labels", {"quantize": "int8", "max_kl": 0.1}, "min_cosine and min_agreement bound what quantize= costs it"),
        ("labels", {"quantize": "auto"}, "Give quantize='int8' or int4"),
        ("labels", {"kv_cache": "int8"}, "Leave it out"),
        ("t5", {"quantize": "int8", "min_cosine": 0.9}, "max_kl and min_agreement bound what that loses"),
        ("labels", {"dtype": "bfloat16", "backend": "export", "min_cosine": 0.9}, "has fixed bounds"),
        ("labels", {"min_cosine": 0.9}, "bound what is lost"),
        ("labels", {"quantize": "int8", "min_cosine": 1.5}, "between -1 and 1, not 1.5"),
    ],
)
def test_bounds_of_other_tasks_are_refused(source, tmp_path, name, options, words):
    with pytest.raises(UsageError, match=words):
        export(
            str(source(name)),
            tmp_path / "out",
            ExportOptions(**SHAPES.get(name, TEXTS), **options),
        )
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the judge

OPTIONS = ExportOptions(quantize="int8")


def judged(outputs: dict[str, list[np.ndarray]], found: dict[str, list[np.ndarray]], edge=None):
    """The verdict on rows of outputs, by name, with an edge that is the first row unless another answer is given."""
    count = len(next(iter(outputs.values())))
    rows = [{name: rows[index] for name, rows in outputs.items()} for index in range(count)]
    answers = [{name: rows[index] for name, rows in found.items()} for index in range(count)]
    samples = [ValidationSample("the shortest row", "outputs", tensors=[{}])]
    samples.append(ValidationSample("held-out 1", "score", tensors=[{}] * count))
    reference = Reference(samples, [[Answer(rows[0])], [Answer(row) for row in rows]])
    return judge_encoder(reference, [[edge or answers[0]], answers], OPTIONS, "quantized to int8")


def drawn(seed: int, shape: tuple[int, ...], count: int = 8) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) for _ in range(count)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(1,), (5,), (7, 5), (5, 4, 3)]))
def test_equal_answers_lose_nothing(seed, shape):
    for name in ("logits", "last_hidden_state"):
        rows = drawn(seed, shape)
        verdict = judged({name: rows}, {name: rows})
        assert verdict.status == "passed"
        assert verdict.figures["mean_cosine"] == verdict.figures["min_cosine"] == 1
        for figure in ("label_agreement", "label_f1", "spearman"):
            assert verdict.figures.get(figure, 1.0) == 1


def test_figures_by_hand():
    """Four rows of three labels, one of which differs: labels 0, 1, 2, 2 become 0, 1, 2, 1."""
    rows = [np.eye(3, dtype=np.float32)[label] * 4 for label in (0, 1, 2, 2)]
    found = [*rows[:3], rows[1]]
    with pytest.raises(AccuracyError, match=r"label agreement of 0\.75 where min_agreement asks for 0\.95"):
        judged({"logits": rows}, {"logits": found})
    with pytest.raises(AccuracyError, match=r"a mean cosine of 0\.75 where min_cosine asks for 0\.999"):
        judged({"logits": rows}, {"logits": found})


def test_labels_of_pixels_lie_along_the_first_axis():
    rows = drawn(0, (5, 6, 6))
    turned = [np.ascontiguousarray(row[::-1]) for row in rows]
    with pytest.raises(AccuracyError, match="label agreement"):
        judged({"logits": rows}, {"logits": turned})


def test_a_faulty_edge_is_no_loss():
    """A row of one token that is another row's answer."""
    rows = drawn(0, (16,))
    with pytest.raises(AccuracyError, match=r"'the shortest row, pooled'.*fault of the compiled graph"):
        judged({"pooled": rows}, {"pooled": rows}, edge={"pooled": rows[1]})


def test_nan_is_found():
    rows = drawn(0, (16,))
    broken = [*rows[:-1], rows[-1] * np.float32("nan")]
    with pytest.raises(AccuracyError, match="NaN"):
        judged({"pooled": rows}, {"pooled": broken})


def test_a_table_of_numbers_is_compared_by_order():
    """A regressor's answers: one number per row."""
    rows = drawn(0, (1,), count=12)
    assert judged({"logits": rows}, {"logits": rows}).figures["spearman"] == 1
    with pytest.raises(AccuracyError, match="mean cosine"):
        judged({"logits": rows}, {"logits": [-row for row in rows]})


def test_the_graph_holds_codes(source, tmp_path):
    exported(source("labels"), tmp_path / "out", "labels", quantize="int8")
    kinds = {node.op_type for node in ir.load(tmp_path / "out" / "model.onnx").graph}
    assert {"MatMulNBits", "GatherBlockQuantized"} <= kinds
