"""`--also`: several backends' variants in one artifact, and the loader that takes what the host has."""

from __future__ import annotations

import json
from dataclasses import replace as replace_options

import numpy as np
import oracle
import pytest
import toy_backend
from click.testing import CliRunner
from msgspec.structs import replace

from precast.cli import cli
from precast.exporter import ExportOptions, export, validate_again
from precast.exporter.backends.aoti.isa import cpu_flags_needed
from precast.exporter.several.variants import _add_variant
from precast.exporter.validation.record import record_accuracy
from precast.runtime import CompiledModel, CompiledModelForCausalLM
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.publish import copy_artifact
from precast.runtime.artifact.schema import Accuracy, Host
from precast.runtime.errors import AccuracyError, HostError, UsageError
from precast.runtime.hosts import select
from precast.runtime.hosts.machine import cpu_flags

ROW = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
SIZES = {"batch_size": 1, "sequence_length": (24,)}
LEVELS = {flag for level in ("avx2", "avx512") for flag in cpu_flags_needed(level)}


@pytest.fixture(scope="module")
def both(checkpoint, tmp_path_factory):
    """A Llama for torch, and for ONNX Runtime where there is none."""
    path = tmp_path_factory.mktemp("also") / "out"
    return export(str(checkpoint("llama")), path, ExportOptions(backend="export", also=("onnx",), **SIZES))


def test_each_variant_has_its_files_and_its_verdict(both):
    first, second = both.contract.variants
    assert (first.name, second.name) == ("export", "onnx")
    assert [first.accuracy.status, second.accuracy.status] == ["passed", "passed"]
    assert first.weights == ["model.safetensors"]
    assert all(name.startswith("onnx/") for name in [*second.weights, *(graph.file for graph in second.graphs)])
    assert {path.name for path in both.path.iterdir() if path.is_dir()} == {"onnx"}
    assert (
        "and, where that does not run | onnx, float32 (onnx): accuracy passed" in (both.path / "README.md").read_text()
    )


@pytest.mark.parametrize("variant", [None, "export", "onnx"])
def test_every_variant_answers_as_eager_does(checkpoint, both, variant):
    model = CompiledModelForCausalLM.from_pretrained(both.path, variant=variant)
    assert model.variant.name == (variant or "export")
    found = model.generate(np.array([ROW]), max_new_tokens=8, do_sample=False)[0, len(ROW) :].tolist()
    assert found == oracle.greedy(checkpoint("llama"), ROW, max_new_tokens=8)


def test_the_loader_takes_what_the_host_has(both, monkeypatch):
    found = {"onnxruntime": "1.31", "torch": None}
    monkeypatch.setattr(select, "installed_version", lambda name: found[name])
    assert CompiledModel.from_pretrained(both.path).variant.name == "onnx"
    found["onnxruntime"] = None
    with pytest.raises(HostError, match=r"export: torch is not installed .*; onnx: onnxruntime is not installed"):
        CompiledModel.from_pretrained(both.path)


@pytest.mark.slow
def test_the_same_weights_lie_there_once(checkpoint, tmp_path):
    """Here of two exports by one backend, whose weights are equal byte by byte."""
    source = str(checkpoint("llama"))
    one = export(source, tmp_path / "one", ExportOptions(backend="export", **SIZES))
    other = export(source, tmp_path / "other", ExportOptions(backend="export", **SIZES))
    named = replace(other.contract, variants=[replace(other.contract.variants[0], name="second")])
    joined = _add_variant(one, type(other)(other.path, other.config, named))
    assert joined.contract.variants[1].weights == ["model.safetensors"]
    assert [name for name in joined.contract.files if name.endswith(".safetensors")] == ["model.safetensors"]
    model = CompiledModelForCausalLM.from_pretrained(one.path, variant="second")
    assert np.abs(model(np.array([ROW])).logits[0] - oracle.logits(checkpoint("llama"), ROW)).max() < 1e-4


def test_each_is_given_what_it_takes(checkpoint):
    asked = ExportOptions(
        backend="aoti", also=("onnx",), isa="avx2", auto_cast="matmul", auto_cast_type="bf16", **SIZES
    )
    asked.check()
    plain = asked.for_backend("onnx")
    assert (plain.backend, plain.isa, plain.auto_cast, plain.auto_cast_type) == ("onnx", "native", "none", None)
    assert (plain.also, plain.sequence_length) == ((), (24,))
    bounded = replace_options(asked, max_kl=0.01, accept_loss=True)
    bounded.check()
    bounded.for_backend("onnx").check()
    assert bounded.for_backend("aoti").max_kl == 0.01
    assert [one.isa for one in asked.per_variant()] == ["avx2", "native"]
    mine = asked.for_backend("aoti")
    assert (mine.isa, mine.auto_cast, mine.auto_cast_type) == ("avx2", "matmul", "bf16")
    reverse = ExportOptions(backend="onnx", also=("aoti",), isa="avx2", **SIZES)
    reverse.check()
    assert reverse.for_backend("onnx").isa == "native"
    assert reverse.for_backend("aoti").isa == "avx2"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"also": ("onnx",)}, "also='onnx' would compile for onnx a second time"),
        ({"also": ("export", "export")}, "also='export' would compile for export a second time"),
        ({"also": ("tpu",)}, "There is no backend 'tpu'"),
        ({"also": ("export",), "isa": "avx2"}, "isa='avx2' is not for backend='onnx'"),
        ({"backend": "auto", "also": ("onnx",)}, "backend='auto' keeps one backend's files, and also= adds another's"),
        ({"backend": "auto", "isa": "avx2,avx512"}, "backend='auto' keeps one variant, .* name backend='aoti'"),
        ({"backend": "aoti", "isa": "avx2,sse2"}, "isa='sse2' is not supported; the choices are: native, avx2"),
        ({"backend": "aoti", "isa": "avx2,"}, "isa='' is not supported"),
        ({"backend": "aoti", "isa": "avx2,avx2"}, "isa= names a level twice: avx2,avx2"),
        ({"backend": "aoti", "isa": "avx2,avx512", "device": "cuda"}, "with device='cuda' give one"),
        ({"isa": "avx2,avx512"}, "isa='avx2,avx512' is not for backend='onnx'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(checkpoint, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        export(str(checkpoint("llama")), tmp_path / "out", ExportOptions(**SIZES, **options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not cpu_flags() >= LEVELS, reason="this CPU does not have both levels")
def test_several_levels_of_instructions_share_their_weights(checkpoint, tmp_path, monkeypatch):
    source = str(checkpoint("llama", num_hidden_layers=1))
    made = export(source, tmp_path / "out", ExportOptions(backend="aoti", isa="avx2,avx512", **SIZES))
    assert [each.name for each in made.contract.variants] == ["aoti-avx2", "aoti-avx512"]
    assert {each.accuracy.status for each in made.contract.variants} == {"passed"}
    assert {name for each in made.contract.variants for name in each.weights} == {"model.safetensors"}
    libraries = [graph.file for each in made.contract.variants for graph in each.graphs]
    assert sorted(libraries) == ["aoti-avx512/decode.so", "aoti-avx512/prefill.so", "decode.so", "prefill.so"]
    best = CompiledModelForCausalLM.from_pretrained(made.path)
    assert best.variant.name == "aoti-avx512"
    monkeypatch.setattr(select, "cpu_flags", lambda: frozenset(made.contract.variants[0].host.isa))
    other = CompiledModelForCausalLM.from_pretrained(made.path)
    assert other.variant.name == "aoti-avx2"
    expected = oracle.greedy(source, ROW, max_new_tokens=8)
    for model in (best, other):
        assert model.generate(np.array([ROW]), max_new_tokens=8, do_sample=False)[0, len(ROW) :].tolist() == expected


def test_if_one_fails_nothing_is_written(checkpoint, tmp_path, toy, monkeypatch):
    step = toy_backend.ToyEngine.bind

    def wrong(self, graph, inputs, outputs):
        run = step(self, graph, inputs, outputs)
        return lambda: (run(), outputs["logits"].fill(1))

    monkeypatch.setattr("precast.exporter.validation.run_samples", _asked_here)
    monkeypatch.setattr(toy_backend.ToyEngine, "bind", wrong)
    with pytest.raises(AccuracyError):
        export(str(checkpoint("llama")), tmp_path / "sub/out", ExportOptions(also=("toy",), **SIZES))
    assert list((tmp_path / "sub").iterdir()) == []


def _asked_here(path, variant, samples, sha256):
    """What the probe does, in this process, where the backend is patched."""
    from precast.runtime import validation_worker

    model = CompiledModel.from_pretrained(path, variant=variant, sha256=sha256)
    return [list(validation_worker._ask_model(model, vars(sample))) for sample in samples]


def test_without_its_device_validation_is_skipped_and_said(checkpoint, tmp_path, toy, monkeypatch):
    compile_plainly = toy_backend.ToyCompiler.compile

    def for_a_device(self, *given):
        made = compile_plainly(self, *given)
        host = Host(platforms=[], device="neuron", isa=[], min_versions={})
        return type(made)(made.graphs, made.weights, host, made.compiler)

    monkeypatch.setattr(toy_backend.ToyCompiler, "compile", for_a_device)
    monkeypatch.setenv("PRECAST_NEURON_ROOT", str(tmp_path / "no machine"))
    source = str(checkpoint("llama"))
    made = export(source, tmp_path / "out", ExportOptions(backend="toy", also=("onnx",), **SIZES))
    there, here = made.contract.variants
    assert there.accuracy.status == "skipped"
    assert there.accuracy.reason.startswith("no device: it needs the device neuron; here are cpu")
    assert here.accuracy.status == "passed"
    assert CompiledModel.from_pretrained(made.path).variant.name == "onnx"
    with pytest.raises(HostError, match="toy: it needs the device neuron"):
        validate_again(made.path, source, ExportOptions(), keep=True, variant="toy")
    assert read_artifact(made.path).contract == made.contract


def test_validating_later_records_the_verdict_on_that_variant(checkpoint, both, tmp_path):
    copy_artifact(both, tmp_path / "copy", force=False)
    copy = read_artifact(tmp_path / "copy")
    skipped = Accuracy(status="skipped", reason="no device: none", figures={})
    for name in ("export", "onnx"):
        copy = record_accuracy(copy, name, skipped)
    accuracy = validate_again(copy.path, str(checkpoint("llama")), ExportOptions(), keep=True, variant="onnx")
    first, second = read_artifact(copy.path).contract.variants
    assert (first.accuracy, second.accuracy) == (skipped, accuracy)
    assert accuracy.status == "passed"
    validate_again(copy.path, str(checkpoint("llama")), ExportOptions(), keep=True)
    assert read_artifact(copy.path).contract.variants[0].accuracy.status == "passed"


def test_the_command_tells_each_verdict(checkpoint, tmp_path):
    source = str(checkpoint("bert", "AutoModel"))
    given = [source, "--task", "feature-extraction", "--batch-size", "1", "--sequence-length", "16", "-q"]
    done = CliRunner().invoke(
        cli, ["export", *given, "--backend", "export", "--also", "onnx", "-o", str(tmp_path / "out"), "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {name: verdict["status"] for name, verdict in told["variants"].items()} == {
        "export": "passed",
        "onnx": "passed",
    }
