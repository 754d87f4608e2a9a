"""A backend is one file and one row: the toy one exports, validates, loads, and gives the eager answers."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

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


def test_its_native_code_needs_proof(toy, checkpoint, tmp_path, monkeypatch):
    made = export(str(checkpoint("llama")), tmp_path / "out", ExportOptions(backend="toy", sequence_length=(16,)))
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "another-user"))
    with pytest.raises(TrustError, match=r"trust_native_code=True"):
        CompiledModelForCausalLM.from_pretrained(made.path)
    assert CompiledModelForCausalLM.from_pretrained(made.path, sha256=made.contract.digest)


def test_an_unknown_backend_is_refused_with_the_choices(toy):
    with pytest.raises(UsageError, match=r"no backend 'tpu'.*onnx, .*toy\."):
        get_backend("tpu")
