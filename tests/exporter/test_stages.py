"""Programs cut between layers: whatever the cut, stages one after the other give the whole program's bits."""

from __future__ import annotations

from itertools import combinations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torch.export.graph_signature import InputKind
from transformers import AutoConfig

from precast.exporter import ExportOptions, export
from precast.exporter.checkpoint.resolve import resolve
from precast.exporter.kinds.decoder.stages import cut_programs, find_layers, share_layers
from precast.exporter.kinds.plan import make_plan
from precast.exporter.kinds.trace import trace
from precast.exporter.precision import cast_programs, choose_cast
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.stages import stages_problem
from precast.runtime.errors import ExportError, UsageError

HEADS = {"head_dim": 16}
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
FAMILIES = {
    "llama": {},
    "bloom": {"n_head": 4, "n_layer": 4},
    "deepseek_v3": {**EXPERTS, **LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
                    "first_k_dense_replace": 1},
    "falcon": {"num_kv_heads": 4},
    "gemma2": HEADS,
    "gemma3_text": {**HEADS, "sliding_window": 8},
    "gemma3n_text": {**HEADS, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
                     "num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 4,
                     "activation_sparsity_pattern": [0.0] * 4},
    "gpt2": GPT2,
    "gpt_neox": {},
    "gpt_oss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {**GPT2, "rotary_dim": 4},
    "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {},
    "phi3": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3_moe": {**EXPERTS, **HEADS, "num_experts": 4},
    "stablelm": {},
}  # fmt: skip
FAST = ("llama", "gpt2", "gptj")


def traced(kind: str, folder, **options):
    """The programs of a tiny model, and the name of its list of layers."""
    config = AutoConfig.for_model(kind, **{**tiny._SHARED, "num_hidden_layers": 4, **FAMILIES[kind]})
    asked = ExportOptions(**{"sequence_length": 48, **options})
    checkpoint = resolve(str(tiny.save_checkpoint(folder, config)), asked)
    plan = make_plan(checkpoint, asked)
    model = checkpoint.load(plan.task, plan.dtype)
    programs = list(trace(model, plan))
    how = choose_cast(asked)
    return cast_programs(programs, how) if how else programs, find_layers(model)


class _Interpreter(torch.fx.Interpreter):
    def call_function(self, target, args, kwargs):
        # Functional programs view what attention returns, which lies otherwise in memory than they were traced with.
        is_view = target is torch.ops.aten.view.default
        return super().call_function(torch.ops.aten.reshape.default if is_view else target, args, kwargs)


def compute(program, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of a program by name."""
    exported = program.exported
    held = {**exported.constants, **exported.state_dict}
    specs = exported.graph_signature.input_specs
    weights = [held[spec.target] for spec in specs if spec.kind is not InputKind.USER_INPUT]
    with torch.no_grad():
        found = _Interpreter(exported.graph_module).run(*weights, *(values[spec.name] for spec in program.graph.inputs))
    return dict(zip((spec.name for spec in program.graph.outputs), found, strict=True))


def inputs_of(graph, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = tokens if not isinstance(graph.length, int) else graph.length
    given = {
        "input_ids": torch.randint(3, tiny.VOCABULARY, (1, count), generator=generator),
        "past_lengths": torch.tensor([3], dtype=torch.int32),
        "new_lengths": torch.tensor([count], dtype=torch.int32),
        "logit_positions": torch.tensor([[0, count - 1]] if count == tokens else [[count - 1]]),
    }
    for spec in graph.inputs[4:]:
        given[spec.name] = torch.randn(spec.shape, generator=generator).mul(0.3).to(getattr(torch, spec.dtype))
    return given


def check(programs, layers: str, stages: int) -> list[list]:
    given = [inputs_of(program.graph, 5) for program in programs]
    right = [compute(program, values) for program, values in zip(programs, given, strict=True)]
    cut = cut_programs(programs, layers, stages)
    assert len(cut) == stages
    for index, (values, wanted) in enumerate(zip(given, right, strict=True)):
        for parts in cut:
            # Each is given nothing but what it says that it takes.
            taken = {spec.name: values[spec.name] for spec in parts[index].graph.inputs}
            values.update(compute(parts[index], taken))
        for name, tensor in wanted.items():
            assert torch.equal(values[name], tensor), name
    return cut


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in FAST else pytest.mark.slow) for k in FAMILIES])
def test_stages_one_after_the_other_give_the_bits_of_the_whole(kind, tmp_path):
    programs, layers = traced(kind, tmp_path)
    # Gemma 3n's last layers share a cache, which more stages would cut apart.
    for stages in (2,) if kind == "gemma3n_text" else (2, 3, 4):
        cut = check(programs, layers, stages)
        if kind == "llama":
            passed = [[spec.name for spec in parts[0].graph.inputs if "activations" in spec.name] for parts in cut]
            # Rotary tables and masks are computed by each stage.
            assert passed == [[], *([f"activations.{index}"] for index in range(stages - 1))]


@pytest.mark.slow
def test_what_layers_share_across_a_cut_is_refused(tmp_path):
    programs, layers = traced("gemma3n_text", tmp_path)
    with pytest.raises(ExportError, match="share the cache of layer 2, and would be in two of 4 stages"):
        cut_programs(programs, layers, 4)


@pytest.mark.parametrize("length", [{"prefill_lengths": (8,)}, {"backend": "export", "dtype": "bfloat16"}], ids=str)
def test_fixed_lengths_and_cast_programs_are_cut_too(length, tmp_path):
    check(*traced("llama", tmp_path, **length), 2)


def test_a_tied_table_is_in_the_first_and_the_last_stage(tmp_path):
    programs, layers = traced("qwen2", tmp_path)
    first, middle, last = cut_programs(programs, layers, 3)
    tables = [
        sum(tensor.numel() == tiny.VOCABULARY * 64 for tensor in parts[0].exported.state_dict.values())
        for parts in (first, middle, last)
    ]
    assert tables == [1, 0, 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=9), st.data())
def test_layers_are_shared_out_evenly(sizes, data):
    layers = len(sizes) - 1
    stages = data.draw(st.integers(1, layers))
    last = share_layers(sizes, stages)
    assert last[-1] == layers
    assert last[0] >= 1
    assert sorted(set(last)) == last
    found = _squares(sizes, last)
    for other in _all_cuts(layers, stages):
        assert found <= _squares(sizes, other)


def _squares(sizes, last) -> int:
    begins = [0, *(end + 1 for end in last[:-1])]
    return sum(sum(sizes[begin : end + 1]) ** 2 for begin, end in zip(begins, last, strict=True))


def _all_cuts(layers: int, stages: int):
    return ([*ends, layers] for ends in combinations(range(1, layers), stages - 1))


def test_more_stages_than_layers_are_refused_with_both_numbers(checkpoint, tmp_path):
    source = checkpoint("llama", num_hidden_layers=2)
    with pytest.raises(UsageError, match=r"pipeline_parallel=3: .* has 2 layers.* Possible is 2\."):
        export(str(source), tmp_path / "out", ExportOptions(sequence_length=48, pipeline_parallel=3))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="pipeline_parallel=3: this model has 2 layers"):
        share_layers([1, 1, 1], 3)


def test_what_has_no_layers_to_cut_between_is_refused(checkpoint, tmp_path):
    encoder = checkpoint("bert", "AutoModel")
    with pytest.raises(UsageError, match="divides the layers of decoders, and 'feature-extraction'"):
        export(str(encoder), tmp_path / "out", ExportOptions(batch_size=1, sequence_length=16, pipeline_parallel=2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pipeline_parallel": 0}, "at least 1, not 0"),
        ({"pipeline_parallel": 2, "backend": "aoti"}, "pipeline_parallel is not for backend='aoti'"),
        ({"pipeline_parallel": 2, "lora_slots": 1, "lora_rank": 4}, "adapters are whole"),
        ({"pipeline_parallel": 2, "prefix_tuning": "x"}, "caches of its own layers"),
        ({"pipeline_parallel": 2, "tensor_parallel": 2, "backend": "aoti"}, "whole layers; leave one of them out"),
        ({"pipeline_parallel": 2, "backend": "neuron"}, "Backends that take it: onnx, export"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        ExportOptions(sequence_length=8, **options).check()


def test_a_contract_whose_stages_do_not_fit_is_refused(checkpoint, artifact):
    made = artifact(checkpoint("llama", num_hidden_layers=2), pipeline_parallel=2, validate=True)
    (variant,) = read_artifact(made).contract.variants
    assert stages_problem(variant) is None
    first, last = variant.stages
    (graph,) = last.graphs
    inputs = {spec.name: spec for spec in graph.inputs}

    def changed(**changes):
        return stages_problem(replace(variant, stages=[first, replace(last, graphs=[replace(graph, **changes)])]))

    def without(name):
        return [spec for spec in graph.inputs if spec.name != name]

    assert "has 1 stages" in stages_problem(replace(variant, stages=[first]))
    assert "not those of one stage each" in stages_problem(replace(variant, stages=[first, replace(last, weights=[])]))
    assert "outside stage_1" in changed(file="stage_0/model.onnx")
    assert "of other sizes" in changed(capacity=47)
    assert "of other sizes" in changed(role="decoder")
    wrong = replace(inputs["activations.0"], shape=[1, 7, 64], axes=[None, None, None])
    assert "reads activations.0, which it is not given" in changed(inputs=[*without("activations.0"), wrong])
    assert "reads other, which" in changed(inputs=[*graph.inputs, replace(inputs["past_lengths"], name="other")])
    assert "lacks past_key_values.1.key" in changed(inputs=without("past_key_values.1.key"))
    assert "caches or the logits" in changed(cache=[])
    assert "caches or the logits" in changed(outputs=graph.outputs[1:])
