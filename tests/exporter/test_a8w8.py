"""Weights and activations in 8 bits: which layers, which ranges, and exports that answer as the quantized model."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiny
import torch
import transformers

from precast.exporter import ExportOptions, export
from precast.exporter.checkpoint.resolve import resolve
from precast.exporter.kinds.plan import make_plan
from precast.exporter.quantize import int8
from precast.exporter.quantize.activations import observe_inputs, replay
from precast.exporter.quantize.choose import quantize_model
from precast.exporter.quantize.int8_linear import Int8Linear
from precast.exporter.quantize.recipe import find_layers
from precast.exporter.quantize.smooth import choose_balance, fold_into_norms
from precast.runtime import CompiledModel, CompiledModelForCausalLM
from precast.runtime.errors import AccuracyError, UsageError

VIT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {"task": "feature-extraction", "batch_size": (2,), "sequence_length": (32,)}
MODELS = {
    # Output embeddings are left out: ONNX Runtime rounds what they read in a way of its own.
    "llama": {"sequence_length": (48,), "skip": ("lm_head", "model.embed_tokens")},
    "gpt2": {"sequence_length": (48,), "skip": ("lm_head",)},
    "bert": TEXT,
    "distilbert": TEXT,
    "vit": {"task": "feature-extraction", "batch_size": (2,)},
}
IDS = np.array([[5, 9, 30, 7, 200, 41, 17]])
PIXELS = np.random.default_rng(0).standard_normal((1, 3, 32, 32), np.float32)


@pytest.fixture(scope="module")
def source(checkpoint, run_folder):
    """`source("bert")`: the directory of a tiny random checkpoint."""

    def make(name):
        if name != "vit":
            return checkpoint(name, **({} if name in ("llama", "gpt2") else {"auto": "AutoModel"}))
        path = run_folder / "a8w8-vit"
        if not path.exists():
            tiny.save_checkpoint(path, transformers.ViTConfig(**VIT), transformers.AutoModel)
            for file in path.glob("*token*"):
                # As models of pictures are published.
                file.unlink()
        return path

    return make


def quantized(source, options):
    """The model that is traced for such an export, and its layers in words."""
    checkpoint = resolve(str(source), options)
    plan = make_plan(checkpoint, options)
    model = checkpoint.load(plan.task, plan.dtype)
    return model, quantize_model(model, checkpoint, plan, options)


def answers(name, model):
    """The eager model's, or a compiled one's."""
    with torch.no_grad():
        if name == "vit":
            given = {"pixel_values": PIXELS if isinstance(model, CompiledModel) else torch.from_numpy(PIXELS)}
        else:
            given = {"input_ids": torch.from_numpy(IDS) if isinstance(model, torch.nn.Module) else IDS}
        found = model(**given)
    return np.asarray(found["logits" if name in ("llama", "gpt2") else "last_hidden_state"])


EVERYTHING = [(name, scheme, backend) for name in MODELS for scheme in ("a8w8", "a8w8-dynamic")
              for backend in ("onnx", "aoti", "export")]  # fmt: skip
FAST = [("bert", "a8w8", "onnx"), ("llama", "a8w8-dynamic", "onnx")]


@pytest.mark.parametrize(
    ("name", "scheme", "backend"),
    [pytest.param(*each, marks=() if each in FAST else pytest.mark.slow) for each in EVERYTHING],
)
def test_exports_answer_as_the_quantized_model(source, tmp_path, name, scheme, backend):
    options = ExportOptions(**MODELS[name], quantize=scheme, backend=backend)
    model, words = quantized(source(name), options)
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) >= 4
    variant = export(str(source(name)), tmp_path / "out", options).contract.variants[0]
    assert variant.accuracy.status == "passed"
    assert variant.quantization == words
    assert f"a scale per {'token' if scheme == 'a8w8-dynamic' else 'tensor'}" in words
    kind = CompiledModelForCausalLM if name in ("llama", "gpt2") else CompiledModel
    expected = answers(name, model)
    found = answers(name, kind.from_pretrained(tmp_path / "out", trust_native_code=True))
    # Where sums differ in their last digits, an activation half-way between two codes may get the other one.
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()


# ---------------------------------------------------------------- which layers


def tiny_model(model_type, auto="AutoModelForCausalLM"):
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(tiny.config_for(model_type)).eval()
    layers = {layer.name: layer for layer in find_layers(model, ()) if layer.linear and not layer.is_vocabulary}
    return model, layers


CALLS = [{"input_ids": torch.arange(3, 40)[None]}, {"input_ids": torch.arange(60, 90)[None]}]


def last(names):
    return [name.rpartition(".")[2] for name in names]


def test_layers_that_read_one_tensor_are_one_group():
    model, layers = tiny_model("llama")
    groups = observe_inputs(model, CALLS, list(layers))
    assert [last(group.names) for group in groups] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip
    assert [group.norm and last([group.norm])[0] for group in groups] == [
        "input_layernorm", None, "post_attention_layernorm", None,
    ]  # fmt: skip
    for group in groups:
        assert torch.equal(group.largest, torch.maximum(group.largest, group.sample.abs().amax(0)))


@pytest.mark.parametrize(
    ("model_type", "auto", "is_folded"),
    [("llama", "AutoModelForCausalLM", True), ("gpt2", "AutoModelForCausalLM", True), ("bert", "AutoModel", False),
     ("gemma2", "AutoModelForCausalLM", False)],
)  # fmt: skip
def test_smoothing_changes_no_answer(model_type, auto, is_folded):
    """It goes into a normalization where nobody else reads that, and stays beside the layers elsewhere: BERT adds its
    normalizations to what comes after, and Gemma's multiply by one more than their weight."""
    model, layers = tiny_model(model_type, auto)
    before = replay(model, CALLS[0])[0]
    groups = observe_inputs(model, CALLS, list(layers))
    for group in groups:
        group.balance = choose_balance(group, [layers[name] for name in group.names], "0.5", is_static=True)
    fold_into_norms(model, CALLS[0], groups, layers)
    assert torch.allclose(replay(model, CALLS[0])[0], before, atol=1e-4)
    assert [group.balance is None for group in groups if group.norm] == [is_folded] * sum(
        group.norm is not None for group in groups
    )


def test_an_outlying_channel_is_smoothed():
    """An exponent by output error beats none where one channel has the steps of all others."""
    model, layers = tiny_model("llama")
    (group,) = observe_inputs(model, CALLS, ["model.layers.0.mlp.down_proj"])
    factors = torch.ones(group.sample.shape[1])
    factors[5] = 1000
    group.sample, group.largest = group.sample * factors, group.largest * factors
    balance = choose_balance(group, [layers[name] for name in group.names], "auto", is_static=True)
    assert float(balance[5]) < 0.2 * float(balance.median())
    assert choose_balance(group, [], "none", is_static=True) is None


class Costs:
    """A meter by what each replaced layer costs."""

    def __init__(self, model, costs):
        self.model, self.costs, self.asked = model, costs, 0

    def divergence(self):
        self.asked += 1
        return sum(cost for name, cost in self.costs.items() if isinstance(self.model.get_submodule(name), Int8Linear))


@pytest.mark.parametrize(("budget", "left_out"), [(1.0, []), (0.3, ["down_proj"]), (0.05, ["o_proj", "down_proj"])])
def test_what_costs_most_is_left_out(budget, left_out):
    model, layers = tiny_model("llama")
    prefix = "model.layers.0."
    costs = {f"{prefix}mlp.down_proj": 0.5, f"{prefix}self_attn.o_proj": 0.2, f"{prefix}mlp.up_proj": 0.01}
    meter = Costs(model, costs)
    done = int8.quantize_activations(model, list(layers.values()), CALLS, meter, budget, "none", is_static=True)
    kinds = {name: isinstance(model.get_submodule(name), Int8Linear) for name in layers}
    assert {name for name, is_int8 in kinds.items() if is_int8} == set(done)
    assert last([name for name, is_int8 in kinds.items() if not is_int8]) == left_out
    assert meter.divergence() <= budget


def test_layers_that_no_sample_reaches_are_in_no_group():
    model, layers = tiny_model("llama")
    model.model.layers[0].mlp.forward = lambda x: x
    groups = observe_inputs(model, CALLS, list(layers))
    assert [last(group.names) for group in groups] == [["q_proj", "k_proj", "v_proj"], ["o_proj"]]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": "int8", "smooth": 0.5}, "smooth= is for activations of 8 bits; give quantize='a8w8'"),
        (
            {"quantize": "a8w8", "smooth": "2"},
            "smooth='2' is not supported; give an exponent from 0 to 1, auto or none.",
        ),
        ({"quantize": "a8w8", "smooth": "much"}, "smooth='much' is not supported"),
        ({"quantize": "a8w8", "group_size": 32}, "group_size say how weights are rounded alone"),
        ({"quantize": "a8w8-dynamic", "quantize_method": "gptq"}, "Leave them out, or give quantize='int8'."),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(UsageError) as refused:
        ExportOptions(sequence_length=48, **options).check()
    assert words in str(refused.value)


def test_below_the_floor_other_schemes_are_advised(source, tmp_path):
    """No layer rounds activations any more, and weights alone lose more than this."""
    options = ExportOptions(sequence_length=48, quantize="a8w8", max_kl=1e-9)
    model, words = quantized(source("llama"), options)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
    assert "activations" not in words
    with pytest.raises(
        AccuracyError, match=r"Try quantize='a8w8-dynamic', another exponent in smooth=, or quantize='int8'"
    ):
        export(str(source("llama")), tmp_path / "out", options)


def test_a_text_too_short_for_ranges_says_how_much_it_takes(source, tmp_path):
    text, folder = tmp_path / "short.txt", tmp_path / "model"
    text.write_text("A few words of calibration. " * 4)
    shutil.copytree(source("llama"), folder)
    tiny.tokenizer().save_pretrained(folder)
    options = ExportOptions(sequence_length=48, quantize="a8w8", calibration=text)
    with pytest.raises(UsageError, match=r"holds \d+ tokens; it takes 256 at least; quantize='a8w8-dynamic' takes 2"):
        export(str(folder), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
