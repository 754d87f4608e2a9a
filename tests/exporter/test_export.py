"""The export as a whole: repeatable, checked, honest about what it found."""

from __future__ import annotations

import json
import shutil
import weakref
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
import transformers

from precast.exporter import ExportOptions, export, preview, validate_again
from precast.exporter.checkpoint.checkpoint import Checkpoint
from precast.exporter.kinds.samples import Answer, ValidationSample
from precast.exporter.validation.reference import Reference
from precast.exporter.validation.rules import judge_float32
from precast.runtime import CompiledModel
from precast.runtime.artifact import read_artifact
from precast.runtime.errors import AccuracyError, CheckpointError, UsageError


@pytest.mark.parametrize("options", [{"sequence_length": (16,)}, {"sequence_length": (16,), "prefill_lengths": (4,)}])
def test_two_exports_are_identical_to_the_byte(checkpoint, tmp_path, options):
    source = checkpoint("llama")
    one, two = (export(str(source), tmp_path / name, ExportOptions(**options)).path for name in ("one", "two"))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_nothing_of_the_machine_is_in_the_artifact(checkpoint, artifact):
    source = checkpoint("llama")
    for path in artifact(source).iterdir():
        content = path.read_bytes()
        assert str(source.parent).encode() not in content, path.name
        assert b"site-packages" not in content, path.name
        assert b".py" not in content, path.name


def test_config_json_says_everything(checkpoint, tmp_path):
    made = export(str(checkpoint("llama")), tmp_path / "out", ExportOptions(batch_size=2, sequence_length=(16,)))
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    contract = raw["precast"]
    assert raw["model_type"] == "llama"
    assert contract["task"] == "text-generation"
    assert contract["shapes"] == {
        "batch_size": 2, "sequence_length": [16], "prefill_lengths": [], "dynamic_batch_size": False,
    }  # fmt: skip
    assert contract["variants"][0]["accuracy"]["status"] == "passed"
    assert set(contract["files"]) == {
        "model.onnx", "model.onnx.data", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    assert "seconds" not in json.dumps(contract)
    assert made.contract == read_artifact(tmp_path / "out").contract


@pytest.mark.parametrize("backend", ["onnx", "export"])
def test_weights_are_given_back_before_validation(checkpoint, tmp_path, monkeypatch, backend):
    """The compiled model's own lie beside whatever is left: onnxscript's rules keep what they matched last."""
    weights, left, load = [], {}, Checkpoint.load

    def load_watched(self, *args):
        model = load(self, *args)
        weights.extend(map(weakref.ref, model.parameters()))
        return model

    @contextmanager
    def count(step):
        left[step] = sum(weight() is not None for weight in weights)
        yield

    monkeypatch.setattr(Checkpoint, "load", load_watched)
    export(str(checkpoint("llama")), tmp_path / "out", backend=backend, sequence_length=16, on_step=count)
    assert left["compile"] == len(weights)
    assert left["validate"] == 0


def test_a_number_or_word_stands_for_a_list_of_one():
    asked = ExportOptions(backend="aoti", sequence_length=64, also="onnx", isa="avx2")
    assert asked == ExportOptions(backend="aoti", sequence_length=(64,), also=("onnx",), isa="avx2")
    assert asked.shapes.sequence_length == (64,)
    assert asked.replace(sequence_length=32).sequence_length == (32,)


def test_the_model_card_has_the_metadata_of_the_hub(checkpoint, tmp_path):
    from huggingface_hub import ModelCard

    source = shutil.copytree(checkpoint("llama"), tmp_path / "llama")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\nA model.\n")
    made = export(str(source), tmp_path / "out", ExportOptions(sequence_length=(16,)))
    card = ModelCard.load(made.path / "README.md")
    assert (card.data.library_name, card.data.license, card.data.pipeline_tag) == ("precast", "mit", "text-generation")
    assert "max_abs_difference" in card.text


def test_a_wrong_graph_is_not_published(checkpoint, tmp_path, monkeypatch):
    """Break the lowering: validation must notice, and the target must stay as it was."""
    from precast.exporter.backends.onnx import lowering

    right = lowering._attention_for

    def wrong(graph):
        inner = right(graph)
        return lambda *args, **kwargs: inner(*args[:7], 2 * args[7], *args[8:], **kwargs)

    monkeypatch.setattr(lowering, "_attention_for", wrong)
    with pytest.raises(AccuracyError, match=r"differ by .* where .* is allowed"):
        export(str(checkpoint("llama")), tmp_path / "out", ExportOptions(sequence_length=(16,)))
    assert list(tmp_path.iterdir()) == []


def test_validate_again_finds_another_checkpoint_out(checkpoint, artifact, tmp_path):
    import tiny

    path = shutil.copytree(artifact(checkpoint("llama"), sequence_length=(16,)), tmp_path / "copy")
    before = (path / "config.json").read_bytes()
    accuracy = validate_again(path, str(checkpoint("llama")), ExportOptions(), keep=False)
    assert accuracy.status == "passed"
    assert (path / "config.json").read_bytes() == before, "nothing changes without --record"
    other = tiny.save_checkpoint(tmp_path / "other", tiny.config_for("llama"), seed=7)
    with pytest.raises(AccuracyError):
        validate_again(path, str(other), ExportOptions(), keep=True)
    assert (path / "config.json").read_bytes() == before
    validate_again(path, str(checkpoint("llama")), ExportOptions(), keep=True)
    assert read_artifact(path).contract.variants[0].accuracy == accuracy
    CompiledModel.from_pretrained(path)


def _judged(expected, found, *, margins=None, atol=1e-4):
    kind = "logits" if margins is None else "greedy"
    name = "logits" if margins is None else "tokens"
    sample = ValidationSample("q", kind, [[1]])
    answers = Answer({name: np.asarray(expected)}, None if margins is None else np.asarray(margins))
    steady = (
        ValidationSample("l", "logits", [[1]]),
        [Answer({"logits": np.array([[1.0, 0.0]])})],
        [{"logits": np.array([[1.0, 5e-5]])}],
    )
    reference = Reference([steady[0], sample], [steady[1], [answers]])
    return judge_float32(reference, [steady[2], [{name: np.asarray(found)}]], atol)


def test_the_rule_is_relative_to_the_largest_value():
    assert _judged([[100.0, 0.0]], [[100.005, 0.0]]).status == "passed"
    with pytest.raises(AccuracyError):
        _judged([[1.0, 0.0]], [[1.005, 0.0]])
    with pytest.raises(AccuracyError, match="NaN"):
        _judged([[1.0, 0.0]], [[np.nan, 0.0]])


def test_nan_fails_wherever_it_stands():
    """A comparison with NaN is always false, so a careless maximum forgets it."""
    samples = [ValidationSample(name, "logits", [[1]]) for name in "abc"]
    answers = [[Answer({"logits": np.array([[1.0, 0.0]])})] for _ in samples]
    for place in range(3):
        found = [[{"logits": np.array([[1.0, np.nan if index == place else 0.0]])}] for index in range(3)]
        with pytest.raises(AccuracyError, match=f"'{'abc'[place]}, logits' holds NaN"):
            judge_float32(Reference(samples, answers), found, 1e-4)


def test_a_token_may_differ_only_where_the_reference_was_in_two_minds():
    assert _judged([7, 8], [7, 9], margins=[1.0, 5e-5]).figures["greedy_tokens_equal"] == 1
    with pytest.raises(AccuracyError, match="token 2 is 9 instead of 8"):
        _judged([7, 8], [7, 9], margins=[1.0, 0.01])


def test_random_heads_are_refused(checkpoint, tmp_path):
    """A base checkpoint has no classifier; transformers would make one up."""
    with pytest.raises(CheckpointError, match=r"no weights for classifier.*names BertModel"):
        export(
            str(checkpoint("bert", "AutoModel")), tmp_path / "out",
            ExportOptions(task="text-classification", batch_size=1, sequence_length=(16,)),
        )  # fmt: skip


def test_a_plan_reads_no_weights(checkpoint, tmp_path):
    source = checkpoint("gemma2")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((source / "config.json").read_bytes())
    plan = preview(str(bare), ExportOptions(batch_size=2)).as_json()
    assert plan["tokenizer"] is None, "said before it is missed"
    expected = sum(each.numel() for each in transformers.AutoModelForCausalLM.from_pretrained(source).parameters())
    assert plan["weight_bytes"] == 4 * expected
    assert plan["sequence_length"] == [64]
    assert plan["cache_bytes"] == 2 * 2 * 2 * 64 * 2 * 16 * 4, "keys and values, layers, batch, capacity, heads, width"


def test_what_cannot_fit_is_refused_before_it_is_loaded(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "big")
    with pytest.raises(UsageError, match=r"needs about [\d.]+ GB of memory"):
        preview(str(tmp_path / "big"), ExportOptions(sequence_length=(512,)))


def test_options_list_everything_wrong_at_once():
    with pytest.raises(UsageError) as caught:
        ExportOptions(backend="aoti", batch_size=0, sequence_length=(0, 0), dtype="int3", atol=-1).check()
    assert str(caught.value) == (
        "batch_size must be at least 1, not 0. sequence_length must be at least 1, not 0. sequence_length must "
        "be at least 1, not 0. sequence_length names a length twice: 0,0. dtype='int3' is not supported; the "
        "choices are: float32, bfloat16, float16, auto. atol= must be above 0, not -1."
    )


def test_the_contract_survives_its_own_schema(decoder):
    contract = read_artifact(decoder).contract
    assert msgspec.convert(msgspec.to_builtins(contract), type(contract)) == contract
