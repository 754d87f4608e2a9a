"""Prefixes before every prompt: a text's own keys and values are that text, and PEFT's and PaddleNLP's are as there."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from prefixes import save_prefix
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache
from zoo import decoders as zoo

from precast.exporter import ExportOptions, export, preview, validate_again
from precast.exporter.eager.model import open_eager
from precast.runtime import CompiledModelForCausalLM
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.publish import copy_artifact, hash_files, write_config
from precast.runtime.errors import CheckpointError, FormatError, InputError, UsageError
from precast.runtime.generation import given_prefix
from precast.runtime.generation.prefix import as_dtype
from precast.runtime.generation.session import Session
from precast.runtime.models import causal_lm

TEXT = [7, 21, 300, 9, 45, 12]
CAPACITY, ROOM = 40, 40 - len(TEXT)
ROWS = [[5, 9, 30, 7, 200], [80], [11, 12, 13, 14, 15, 16, 17, 18, 19]]
GREEDY = {"do_sample": False, "eos_token_id": []}
slow = pytest.mark.slow
tokens = st.integers(3, 319)
some = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def text_keys(source, ids):
    """The keys and values of a text, [layers, 2, heads, length, width]."""
    with torch.inference_mode():
        cache = oracle.eager(source)(input_ids=torch.tensor([ids]), cache=DynamicCache(), use_cache=True).cache
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]).clone()


@pytest.fixture(scope="module")
def made(checkpoint, artifact, tmp_path_factory):
    """`made("llama", batch_size=3)`: a checkpoint, and its artifact after the keys and values of TEXT."""

    def make(model_type="llama", text=TEXT, **options):
        source = checkpoint(model_type, num_hidden_layers=2)
        adapter = save_prefix(tmp_path_factory.getbasetemp() / f"prefix-{model_type}-{len(text)}",
                               text_keys(source, text))  # fmt: skip
        compiled = artifact(source, sequence_length=(CAPACITY,), prefix_tuning=str(adapter), **options)
        return SimpleNamespace(source=source, path=compiled, adapter=adapter)

    return make


@pytest.fixture(scope="module")
def llama(made):
    """Batch 1, compared with the eager model when it was exported."""
    found = made(validate=True)
    found.model = CompiledModelForCausalLM.from_pretrained(found.path)
    return found


def after(source, row, count, text=TEXT):
    """What the eager model appends to the text and the row."""
    return oracle.greedy(source, [*text, *row], max_new_tokens=count, eos_token_id=None)


def answers(model, rows, count, side="right", **options):
    ids, mask = oracle.padded(rows, side)
    found = model.generate(ids, mask, max_new_tokens=count, **GREEDY, **options)
    return found[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("model_type", "backend", "batch"),
    [
        # Grouped heads.
        ("llama", "onnx", 3),
        *(
            pytest.param(*each, marks=slow)
            for each in (
                ("llama", "onnx", 1), ("llama", "export", 1), ("llama", "export", 3), ("llama", "aoti", 1),
                ("llama", "aoti", 3),
                ("gpt2", "onnx", 1), ("gpt2", "onnx", 3), ("gptj", "onnx", 1),
                # Windows that are shorter than prefix and prompt.
                ("mistral", "onnx", 1), ("mistral", "onnx", 3), ("gemma2", "onnx", 3),
            )
        ),
    ],
)  # fmt: skip
def test_the_keys_of_a_text_are_that_text(made, model_type, backend, batch):
    """Two requests in a row, padded on either side: no one of them takes from the prefix."""
    it = made(model_type, backend=backend, batch_size=batch)
    model = CompiledModelForCausalLM.from_pretrained(it.path)
    for side in ("left", "right", "middle"):
        rows = ROWS[:batch] if side != "right" else ROWS[-batch:]
        assert answers(model, rows, 12, side) == [after(it.source, row, 12) for row in rows]
    ids, mask = oracle.padded(rows, "left")
    for row, values, keep in zip(rows, model(ids, mask).logits, mask, strict=True):
        expected = oracle.logits(it.source, [*TEXT, *row])[len(TEXT) :]
        assert np.abs(values[keep == 1] - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


@some
@given(first=st.lists(tokens, min_size=1, max_size=20), more=st.lists(tokens, max_size=6))
def test_turns_of_a_chat_keep_the_prefix(llama, first, more):
    """What the caches hold of an earlier turn is used again, and the prefix lies before it as it did."""
    llama.model.reset()
    for row in (first, [*first, *more]):
        assert answers(llama.model, [row], 5) == [after(llama.source, row, 5)]
    other = llama.model.new_session()
    assert answers(other, [first], 5, prompt_lookup_num_tokens=3) == [after(llama.source, first, 5)]


@pytest.mark.parametrize("batch", [1, 3])
@slow
def test_static_graphs_take_prompts_of_any_length(made, batch):
    it = made(batch_size=batch, prefill_lengths=(4, 16))
    model = CompiledModelForCausalLM.from_pretrained(it.path)
    for length in (1, 4, 5, 21):
        rows = [[(7 * n + length + row) % 300 + 3 for n in range(length)] for row in range(batch)]
        assert answers(model, rows, 6, "left") == [after(it.source, row, 6) for row in rows]
        expected = oracle.logits(it.source, [*TEXT, *rows[0]])[len(TEXT) :]
        assert np.abs(model(np.array(rows)).logits[0] - expected).max() < 1e-4 * max(1, np.abs(expected).max())


def test_beams_move_rows_after_the_prefix(made):
    it = made(batch_size=3)
    model = CompiledModelForCausalLM.from_pretrained(it.path)
    with torch.inference_mode():
        whole = oracle.eager(it.source).generate(
            torch.tensor([[*TEXT, *ROWS[0]]]), num_beams=3, max_new_tokens=8, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    assert answers(model, ROWS[:1], 8, num_beams=3) == [whole[0, len(TEXT) + len(ROWS[0]) :].tolist()]


def test_the_prefix_takes_of_the_capacity_and_is_never_written_to(llama):
    before = {name: cache[:, :, : len(TEXT)].copy() for name, cache in llama.model._session._caches.items()}
    assert (llama.model.capacity, llama.model.prefix_length) == (ROOM, len(TEXT))
    row = [(7 * n) % 300 + 3 for n in range(ROOM - 6)]
    assert answers(llama.model, [row], 6) == [after(llama.source, row, 6)]
    with pytest.raises(InputError) as caught:
        llama.model.generate(np.array([row]), max_new_tokens=7)
    for part in (
        f"{ROOM - 6} prompt tokens and 7 new ones, {ROOM + 1} together,",
        f"of {CAPACITY}, of which a prefix takes {len(TEXT)}.",
        "max_new_tokens=6 at most",
        f"--sequence-length {CAPACITY + 1} --prefix-tuning PREFIX",
    ):
        assert part in str(caught.value)
    with pytest.raises(InputError, match=f"{ROOM + 1} tokens do not fit"):
        llama.model(np.array([[5] * (ROOM + 1)]))
    llama.model.reset()
    for name, cache in llama.model._session._caches.items():
        assert np.array_equal(cache[:, :, : len(TEXT)], before[name])
        assert before[name].any()


def test_another_prefix_has_another_answer(made, llama):
    """A wrong position, and a single wrong vector of one."""
    other = CompiledModelForCausalLM.from_pretrained(made(text=TEXT[1:]).path)
    expected = after(llama.source, ROWS[0], 12)
    assert answers(other, ROWS[:1], 12) == [after(llama.source, ROWS[0], 12, TEXT[1:])] != [expected]
    damaged = llama.model.new_session()
    damaged.reset()
    damaged._session._caches["past_key_values.1.value"][0, :, 2] += 3
    assert answers(damaged, ROWS[:1], 12) != [expected]


def test_a_saved_session_is_of_one_prefix(made, llama, tmp_path):
    file = tmp_path / "a.session"
    llama.model.reset()
    answers(llama.model, ROWS[:1], 4)
    llama.model.save_session(file)
    fresh = CompiledModelForCausalLM.from_pretrained(llama.path)
    assert fresh.load_session(file) == len(ROWS[0]) + 3
    more = [*ROWS[0], 44, 45]
    assert answers(fresh, [more], 6) == [after(llama.source, more, 6)]
    other = CompiledModelForCausalLM.from_pretrained(made(text=TEXT[1:]).path)
    with pytest.raises(InputError, match="of another model"):
        other.load_session(file)


# PEFT


def peft_greedy(model, row, count):
    """Token by token without a cache. (peft 0.21's generate() hands its prefix over by a name that transformers 5.24
    has given up, and loses it.)"""
    ids = list(row)
    with torch.inference_mode():
        for _ in range(count):
            found = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
            ids.append(int(found.logits[0, -1].argmax()))
    return ids[len(row) :]


@pytest.fixture(scope="module")
def tuned(checkpoint, tmp_path_factory):
    """`tuned("llama", "P_TUNING")`: a checkpoint, a random adapter that peft has saved, and peft's model."""
    peft = pytest.importorskip("peft")
    configs = {
        "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5,
                                                         prefix_projection=True, encoder_hidden_size=16),
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3,
                                                     encoder_hidden_size=16),
    }  # fmt: skip

    def make(model_type, kind):
        # peft goes by num_key_value_heads in a GPT-2's configuration, too, where it says nothing.
        source = checkpoint(model_type, **({"num_key_value_heads": 4} if model_type == "gpt2" else {}))
        folder = tmp_path_factory.getbasetemp() / f"{kind}-{model_type}"
        base = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
        torch.manual_seed(3)
        model = peft.get_peft_model(base, configs[kind]())
        for parameter in model.prompt_encoder.parameters():
            parameter.data.normal_(0, 0.7)
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
        return source, folder, peft.PeftModel.from_pretrained(loaded, folder).eval()

    return make


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("llama", "PREFIX_TUNING"),
        ("gpt2", "PROMPT_TUNING"),
        *(
            pytest.param(*each, marks=slow)
            for each in (("gpt2", "PREFIX_TUNING"), ("llama", "PROMPT_TUNING"), ("llama", "P_TUNING"))
        ),
    ],
)
def test_adapters_of_peft_answer_as_there(tuned, artifact, model_type, kind):
    source, folder, expected = tuned(model_type, kind)
    compiled = artifact(source, sequence_length=(CAPACITY,), prefix_tuning=str(folder), batch_size=3)
    model = CompiledModelForCausalLM.from_pretrained(compiled)
    for _ in range(2):
        assert answers(model, ROWS, 8, "left") == [peft_greedy(expected, row, 8) for row in ROWS]
    if kind == "PREFIX_TUNING":
        plain = CompiledModelForCausalLM.from_pretrained(artifact(source, batch_size=3))
        assert answers(plain, ROWS, 8, "left", prefix=folder) == answers(model, ROWS, 8, "left")
    assert answers(model, ROWS[:1], 8) != [oracle.greedy(source, ROWS[0], max_new_tokens=8)]


# PaddleNLP


def zero_greedy(source, tensor, row, count):
    """Token by token after a prefix, the first of them at position 0."""
    model, cache, new, found = oracle.eager(source), DynamicCache(), row, []
    for layer, (keys, values) in enumerate(tensor):
        cache.update(keys[None], values[None], layer)
    with torch.inference_mode():
        for _ in range(count):
            first = cache.get_seq_length() - tensor.shape[3]
            positions = torch.arange(first, first + len(new))[None]
            logits = model(input_ids=torch.tensor([new]), cache=cache, position_ids=positions, use_cache=True).logits
            new = [int(logits[0, -1].argmax())]
            found += new
    return found


@pytest.mark.parametrize(
    ("model_type", "backend"),
    [("llama", "onnx"), *(pytest.param(*each, marks=slow) for each in (("gpt2", "onnx"), ("llama", "export")))],
)
def test_after_pre_caches_positions_begin_at_zero(checkpoint, artifact, tmp_path, model_type, backend):
    source = checkpoint(model_type, num_hidden_layers=2)
    tensor = text_keys(source, TEXT)
    np.save(tmp_path / "pre_caches.npy", tensor.numpy())
    options = {"sequence_length": (CAPACITY,), "batch_size": 3, "backend": backend, "prefix_tuning": str(tmp_path)}
    model = CompiledModelForCausalLM.from_pretrained(artifact(source, **options))
    assert model.artifact.contract.prefix.positions == "from-zero"
    assert answers(model, ROWS, 8, "left") == [zero_greedy(source, tensor, row, 8) for row in ROWS]
    assert zero_greedy(source, tensor, ROWS[0], 8) != after(source, ROWS[0], 8)
    full = [(7 * n) % 300 + 3 for n in range(ROOM - 4)]
    assert answers(model, [full], 4) == [zero_greedy(source, tensor, full, 4)]


# What an export makes of it


def test_an_export_compares_with_the_eager_model_after_the_prefix(llama):
    contract = llama.model.artifact.contract
    assert contract.variants[0].accuracy.status == "passed"
    prefix = contract.prefix
    assert (prefix.length, prefix.method, prefix.positions) == (len(TEXT), "prefix-tuning", "after")
    assert prefix.file in contract.files
    with pytest.raises(UsageError, match="compiled with a prefix"):
        open_eager(llama.path, checkpoint=str(llama.source))


@slow
def test_several_variants_have_one_prefix(made, tmp_path):
    it = made()
    found = export(str(it.source), tmp_path / "out", sequence_length=CAPACITY, prefix_tuning=str(it.adapter),
                   also=("export",))  # fmt: skip
    assert [each.accuracy.status for each in found.contract.variants] == ["passed", "passed"]
    for variant in ("onnx", "export"):
        model = CompiledModelForCausalLM.from_pretrained(found.path, variant=variant)
        assert answers(model, ROWS[:1], 8) == [after(it.source, ROWS[0], 8)]
    assert validate_again(found.path, str(it.source), ExportOptions(), keep=False).status == "passed"


@slow
@pytest.mark.parametrize("options", [{"kv_cache": "float16"}, {"dtype": "bfloat16"}], ids=["float16", "bfloat16"])
def test_caches_of_less_than_float32_hold_it_rounded(made, tmp_path, options):
    it = made()
    found = export(str(it.source), tmp_path / "out", sequence_length=CAPACITY, prefix_tuning=str(it.adapter),
                   backend="export", **options)  # fmt: skip
    assert found.contract.variants[0].accuracy.status == "passed"
    model = CompiledModelForCausalLM.from_pretrained(found.path)
    dtype = getattr(torch, model.variant.graphs[0].cache[0].dtype)
    assert dtype != torch.float32
    expected = text_keys(it.source, TEXT)[0, 0].to(dtype).view(torch.uint16).numpy()
    held = model._session._caches["past_key_values.0.key"][0, :, : len(TEXT)]
    assert np.array_equal(held.view(np.uint16), expected)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_values_are_rounded_as_torch_rounds(values):
    given = np.array(values, np.float32)
    for dtype in (torch.bfloat16, torch.float16):
        expected = torch.from_numpy(given).to(dtype).view(torch.uint16).numpy()
        with np.errstate(over="ignore"):
            assert as_dtype(given, str(dtype).removeprefix("torch.")).view(np.uint16).tolist() == expected.tolist()


def test_a_file_that_does_not_fit_the_caches_is_no_prefix(llama, tmp_path):
    copy_artifact(read_artifact(llama.path), tmp_path / "copy", force=False)
    artifact = read_artifact(tmp_path / "copy")
    held = load_file(artifact.path / "prefix.safetensors")
    for damaged in (
        {name: tensor[:, 1:].contiguous() for name, tensor in held.items()},
        {name: tensor.half() for name, tensor in held.items()},
        dict(list(held.items())[1:]),
    ):
        save_file(damaged, artifact.path / "prefix.safetensors")
        write_config(artifact.path, artifact.config, replace(artifact.contract, files=hash_files(artifact.path)))
        with pytest.raises(FormatError, match="does not hold the keys and values of a prefix of 6 positions"):
            CompiledModelForCausalLM.from_pretrained(artifact.path)
    told = replace(artifact.contract.prefix, length=CAPACITY)
    write_config(artifact.path, artifact.config, replace(artifact.contract, prefix=told))
    with pytest.raises(FormatError, match=f"the prefix takes {CAPACITY} positions of {CAPACITY}"):
        read_artifact(artifact.path)


# Refusals


def _numbers(*shape):
    return torch.zeros(shape)


def _pickled(folder):
    save_prefix(folder, _numbers(2, 64))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda it: None, CheckpointError, "There is no prefix at .*adapter_config.json.*pre_caches.npy"),
        (_pickled, CheckpointError, "adapter_model.bin is a pickle.*save_pretrained"),
        (lambda it: save_prefix(it, _numbers(0, 128)), CheckpointError, "prefix of 0 positions"),
        (lambda it: save_prefix(it, _numbers(CAPACITY, 128)), UsageError, "has 40 positions and sequence_length=40 "),
        (lambda it: save_prefix(it, _numbers(3, 96)), CheckpointError, r"it holds \[3, 96\], and .* needs \[3, 128\]"),
        (lambda it: save_prefix(it, _numbers(3, 32), "P_TUNING"), CheckpointError, r"\[3, 32\], and .* \[3, 64\]"),
        (lambda it: save_prefix(it, _numbers(3, 128) + torch.inf), CheckpointError, "not finite"),
        (lambda it: save_prefix(it, _numbers(3, 128), "LORA"), CheckpointError, "type LORA, and what can stand"),
        (lambda it: save_prefix(it, _numbers(3, 64), task_type="SEQ_CLS"), CheckpointError, "was tuned for SEQ_CLS"),
        (lambda it: np.save(it / "pre_caches.npy", np.zeros((2, 2, 3))), CheckpointError, r"holds float64 \[2, 2, 3\]"),
        (lambda it: np.save(it / "pre_caches.npy", np.array([{}])), CheckpointError, "cannot be read as an array"),
        (lambda it: np.save(it / "pre_caches.npy", np.zeros((2, 2, 3, 4, 16))), CheckpointError,
         r"\[2, 2, 3, 4, 16\], and .* needs \[2, 2, 2, 4, 16\]"),
    ],
    ids=["none", "pickle", "empty", "too long", "sizes", "hidden size", "infinite", "lora", "task", "axes", "objects",
         "heads"],
)  # fmt: skip
def test_what_is_no_prefix_of_this_model_is_refused(checkpoint, tmp_path, make, error, words):
    make(tmp_path)
    with pytest.raises(error, match=words):
        preview(str(checkpoint("llama", num_hidden_layers=2)), sequence_length=CAPACITY, prefix_tuning=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache": "int8"}, "cannot be combined with kv_cache='int8'"),
        ({"backend": "neuron", "instance_type": "trn1"}, "is not for backend='neuron'"),
        ({"backend": "aoti", "device": "cuda"}, "cannot be combined with device='cuda'"),
    ],
    ids=["int8", "neuron", "cuda"],
)
def test_options_without_a_place_for_it_are_refused(llama, options, words):
    with pytest.raises(UsageError, match=words):
        preview(str(llama.source), sequence_length=CAPACITY, prefix_tuning=str(llama.adapter), **options)


def test_models_without_a_place_for_it_are_refused(checkpoint, llama, tmp_path):
    asked = {"sequence_length": CAPACITY, "prefix_tuning": str(llama.adapter)}
    with pytest.raises(UsageError, match="carries states from token to token"):
        preview(str(zoo.make(tmp_path / "mamba", "mamba")), **asked)
    with pytest.raises(UsageError, match="stands before the prompts of decoders"):
        preview(str(checkpoint("bert", "AutoModel")), batch_size=1, **asked)


# Given at run time

WIDE = 48


@pytest.fixture(scope="module")
def plain(llama, artifact):
    """`plain(batch_size=3)`: the model of `llama`, compiled for WIDE tokens without a prefix, as for other tests."""
    return lambda **options: CompiledModelForCausalLM.from_pretrained(artifact(llama.source, **options))


@pytest.fixture(scope="module")
def other(llama, tmp_path_factory):
    """A prefix of the same model, of another text."""
    return save_prefix(tmp_path_factory.mktemp("other") / "prefix", text_keys(llama.source, TEXT[1:]))


@pytest.fixture
def opened(monkeypatch):
    """The prefixes that were read."""
    found = []
    read = given_prefix.open_prefix
    monkeypatch.setattr(causal_lm, "open_prefix", lambda *given: (found.append(given[0]), read(*given))[1])
    return found


@pytest.mark.parametrize("batch", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_prefix_at_run_time_is_as_a_compiled_one(made, plain, batch):
    it, model = made(batch_size=batch), plain(**({"batch_size": batch} if batch > 1 else {}))
    compiled = CompiledModelForCausalLM.from_pretrained(it.path)
    session = model.new_session(prefix=it.adapter)
    assert (session.capacity, session.prefix_length, session.prefix_sha256) == (
        WIDE - len(TEXT), len(TEXT), compiled.artifact.contract.prefix.source_sha256
    )  # fmt: skip
    assert (model.capacity, model.prefix_length, model.prefix_sha256) == (WIDE, 0, None)
    alone = [oracle.greedy(it.source, row, max_new_tokens=6, eos_token_id=None) for row in ROWS[:batch]]
    for side in ("left", "right"):
        expected = answers(compiled, ROWS[:batch], 6, side)
        assert expected == [after(it.source, row, 6) for row in ROWS[:batch]]
        assert answers(session, ROWS[:batch], 6, side) == expected
        assert answers(model, ROWS[:batch], 6, side, prefix=str(it.adapter)) == expected
        assert answers(model, ROWS[:batch], 6, side) == alone
    for options in ({"num_beams": batch}, {"guidance_scale": 1.5}):
        expected = answers(compiled, ROWS[:1], 6, **options)
        assert answers(model, ROWS[:1], 6, prefix=it.adapter, **options) == expected
    ids, mask = oracle.padded(ROWS[:batch], "left")
    np.testing.assert_allclose(session(ids, mask).logits, compiled(ids, mask).logits, rtol=1e-5, atol=1e-6)
    asked = [[0, len(row) - 1][-len(row) :] for row in ROWS[:batch]]
    for found, wanted in zip(session.logits_at(ROWS[:batch], asked), compiled.logits_at(ROWS[:batch], asked),
                             strict=True):  # fmt: skip
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@slow
@pytest.mark.parametrize(
    ("model_type", "backend", "changes"),
    [("llama", "export", {}), ("llama", "aoti", {}), ("gpt2", "onnx", {}), ("mistral", "onnx", {}),
     # Caches have wider heads than the model.
     ("llama", "onnx", {"head_dim": 12})],
    ids=["export", "aoti", "gpt2", "mistral", "narrow"],
)  # fmt: skip
def test_so_it_is_for_others(checkpoint, artifact, tmp_path, model_type, backend, changes):
    source = checkpoint(model_type, num_hidden_layers=2, **changes)
    adapter = save_prefix(tmp_path / "prefix", text_keys(source, TEXT))
    model = CompiledModelForCausalLM.from_pretrained(
        artifact(source, sequence_length=(CAPACITY,), backend=backend, batch_size=3)
    )
    assert answers(model, ROWS, 8, prefix=adapter) == [after(source, row, 8) for row in ROWS]


def test_calls_with_other_prefixes_never_mix(llama, plain, other, opened, tmp_path):
    """Each call begins with the same tokens, which the caches of one before may hold."""
    model, adapter, changed = plain(), str(llama.adapter), tmp_path / "changed"
    first, second = after(llama.source, ROWS[0], 6), after(llama.source, ROWS[0], 6, TEXT[1:])
    alone = oracle.greedy(llama.source, ROWS[0], max_new_tokens=6, eos_token_id=None)
    assert len({tuple(each) for each in (first, second, alone)}) == 3
    ids = np.array(ROWS[:1])
    streams = [model.stream(ids, max_new_tokens=6, **GREEDY), model.stream(ids, prefix=adapter, max_new_tokens=6,
                                                                           **GREEDY)]  # fmt: skip
    begun = [[next(each)] for each in streams]
    for prefix, expected in ((other, second), (adapter, first), (adapter, first), (llama.adapter, first)):
        assert answers(model, ROWS[:1], 6, prefix=prefix) == [expected]
    assert opened == [adapter, other, adapter], "a prefix that is named again is not read again"
    assert [*begun[0], *streams[0]] == alone
    assert [*begun[1], *streams[1]] == first, "its session was not that of the later calls"
    shutil.copytree(llama.adapter, changed)
    assert answers(model, ROWS[:1], 6, prefix=changed) == [first]
    assert len(opened) == 3, "the same file elsewhere"
    shutil.copy(other / "adapter_model.safetensors", changed)
    assert answers(model, ROWS[:1], 6, prefix=changed) == [second]
    assert answers(model, ROWS[:1], 6) == [alone]


def test_a_call_after_a_prefix_goes_by_the_models_settings(llama, plain, fed_lengths):
    model, ids = plain(), np.array(ROWS[:1])
    for count in (2, 3):
        model.generation_config = {"max_new_tokens": count, "eos_token_id": []}
        assert model.generate(ids, prefix=llama.adapter).shape[1] == len(ROWS[0]) + count
    fed_lengths.clear()
    model.generate(ids, prefix=llama.adapter, max_new_tokens=1)
    assert fed_lengths == [1], "what the caches hold is not computed again"
    model.reset()
    model.generate(ids, prefix=llama.adapter, max_new_tokens=1)
    assert fed_lengths == [1, len(ROWS[0])]
    session = model.new_session(prefix=llama.adapter)
    expected = after(llama.source, ROWS[0], 6)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}, {"assistant_model": session}):
        assert answers(model, ROWS[:1], 6, prefix=llama.adapter, **options) == [expected]
        assert answers(session.new_session(), ROWS[:1], 6, **options) == [expected]
    # A prefix changes the guesses, and not what is checked.
    alone = oracle.greedy(llama.source, ROWS[0], max_new_tokens=6, eos_token_id=None)
    assert answers(model, ROWS[:1], 6, assistant_model=session) == [alone]


@pytest.fixture
def fed_lengths(monkeypatch):
    """How many tokens each call computed."""
    counts, run = [], Session._run_call
    monkeypatch.setattr(
        Session, "_run_call", lambda self, call, rows: (counts.append(int(call.new.max())), run(self, call, rows))[1]
    )
    return counts


def test_a_saved_session_opens_after_its_own_prefix_only(llama, plain, other, tmp_path):
    model, file = plain(), tmp_path / "a.session"
    session = model.new_session(prefix=llama.adapter)
    answers(session, ROWS[:1], 4)
    session.save_session(file)
    fresh, more = model.new_session(prefix=llama.adapter), [*ROWS[0], 44, 45]
    assert fresh.load_session(file) == len(ROWS[0]) + 3
    assert answers(fresh, [more], 6) == [after(llama.source, more, 6)]
    held = session.prefix_sha256[:12]
    with pytest.raises(InputError, match=f"after a prefix of sha256 {held}…, and .* no prefix.*new_session"):
        model.load_session(file)
    with pytest.raises(InputError, match=f"after a prefix of sha256 {held}…, and .* with a prefix of sha256"):
        model.new_session(prefix=other).load_session(file)
    answers(model, ROWS[:1], 4)
    model.save_session(file)
    with pytest.raises(InputError, match=r"after no prefix, and .* begin with a prefix of.*without a prefix"):
        session.load_session(file)
    assert answers(session, [more], 6) == [after(llama.source, more, 6)]


def test_what_cannot_stand_before_prompts_at_run_time_is_refused(llama, plain, tmp_path):
    model = plain()
    size = 2 * 2 * 2 * 16

    def holding(folder, **tensors):
        save_file(tensors, save_prefix(folder, _numbers(3, size)) / "adapter_model.safetensors")

    cases = [
        (lambda it: None, "There is no prefix at .*adapter_config.json"),
        (_pickled, "adapter_model.bin is a pickle.*save_pretrained"),
        (lambda it: save_prefix(it, _numbers(0, size)), "prefix of 0 positions"),
        (lambda it: save_prefix(it, _numbers(WIDE, size)),
         rf"has {WIDE} positions, and the model was compiled for {WIDE}, .*--sequence-length {WIDE + 2} "),
        (lambda it: save_prefix(it, _numbers(3, 96)),
         rf"another model: it holds \[3, 96\], and .* needs \[3, {size}\] \(.*2 layers, 2 heads .*, width 16\)"),
        (lambda it: save_prefix(it, _numbers(3, size) + torch.nan), f"NaN or infinity: {3 * size} of {3 * size} num"),
        (lambda it: save_prefix(it, _numbers(3, size), "LORA"), r"of type LORA, .* load_adapter\(\), or is merged"),
        (lambda it: save_prefix(it, _numbers(3, size), task_type="SEQ_CLS"), "was tuned for SEQ_CLS"),
        (lambda it: save_prefix(it, _numbers(3, 64), "PROMPT_TUNING"), "prompt-tuning: .*prefix_tuning=PATH"),
        (lambda it: save_prefix(it, _numbers(3, 64), "P_TUNING"), "p-tuning: .*embeddings.*prefix_tuning=PATH"),
        (lambda it: np.save(it / "pre_caches.npy", np.zeros((2, 2, 2, 4, 16))), "from 0.*prefix_tuning=PATH"),
        (lambda it: holding(it, prompt_embeddings=torch.ones(3, size, dtype=torch.int32)), "embeddings as int32"),
        (lambda it: holding(it, prompt_embeddings=_numbers(3, 2, size)), rf"float32 \[3, 2, {size}\], not a float mat"),
        (lambda it: holding(it, a=_numbers(1)), "has no matrix prompt_embeddings"),
        (lambda it: (save_prefix(it, _numbers(3, size)), (it / "adapter_model.safetensors").write_bytes(b"{}")),
         "cannot be read: .*is not a safetensors file"),
    ]  # fmt: skip
    for number, (make, words) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder)
        with pytest.raises(InputError, match=words):
            model.new_session(prefix=folder)
        with pytest.raises(InputError, match=words):
            model.generate([[5]], prefix=folder)
    with pytest.raises(InputError, match=r"prefix must be the path of .*, not 7"):
        model.generate([[5]], prefix=7)
    with pytest.raises(InputError, match=r"was compiled with a prefix of 6 positions.*compiled without"):
        llama.model.new_session(prefix=llama.adapter)
    row = [(7 * n) % 300 + 3 for n in range(WIDE - 6)]
    with pytest.raises(InputError, match=rf"{WIDE - 5} together, .* capacity of {WIDE}, of which a prefix takes 6"):
        model.generate([row], max_new_tokens=1, prefix=llama.adapter)


def test_models_without_a_place_for_one_at_run_time_are_refused(checkpoint, artifact, tmp_path, monkeypatch):
    """Each is compiled for other tests, too."""
    folder = save_prefix(tmp_path / "prefix", _numbers(3, 64))
    slotted = CompiledModelForCausalLM.from_pretrained(artifact(checkpoint("llama"), lora_slots=2, lora_rank=6))
    adapters = pytest.importorskip("adapters")
    made = adapters.make_adapter(tmp_path / "lora", checkpoint("llama"), "AutoModelForCausalLM",
                                 target_modules=["q_proj"])  # fmt: skip
    slotted.load_adapter("style", made)
    assert slotted.generate([[5]], max_new_tokens=1, prefix=folder).shape == (1, 2)
    for call in (
        lambda: slotted.generate([[5]], max_new_tokens=1, prefix=folder, adapter="style"),
        lambda: slotted.new_session(prefix=folder).logits_at([np.array([5])], [[0]], adapter=["style"]),
    ):
        with pytest.raises(InputError, match=r"adapter=.*'style'.* cannot be combined with a prefix"):
            call()
    codes = CompiledModelForCausalLM.from_pretrained(artifact(checkpoint("llama"), kv_cache="int8"))
    with pytest.raises(InputError, match=r"caches are in int8.*without kv_cache='int8'"):
        codes.new_session(prefix=folder)
    states = CompiledModelForCausalLM.from_pretrained(artifact(zoo.make(tmp_path / "mamba", "mamba")))
    with pytest.raises(InputError, match="carries states from token to token"):
        states.generate([[5]], prefix=folder)
    graph = slotted.variant.graphs[0]
    halved = replace(graph, cache=[replace(each, dtype="float16") for each in graph.cache])
    large = save_prefix(tmp_path / "large", _numbers(3, 64) + 7e4)
    with pytest.raises(InputError, match=r"numbers up to 70000, .* in float16, which ends at 65504"):
        given_prefix.open_prefix(large, slotted.artifact, halved, slotted._engine)
    monkeypatch.setattr(given_prefix, "owns_caches", lambda engine: True)
    with pytest.raises(InputError, match=r"memory of a device\. Open the model on the CPU"):
        slotted.new_session(prefix=folder)
