"""Sentence embeddings are sentence-transformers', whatever the padding; the oracle pools unpadded rows by hand."""

from __future__ import annotations

import json
import shutil

import numpy as np
import oracle
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from zoo.shrink import tiny_config

from precast.exporter import ExportOptions, export
from precast.exporter.checkpoint.resolve import resolve
from precast.runtime import CompiledModel, pipeline
from precast.runtime.artifact.tasks import get_task
from precast.runtime.errors import CheckpointError

ROOT = "sentence_transformers.models."
WAYS = {
    "cls_token": lambda states: states[0],
    "max_tokens": lambda states: states.max(0),
    "mean_tokens": lambda states: states.mean(0),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / np.sqrt(len(states)),
    "weightedmean_tokens": lambda states: np.average(states, 0, np.arange(1, len(states) + 1)),
    "lasttoken": lambda states: states[-1],
}


def _with_modules(source, target, kinds, pooling=()):
    shutil.copytree(source, target)
    modules = [{"idx": 0, "name": "0", "path": "", "type": ROOT + "Transformer"}]
    for index, kind in enumerate(kinds, 1):
        folder = target / f"{index}_{kind}"
        folder.mkdir()
        modules.append({"idx": index, "name": str(index), "path": folder.name, "type": ROOT + kind})
        if kind == "Pooling":
            config = {f"pooling_mode_{way}": way in pooling for way in WAYS}
            (folder / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **config}))
        if kind == "LayerNorm":
            (folder / "config.json").write_text('{"dimension": 64}')
            save_file(
                {"norm.weight": torch.arange(64) / 64, "norm.bias": torch.ones(64) / 7}, folder / "model.safetensors"
            )
        if kind == "Dense":
            generator = torch.Generator().manual_seed(1)
            width = 64 * len(pooling)
            config = {"in_features": width, "out_features": 12, "bias": True}
            (folder / "config.json").write_text(
                json.dumps({**config, "activation_function": "torch.nn.modules.activation.Tanh"})
            )
            weights = {
                "linear.weight": torch.randn(12, width, generator=generator) / 8,
                "linear.bias": torch.ones(12) / 9,
            }
            save_file(weights, folder / "model.safetensors")
    (target / "modules.json").write_text(json.dumps(modules))
    return target


PROMPTS = {"prompts": {"query": "Find: ", "x": ""}, "default_prompt_name": "query", "similarity_fn_name": "dot"}


@pytest.fixture(scope="module")
def sentences(checkpoint, tmp_path_factory):
    source = checkpoint("bert", "AutoModel")
    folder = tmp_path_factory.mktemp("sentences")
    made = _with_modules(source, folder / "source", ["Pooling", "Dropout", "Dense", "Normalize"], tuple(WAYS))
    (made / "sentence_roberta_config.json").write_text(json.dumps({"max_seq_length": 9, "do_lower_case": True}))
    (made / "config_sentence_transformers.json").write_text(json.dumps(PROMPTS | {"__version__": {}}))
    options = ExportOptions(batch_size=2, sequence_length=(24,), dynamic_batch_size=True)
    artifact = export(str(made), folder / "out", options)
    assert artifact.contract.variants[0].accuracy.status == "passed"
    return source, made, CompiledModel.from_pretrained(artifact.path)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(st.integers(3, 300), min_size=1, max_size=24), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
)
def test_all_ways_of_pooling_then_dense_then_normalize(sentences, rows, side):
    source, made, model = sentences
    ids, mask = oracle.padded(rows, side)
    output = model(ids, mask)
    assert list(output) == ["last_hidden_state", "sentence_embedding"]
    assert output.sentence_embedding.shape == (len(rows), 12)
    with torch.inference_mode():
        for row, found in zip(rows, output.sentence_embedding, strict=True):
            states = oracle.eager(source, "AutoModel")(torch.tensor([row])).last_hidden_state[0].numpy()
            pooled = np.concatenate([pool(states) for pool in WAYS.values()])
            assert np.abs(found - _dense(made, pooled)).max() < 1e-5


def _dense(made, pooled):
    from safetensors.numpy import load_file

    weights = load_file(made / "3_Dense" / "model.safetensors")
    vector = np.tanh(weights["linear.weight"] @ pooled + weights["linear.bias"])
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("names", ["T5EncoderModel", "T5ForConditionalGeneration"])
def test_the_encoder_of_an_encoder_decoder_embeds_alone(tmp_path, names):
    """Sentence-T5 and GTR are published as T5's encoder; the whole of T5 has one, too, and embeds when asked to."""
    torch.manual_seed(0)
    config = tiny_config("t5", {"d_kv": 16})
    getattr(transformers, names)(config).save_pretrained(tmp_path / "source")
    options = ExportOptions(
        task=None if names == "T5EncoderModel" else "feature-extraction", batch_size=2, sequence_length=(8,)
    )
    model = CompiledModel.from_pretrained(export(str(tmp_path / "source"), tmp_path / "out", options).path)
    assert model.task == "feature-extraction"
    ids, mask = oracle.padded([[5, 6, 7], [9, 11, 12, 13, 2]], "left")
    found = model(ids, mask).last_hidden_state
    with torch.inference_mode():
        theirs = oracle.eager(tmp_path / "source", "T5EncoderModel")
        for row, values, keep in zip(ids, found, mask, strict=True):
            expected = theirs(torch.from_numpy(row[keep == 1])[None]).last_hidden_state[0].numpy()
            assert np.abs(values[keep == 1] - expected).max() < 1e-5


def test_the_hash_of_the_weights_covers_every_module(sentences, checkpoint):
    source, _, model = sentences
    plain = resolve(str(source), ExportOptions()).weights_sha256()
    assert model.artifact.contract.source.weights_sha256 != plain


def test_other_modules_are_refused_by_name(checkpoint, tmp_path):
    made = _with_modules(checkpoint("bert", "AutoModel"), tmp_path / "source", ["Pooling", "CNN"], ("mean_tokens",))
    with pytest.raises(CheckpointError, match="a module of the kind CNN; precast knows Transformer, Pooling, Dense"):
        export(str(made), tmp_path / "out", ExportOptions(batch_size=1, sequence_length=(8,)))


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize("prompt", [None, "", "Of: "])
def test_prompts_lower_case_and_the_longest_length_are_the_checkpoints(sentences, prompt):
    source, made, model = sentences
    texts = ["Paris", "A compiler translates a PROGRAM once, and no more than that.", ""]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    before = "Find: " if prompt is None else prompt
    expected = []
    for text in texts:
        ids = tokenizer((before + text).lower(), truncation=True, max_length=9, return_tensors="pt")["input_ids"]
        if not ids.numel():
            continue
        with torch.inference_mode():
            states = oracle.eager(source, "AutoModel")(ids).last_hidden_state[0].numpy()
        expected.append(_dense(made, np.concatenate([pool(states) for pool in WAYS.values()])))
    texts = texts[: len(expected)]
    assert np.abs(model.embed(texts, prompt=prompt) - expected).max() < 1e-5
    assert np.abs(np.array(pipeline(model=model)(texts, prompt=prompt)) - expected).max() < 1e-5


def test_what_was_applied_is_recorded(sentences):
    files = {name: json.loads((sentences[2].artifact.path / name).read_text()) for name in (
        "config_sentence_transformers.json", "sentence_bert_config.json")}  # fmt: skip
    assert list(files.values()) == [PROMPTS, {"max_seq_length": 9, "do_lower_case": True}]


def test_modules_make_what_sentence_transformers_makes(checkpoint, tmp_path):
    """LayerNorm, a residual of another width, and a pooling whose old keys are all false, which is the mean."""
    source = checkpoint("bert", "AutoModel")
    made = _with_modules(source, tmp_path / "source", ["Pooling", "LayerNorm", "Dense"], ())
    dense, weight = made / "3_Dense", torch.randn(5, 64)
    config = {"in_features": 64, "out_features": 5, "use_residual": True, "bias": False, "module_output_name": None}
    (dense / "config.json").write_text(json.dumps(config | {"activation_function": "torch.nn.modules.linear.Identity"}))
    save_file({"linear.weight": weight, "residual.weight": weight.clone()}, dense / "model.safetensors")
    model = resolve(str(made), ExportOptions()).load(get_task("feature-extraction"), "float32")
    with torch.inference_mode():
        answer = model(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64))
        mean = torch.nn.functional.layer_norm(
            answer.last_hidden_state.mean(1), (64,), torch.arange(64) / 64, torch.ones(64) / 7
        )
    assert torch.allclose(answer["sentence_embedding"], 2 * mean @ weight.T, atol=1e-5)


PROMPTS_FILE, TRANSFORMER, POOLING = (
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
PLAIN = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
OTHER = {"text": {"method": "get_text_features"}}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            PROMPTS_FILE,
            {"default_prompt_name": "q", "prompts": {"p": "x"}},
            r"'q', which is not among its prompts \(p\)",
        ),
        (PROMPTS_FILE, {"default_prompt_name": "q", "prompts": {"q": 3}}, "has prompts"),
        (PROMPTS_FILE, {"similarity_fn_name": "maxsim"}, 'has similarity_fn_name: "maxsim"'),
        (PROMPTS_FILE, [], "Expected `object`, got `array`"),
        (TRANSFORMER, {"max_seq_length": 0}, "max_seq_length of source is 0"),
        (TRANSFORMER, {"transformer_task": "fill-mask"}, "has transformer_task: 'fill-mask'"),
        (TRANSFORMER, {"modality_config": OTHER}, "has modality_config"),
        (TRANSFORMER, {"tokenizer_args": {"truncation_side": "left"}}, "has tokenizer_args"),
        (TRANSFORMER, {"model_args": {"attn_implementation": "sdpa"}}, None),
        (TRANSFORMER, {"module_output_name": "token_embeddings", "modality_config": PLAIN, "new": 1}, None),
        (POOLING, {"pooling_mode": ["mean", "sum"]}, "pooling of source is mean, sum"),
        (POOLING, {"embedding_dimension": 64, "include_prompt": False}, None),
        ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "of token_embeddings where"),
        ("modules.json", [{"type": "custom_st.Transformer", "path": ""}], r"code, custom_st\.Transformer"),
    ],
)
def test_settings_that_change_answers_are_refused_before_any_work(checkpoint, tmp_path, file, content, message):
    made = _with_modules(
        checkpoint("bert", "AutoModel"), tmp_path / "source", ["Pooling", "Normalize"], ("mean_tokens",)
    )
    (made / file).write_text(json.dumps(content))
    found = resolve(str(made), ExportOptions())
    if message is None:
        found.skeleton(get_task("feature-extraction"))
        return
    with pytest.raises(CheckpointError, match=message):
        found.skeleton(get_task("feature-extraction"))


def test_the_last_of_several_poolings_counts(checkpoint, tmp_path):
    """Each pools the tokens anew."""
    source, ids = checkpoint("bert", "AutoModel"), torch.tensor([[5, 6, 7]])
    found = []
    for kinds in (["Pooling", "Normalize"], ["Pooling", "Pooling", "Normalize"]):
        made = _with_modules(source, tmp_path / str(len(kinds)), kinds, ("max_tokens",))
        if len(kinds) == 3:
            (made / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
        model = resolve(str(made), ExportOptions()).load(get_task("feature-extraction"), "float32")
        with torch.no_grad():
            found.append(model(ids, attention_mask=torch.ones_like(ids))["sentence_embedding"])
    assert torch.equal(*found)


def test_a_module_without_its_file_is_named(checkpoint, tmp_path):
    made = _with_modules(checkpoint("bert", "AutoModel"), tmp_path / "source", ["Pooling"], ("mean_tokens",))
    (made / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"source lacks the file 1_Pooling/config\.json, which its modules\.json"):
        resolve(str(made), ExportOptions()).skeleton(get_task("feature-extraction"))


def test_a_prompt_that_is_not_pooled_is_refused(checkpoint, tmp_path):
    made = _with_modules(checkpoint("bert", "AutoModel"), tmp_path / "source", ["Pooling"], ("mean_tokens",))
    (made / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean", "include_prompt": false}')
    (made / "config_sentence_transformers.json").write_text(json.dumps(PROMPTS))
    with pytest.raises(CheckpointError, match=r"leaves its default prompt, 'Find: ', out of the embedding"):
        resolve(str(made), ExportOptions()).skeleton(get_task("feature-extraction"))
