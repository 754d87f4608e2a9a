"""A backend is one file and one row: the toy one exports, validates, loads, and gives the eager answers."""

from __future__ import annotations

import sys

import numpy as np
import oracle
import pytest

from precast.cli import main
from precast.exporter import ExportOptions, export
from precast.runtime import CompiledModelForCausalLM
from precast.runtime.artifact.backends import get_backend
from precast.runtime.errors import TrustError, UsageError


def test_one_file_and_one_row_make_a_backend(toy, checkpoint, tmp_path):
    source = checkpoint("mistral")
    made = export(str(source), tmp_path / "out", ExportOptions(backend="toy", batch_size=2, sequence_length=(24,)))
    assert made.contract.variants[0].accuracy.status == "passed"
    model = CompiledModelForCausalLM.from_pretrained(tmp_path / "out")
    row = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert np.abs(model(np.array([row])).logits[0] - oracle.logits(source, row)).max() < 1e-4
    found = model.generate(np.array([row]), max_new_tokens=8, do_sample=False)[0, len(row) :].tolist()
    assert found == oracle.greedy(source, row, max_new_tokens=8)


def _export_by_command(monkeypatch, capfd, *words):
    """Exit code, standard output and standard error of `precast export`."""
    monkeypatch.setattr(sys, "argv", ["precast", "export", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code or 0, *capfd.readouterr()


def test_its_option_is_one_of_the_command_line(toy, checkpoint, tmp_path, monkeypatch, capfd):
    source, words = checkpoint("llama"), ("-o", tmp_path / "out", "--sequence-length", 16, "--no-validate", "-q")
    code, _, err = _export_by_command(monkeypatch, capfd, source, *words, "--backend", "toy", "--toy-note", "a word")
    assert code == 0, err
    found = CompiledModelForCausalLM.from_pretrained(tmp_path / "out").variant.compiler.options
    assert found == {"toy_note": "a word"}
    code, _, err = _export_by_command(monkeypatch, capfd, source, *words, "--force", "--toy-note", "a word")
    assert code == 2
    assert "--toy-note is not for --backend onnx: ONNX Runtime" in err
    assert "Backends that take it: toy." in err
    help_text = _export_by_command(monkeypatch, capfd, "--help")[1]
    assert "With --backend toy:\n  --toy-note TEXT  Kept in the artifact, in one line." in help_text


def test_its_option_is_a_keyword(toy):
    options = ExportOptions.of({"backend": "toy", "toy_note": "a word", "batch_size": 2})
    assert (options.toy_note, options.backend_options.toy_note, options.batch_size) == ("a word", "a word", 2)
    assert ExportOptions(**options.as_keywords()) == options
    assert ExportOptions(also=("toy",), toy_note="a word").for_backend("onnx").toy_note == ""
    options.check()
    ExportOptions(also=("toy",), toy_note="a word").check()
    with pytest.raises(UsageError, match=r"toy_note is not for backend='neuron': .* take it: toy\."):
        ExportOptions(backend="neuron", instance_type="trn1", toy_note="a word").check()
    with pytest.raises(UsageError, match=r"toy_note is one line"):
        options.replace(toy_note="a\nb").check()
    with pytest.raises(UsageError, match=r"does not know toy_notes\. Did you mean toy_note\?"):
        ExportOptions.of({"toy_notes": "a word"})


def test_without_it_nobody_knows_its_option():
    with pytest.raises(UsageError, match=r"does not know toy_note"):
        ExportOptions.of({"toy_note": "a word"})


def test_its_native_code_needs_proof(toy, checkpoint, tmp_path, monkeypatch):
    made = export(str(checkpoint("llama")), tmp_path / "out", ExportOptions(backend="toy", sequence_length=(16,)))
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "another-user"))
    with pytest.raises(TrustError, match=r"trust_native_code=True"):
        CompiledModelForCausalLM.from_pretrained(made.path)
    assert CompiledModelForCausalLM.from_pretrained(made.path, sha256=made.contract.digest)


def test_an_unknown_backend_is_refused_with_the_choices(toy):
    with pytest.raises(UsageError, match=r"no backend 'tpu'.*onnx, .*toy\."):
        get_backend("tpu")
