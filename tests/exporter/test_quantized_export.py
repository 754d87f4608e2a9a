"""Quantized exports of tiny models as a whole: what is on which grid, what is stored, what is refused."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx_ir as ir
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

from precast.exporter import ExportOptions, export, validate_again
from precast.exporter.backends.onnx import lowering
from precast.runtime import CompiledModelForCausalLM
from precast.runtime.errors import AccuracyError, CheckpointError, UsageError

CAPACITY = 48
ROWS = [[5, 9, 30, 7, 200, 41, 17], [80, 3, 3]]


@pytest.fixture(scope="module")
def made(checkpoint, artifact):
    """`made("llama", {}, quantize="int8")`: the checkpoint, and the graph of its unvalidated export."""

    def make(model_type, changes, **options):
        source = checkpoint(model_type, **changes)
        return source, artifact(source, sequence_length=(CAPACITY,), **options)

    return make


def graph(path) -> ir.Graph:
    return ir.load(path / "model.onnx").graph


def nodes(path, kind: str) -> list[ir.Node]:
    return [node for node in graph(path) if node.op_type == kind]


def quantization(path) -> str:
    return json.loads((path / "config.json").read_text())["precast"]["variants"][0]["quantization"]


def divergence(source, path) -> float:
    """Mean KL from eager fp32, with rows padded to one batch or alone."""
    model, total = CompiledModelForCausalLM.from_pretrained(path), []
    for row in ROWS:
        mine = torch.from_numpy(oracle.logits(source, row)).log_softmax(-1)
        theirs = torch.from_numpy(model(np.array([row])).logits[0]).log_softmax(-1)
        total.append((mine.exp() * (mine - theirs)).sum(-1).mean())
    return float(torch.stack(total).mean())


FAMILIES = {
    "llama": ("llama", {"num_hidden_layers": 2}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "tied, odd width": ("llama", {"tie_word_embeddings": True, "hidden_size": 80, "head_dim": 16}),
    "conv1d": ("gpt2", {}),
    "biases": ("qwen2", {}),
    "norms": ("qwen3", {}),
    "scaled embedding": ("gemma3_text", {"tie_word_embeddings": True}),
    "opt": ("opt", {}),
}


SLOW = ("tied", "biases", "norms", "scaled embedding", "opt")
"""Kinds of layers that others of the fast lane have, too."""


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=pytest.mark.slow if each in SLOW else ()) for each in FAMILIES]
)
def test_int8_of_every_kind_of_layer(made, family):
    source, path = made(*FAMILIES[family], quantize="int8")
    assert divergence(source, path) < 0.01
    assert not nodes(path, "MatMul"), "every linear layer is quantized"
    assert not nodes(path, "FusedMatMul")
    assert "int8 in groups of 32, symmetric" in quantization(path)


@pytest.mark.parametrize(
    ("family", "symmetric"),
    [
        ("llama", False),
        ("conv1d", True),
        pytest.param("llama", True, marks=pytest.mark.slow),
        pytest.param("conv1d", False, marks=pytest.mark.slow),
    ],
)
def test_int4(made, family, symmetric):
    words = "symmetric" if symmetric else "asymmetric with offsets"
    source, path = made(*FAMILIES[family], quantize="int4", symmetric=symmetric)
    assert divergence(source, path) < 0.5
    assert f"int4 in groups of 32, {words} (" in quantization(path)
    count = 1 if family == "conv1d" else 2
    assert f"int8 in groups of 32, symmetric ({count} layers)" in quantization(path), "embeddings, in and out"
    bits = Counter(node.attributes["bits"].as_int() for node in nodes(path, "MatMulNBits"))
    assert bits[8] == 1
    assert bits[4] > 0


def test_auto_takes_fewer_bytes_than_int4_where_the_budget_is_as_large(made):
    """Embeddings in 4 bits as well, and groups of the size that pays."""
    sizes = []
    for options in ({"quantize": "auto", "max_kl": 5.0}, {"quantize": "int4"}):
        source, path = made("llama", {"hidden_size": 128}, **options)
        assert divergence(source, path) < 0.5
        sizes.append((path / "model.onnx.data").stat().st_size)
    assert sizes[0] < sizes[1]
    _, path = made("llama", {"hidden_size": 128}, quantize="auto", max_kl=5.0)
    assert quantization(path).startswith("int4 in groups of 128, asymmetric (")
    assert quantization(path).endswith("by gptq")


def test_a_llama_in_numbers(made):
    """Queries, keys and values are one product that goes straight into attention; gate and up are one."""
    _, path = made(*FAMILIES["llama"], quantize="int4", symmetric=False)
    counts, layers = Counter(node.op_type for node in graph(path)), 2
    assert counts["MatMulNBits"] == 4 * layers + 1
    assert counts["GroupQueryAttention"] == layers
    assert counts["Split"] == layers, "gate and up; attention splits its own"
    assert counts["AveragePool"] == 4 * layers, "means of each input once"
    assert not counts.keys() & {"RotaryEmbedding", "Transpose", "MatMul"}


def test_a_tied_table_is_stored_once(made):
    _, path = made("llama", {"tie_word_embeddings": True}, quantize="int8")
    (lookup,), head = nodes(path, "GatherBlockQuantized"), nodes(path, "MatMulNBits")[-1]
    for mine, its in ((0, 1), (2, 2)):
        table, shared = lookup.inputs[mine].const_value, head.inputs[its].const_value
        assert (table.offset, table.length) == (shared.offset, shared.length)
    size = (path / "model.onnx.data").stat().st_size
    _, untied = made("llama", {}, quantize="int8")
    assert size < (untied / "model.onnx.data").stat().st_size - 320 * 64
    (lookup,), head = nodes(untied, "GatherBlockQuantized"), nodes(untied, "MatMulNBits")[-1]
    assert lookup.inputs[0].const_value.offset != head.inputs[1].const_value.offset


def test_skipped_layers_stay(made):
    source, path = made(*FAMILIES["llama"], quantize="int8", skip=("lm_head", "*.1.mlp.*"))
    assert divergence(source, path) < 0.01
    # Gate and up are one product in fp32 as well.
    assert len(nodes(path, "MatMul")) in (3, 4)
    assert "(12 layers)" in quantization(path), "the embedding among them"


def test_every_graph_of_a_static_export_is_quantized(checkpoint, artifact):
    source = checkpoint("llama")
    path = artifact(source, sequence_length=(CAPACITY,), batch_size=2, prefill_lengths=(8,), quantize="int8")
    ids, mask = oracle.padded(ROWS, "left")
    found = CompiledModelForCausalLM.from_pretrained(path)(ids, mask).logits
    for row, values, keep in zip(ROWS, found, mask, strict=True):
        expected = oracle.logits(source, row)
        assert np.abs(values[keep == 1] - expected).max() < 0.05 * np.abs(expected).max()
    one = artifact(source, sequence_length=(CAPACITY,), quantize="int8")
    assert (path / "model.onnx.data").stat().st_size <= 1.05 * (one / "model.onnx.data").stat().st_size


# ---------------------------------------------------------------- source


def on_a_grid(source, target, *, minima: bool):
    """The checkpoint with its linear weights on Q4_1's grid (or Q4_0's)."""
    import shutil

    shutil.copytree(source, target)
    weights, random = load_file(target / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.ndim == 2 and "embed" not in name:
            codes = torch.randint(0, 16, (weight.shape[0], weight.shape[1] // 32, 32), generator=random)
            codes[..., 0], codes[..., -1] = 0, 15
            scales = (torch.rand(codes.shape[:2], generator=random) * 0.02 + 0.02).half().float()[..., None]
            low = -scales * (torch.rand(scales.shape, generator=random) * 6 + 5) if minima else -8 * scales
            weights[name] = (codes * scales + low.half().float() if minima else (codes - 8) * scales).flatten(1)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("minima", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_sources_grid_is_kept(checkpoint, tmp_path, minima):
    """4-bit weights stay as they are: only activations (and the offsets' own codes) are rounded."""
    source = on_a_grid(checkpoint("llama"), tmp_path / "source", minima=minima)
    options = ExportOptions(sequence_length=(CAPACITY,), quantize="source", max_kl=0.02)
    path = export(str(source), tmp_path / "out", options).path
    assert quantization(path).startswith("the source's int4 in groups of 32 (8 layers)")
    assert {node.attributes["bits"].as_int() for node in nodes(path, "MatMulNBits")} == {4}
    assert bool(nodes(path, "AveragePool")) == minima


def test_a_source_without_a_grid_is_refused(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"lie on none of 4 or 8 bits in groups of 32.*quantize='int8'"):
        export(str(checkpoint("llama")), tmp_path / "out", ExportOptions(sequence_length=(16,), quantize="source"))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the gate


@pytest.mark.slow
def test_two_quantized_exports_are_identical_and_say_what_they_lost(checkpoint, tmp_path):
    options = ExportOptions(sequence_length=(16,), quantize="int4", max_kl=5)
    one, two = (export(str(checkpoint("llama")), tmp_path / name, options).path for name in ("one", "two"))
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name
    accuracy = json.loads((one / "config.json").read_text())["precast"]["variants"][0]["accuracy"]
    assert accuracy["status"] == "passed"
    assert accuracy["figures"]["kl_divergence"] > 0
    card = (one / "README.md").read_text()
    for name in ("perplexity", "reference_perplexity", "kl_divergence", "top1_agreement", "heldout_tokens"):
        assert f"| {name} | {accuracy['figures'][name]} |" in card
    assert "int4 in groups of 32" in card


def test_below_the_floor_nothing_is_written_unless_it_is_accepted(checkpoint, tmp_path):
    settings = {"sequence_length": (16,), "quantize": "int4", "max_kl": 1e-6}
    with pytest.raises(AccuracyError, match=r"max_kl allows 1e-06"):
        export(str(checkpoint("llama")), tmp_path / "out", ExportOptions(**settings))
    assert not (tmp_path / "out").exists()
    made = export(str(checkpoint("llama")), tmp_path / "out", ExportOptions(**settings, accept_loss=True))
    accuracy = made.contract.variants[0].accuracy
    assert accuracy.status == "accepted"
    assert accuracy.figures["kl_divergence"] > 1e-6
    again = validate_again(made.path, str(checkpoint("llama")), ExportOptions(), keep=False)
    assert again == accuracy
    with pytest.raises(UsageError, match=r"atol=0\.5 bounds .* in float32; the variant onnx-int4 is quantized to int4"):
        validate_again(made.path, str(checkpoint("llama")), ExportOptions(atol=0.5), keep=False)


def test_a_wrong_mask_in_a_quantized_graph_is_found(checkpoint, tmp_path, monkeypatch):
    """Every token sees only itself and the one before. Which of the rules refuses it is left open."""
    right = lowering._attention_for

    def wrong(described):
        inner = right(described)
        return lambda *args, **kwargs: inner(*args[:6], *args[6:8], "window", 2, *args[10:], **kwargs)

    monkeypatch.setattr(lowering, "_attention_for", wrong)
    options = ExportOptions(sequence_length=(16,), quantize="int8", max_kl=0.5)
    with pytest.raises(AccuracyError):
        export(str(checkpoint("llama")), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- refusals


def test_patterns_that_match_nothing(checkpoint, tmp_path):
    options = ExportOptions(sequence_length=(16,), quantize="int8", skip=("head",))
    with pytest.raises(UsageError, match=r"skip='head' matches no layer.*model\.layers\.0.*lm_head"):
        export(str(checkpoint("llama")), tmp_path / "out", options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq"])
def test_calibration_longer_than_the_model(checkpoint, tmp_path, method):
    """64 positions, rows of 512: the rows are cut, not the model's table overrun."""
    options = ExportOptions(sequence_length=(16,), quantize="int8", quantize_method=method, max_kl=5)
    made = export(str(checkpoint("gpt2")), tmp_path / "out", options)
    assert made.contract.variants[0].quantization.endswith("by gptq")


def test_experts_that_stay_as_they_are_are_said(tmp_path):
    """Their tensors are no linear layers: that they stay in fp32 must not go unsaid."""
    import tiny
    from transformers import AutoConfig

    config = AutoConfig.for_model("mixtral", **{**tiny._SHARED, "num_local_experts": 2, "num_experts_per_tok": 1})
    source = tiny.save_checkpoint(tmp_path / "mixtral", config)
    options = ExportOptions(sequence_length=(16,), quantize="int8", max_kl=5, min_agreement=0)
    made = export(str(source), tmp_path / "out", options)
    assert made.contract.variants[0].quantization.startswith("experts stay float32 (")
