"""Rotation inside attention: the graph without the rewrite says the same, and no operator is left over."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import oracle
import pytest
import torch
from transformers import AutoModelForCausalLM
from zoo.shrink import tiny_config

from precast.exporter import ExportOptions, preview
from precast.exporter.architectures import make_traceable
from precast.exporter.backends.onnx import passes
from precast.exporter.backends.onnx.lowering import lower
from precast.exporter.backends.onnx.rotary import FoldRotary
from precast.exporter.checkpoint.resolve import resolve
from precast.exporter.kinds.plan import make_plan
from precast.exporter.kinds.trace import trace
from precast.runtime import CompiledModelForCausalLM
from precast.runtime.artifact.schema import Dim
from precast.runtime.errors import UsageError

CAPACITY = 48
ROPE = {"rope_theta": 10000.0}
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}}
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16, **ROPE,
    }
}  # fmt: skip
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **ROPE}}
FOLDED = {
    "llama": ("llama", {}, {}),
    "norms": ("qwen3", {}, {}),
    "batch": ("llama", {}, {"batch_size": 2}),
    "static": ("llama", {}, {"prefill_lengths": (5, 16), "batch_size": 2}),
    "linear": ("llama", LINEAR, {}),
    "llama3": ("llama", LLAMA3, {}),
}
# What transformers' fusion does not see as rotary embeddings, or leaves between transposes, stays as it is.
LEFT = {
    "partial": ("gpt_neox", {}),
    "interleaved": ("gptj", {}),
    "windows": ("gemma3_text", {}),
    "yarn": ("llama", YARN),
    "heads of 24": ("llama", {"head_dim": 24}),
}


def _rare(case, rare):
    """A case of the slow lane, if it is `rare`."""
    return pytest.param(case, marks=pytest.mark.slow) if case in rare else case


def programs(source, **options):
    settings = ExportOptions(sequence_length=(CAPACITY,), **options)
    checkpoint = resolve(str(source), settings)
    plan = make_plan(checkpoint, settings)
    return trace(checkpoint.load(plan.task, plan.dtype), plan)


def both(program, monkeypatch) -> tuple[ir.Model, ir.Model]:
    """The optimized graph as it was before the rotation was folded, and as it is in the end."""
    kept = []

    def spied(graph):
        def call(model):
            kept.append(ir.from_proto(ir.to_proto(model)))
            return original(graph)(model)

        return call

    original = passes.FoldRotary
    monkeypatch.setattr(passes, "FoldRotary", spied)
    model = lower(program)
    passes.optimize(model, program.graph)
    monkeypatch.undo()
    return kept[0], model


def census(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def answers(model: ir.Model, graph, past: list[int], new: list[int]) -> list[np.ndarray]:
    """The logits after each row's last token, from random caches."""
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    length = max(new) if isinstance(graph.length, Dim) else graph.length
    given = {
        "input_ids": random.integers(3, 300, (graph.batch, length)),
        "past_lengths": np.array(past, np.int32),
        "new_lengths": np.array(new, np.int32),
        "logit_positions": np.array(new, np.int64)[:, None] - 1,
    }
    for layer in graph.cache:
        for name in (layer.key_in, layer.value_in):
            shape = (graph.batch, layer.heads, graph.capacity, layer.head_dim)
            given[name] = random.normal(size=shape).astype(np.float32)
    return session.run(["logits"], given)[0]


def steps(graph) -> list[tuple[list[int], list[int]]]:
    """(past, new) per row: a ragged prompt, each row's next token at its own position, a chunk behind a past."""
    if graph.batch == 1:
        return [([0], [7]), ([9], [1]), ([CAPACITY - 1], [1]), ([11], [5])]
    if graph.length == 1:
        return [([3, 40], [1, 1])]
    decode = [([3, 40], [1, 1])] if isinstance(graph.length, Dim) else []
    return [([0, 0], [5, 3]), *decode]


@pytest.mark.parametrize("case", [_rare(each, ("norms", "batch", "linear", "llama3")) for each in FOLDED])
def test_attention_rotates_by_itself(checkpoint, monkeypatch, case):
    model_type, changes, options = FOLDED[case]
    for program in programs(checkpoint(model_type, **changes), **options):
        apart, folded = both(program, monkeypatch)
        before, after = census(apart), census(folded)
        assert before["RotaryEmbedding"] == 2 * len(program.graph.cache)
        assert after["RotaryEmbedding"] == 0
        assert not after.keys() & {"Cos", "Sin"}, "the angles are constants"
        for past, new in steps(program.graph):
            expected, found = (answers(each, program.graph, past, new) for each in (apart, folded))
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), (past, new)


@pytest.mark.parametrize("case", [_rare(each, ("interleaved", "windows", "yarn", "partial")) for each in LEFT])
def test_what_is_left_is_left_whole(checkpoint, monkeypatch, case):
    model_type, changes = LEFT[case]
    program = next(programs(checkpoint(model_type, **changes), batch_size=2))
    apart, folded = both(program, monkeypatch)
    assert census(folded)["RotaryEmbedding"] in (0, census(apart)["RotaryEmbedding"])
    for past, new in steps(program.graph):
        expected, found = (answers(each, program.graph, past, new) for each in (apart, folded))
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), (past, new)


def rewritten(model: ir.Model, graph) -> ir.Model:
    """A copy with the rotation folded, if it can be."""
    copy = ir.from_proto(ir.to_proto(model))
    FoldRotary(graph)(copy)
    passes.common.RemoveUnusedNodesPass()(copy)
    return copy


def rotations(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "RotaryEmbedding"]


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_interleaved_pairs(checkpoint, monkeypatch, batch):
    program = next(programs(checkpoint("llama"), batch_size=batch))
    apart, _ = both(program, monkeypatch)
    straight = answers(apart, program.graph, *steps(program.graph)[1])
    for node in rotations(apart):
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)
    folded = rewritten(apart, program.graph)
    assert not rotations(folded)
    for past, new in steps(program.graph):
        expected, found = (answers(each, program.graph, past, new) for each in (apart, folded))
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), (past, new)
    assert np.abs(expected - straight).max() > 1e-3


def test_queries_and_keys_rotated_differently_are_left(checkpoint, monkeypatch):
    program = next(programs(checkpoint("llama")))
    apart, _ = both(program, monkeypatch)
    for node in rotations(apart)[::2]:
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)
    assert len(rotations(rewritten(apart, program.graph))) == 2


def _by_length(model: ir.Model) -> list[ir.Node]:
    """How many tokens come at once."""
    shape = ir.node("Shape", [model.graph.inputs[0]], {"start": 1, "end": 2})
    return [shape, ir.node("Cast", [shape.outputs[0]], {"to": ir.DataType.FLOAT})]


def _by_other_rows(model: ir.Model) -> list[ir.Node]:
    """The longest row, of all rows."""
    longest = ir.node("ReduceMax", [model.graph.inputs[1]], {"keepdims": 1})
    return [longest, ir.node("Cast", [longest.outputs[0]], {"to": ir.DataType.FLOAT})]


@pytest.mark.parametrize(
    ("what", "batch"), [(_by_length, 2), (_by_other_rows, 2), pytest.param(_by_length, 1, marks=pytest.mark.slow)]
)
def test_angles_of_more_than_the_position_are_left(checkpoint, monkeypatch, what, batch):
    """As for dynamic scaling: a table would give every row the angles of the longest."""
    program = next(programs(checkpoint("llama"), batch_size=batch))
    apart, _ = both(program, monkeypatch)
    cos = rotations(apart)[0].inputs[2]
    users = list(cos.uses())
    nodes = what(apart)
    nodes.append(ir.node("Mul", [cos, nodes[-1].outputs[0]]))
    apart.graph.insert_after(cos.producer(), nodes)
    for node, index in users:
        node.replace_input_with(index, nodes[-1].outputs[0])
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"more_{index}"
    assert len(rotations(rewritten(apart, program.graph))) == 2


def test_a_llama_in_numbers(checkpoint, monkeypatch):
    """Per layer: two norms, attention, four products. Nothing between the packed projection and attention."""
    program = next(programs(checkpoint("llama", num_hidden_layers=2)))
    apart, folded = both(program, monkeypatch)
    counts, layers = census(folded), len(program.graph.cache)
    assert counts["GroupQueryAttention"] == layers
    assert counts["MatMul"] == 4 * layers + 1, "qkv, o, gate and up, down; the head"
    assert counts["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert census(apart)["Split"] - counts["Split"] == layers
    assert not counts.keys() & {"RotaryEmbedding", "Transpose", "Concat"}
    assert sum(counts.values()) <= 12 * layers + 20, counts


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8, **ROPE}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 16, **ROPE,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "rope", "capacity"), [("llama", DYNAMIC, CAPACITY), ("phi3", LONG, 16)], ids=["dynamic", "longrope"]
)
def test_scaling_by_the_length_is_right_up_to_its_limit(checkpoint, artifact, model_type, rope, capacity):
    """Rows beside each other too, up to the last token that has the angles of short sequences."""
    source = checkpoint(model_type, rope_parameters=rope, **_original(model_type))
    model = CompiledModelForCausalLM.from_pretrained(artifact(source, batch_size=2, sequence_length=(capacity,)))
    rows = [[(7 * place) % 300 + 3 for place in range(length)] for length in (5, capacity)]
    oracle.check_logits(source, model, rows, "left")


def test_longrope_beyond_its_limit_is_refused_by_the_capacity_that_works(checkpoint):
    """Where a prompt or an answer crosses it, every key in the caches would have to be rotated again."""
    source = str(checkpoint("phi3", rope_parameters=LONG, **_original("phi3")))
    with pytest.raises(UsageError, match=r"sequence_length=17: .*more than 16 tokens.*Give at most 16"):
        preview(source, ExportOptions(sequence_length=(17,)))
    assert preview(source, ExportOptions()).lengths == (16,), "the default"


def _original(model_type):
    return {"original_max_position_embeddings": 16} if model_type == "phi3" else {}


@pytest.mark.parametrize("rope_type", ["default", "longrope"])
def test_phimoe_scales_as_for_short_sequences(rope_type):
    long = {**LONG, "short_mscale": 1.2, "long_mscale": 1.4}
    rope = long if rope_type == "longrope" else {"rope_type": "default", **ROPE}
    changes = {
        "rope_parameters": rope,
        "original_max_position_embeddings": 16,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    model = AutoModelForCausalLM.from_config(tiny_config("phimoe", changes)).eval()
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        with make_traceable(model):
            assert torch.allclose(model(ids).logits, expected, atol=1e-5)
