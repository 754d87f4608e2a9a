"""Adapters in slots: rows answer as peft's eager model with theirs active, or as if there were none; what does not fit
is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import adapters as made
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from precast.exporter import ExportOptions, export, validate_again
from precast.exporter.kinds.decoder import lora_slots
from precast.runtime import CompiledModelForCausalLM, pipeline
from precast.runtime.artifact import read_artifact, render_config
from precast.runtime.errors import (
    AccuracyError,
    ExportError,
    FormatError,
    InputError,
    OutOfMemoryError,
    UsageError,
)
from precast.runtime.generation import adapters as slots_of

CAUSAL = "AutoModelForCausalLM"
TARGETS = {
    "llama": ["q_proj", "k_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "qwen2": ["q_proj", "v_proj", "o_proj", "up_proj"],
    "opt": ["q_proj", "fc1", "fc2"],
}
SLOTS = {"lora_slots": 2, "lora_rank": 6}
PROMPTS = [list(range(3, 19)), list(range(40, 47)), list(range(3, 12))]
FAST = {("llama", "onnx", "none")}
GRID = [
    *((family, "onnx", "none") for family in ("llama", "gpt2", "qwen2", "opt")),
    *((family, "aoti", "none") for family in ("llama", "gpt2")),
    ("llama", "export", "none"), ("gpt2", "onnx", "int8"), ("llama", "onnx", "int4"), ("qwen2", "aoti", "int8"),
]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """`adapter("llama", "rslora", seed=2)`: an adapter of the family's checkpoint, made once."""
    root, found = tmp_path_factory.mktemp("adapters"), {}

    def make(family="llama", kind="lora", **given):
        key = repr((family, kind, sorted(given.items())))
        if key not in found:
            given = {"target_modules": TARGETS[family], **given}
            found[key] = made.make_adapter(root / str(len(found)), checkpoint(family), CAUSAL, kind, **given)
        return found[key]

    return make


@pytest.fixture(scope="module")
def slotted(checkpoint, artifact):
    """`slotted("gpt2", batch_size=2)`: a model with two slots, opened anew."""

    def open_model(family="llama", **options):
        if options.get("quantize", "none") != "none":
            options["accept_loss"] = True
        path = artifact(checkpoint(family), **{**SLOTS, **options})
        return CompiledModelForCausalLM.from_pretrained(path, trust_native_code=True)

    return open_model


@pytest.fixture
def model(slotted, adapter):
    """A Llama of batch 1 with two adapters, "a" and "b"."""
    opened = slotted()
    opened.load_adapter("a", adapter())
    opened.load_adapter("b", adapter(kind="rslora", seed=2))
    return opened


@pytest.fixture
def pair(slotted, adapter):
    """The same of batch 2."""
    opened = slotted(batch_size=2)
    opened.load_adapter("a", adapter())
    opened.load_adapter("b", adapter(kind="rslora", seed=2))
    return opened


@pytest.fixture
def own(adapter, tmp_path):
    """`own(r=8)`: an adapter that is the test's own, with these settings changed in its configuration."""

    def copy(change=lambda held: held, **changes):
        path = shutil.copytree(adapter(), tmp_path / "adapter", dirs_exist_ok=True)
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")
        tensors = path / "adapter_model.safetensors"
        save_file(change(load_file(tensors)), tensors)
        return path

    return copy


def _expected(source, path, row):
    with torch.no_grad():
        return made.open_adapted(source, CAUSAL, path)(torch.tensor([row])).logits[0].numpy()


def _continue(model, row, adapter=None, count=6, **options):
    found = model.generate([row], max_new_tokens=count, eos_token_id=[], adapter=adapter, **options)
    return found[0, len(row) :].tolist()


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("family", "backend", "quantize"),
    [pytest.param(*row, marks=[] if row in FAST else pytest.mark.slow) for row in GRID],
)
def test_rows_with_adapters_of_their_own_answer_as_peft(checkpoint, adapter, slotted, family, backend, quantize):
    patterns = {"rank_pattern": {TARGETS[family][0]: 6}, "alpha_pattern": {f"0.*.{TARGETS[family][-1]}": 20}}
    paths = [adapter(family), adapter(family, "rslora", seed=2, **patterns)]
    model, source, row = (
        slotted(family, backend=backend, quantize=quantize, batch_size=2),
        checkpoint(family),
        PROMPTS[0],
    )
    before = model([row, row]).logits
    for name, path in zip("ab", paths, strict=True):
        model.load_adapter(name, path)
    assert list(model.adapters) == ["a", "b"]
    found = model([row, row], adapter=["a", "b"]).logits
    for path, logits in zip(paths, found, strict=True):
        expected = _expected(source, path, row)
        # Rounded weights give other answers, but by far not so different ones as an adapter.
        allowed = 1e-5 if quantize == "none" else 0.1
        np.testing.assert_allclose(logits, expected, rtol=allowed, atol=allowed * np.abs(expected).max())
        assert np.abs(logits - before[0]).max() > 1
    assert np.array_equal(model([row, row], adapter=[None, "b"]).logits[0], before[0])
    assert np.array_equal(model([row, row]).logits, before)


def test_greedy_answers_are_those_of_peft_in_one_batch(checkpoint, adapter, pair):
    rows = np.array([PROMPTS[1], PROMPTS[1]])
    found = pair.generate(rows, max_new_tokens=8, eos_token_id=[], adapter=["a", None])[:, rows.shape[1] :]
    eager = made.open_adapted(checkpoint("llama"), CAUSAL, adapter())
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    ids = torch.tensor(rows[:1])
    with eager.disable_adapter():
        plain = eager.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)
    adapted = eager.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)
    assert found.tolist() == [each[0, rows.shape[1] :].tolist() for each in (adapted, plain)]


def test_slots_without_adapters_change_nothing(decoder, model):
    """To the bit, with others loaded."""
    plain = CompiledModelForCausalLM.from_pretrained(decoder)
    for row in PROMPTS:
        assert np.array_equal(plain([row]).logits, model([row]).logits)
    assert _continue(plain, PROMPTS[0]) == _continue(model, PROMPTS[0])


def test_a_slot_holds_nothing_of_an_adapter_before(slotted, adapter):
    model = slotted()
    model.load_adapter("large", adapter(r=6, seed=3))
    model.unload_adapter("large")
    model.load_adapter("small", adapter(target_modules=["q_proj"], r=2))
    model.load_adapter("other", adapter(kind="rslora", seed=2))
    fresh = slotted()
    fresh.load_adapter("small", adapter(target_modules=["q_proj"], r=2))
    assert np.array_equal(model([PROMPTS[0]], adapter="small").logits, fresh([PROMPTS[0]], adapter="small").logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_half_precision_are_read(slotted, own, dtype):
    path = own(lambda held: {name: value.to(dtype) for name, value in held.items()})
    model = slotted()
    model.load_adapter("half", path)
    own(lambda held: {name: value.to(dtype).float() for name, value in held.items()})
    model.load_adapter("full", path)
    halves, full = (model([PROMPTS[0]], adapter=name).logits for name in ("half", "full"))
    assert np.array_equal(halves, full)


# ---------------------------------------------------------------- what caches hold

CALLS = st.lists(st.tuples(st.integers(0, len(PROMPTS) - 1), st.sampled_from([None, "a", "b"])), min_size=2, max_size=5)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=CALLS)
def test_nothing_read_with_other_weights_is_used_again(model, calls):
    for prompt, adapter in calls:
        found = _continue(model, PROMPTS[prompt], adapter)
        model.reset()
        assert found == _continue(model, PROMPTS[prompt], adapter)
        assert found[0] == int(model([PROMPTS[prompt]], adapter=adapter).logits[0, -1].argmax())
        # What the next call finds is what this one left.
        _continue(model, PROMPTS[prompt], adapter)


def test_what_was_read_with_the_same_adapter_is_used_again(model, monkeypatch):
    _continue(model, PROMPTS[0], "a")
    fed = []
    feed = model._session._feed_row
    monkeypatch.setattr(model._session, "_feed_row", lambda row: fed.append(len(row)) or feed(row))
    _continue(model, PROMPTS[0], "a")
    _continue(model, PROMPTS[0], "b")
    _continue(model, PROMPTS[0])
    assert fed == [1, len(PROMPTS[0]), len(PROMPTS[0])]


def test_rows_of_a_batch_do_not_use_each_others_caches(pair):
    rows = np.array([PROMPTS[1], PROMPTS[1]])
    for adapters in (["a", "b"], ["b", "a"], [None, "a"], ["a", "a"]):
        found = pair.generate(rows, max_new_tokens=4, eos_token_id=[], adapter=adapters)
        pair.reset()
        assert np.array_equal(found, pair.generate(rows, max_new_tokens=4, eos_token_id=[], adapter=adapters))


def test_a_saved_session_belongs_to_its_adapter(slotted, adapter, model, tmp_path):
    answer = _continue(model, PROMPTS[0], "a")
    model.save_session(tmp_path / "session")
    other = slotted()
    with pytest.raises(InputError, match=r"read with an adapter that is not loaded, of sha256 [0-9a-f]{12}…"):
        other.load_session(tmp_path / "session")
    other.load_adapter("again", adapter())
    assert other.load_session(tmp_path / "session") == len(PROMPTS[0]) + len(answer) - 1
    plain = _continue(slotted(), PROMPTS[0])
    assert plain != answer
    assert _continue(other, PROMPTS[0]) == plain
    other.load_session(tmp_path / "session")
    assert _continue(other, PROMPTS[0], "again") == answer


def test_a_session_without_adapters_is_written_as_ever(decoder, tmp_path):
    model = CompiledModelForCausalLM.from_pretrained(decoder)
    _continue(model, PROMPTS[0])
    model.save_session(tmp_path / "session")
    assert b"adapters" not in (tmp_path / "session").read_bytes()


def test_sessions_share_adapters_and_not_caches(model):
    answer = _continue(model, PROMPTS[0], "a")
    other = model.new_session()
    assert other.adapters == model.adapters
    assert _continue(other, PROMPTS[0]) == _continue(model, PROMPTS[0]) != answer
    assert _continue(other, PROMPTS[0], "a") == answer
    other.unload_adapter("b")
    assert list(model.adapters) == ["a"]


def test_a_session_of_ones_own_begins_without_adapters(model):
    expected = model([PROMPTS[0]]).logits[0, -1]
    _continue(model, PROMPTS[0], "a")
    logits = model.session().prefill([np.array(PROMPTS[0])])[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_not_unloaded_below_a_stream(model, adapter):
    stream = model.stream([PROMPTS[0]], max_new_tokens=8, eos_token_id=[], adapter="a")
    next(stream)
    model.unload_adapter("a")
    model.load_adapter("a", adapter(seed=4))
    with pytest.raises(InputError, match="'a' was unloaded while a call was using it"):
        list(stream)
    assert _continue(model, PROMPTS[0], "a")


# ---------------------------------------------------------------- other ways to generate


def test_beams_guidance_and_streams_have_the_adapter(pair, model, slotted, adapter):
    merged = slotted()
    # The only adapter there is, from an empty cache: what a way to generate forgets, it forgets in both or in none.
    merged.load_adapter("only", adapter())
    for options in ({"guidance_scale": 1.5}, {"prompt_lookup_num_tokens": 4}):
        model.reset(), merged.reset()
        _continue(model, PROMPTS[0])
        found = _continue(model, PROMPTS[0], "a", **options)
        assert found == _continue(merged, PROMPTS[0], "only", **options) != _continue(model, PROMPTS[0], **options)
    streamed = list(model.stream([PROMPTS[0]], max_new_tokens=6, eos_token_id=[], adapter="a"))
    assert streamed == _continue(model, PROMPTS[0], "a")
    assert _continue(model, PROMPTS[0], "a", assistant_model=merged) == streamed
    beams = _continue(pair, PROMPTS[0], "a", num_beams=2)
    pair.reset()
    pair.unload_adapter("b")
    assert beams == _continue(pair, PROMPTS[0], "a", num_beams=2) != _continue(pair, PROMPTS[0], num_beams=2)


def test_guidance_leads_away_from_the_adapted_model(checkpoint, adapter, model):
    asked = {"max_new_tokens": 6, "guidance_scale": 1.5, "eos_token_id": [], "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([PROMPTS[0]])
    eager = made.open_adapted(checkpoint("llama"), CAUSAL, adapter())
    expected = eager.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)[0, ids.shape[1] :].tolist()
    assert _continue(model, PROMPTS[0], "a", guidance_scale=1.5) == expected


def test_a_pipeline_takes_an_adapter_for_each_input(pair):
    texts = ["Water boils at", "The capital of", "Water boils at"]
    ask = pipeline("text-generation", pair)
    found = ask(texts, adapter=["a", None, "b"], max_new_tokens=4)
    alone = [ask(text, adapter=name, max_new_tokens=4) for text, name in zip(texts, ["a", None, "b"], strict=True)]
    assert found == alone
    assert found[0] != found[2]


# ---------------------------------------------------------------- refusals at run time


def _without(part):
    return lambda held: {name: value for name, value in held.items() if part not in name}


def _with(name, tensor):
    return lambda held: {**held, f"base_model.model.{name}": tensor}


Q = "model.layers.0.self_attn.q_proj"
REFUSED = {
    "kind": ({"peft_type": "LOHA"}, None, "its peft_type is 'LOHA'.*export the model with lora= to merge"),
    "dora": ({"use_dora": True}, None, "it is DoRA"),
    "task": ({"task_type": "SEQ_CLS"}, None, "trained for SEQ_CLS"),
    "bias": ({"bias": "all"}, None, "it replaces biases \\(bias='all'\\)"),
    "whole": ({"modules_to_save": ["lm_head"]}, None, "replaces weights as a whole \\(modules_to_save"),
    "start": ({"init_lora_weights": "pissa"}, None, "trained from init_lora_weights='pissa'"),
    "new": ({"use_more": True}, None, "it has use_more=True"),
    "rank": ({"r": 5}, None, "lora_A \\[4, [0-9]+\\] and lora_B .* for .*where its adapter_config.json says rank 5"),
    "alpha": ({"lora_alpha": -1}, None, "lora_alpha of .* is -1"),
    "pattern": ({"rank_pattern": {"(": 4}}, None, "its rank_pattern is none"),
    "half": ({}, _without("lora_B"), "lacks lora_B of model.layers.0"),
    "empty": ({}, lambda held: {}, "holds no tensors"),
    "nan": ({}, lambda held: {**held, f"base_model.model.{Q}.lora_A.weight": torch.full((4, 64), float("nan"))},
            "holds NaN or infinity: 256 of 256 numbers of base_model.model.model.layers.0.self_attn.q_proj.lora_A"),
    "whole numbers": ({}, _with(f"{Q}.lora_A.weight", torch.ones(4, 64, dtype=torch.int32)), "as int32 \\[4, 64\\]"),
    "embedding": ({}, _with("model.embed_tokens.lora_embedding_A", torch.ones(4, 8)), "is no LoRA of a linear layer"),
    "target": ({}, lambda held: {**held, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64),
                                 "base_model.model.lm_head.lora_B.weight": torch.ones(320, 4)},
               "changes lm_head, which was compiled without slots. Those with slots are: \\*.q_proj, .*lora_targets="),
    "shape": ({}, _with(f"{Q}.lora_A.weight", torch.ones(4, 32)), "from 32 to 64 numbers, and that of this model is "
              "from 64 to 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_into_a_slot_is_refused(model, own, name):
    changes, change, message = REFUSED[name]
    path = own(change or (lambda held: held), **changes)
    model.unload_adapter("b")
    with pytest.raises(InputError, match=message) as caught:
        model.load_adapter("c", path)
    assert str(path) in str(caught.value)
    assert list(model.adapters) == ["a"]


def test_larger_ranks_than_compiled_are_refused(slotted, adapter):
    with pytest.raises(InputError, match=r"has rank 7 for .* slots hold ranks up to 6. Export .* lora_rank=7"):
        slotted().load_adapter("a", adapter(r=7))


def test_files_that_are_none_are_refused(model, own, tmp_path):
    model.unload_adapter("b")

    def refusal(path):
        with pytest.raises(InputError) as caught:
            model.load_adapter("c", path)
        return str(caught.value)

    assert "there is no adapter_config.json in it" in refusal(tmp_path / "nowhere")
    path = own()
    (path / "adapter_model.safetensors").write_bytes(b"\1" * 50)
    assert "cannot be read" in refusal(path)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    assert "is pickled (adapter_model.bin), which can run any code. Save it as safetensors" in refusal(path)
    (path / "adapter_model.bin").unlink()
    assert "has no weights" in refusal(path)
    (path / "adapter_config.json").write_text("{")
    assert "cannot be read" in refusal(path)


def test_names_and_numbers_of_adapters_are_checked(model, pair, adapter, decoder):
    for call, message in [
        (lambda: model.load_adapter("a", adapter()), "'a' is loaded already: model.unload_adapter"),
        (
            lambda: model.load_adapter("c", adapter()),
            r"for 2 adapters at once, and loaded are: 'a', 'b'. model.unload_",
        ),
        (lambda: model.load_adapter("", adapter()), "name is a text, not ''"),
        (lambda: model.unload_adapter("c"), "No adapter 'c' is loaded. Loaded are: 'a', 'b'"),
        (lambda: _continue(model, PROMPTS[0], "aa"), "No adapter 'aa' is loaded. Did you mean 'a'?"),
        (lambda: _continue(model, PROMPTS[0], 3), "must be a name, None, or a list of these, not 3"),
        (lambda: _continue(pair, PROMPTS[0], ["a", "b"]), "adapter has 2 names, and there are 1 rows"),
        (lambda: pair.logits_at([PROMPTS[0]], [[0]], adapter=[None, "a"]), "adapter has 2 names"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    plain = CompiledModelForCausalLM.from_pretrained(decoder)
    assert plain.adapters == {}
    for call in (lambda: plain.load_adapter("a", adapter()), lambda: _continue(plain, PROMPTS[0], "a")):
        with pytest.raises(InputError, match=r"compiled without slots for adapters. Export it with lora_slots=1"):
            call()


def test_an_adapter_of_another_base_model_is_refused(slotted, own):
    path, model = own(base_model_name_or_path="user/other"), slotted()
    # Both have to be names on the Hub, by which a checkpoint on this machine is not known.
    model.load_adapter("local", path)
    source = msgspec.structs.replace(model.artifact.contract.source, model="user/model", revision="0" * 40)
    contract = msgspec.structs.replace(model.artifact.contract, source=source)
    object.__setattr__(model.artifact, "contract", contract)
    with pytest.raises(InputError, match=r"trained on user/other, and this model is user/model.*force_base=True"):
        model.load_adapter("c", path)
    model.load_adapter("c", path, force_base=True)


def test_a_larger_model_and_the_card_have_the_slots(model):
    with pytest.raises(InputError, match=r"precast export .* --lora-slots 2 --lora-rank 6 -o OUT"):
        _continue(model, list(range(3, 53)))
    card = (model.artifact.path / "README.md").read_text("utf-8")
    assert "| LoRA adapters | 2 at once, of ranks up to 6, for 7 layers: `model.load_adapter(name, path)` |" in card


def test_memory_that_is_not_there_is_said(slotted, adapter, monkeypatch):
    monkeypatch.setattr(slots_of, "available_bytes", lambda: 1000)
    with pytest.raises(OutOfMemoryError, match=r"takes 0 MB in its slot \(float32, rank 6\), and 0 MB .* lora_rank"):
        slotted().load_adapter("a", adapter())


# ---------------------------------------------------------------- export

OPTIONS = [
    ({"lora_slots": 2}, "needs the largest rank"),
    ({"lora_slots": -1, "lora_rank": 4}, "lora_slots must be a whole number from 1, not -1"),
    ({"lora_slots": 1, "lora_rank": 0}, "lora_rank must be a whole number from 1, not 0"),
    ({"lora_rank": 4}, "lora_rank say which adapters fit into slots; give lora_slots="),
    (
        {**SLOTS, "backend": "neuron", "instance_type": "trn1"},
        "backend='neuron'.*Backends that take it: onnx, aoti, exp",
    ),
    ({**SLOTS, "backend": "aoti", "device": "cuda"}, "lora_slots=2 cannot be combined with device='cuda'"),
    ({**SLOTS, "backend": "aoti", "dtype": "bfloat16"}, "cannot be combined with dtype='bfloat16'"),
    ({**SLOTS, "prefix_tuning": "x"}, "cannot be combined with prefix_tuning='x'"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[str(index) for index in range(len(OPTIONS))])
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ExportOptions(**options).check()


def test_targets_are_named_by_patterns(checkpoint, artifact, adapter, tmp_path):
    def export_with(*patterns, source="llama", **options):
        given = ExportOptions(**SLOTS, lora_targets=patterns, sequence_length=(48,), validate=False, **options)
        return export(str(source if isinstance(source, Path) else checkpoint(source)), tmp_path / "out", given)

    with pytest.raises(UsageError, match=r"lora_targets='\*.query' matches no layer. Layers are called model.layers.0"):
        export_with("*.query")
    with pytest.raises(UsageError, match=r"lora_slots=2 are for decoders"):
        export_with(source=checkpoint("bert", "AutoModel"), task="feature-extraction")
    found = read_artifact(artifact(checkpoint("llama"), **SLOTS, lora_targets=("*.q_proj", "lm_head")))
    assert [each.module for each in found.contract.lora.targets] == [Q, "lm_head"]
    model = CompiledModelForCausalLM.from_pretrained(found.path)
    path = shutil.copytree(adapter(target_modules=["lm_head"]), tmp_path / "head")
    with pytest.raises(InputError, match=r"holds base_model.model.lm_head.base_layer.weight, which is no LoRA"):
        model.load_adapter("head", path)
    tensors = load_file(path / "adapter_model.safetensors")
    save_file(_without("base_layer")(tensors), path / "adapter_model.safetensors")
    model.load_adapter("head", path)
    expected = _expected(checkpoint("llama"), path, PROMPTS[0])
    np.testing.assert_allclose(model([PROMPTS[0]], adapter="head").logits[0], expected, rtol=1e-5, atol=1e-4)


def test_a_layer_that_is_read_and_not_called_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(lora_slots, "_add_adapter", lambda called, name, *rest: rest[-1])
    with pytest.raises(
        ExportError, match=r"multiplies by the weight of model.layers.0.self_attn.q_proj without calling"
    ):
        export(str(checkpoint("llama")), tmp_path / "out", ExportOptions(**SLOTS, sequence_length=(48,)))


def test_an_export_whose_slots_are_mixed_up_fails(checkpoint, tmp_path, monkeypatch):
    add = lora_slots._add_adapter

    def wrong(called, name, weights, slots, *rest):
        return add(called, name, weights, slots.flip(0), *rest)

    monkeypatch.setattr(lora_slots, "_add_adapter", wrong)
    with pytest.raises(AccuracyError, match="with an adapter"):
        export(str(checkpoint("llama")), tmp_path / "out", ExportOptions(**SLOTS, batch_size=2, sequence_length=(48,)))


def test_an_artifact_is_validated_with_an_adapter(checkpoint, artifact):
    path = artifact(checkpoint("llama"), **SLOTS)
    found = validate_again(path, str(checkpoint("llama")), ExportOptions(), keep=False)
    assert (found.status, found.figures["max_abs_difference"] < 1e-4) == ("passed", True)


@pytest.mark.parametrize("change", [{"slots": 3}, {"rank": 5}, {"slots": 0}])
def test_a_contract_whose_slots_are_not_those_of_its_graphs_is_refused(checkpoint, artifact, tmp_path, change):
    found = read_artifact(artifact(checkpoint("llama"), **SLOTS))
    lora = msgspec.structs.replace(found.contract.lora, **change)
    (tmp_path / "config.json").write_bytes(
        render_config(found.config, msgspec.structs.replace(found.contract, lora=lora))
    )
    with pytest.raises(FormatError, match=r"graph 'model' (lacks the input lora\.|has 0 slots)"):
        read_artifact(tmp_path)
