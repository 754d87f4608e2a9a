"""Every decoder family: the compiled graph gives the eager model's answers, whatever the lengths and the padding."""

from __future__ import annotations

import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnx_ir
import oracle
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention
from zoo import decoders as zoo
from zoo.shrink import tiny_config

from precast.exporter import ExportOptions, export, preview
from precast.exporter.architectures import attention_interface
from precast.exporter.architectures.patching import replace_method
from precast.exporter.pipeline import _explain_failures
from precast.runtime import CompiledModelForCausalLM
from precast.runtime.artifact import read_artifact
from precast.runtime.errors import AccuracyError, CheckpointError, ExportError

CAPACITY = 48
tokens = st.integers(3, tiny.VOCABULARY - 1)
rows_of_any_length = st.lists(st.lists(tokens, min_size=1, max_size=CAPACITY), min_size=1, max_size=5)
sides = st.sampled_from(["left", "right", "middle"])
many = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


FAST = ("llama", "mistral", "qwen2", "gpt2", "gemma2", "gptj", "bloom", "gpt_oss", "llama4_text")
"""One of each way into the operator: plain, windows, windows in some layers, learned positions, soft caps, rotation in
interleaved pairs, ALiBi, sinks, chunks."""
FAMILIES = [
    pytest.param(each, marks=() if each in FAST else pytest.mark.slow)
    for each in (*tiny.DECODERS, *zoo.REPRESENTATIVES)
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, checkpoint, artifact, tmp_path_factory):
    """One checkpoint and its artifact: batch 3, more rows in slices."""
    if request.param in tiny.DECODERS:
        source = checkpoint(request.param, num_hidden_layers=2)
    else:
        source = zoo.make(tmp_path_factory.mktemp("zoo") / request.param, request.param)
    compiled = artifact(source, batch_size=3, sequence_length=(CAPACITY,), dynamic_batch_size=True)
    return source, CompiledModelForCausalLM.from_pretrained(compiled)


@many
@given(rows=rows_of_any_length, side=sides)
def test_logits_are_those_of_the_unpadded_row(family, rows, side):
    source, model = family
    oracle.check_logits(source, model, rows, side)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_greedy_tokens_are_transformers_own(family, side):
    source, model = family
    oracle.check_greedy(source, model, side, 20)


@pytest.mark.parametrize("family", FAMILIES[: len(tiny.DECODERS)], indirect=True)
def test_census(family):
    """One GroupQueryAttention per layer, caches straight from input to it and from it to output."""
    _, model = family
    graph = onnx_ir.load(model.artifact.path / "model.onnx").graph
    counts = Counter(node.op_type for node in graph.all_nodes())
    layers = model.variant.graphs[0].cache
    assert counts["GroupQueryAttention"] == len(layers)
    for value in graph.inputs:
        if value.name.startswith("past_key_values."):
            assert [user.op_type for user, _ in value.uses()] == ["GroupQueryAttention"], value.name
    for value in graph.outputs:
        if value.name.startswith("present."):
            assert value.producer().op_type == "GroupQueryAttention", value.name
    assert not counts.keys() & {"ScatterND", "ScatterElements", "Softmax"}
    assert not any(node.metadata_props or node.doc_string for node in graph.all_nodes())


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_static_graphs_take_prompts_of_any_length(checkpoint, artifact, batch):
    """Prefill at 4 and 16 tokens and decode: padded first chunks, whole later ones, token by token for the rest."""
    source = checkpoint("llama")
    compiled = artifact(source, batch_size=batch, sequence_length=(CAPACITY,), prefill_lengths=(4, 16))
    model = CompiledModelForCausalLM.from_pretrained(compiled)
    assert [graph.name for graph in model.variant.graphs] == ["prefill_4", "prefill_16", "decode"]
    for lengths in ([1, 3, 4], [5, 16, 17], [20, 33, 40]):
        rows = [[(7 * n + length) % 300 + 3 for n in range(length)] for length in lengths][:batch]
        ids, mask = oracle.padded(rows, "left")
        found = model.generate(ids, mask, max_new_tokens=8, do_sample=False)
        for row, values, keep, all_logits in zip(rows, found, mask, model(ids, mask).logits, strict=True):
            expected = oracle.greedy(source, row, max_new_tokens=8)
            assert values[ids.shape[1] :][: len(expected)].tolist() == expected
            assert np.abs(all_logits[keep == 1] - oracle.logits(source, row)).max() < 1e-4


def test_weights_are_stored_once_for_all_graphs(checkpoint, artifact):
    source = checkpoint("llama")
    one = artifact(source, sequence_length=(CAPACITY,))
    several = artifact(source, sequence_length=(CAPACITY,), prefill_lengths=(4, 16))
    assert (several / "model.onnx.data").stat().st_size <= 1.02 * (one / "model.onnx.data").stat().st_size


def test_head_sizes_that_the_operator_lacks_are_padded(checkpoint, artifact):
    source = checkpoint("llama", **tiny.ODD_HEADS)
    model = CompiledModelForCausalLM.from_pretrained(artifact(source, sequence_length=(CAPACITY,)))
    assert model.variant.graphs[0].cache[0].head_dim == 16
    row = [9, 8, 7, 6, 5]
    assert np.abs(model(np.array([row])).logits[0] - oracle.logits(source, row)).max() < 1e-4


def test_capacity_bounds_windows(checkpoint, artifact):
    """A window that the cache cannot outgrow is a plain causal mask; one below it is kept and recorded."""
    wide = artifact(checkpoint("mistral", sliding_window=64), sequence_length=(CAPACITY,))
    small = artifact(checkpoint("mistral"), batch_size=3, sequence_length=(CAPACITY,), dynamic_batch_size=True)
    for path, expected in ((wide, {None}), (small, {8})):
        nodes = onnx_ir.load(path / "model.onnx").graph.all_nodes()
        found = {
            node.attributes.get_int("local_window_size", None)
            for node in nodes
            if node.op_type == "GroupQueryAttention"
        }
        assert found == expected
        versions = read_artifact(path).contract.variants[0].host.min_versions
        assert versions == {"onnxruntime": "1.31" if expected == {8} else "1.23"}, "older kernels see one key more"


def test_falcon_with_alibi_gives_the_answers_that_transformers_gives_by_itself(tmp_path):
    """Its eager attention adds the bias twice; which counts in bfloat16, so that distances are not all that matters."""
    config = tiny_config("falcon", {"alibi": True, "new_decoder_architecture": False, "max_position_embeddings": 320})
    source = tiny.save_checkpoint(tmp_path / "falcon", config)
    made = export(
        str(source), tmp_path / "out", ExportOptions(batch_size=2, sequence_length=(300,), validate=False)
    ).path
    model = CompiledModelForCausalLM.from_pretrained(made)
    assert "attention" not in model.variant.compiler.options, "the operator"
    rows = [[(7 * place) % 300 + 3 for place in range(length)] for length in (290, 9)]
    ids, mask = oracle.padded(rows, "left")
    found = model(ids, mask).logits
    eager = AutoModelForCausalLM.from_pretrained(source).eval()
    for row, logits, keep in zip(rows, found, mask, strict=True):
        with torch.inference_mode():
            expected = eager(torch.tensor([row])).logits[0].numpy()
        assert np.abs(logits[keep == 1] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_what_fails_says_why_attention_is_in_ordinary_operators():
    plan = SimpleNamespace(notes={"attention_because": "its masks are drawn by hand"})
    reason = r"They differ\. Attention is .* because: its masks are drawn by hand"
    with pytest.raises(AccuracyError, match=reason), _explain_failures(plan):
        raise AccuracyError("They differ.")


def test_an_architecture_past_the_interface_keeps_its_own_operators(checkpoint, tmp_path, monkeypatch):
    """GPT-Neo without its adapter: nothing calls the operator, which is noticed when it is planned, and recorded."""
    monkeypatch.delitem(__import__("precast.exporter.architectures", fromlist=["ADAPTERS"]).ADAPTERS, "gpt_neo")
    source = tiny.save_checkpoint(tmp_path / "gpt_neo", tiny_config("gpt_neo", zoo.CONFIGS["gpt_neo"]))
    found = export(str(source), tmp_path / "out", ExportOptions(sequence_length=(16,)))
    options = found.contract.variants[0].compiler.options
    assert options["attention"] == "ordinary operators"
    assert options["attention_because"].startswith("GPTNeoForCausalLM has 2 cached layers but 0 of them call attention")
    assert found.contract.variants[0].accuracy.status == "passed"


def test_a_warning_is_no_reason_to_leave_the_operator(checkpoint, monkeypatch):
    """What is deprecated still fits: where warnings are errors, one is not taken for a model that does not."""
    monkeypatch.setattr(
        attention_interface, "_find_layer", lambda *_: warnings.warn("a name is deprecated", FutureWarning, 2)
    )
    with pytest.raises(FutureWarning, match="is deprecated"):
        preview(str(checkpoint("llama")), ExportOptions(sequence_length=(16,)))


def test_a_method_that_transformers_has_no_more_is_not_replaced_in_vain(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    with (
        pytest.raises(ExportError, match=r"has no LlamaAttention\._attn"),
        replace_method(model, LlamaAttention, "_attn", id),
    ):
        pass


def test_a_cache_that_is_none_of_transformers_own_is_refused(tmp_path):
    """RWKV hands a list of tensors around."""
    from transformers import RwkvConfig

    config = RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    config.architectures = ["RwkvForCausalLM"]
    config.save_pretrained(tmp_path / "rwkv")
    with pytest.raises((CheckpointError, ExportError), match="Rwkv"):
        export(str(tmp_path / "rwkv"), tmp_path / "out", ExportOptions(sequence_length=(16,)))
