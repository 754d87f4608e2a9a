"""Decoders whose attention stays in ordinary operators: the same answers, whatever the lengths and the padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import oracle
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo.decoders import CONFIGS
from zoo.shrink import tiny_config

from precast.exporter import ExportOptions, export, preview
from precast.exporter.kinds.decoder import plan
from precast.runtime import CompiledModelForCausalLM
from precast.runtime.artifact import read_artifact
from precast.runtime.errors import UsageError

CAPACITY = 48
# Latents expanded behind the cache.
FAST = ["deepseek_v3"]
SLOW = [
    # Keys changed behind the cache.
    "diffllama",
    "gpt_neox_japanese",
    "axk1",
    "big_bird",
    "doge",
    "glm4_moe_lite",
    "megatron-bert",
    "minicpm3",
    "rembert",
    "youtu",
]
# What the operator does too, so that every mask is met here: a window, chunks, soft capping, ALiBi; and products of
# matrices that want two dimensions.
FORCED = ["mistral", "gemma2", "gpt2"]

tokens = st.integers(3, tiny.VOCABULARY - 1)
rows_of_any_length = st.lists(st.lists(tokens, min_size=1, max_size=CAPACITY), min_size=1, max_size=5)
sides = st.sampled_from(["left", "right", "middle"])
few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """`source("diffllama")`: the directory of a tiny random checkpoint, made once."""
    root, made = tmp_path_factory.mktemp("ordinary"), {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            config = tiny_config(model_type, CONFIGS.get(model_type))
            made[model_type] = tiny.save_checkpoint(root / model_type, config)
        return made[model_type]

    return make


@pytest.fixture(
    scope="module", params=[*FAST, *(pytest.param(each, marks=pytest.mark.slow) for each in (*SLOW, *FORCED))]
)
def family(request, source, tmp_path_factory):
    """One checkpoint and its artifact: batch 3, more rows in slices."""
    checkpoint = source(request.param)
    with pytest.MonkeyPatch.context() as patch:
        if request.param in FORCED:
            patch.setattr(plan, "fused_blocker", lambda *_: "the test says so")
        # The mask of chunks is built by looking at the length.
        fixed = (8, 20) if request.param == "llama4_text" else ()
        sizes = {"batch_size": 3, "sequence_length": (CAPACITY,), "dynamic_batch_size": True, "prefill_lengths": fixed}
        made = export(str(checkpoint), tmp_path_factory.mktemp("ordinary") / "out", validate=False, **sizes)
    return checkpoint, CompiledModelForCausalLM.from_pretrained(made.path)


@few
@given(rows=rows_of_any_length, side=sides)
def test_logits_are_those_of_the_unpadded_row(family, rows, side):
    checkpoint, model = family
    ids, mask = oracle.padded(rows, side)
    found = model(ids, mask).logits
    for row, values, keep in zip(rows, found, mask, strict=True):
        expected = oracle.logits(checkpoint, row)
        assert np.abs(values[keep == 1] - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_greedy_tokens_are_transformers_own(family, side):
    checkpoint, model = family
    rows = [[5, 9, 30, 7, 200], [80], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]]
    check_greedy(checkpoint, model, rows, side, 30)


def check_greedy(checkpoint, model, rows, side, count, **options):
    ids, mask = oracle.padded(rows, side)
    found = model.generate(ids, mask, max_new_tokens=count, do_sample=False, use_cache=True, **options)
    for row, values in zip(rows, found, strict=True):
        expected = oracle.greedy(checkpoint, row, max_new_tokens=count, use_cache=True)
        assert values[ids.shape[1] :][: len(expected)].tolist() == expected


def test_the_artifact_says_so(family):
    _, model = family
    assert model.variant.compiler.options["attention"] == "ordinary operators"


def test_caches_may_share_their_memory(family):
    """Whatever reads a cache has read it before the cache that replaces it in the same memory is written."""
    _, model = family
    graph = onnx_ir.load(model.artifact.path / model.variant.graphs[-1].file).graph
    inputs, outputs = ({value.name: value for value in values} for values in (graph.inputs, graph.outputs))
    for layer in model.variant.graphs[0].cache:
        for name_in, name_out in ((layer.key_in, layer.key_out), (layer.value_in, layer.value_out)):
            needed = ancestors(outputs[name_out])
            assert needed >= {node for node, _ in inputs[name_in].uses()}, name_in


def ancestors(value: onnx_ir.Value) -> set[onnx_ir.Node]:
    """The nodes that must have run before this value's own."""
    found: set[onnx_ir.Node] = set()
    waiting = [value.producer()]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [each.producer() for each in node.inputs if each is not None]
    return found - {value.producer()}


def test_one_operator_is_preferred(checkpoint):
    """A plan says which way it takes; only the unusual one is worth a line."""
    shapes = ExportOptions(sequence_length=(CAPACITY,))
    assert "attention" not in preview(str(checkpoint("llama")), shapes).as_json()


def test_a_plan_says_it_before_weights_are_read(source):
    found = preview(str(source("diffllama")), ExportOptions(sequence_length=(CAPACITY,)))
    assert found.as_json()["attention"] == "ordinary operators"


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_static_graphs(source, artifact, batch):
    checkpoint = source("diffllama")
    compiled = artifact(checkpoint, batch_size=batch, sequence_length=(CAPACITY,), prefill_lengths=(16,))
    model = CompiledModelForCausalLM.from_pretrained(compiled)
    for lengths in ([1, 3, 4], [5, 16, 17], [20, 33, 40]):
        rows = [[(7 * n + length) % 300 + 3 for n in range(length)] for length in lengths][:batch]
        check_greedy(checkpoint, model, rows, "left", 8)


@pytest.mark.slow
def test_a_row_alone_is_continued_and_guessed_ahead(source, artifact):
    """At batch 1 what the cache holds is read no second time, and several guesses are checked in one step."""
    checkpoint = source("deepseek_v3")
    model = CompiledModelForCausalLM.from_pretrained(artifact(checkpoint, sequence_length=(CAPACITY,)))
    row = [7, 8, 9, 10] * 4
    for length in (4, 10, 16, 13):
        check_greedy(checkpoint, model, [row[:length]], "left", 20, prompt_lookup_num_tokens=4)


def test_caches_in_int8_are_refused(source, tmp_path):
    options = ExportOptions(sequence_length=(CAPACITY,), kv_cache="int8")
    with pytest.raises(UsageError, match=r"kv_cache='int8'.*DiffLlamaForCausalLM.*Leave it out"):
        export(str(source("diffllama")), tmp_path / "out", options)


@pytest.mark.slow
def test_an_export_is_validated_and_repeats_to_the_byte(source, tmp_path):
    options = ExportOptions(sequence_length=(CAPACITY,), batch_size=2)
    one, other = (export(str(source("deepseek_v3")), tmp_path / name, options) for name in ("one", "other"))
    assert one.contract.variants[0].accuracy.status == "passed"
    assert one.contract.digest == other.contract.digest == read_artifact(tmp_path / "one").contract.digest
