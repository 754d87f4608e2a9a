"""Artifacts of optimum-neuron, as its release 0.4 writes them, read as ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from fakehub import FakeHub
from neffs import neff, torchscript

from precast.cli import cli
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.optimum_neuron import TASKS
from precast.runtime.errors import ArtifactError, FormatError, HostError
from precast.runtime.hosts.neuron import ROOT_VARIABLE
from precast.runtime.models.base import CompiledModel, verify_artifact

# What `optimum-cli export neuron --model sentence-transformers/all-MiniLM-L6-v2 --batch_size 2 --sequence_length 64
# --instance-type inf2 --auto_cast matmul` leaves there, by `store_compilation_config`.
SECTION = {
    "auto_cast": "matmul",
    "auto_cast_type": "bf16",
    "compiler_type": "neuronx-cc",
    "compiler_version": "2.21.33363.0+82129205",
    "dynamic_batch_size": False,
    "float_dtype": "fp32",
    "inline_weights_to_neff": True,
    "instance_type": "trn1",
    "int_dtype": "int64",
    "model_type": "bert",
    "optlevel": "2",
    "output_attentions": False,
    "output_hidden_states": False,
    "static_batch_size": 2,
    "static_sequence_length": 64,
    "task": "feature-extraction",
    "tensor_parallel_size": 1,
}
CONFIG = {
    "_name_or_path": "sentence-transformers/all-MiniLM-L6-v2", "model_type": "bert", "hidden_size": 384,
    "vocab_size": 30522, "pad_token_id": 0, "type_vocab_size": 2, "transformers_version": "4.57.1",
    "export_model_type": "bert",
}  # fmt: skip


def theirs(path, config=(), **section):
    """A directory of optimum-neuron's; a key of `section` that is None is left out."""
    path.mkdir(parents=True, exist_ok=True)
    found = {name: value for name, value in {**SECTION, **section}.items() if value is not None}
    (path / "config.json").write_text(json.dumps({**CONFIG, **dict(config), "neuron": found}))
    (path / "tokenizer.json").write_text("{}")
    (path / ".cache").mkdir()
    torchscript(path / "model.neuron", neff())
    return path


def test_inputs_sizes_and_compiler_are_those_that_were_compiled(tmp_path):
    contract = read_artifact(theirs(tmp_path / "minilm")).contract
    (variant,) = contract.variants
    (graph,) = variant.graphs
    assert [(spec.name, spec.dtype, spec.shape, spec.pad) for spec in graph.inputs] == [
        ("input_ids", "int64", [2, 64], 0),
        ("attention_mask", "int64", [2, 64], 0),
        ("token_type_ids", "int64", [2, 64], 0),
    ]
    assert [(spec.name, spec.shape) for spec in graph.outputs] == [
        ("last_hidden_state", [2, 64, 384]),
        ("pooler_output", [2, 384]),
    ]
    assert (contract.task, contract.source.model) == ("feature-extraction", "all-MiniLM-L6-v2")
    assert (graph.file, variant.backend, variant.trust) == ("model.neuron", "neuron", "native")
    assert variant.compiler.version == "2.21.33363.0+82129205"
    assert variant.compiler.options["instance_type"] == "trn1"
    assert set(contract.files) == {"model.neuron", "tokenizer.json"}
    assert not contract.shapes.dynamic_batch_size


def test_digest_and_hashes_are_of_what_lies_there(tmp_path):
    path = theirs(tmp_path / "minilm", {"_name_or_path": ""})
    before = read_artifact(path)
    verify_artifact(before, before.contract.variants[0], force=True)
    assert read_artifact(path.rename(tmp_path / "renamed")).contract.digest == before.contract.digest
    (tmp_path / "renamed").rename(path)
    torchscript(path / "model.neuron", neff(), b"something else")
    assert read_artifact(path).contract.digest != before.contract.digest


@pytest.mark.parametrize(
    ("task", "config", "shapes"),
    [
        ("text-classification", {"id2label": {"0": "a", "1": "b", "2": "c"}}, [[2, 3]]),
        ("text-classification", {}, [[2, 2]]),
        ("token-classification", {"id2label": {str(n): str(n) for n in range(9)}}, [[2, 64, 9]]),
        ("question-answering", {}, [[2, 64], [2, 64]]),
        ("fill-mask", {}, [[2, 64, 30522]]),
        ("sentence-similarity", {}, [[2, 64, 384], [2, 384]]),
    ],
)
def test_outputs_have_the_sizes_of_the_configuration(tmp_path, task, config, shapes):
    (variant,) = read_artifact(theirs(tmp_path / "x", config, task=task)).contract.variants
    assert [spec.shape for spec in variant.graphs[0].outputs] == shapes


def test_models_without_segments_have_two_inputs(tmp_path):
    made = theirs(tmp_path / "x", {"pad_token_id": 1}, model_type="xlm-roberta", task="fill-mask")
    graph = read_artifact(made).contract.variants[0].graphs[0]
    assert [(spec.name, spec.pad) for spec in graph.inputs] == [("input_ids", 1), ("attention_mask", 0)]


def test_a_model_of_sentence_transformers_has_its_embedding(tmp_path):
    graph = read_artifact(theirs(tmp_path / "x", model_type="transformer")).contract.variants[0].graphs[0]
    assert [spec.name for spec in graph.outputs] == ["last_hidden_state", "sentence_embedding"]
    assert graph.outputs[1].shape == [2, 384]


def test_choices_images_and_sounds(tmp_path):
    made = theirs(tmp_path / "choices", task="multiple-choice", static_num_choices=4)
    graph = read_artifact(made).contract.variants[0].graphs[0]
    assert graph.inputs[0].shape == [2, 4, 64]
    assert graph.outputs[0].shape == [2, 4]
    made = theirs(
        tmp_path / "image", {"image_size": 224, "num_channels": 3}, task="image-classification", model_type="vit",
        static_sequence_length=None,
    )  # fmt: skip
    graph = read_artifact(made).contract.variants[0].graphs[0]
    assert [(spec.name, spec.shape, spec.axes) for spec in graph.inputs] == [
        ("pixel_values", [2, 3, 224, 224], ["batch", None, None, None])
    ]
    made = theirs(
        tmp_path / "sound", task="audio-classification", model_type="wav2vec2", static_sequence_length=None,
        static_audio_sequence_length=16000,
    )  # fmt: skip
    (spec,) = read_artifact(made).contract.variants[0].graphs[0].inputs
    assert (spec.name, spec.shape, spec.axes) == ("input_values", [2, 16000], ["batch", None])


def test_every_task_has_a_class_that_runs_it(tmp_path):
    sizes = {"static_num_choices": 4, "static_audio_sequence_length": 400, "static_image_size": 32}
    for task in TASKS:
        artifact = read_artifact(theirs(tmp_path / task, task=task, **sizes))
        assert CompiledModel._class_for(artifact).task == task


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"task": "automatic-speech-recognition"}, ArtifactError, "does not say what its outputs are"),
        ({"model_type": "clip"}, ArtifactError, "model type 'clip', and its config.json does not say"),
        ({"static_batch_size": "two"}, FormatError, r"neuron\.static_batch_size is 'two', not a size"),
        ({"static_sequence_length": None}, FormatError, r"neuron\.static_sequence_length is None, not a size"),
        ({"static_batch_size": True}, FormatError, "static_batch_size is True"),
        ({"float_dtype": "fp8"}, FormatError, "float_dtype is 'fp8', not fp32, fp16 or bf16"),
        ({"int_dtype": "int8"}, FormatError, "int_dtype is 'int8'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        read_artifact(theirs(tmp_path / "x", **changes))


def test_other_layouts_are_refused_by_name(tmp_path):
    (theirs(tmp_path / "decoder") / "neuron_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"is a decoder of optimum-neuron.*precast export MODEL --backend neuron"):
        read_artifact(tmp_path / "decoder")
    torchscript(theirs(tmp_path / "t5") / "encoder/model.neuron", neff())
    with pytest.raises(ArtifactError, match="is an encoder-decoder of optimum-neuron"):
        read_artifact(tmp_path / "t5")
    path = theirs(tmp_path / "parallel")
    (path / "model.neuron").unlink()
    (path / "model.neuron").mkdir()
    with pytest.raises(ArtifactError, match="form for tensor parallel"):
        read_artifact(path)
    (theirs(tmp_path / "two") / "other.neuron").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"2 files \*.neuron where one is needed: model\.neuron, other\.neuron"):
        read_artifact(tmp_path / "two")


def test_without_a_device_it_is_shown_and_not_opened(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "nothing"))
    path = theirs(tmp_path / "minilm")
    told = CliRunner().invoke(cli, ["inspect", str(path)])
    assert told.exit_code == 0, told.output
    for words in ("variant optimum-neuron", "no: it needs the device neuron", "version 2.0, NeuronCores 1"):
        assert words in told.output
    with pytest.raises(HostError, match="needs the device neuron"):
        CompiledModel.from_pretrained(path)


def test_one_on_the_hub_is_shown_and_opened_under_its_digest(tmp_path):
    path = theirs(tmp_path / "minilm")
    files = {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()}
    digest = read_artifact(path).contract.digest
    with FakeHub(token="x") as hub:
        hub.add("user/minilm-neuronx", {**files, "1_Pooling/config.json": b"{}"})
        access = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "x", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        places = {"HF_HOME": str(tmp_path / "hf"), "PRECAST_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", "from precast.cli import main; main()", "inspect", "user/minilm-neuronx", "--json"],
            env={**os.environ, **access, **places, ROOT_VARIABLE: str(tmp_path / "nothing")},
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["digest"] == digest
    assert told["path"].endswith(digest)
    assert told["neffs"][0][0]["major"] == 2
