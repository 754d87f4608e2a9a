"""Models divided between ranks: each has its part of the weights, and together they give the model's logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from divided import FAMILIES, SHARED, Group, degrees, model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from precast.exporter import ExportOptions
from precast.exporter.parallel import plans
from precast.exporter.parallel.division import divide
from precast.exporter.parallel.local_model import local_model
from precast.exporter.quantize.linear import Packed, QuantizedLinear
from precast.exporter.quantize.scheme import QuantParams, encode, split_groups
from precast.runtime.artifact.ranks import pattern_of
from precast.runtime.artifact.schema import Ranks, Split
from precast.runtime.artifact.weight_files import WeightFile, divide_weights, join_weights
from precast.runtime.errors import CheckpointError, FormatError, UsageError

FAST = ("llama", "gpt2", "mixtral", "olmo2")


def check_logits(model, division) -> None:
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    models = [local_model(model, division, rank) for rank in range(division.ranks)]
    found = Group(division.ranks).run(lambda rank: models[rank](ids, use_cache=False).logits)
    with torch.no_grad():
        right = model(ids, use_cache=False).logits
    for each in found:
        assert torch.equal(each, found[0]), "all ranks have the same bits"
        assert float((each - right).abs().max()) <= 1e-5 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in FAST else pytest.mark.slow) for k in FAMILIES])
def test_ranks_together_give_the_models_logits(kind, ranks):
    model = model_of(kind)
    division = divide(model, degrees(ranks))
    check_logits(model, division)
    whole = sum(each.numel() for each in model.parameters())
    own = sum(each.numel() for each in local_model(model, division, 0).parameters())
    # What stays whole: norms, keys and values of fewer heads than ranks, shared experts, which the plan leaves alone.
    assert own < whole * (1 / ranks + (0.25 if kind == "qwen2_moe" else 0.08)), (own, whole)


@pytest.mark.parametrize(
    "fewer",
    [
        {"attn": 2, "o_proj": 2},
        {"attn": 2, "o_proj": 4},
        {"attn": 4, "o_proj": 1, "mlp": 2},
        {"attn": 1, "o_proj": 2, "embed": 1, "lmhead": 2, "moe": 2},
    ],
    ids=str,
)
def test_modules_of_a_kind_may_have_fewer_parts(fewer):
    model = model_of("llama" if "mlp" in fewer else "mixtral")
    division = divide(model, degrees(4, **fewer))
    check_logits(model, division)
    assert division.degrees.fewer() == {name: value for name, value in fewer.items() if value < 4}


EXPERT_FAMILIES = [kind for kind in FAMILIES if "moe" in kind or kind in ("mixtral", "gpt_oss")]


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        pytest.param(kind, parts, marks=[] if (kind, parts) == ("gpt_oss", 2) else pytest.mark.slow)
        for kind in EXPERT_FAMILIES
        for parts in (2, 4)
    ],
)
def test_experts_are_divided_by_their_numbers(kind, parts):
    model = model_of(kind)
    division = divide(model, degrees(4, moe=parts, by_expert=True))
    check_logits(model, division)
    experts = next(name for name in division.modules if name.endswith("experts"))
    for name, parameter in model.get_submodule(experts).named_parameters():
        own = local_model(model, division, 3).get_submodule(experts).get_parameter(name)
        assert torch.equal(own, parameter[-4 // parts :]), "whole experts, the last ones"


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 16), (4, 16)])
def test_quantized_weights_are_divided_as_they_are(bits, group):
    model = model_of("llama")
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            groups = split_groups(module.weight.detach(), group or module.in_features)
            params = QuantParams(groups.abs().amax(-1) / 7, torch.full(groups.shape[:2], 2.0 ** (bits - 1)), None)
            parent, _, last = name.rpartition(".")
            packed = Packed(encode(groups, params, bits, module.in_features))
            setattr(model.get_submodule(parent), last, QuantizedLinear(packed, None))
    check_logits(model, divide(model, degrees(2)))


def test_what_cannot_be_shared_is_refused_with_both_numbers():
    with pytest.raises(UsageError, match=r"tensor_parallel=3: .* 3 cannot share the 8 attention heads and 2 key/value"):
        divide(model_of("llama"), degrees(3))
    with pytest.raises(UsageError, match=r"the 65 tokens of the vocabulary of model.embed_tokens.weight.*embed_tp=1"):
        divide(model_of("llama", vocab_size=65), degrees(2))
    with pytest.raises(UsageError, match=r"mlp_tp=2: 2 ranks cannot share the 97 rows or columns"):
        divide(model_of("llama", intermediate_size=97), degrees(4, mlp=2))
    with pytest.raises(UsageError, match=r"moe_ep=4: 4 ranks cannot share the 6 experts .* Possible are 2, 3, 6; "):
        divide(model_of("mixtral", num_local_experts=6), degrees(4, by_expert=True))
    with pytest.raises(UsageError, match=r"moe_ep=2 says how experts are divided, .* type 'llama' divides none"):
        divide(model_of("llama"), degrees(2, by_expert=True))
    with pytest.raises(UsageError, match="one tensor in this model"):
        divide(model_of("qwen2"), degrees(4, embed=1))
    unknown = AutoModelForCausalLM.from_config(AutoConfig.for_model("persimmon", **SHARED))
    with pytest.raises(UsageError, match="neither transformers nor precast has one for models of type 'persimmon'"):
        divide(unknown, degrees(2))


def test_a_plan_that_names_what_is_not_there_is_an_error(monkeypatch):
    """Weights would stay whole without a word."""
    plan = {"model.layers.*.self_attn.query": "colwise", "lm_head": "colwise_gather_output"}
    monkeypatch.setitem(plans.OWN_PLANS, "llama", plan)
    with pytest.raises(CheckpointError, match=r"names model.layers.\*.self_attn.query, which this model does not have"):
        divide(model_of("llama"), degrees(2))
    monkeypatch.setitem(plans.OWN_PLANS, "llama", {"lm_head": "sequence_parallel"})
    with pytest.raises(UsageError, match="sequence_parallel"):
        divide(model_of("llama"), degrees(2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel": 0}, "at least 1, not 0"),
        ({"tensor_parallel": 4, "mlp_tp": 3}, "mlp_tp=3 does not divide the 4 ranks .* possible are 1, 2, 4"),
        ({"tensor_parallel": 2, "moe_tp": 2, "moe_ep": 2}, "moe_tp divides each expert, and moe_ep gives each rank"),
        ({"attn_tp": 2, "online_split": True}, "attn_tp and online_split say how .* give tensor_parallel=2"),
        ({"tensor_parallel": 2, "device": "cuda"}, "leave one of them out"),
        ({"tensor_parallel": 2, "lora_slots": 1, "lora_rank": 4}, "adapters are whole"),
        ({"tensor_parallel": 2, "kv_cache": "int8"}, "scales are those of all heads"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        ExportOptions(backend="aoti", sequence_length=8, **options).check()


SPLITS = st.tuples(st.integers(0, 2), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]))


@settings(max_examples=60, deadline=None)
@given(
    splits=st.lists(SPLITS, min_size=1, max_size=4),
    ranks=st.sampled_from([2, 4, 6]),
    dtype=st.sampled_from(["U8", "BF16", "F32"]),
    seed=st.integers(0, 99),
)
def test_weights_divided_and_joined_are_the_same_bytes(tmp_path_factory, splits, ranks, dtype, seed):
    random, size = np.random.default_rng(seed), {"U8": 1, "BF16": 2, "F32": 4}[dtype]
    whole = WeightFile()
    rules = {}
    for index, (dim, blocks, copies) in enumerate(splits):
        shape = [3, 5, 2]
        shape[dim] = blocks * (ranks // copies) * int(random.integers(1, 4))
        name = f"layers.{index}.w{index}"
        whole.tensors[name] = random.integers(0, 256, (*shape, size), np.uint8).view(f"u{size}")[..., 0]
        whole.dtypes[name] = dtype
        rules[pattern_of(name)] = Split(dim=dim, blocks=blocks, copies=copies)
    whole.tensors["norm"], whole.dtypes["norm"] = np.ones(3, "u4"), "F32"
    how = Ranks(count=ranks, splits=rules, degrees={}, stored=ranks)
    folder = tmp_path_factory.mktemp("weights")
    whole.write(folder / "whole")
    shared, own = divide_weights(WeightFile.read(folder / "whole"), how)
    assert list(shared.tensors) == ["norm"]
    for index, part in enumerate(own):
        part.write(folder / f"rank_{index}")
    parts = [WeightFile.read(folder / f"rank_{index}") for index in range(ranks)]
    join_weights(shared, parts, how).write(folder / "joined")
    assert (folder / "joined").read_bytes() == (folder / "whole").read_bytes()


def test_parts_that_are_not_of_one_model_are_not_joined():
    how = Ranks(count=2, splits={"w": Split(dim=0), "k": Split(dim=0, copies=2)}, degrees={}, stored=2)
    one, other = ({"w": np.ones((2, 2), "u4"), "k": np.full(2, n, "u4")} for n in (1, 2))
    dtypes = {"w": "F32", "k": "F32"}
    with pytest.raises(FormatError, match="k of rank 1 does not fit"):
        join_weights(WeightFile(), [WeightFile(dtypes, one), WeightFile(dtypes, other)], how)
    with pytest.raises(FormatError, match="rank 1 are others than those of rank 0"):
        join_weights(WeightFile(), [WeightFile(dtypes, one), WeightFile({"w": "F32"}, {"w": one["w"]})], how)
