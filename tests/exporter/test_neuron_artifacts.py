"""What is around the `neuron` backend, on the stand-in: another host's variant, a device that is not here, and
optimum-neuron's layout both ways."""

from __future__ import annotations

import json
import shutil

import neuron_machine
import numpy as np
import oracle
import pytest
import torch
from neffs import neff

from precast.exporter import ExportOptions, export, validate_again
from precast.exporter.options.layout import LAYOUTS
from precast.runtime import CompiledModel, CompiledModelForCausalLM, CompiledModelForFeatureExtraction
from precast.runtime.artifact import read_artifact
from precast.runtime.errors import ExportError, HostError, TrustError, UsageError

NEURON = {"backend": "neuron", "instance_type": "inf2", "batch_size": 2, "sequence_length": (24,)}
THEIRS = {**NEURON, "layout": "optimum-neuron", "inline_weights": True, "task": "feature-extraction"}
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22]]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(cores=0)`: the stand-in, and so many NeuronCores of an inf2."""
    neuron_machine.install(monkeypatch, tmp_path / "machine", instance="Inf2")

    def change(cores, instance="Inf2"):
        neuron_machine.devices(monkeypatch, tmp_path / "machine/root", cores=cores, instance=instance)

    return change


def _eager(source, row, auto="AutoModel"):
    with torch.no_grad():
        return oracle.eager(source, auto)(torch.tensor([row]))[0][0].numpy()


def _check_features(model, source):
    ids, mask = oracle.padded(ROWS, "left")
    found = model(ids, mask).last_hidden_state
    for row, values, keep in zip(ROWS, found, mask, strict=True):
        assert np.abs(values[keep == 1] - _eager(source, row)).max() < 1e-4


@pytest.mark.slow
def test_compiled_without_a_device_and_validated_on_one(checkpoint, tmp_path, machine):
    machine(cores=0)
    source = str(checkpoint("llama"))
    options = ExportOptions(**NEURON, prefill_lengths=(8,), also=("onnx",))
    made = export(source, tmp_path / "out", options)
    there, here = made.contract.variants
    assert (there.name, there.accuracy.status) == ("neuron", "skipped")
    assert there.accuracy.reason.startswith("no device: it needs the device neuron")
    assert (here.name, here.accuracy.status) == ("onnx", "passed")
    assert CompiledModel.from_pretrained(made.path).variant.name == "onnx"
    with pytest.raises(HostError, match="neuron: it needs the device neuron"):
        validate_again(made.path, source, ExportOptions(), keep=True, variant="neuron")

    machine(cores=2)
    assert validate_again(made.path, source, ExportOptions(), keep=True).status == "passed"
    there, here = read_artifact(made.path).contract.variants
    assert (there.accuracy.status, here.accuracy.status) == ("passed", "passed")
    model = CompiledModelForCausalLM.from_pretrained(made.path)
    assert model.variant.name == "neuron"
    found = model.generate(np.array([ROWS[0]]), max_new_tokens=6, do_sample=False)[0, len(ROWS[0]) :].tolist()
    assert found == oracle.greedy(checkpoint("llama"), ROWS[0], max_new_tokens=6)


@pytest.mark.slow
def test_compiled_for_another_machine_than_this_one(checkpoint, tmp_path, machine):
    machine(cores=16, instance="Trn2")
    made = export(str(checkpoint("bert", "AutoModel")), tmp_path / "out", ExportOptions(**NEURON))
    (variant,) = made.contract.variants
    assert variant.accuracy.status == "skipped"
    assert "compiled for inf2, so it runs on inf2, trn1, trn1n; this is trn2" in variant.accuracy.reason
    with pytest.raises(HostError, match="compiled for inf2"):
        CompiledModel.from_pretrained(made.path)


@pytest.mark.slow
def test_a_neff_of_another_version_is_refused_before_the_sdk_sees_it(checkpoint, tmp_path, machine):
    machine(cores=2)
    made = export(str(checkpoint("bert", "AutoModel")), tmp_path / "out", ExportOptions(**NEURON, validate=False))
    path = made.path / made.contract.variants[0].graphs[0].file
    path.write_bytes(path.read_bytes() + neff(major=3))
    with pytest.raises(HostError, match=r"its NEFF has version 3\.0; Neuron Runtime takes 0\.x to 2\.x"):
        CompiledModel.from_pretrained(made.path)


def test_their_layout_is_opened_as_ours_and_as_theirs(checkpoint, tmp_path, machine):
    """As theirs: the same directory without our contract, which is all that optimum-neuron knows of it."""
    machine(cores=2)
    source = checkpoint("bert", "AutoModel")
    made = export(str(source), tmp_path / "out", ExportOptions(**THEIRS, auto_cast="none"))
    assert made.contract.variants[0].accuracy.status == "passed"
    assert made.contract.variants[0].graphs[0].file == "model.neuron"
    _check_features(CompiledModelForFeatureExtraction.from_pretrained(made.path), source)

    theirs = tmp_path / "theirs"
    shutil.copytree(made.path, theirs)
    config = json.loads((theirs / "config.json").read_bytes())
    del config["precast"]
    (theirs / "config.json").write_text(json.dumps(config))
    section = config["neuron"]
    assert (section["static_batch_size"], section["static_sequence_length"]) == (2, 24)
    assert (section["task"], section["model_type"], section["instance_type"]) == ("feature-extraction", "bert", "inf2")
    assert (section["compiler_type"], section["inline_weights_to_neff"], section["optlevel"]) == (
        "neuronx-cc",
        True,
        "2",
    )
    assert (section["auto_cast"], section["auto_cast_type"], section["dynamic_batch_size"]) == (None, None, False)
    assert (section["float_dtype"], section["int_dtype"], section["tensor_parallel_size"]) == ("fp32", "int64", 1)


def test_an_artifact_of_theirs_answers_as_eager_does(checkpoint, tmp_path, machine):
    machine(cores=2)
    source = checkpoint("bert", "AutoModelForSequenceClassification")
    asked = {**THEIRS, "task": "text-classification", "auto_cast": "matmul", "validate": False}
    made = export(str(source), tmp_path / "out", ExportOptions(**asked))
    config = json.loads((made.path / "config.json").read_bytes())
    del config["precast"]
    assert (config["neuron"]["auto_cast"], config["neuron"]["auto_cast_type"]) == ("matmul", "bf16")
    (made.path / "config.json").write_text(json.dumps(config))
    read = read_artifact(made.path)
    with pytest.raises(TrustError, match="trust_native_code=True"):
        CompiledModel.from_pretrained(made.path)
    for proof in ({"trust_native_code": True}, {"sha256": read.contract.digest}):
        model = CompiledModel.from_pretrained(made.path, **proof)
        ids, mask = oracle.padded(ROWS, "right")
        found = model(ids, mask).logits
        for row, values in zip(ROWS, found, strict=True):
            assert np.abs(values - _eager(source, row, "AutoModelForSequenceClassification")).max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backend": "onnx", "instance_type": None, "inline_weights": False}, "give backend='neuron', too"),
        ({"inline_weights": False}, "give inline_weights=True, too"),
        ({"strategy": "model-builder", "inline_weights": False}, "leave out strategy= and tensor_parallel"),
        ({"sequence_length": (16, 24)}, "sequence_length=16,24 asks for more; give one size"),
        ({"layout": "tensorrt"}, f"the choices are: {', '.join(LAYOUTS)}"),
    ],
)
def test_what_their_layout_has_no_place_for_is_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        ExportOptions(**{**THEIRS, **changes}).check()


def test_models_that_they_feed_otherwise_are_refused_before_compiling(checkpoint, tmp_path, machine, monkeypatch):
    machine(cores=2)
    options = ExportOptions(**{**THEIRS, "task": None, "prefill_lengths": (8,), "validate": False})
    with pytest.raises(ExportError, match=r"holds one graph of an encoder.*text-generation as prefill_8, decode"):
        export(str(checkpoint("llama")), tmp_path / "decoder/out", options)
    monkeypatch.setattr("precast.exporter.backends.neuron.optimum_layout.text_inputs", lambda *_: None)
    with pytest.raises(ExportError, match="it goes by the model type, bert, which it has not"):
        export(str(checkpoint("bert", "AutoModel")), tmp_path / "bert/out", ExportOptions(**THEIRS, validate=False))
    assert not (tmp_path / "decoder/out").exists()
    assert not (tmp_path / "bert/out").exists()
