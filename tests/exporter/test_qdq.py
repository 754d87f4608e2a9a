"""format='qdq': quantized graphs in operators of the ONNX standard alone, with the answers of the usual ones."""

from __future__ import annotations

import numpy as np
import onnxruntime
import oracle
import pytest
import tiny
from standard_graphs import check_standard, openvino_answers
from zoo import decoders as zoo

from precast.exporter import ExportOptions, export
from precast.exporter.options.request import parse_request
from precast.runtime import CompiledModel, CompiledModelForCausalLM
from precast.runtime.artifact import read_artifact
from precast.runtime.errors import UsageError

ROWS = [[5, 9, 30, 7, 200, 41, 17], [80, 3, 3], [11, 12, 13, 14, 15]]
EOS = 2
SCHEMES = ("int8", "int4", "a8w8", "a8w8-dynamic")


def check_close(found, expected):
    """Equal to the last digits, but where an activation lies between two codes and is rounded to the other."""
    difference, largest = np.abs(found - expected), np.abs(expected).max()
    assert np.median(difference) <= 1e-5 * largest
    assert difference.max() <= 0.02 * largest


def check_answers(path, usual):
    """Rows of one batch have the logits of the usual format, and tokens decoded one by one are the likeliest of all at
    once."""
    ids, mask = oracle.padded(ROWS, "left")
    mine, theirs = (CompiledModelForCausalLM.from_pretrained(each) for each in (path, usual))
    found, expected = (each(ids, mask).logits[mask == 1] for each in (mine, theirs))
    check_close(found, expected)
    count = 12
    whole = mine.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    seen = np.concatenate([mask, np.ones((len(ids), count - 1), mask.dtype)], 1)
    logits = mine(whole[:, :-1], seen).logits[:, -count:]
    logits[..., EOS] = -np.inf
    chosen = np.take_along_axis(logits, whole[:, -count:, None], -1)[..., 0]
    assert (logits.max(-1) - chosen).max() <= 0.02 * np.abs(expected).max()


def test_a_decoder_in_standard_operators(checkpoint, artifact):
    """4 bits, with offsets in columns of their own, and embeddings that share a table."""
    source = checkpoint("llama", tie_word_embeddings=True)
    path, usual = (artifact(source, batch_size=3, quantize="int4", format=each) for each in ("qdq", "kernels"))
    kinds = check_standard(path)
    assert kinds["DequantizeLinear"] == 5, "of siblings one"
    check_answers(path, usual)
    sizes = [(each / "model.onnx.data").stat().st_size for each in (path, usual)]
    assert sizes[0] <= 1.1 * sizes[1], "the table is there once"
    (variant,) = read_artifact(path).contract.variants
    assert variant.name == "onnx-int4-qdq"
    assert (variant.compiler.options["format"], variant.compiler.options["opset"]) == ("qdq", 21)
    assert parse_request(variant).format == "qdq"
    assert "format" not in read_artifact(usual).contract.variants[0].compiler.options


TEXTS = {"batch_size": (2,), "sequence_length": (32,)}


def test_an_encoder_with_activations_in_8_bits(checkpoint, tmp_path):
    """They are rounded where a QuantizeLinear says so, and the gate that all exports pass is passed."""
    asked = ExportOptions(**TEXTS, quantize="a8w8", format="qdq", min_cosine=0.98)
    made = export(str(checkpoint("bert", "AutoModel")), tmp_path / "out", asked)
    assert made.contract.variants[0].accuracy.status == "passed"
    kinds = check_standard(made.path)
    assert 0 < kinds["QuantizeLinear"] < kinds["DequantizeLinear"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "format='qdq' needs quantize=, as it says how quantized weights are written; give both, or neither"),
        (
            {"quantize": "int8", "lora_slots": 1, "lora_rank": 4},
            "lora_slots=1 cannot be combined with format='qdq', as",
        ),
        ({"quantize": "int8", "backend": "export"}, "format='qdq' is not for backend='export': .* take it: onnx"),
        ({"quantize": "int8", "format": "qoperator"}, "'qoperator' is not supported; the choices are: kernels, qdq"),
    ],
)
def test_what_it_is_not_for_is_refused_by_name(options, words):
    with pytest.raises(UsageError, match=words):
        ExportOptions(**{"format": "qdq", **options}).check()


# ---------------------------------------------------------------- breadth

KINDS = {
    "biases": ("qwen2", {}),
    "conv1d": ("gpt2", {}),
    "odd width": ("llama", {"tie_word_embeddings": True, "hidden_size": 80, "head_dim": 16}),
    "windows and caps": ("gemma2", {}),
    "ALiBi": ("bloom", {}),
    "sinks and experts": ("gpt_oss", {}),
    "states": ("mamba", {}),
    "latents": ("deepseek_v3", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_decoder(checkpoint, artifact, tmp_path, kind, scheme):
    model_type, changes = KINDS[kind]
    known = model_type in tiny.DECODERS
    source = checkpoint(model_type, **changes) if known else zoo.make(tmp_path / model_type, model_type)
    path, usual = (artifact(source, batch_size=3, quantize=scheme, format=each) for each in ("qdq", "kernels"))
    check_standard(path)
    check_answers(path, usual)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_encoders_answer_as_in_the_usual_format(checkpoint, artifact, scheme):
    source, (ids, mask) = checkpoint("bert", "AutoModel"), oracle.padded(ROWS[:2], "right")
    paths = [artifact(source, **TEXTS, quantize=scheme, format=each) for each in ("qdq", "kernels")]
    models = [CompiledModel.from_pretrained(each) for each in paths]
    found, expected = (each(ids, mask).last_hidden_state[mask == 1] for each in models)
    check_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"kv_cache": "int8"}, {"prefill_lengths": (8, 16)}, {"prefill_lengths": (8,), "kv_cache": "int8"}],
    ids=str,
)
def test_caches_and_static_graphs(checkpoint, artifact, options):
    source = checkpoint("llama", num_hidden_layers=2)
    path, usual = (
        artifact(source, quantize="int8", format=each, batch_size=3, **options) for each in ("qdq", "kernels")
    )
    check_standard(path)
    check_answers(path, usual)


# ---------------------------------------------------------------- another runtime


def check_openvino(path, inputs, outputs, folder):
    """OpenVINO's answers are those of ONNX Runtime, node by node as the graph has them."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    theirs = openvino_answers(path / "model.onnx", inputs, outputs, folder)
    for name, mine in zip(outputs, session.run(outputs, inputs), strict=True):
        assert np.abs(theirs[name] - mine).max() <= 1e-4 * np.abs(mine).max(), name


@pytest.mark.peers
@pytest.mark.parametrize("scheme", SCHEMES)
def test_openvino_reads_a_decoder(checkpoint, artifact, tmp_path, scheme):
    source = checkpoint("llama", num_hidden_layers=2)
    path = artifact(source, batch_size=2, quantize=scheme, format="qdq")
    random, (graph,) = np.random.default_rng(0), read_artifact(path).contract.variants[0].graphs
    inputs = {
        "input_ids": random.integers(3, tiny.VOCABULARY, (2, 6)),
        "past_lengths": np.array([3, 7], np.int32),
        "new_lengths": np.array([6, 6], np.int32),
        "logit_positions": np.tile(np.arange(6), (2, 1)),
    }
    for spec in graph.inputs[len(inputs) :]:
        inputs[spec.name] = random.normal(size=spec.shape).astype(spec.dtype)
    outputs = [spec.name for spec in graph.outputs]
    check_openvino(path, inputs, outputs, tmp_path)


@pytest.mark.peers
@pytest.mark.parametrize("scheme", SCHEMES)
def test_openvino_reads_an_encoder(checkpoint, artifact, tmp_path, scheme):
    path = artifact(checkpoint("bert", "AutoModel"), **TEXTS, quantize=scheme, format="qdq")
    (graph,) = read_artifact(path).contract.variants[0].graphs
    ids, mask = oracle.padded([row * 2 for row in ROWS[:2]], "right")
    inputs = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in graph.inputs}
    inputs["input_ids"][:, : ids.shape[1]], inputs["attention_mask"][:, : ids.shape[1]] = ids, mask
    outputs = [spec.name for spec in graph.outputs]
    check_openvino(path, inputs, outputs, tmp_path)
