"""`--backend export`: portable graphs of torch.export, with eager's answers and one file of weights."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch
import transformers

from precast.exporter import ExportOptions, export
from precast.exporter.backends import export as backend
from precast.runtime import CompiledModel, CompiledModelForCausalLM
from precast.runtime.artifact.pt2 import allowed_operators
from precast.runtime.engines.safetensors_map import open_weights
from precast.runtime.engines.torch_views import view_weights
from precast.runtime.errors import ExportError

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22], [30]]


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    """A Llama of batch 2, exported and validated."""
    path = tmp_path_factory.mktemp("export") / "out"
    return export(str(checkpoint("llama")), path, ExportOptions(backend="export", batch_size=2, sequence_length=(48,)))


def test_a_decoder_answers_as_eager_does(checkpoint, made):
    source = checkpoint("llama")
    variant = made.contract.variants[0]
    assert (variant.trust, variant.accuracy.status, variant.weights) == ("graph", "passed", ["model.safetensors"])
    model = CompiledModelForCausalLM.from_pretrained(made.path)
    for row in ROWS:
        assert np.abs(model(np.array([row])).logits[0] - oracle.logits(source, row)).max() < 1e-4
        found = model.generate(np.array([row]), max_new_tokens=12, do_sample=False)[0, len(row) :].tolist()
        assert found == oracle.greedy(source, row, max_new_tokens=12)


def test_rows_of_a_batch_do_not_see_each_other(checkpoint, made):
    ids, mask = oracle.padded(ROWS[:2], "left")
    model = CompiledModelForCausalLM.from_pretrained(made.path)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, ids.shape[1] :]
    assert found.tolist() == [oracle.greedy(checkpoint("llama"), row, max_new_tokens=8) for row in ROWS[:2]]


@pytest.mark.parametrize(
    "model_type", ["gpt2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gemma2", "qwen2"))]
)
def test_static_graphs_of_other_architectures_pass_validation(checkpoint, tmp_path, model_type):
    """Tied embeddings and learned positions; soft caps and windows; biases."""
    options = ExportOptions(backend="export", sequence_length=(24,), prefill_lengths=(8,))
    made = export(str(checkpoint(model_type)), tmp_path / "out", options)
    assert made.contract.variants[0].accuracy.status == "passed"


def test_an_encoder_of_two_buckets_answers_as_eager_does(checkpoint, tmp_path):
    source = checkpoint("bert", "AutoModel")
    options = ExportOptions(backend="export", batch_size=3, sequence_length=(16, 48))
    made = export(str(source), tmp_path / "out", options)
    model = CompiledModel.from_pretrained(made.path)
    eager = transformers.AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    for length in (1, 9, 30):
        ids = np.arange(5, 5 + length)[None].repeat(2, 0)
        with torch.no_grad():
            expected = eager(torch.from_numpy(ids)).last_hidden_state.numpy()
        assert np.abs(model(ids).last_hidden_state - expected).max() < 1e-4


def test_weights_are_stored_once_for_all_graphs(checkpoint, made):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    parameters = sum(each.numel() * each.element_size() for each in model.parameters())
    size = (made.path / "model.safetensors").stat().st_size
    assert parameters <= size < parameters + 20_000
    assert len(made.contract.variants[0].graphs) > 1
    weights = view_weights(open_weights([made.path / "model.safetensors"]))
    head = next(tensor for name, tensor in weights.items() if name.endswith("lm_head.weight"))
    assert torch.equal(head, model.lm_head.weight)


def test_two_exports_are_identical_and_name_nothing_of_the_machine(checkpoint, tmp_path):
    source = checkpoint("llama")
    options = ExportOptions(backend="export", sequence_length=(16,), prefill_lengths=(4,), validate=False)
    one, two = (export(str(source), tmp_path / name, options).path for name in ("one", "two"))
    for path in one.iterdir():
        content = path.read_bytes()
        assert content == (two / path.name).read_bytes(), path.name
        assert str(source.parent).encode() not in content, path.name
        assert b"site-packages" not in content
        assert b".py" not in content


def test_an_operator_that_the_runtime_refuses_fails_the_export(checkpoint, tmp_path, monkeypatch):
    """Break the list: what cannot be loaded is not written."""
    monkeypatch.setattr("precast.runtime.artifact.pt2.format.ATEN", allowed_operators.ATEN - {"embedding"})
    with pytest.raises(ExportError, match=r"cannot write this model: .*'torch.ops.aten.embedding.default'"):
        export(str(checkpoint("llama")), tmp_path / "out", ExportOptions(backend="export", sequence_length=(16,)))
    assert list(tmp_path.iterdir()) == []


def test_the_archive_of_a_program_has_no_code(checkpoint, made):
    for graph in made.contract.variants[0].graphs:
        content = (made.path / graph.file).read_bytes()
        assert b"stack_trace" not in content
        assert b'"guards_code":[]' in content
    assert backend.WEIGHTS in made.contract.files


AUDIT = """
import sys
import torch, precast.runtime.engines.export, precast.runtime.models.causal_lm, precast.runtime.generation.config
from precast.runtime import CompiledModelForCausalLM
import numpy as np

def generate(path):
    model = CompiledModelForCausalLM.from_pretrained(path)
    return model.generate(np.array([[5, 6, 7, 8]]), max_new_tokens=4, do_sample=False)

first = generate(sys.argv[1])
forbidden = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.", "pickle.", "exec",
             "compile", "ctypes.dlopen", "import")
seen = []
sys.addaudithook(lambda event, given: seen.append((event, str(given)[:200])) if event.startswith(forbidden) else None)
second = generate(sys.argv[2])
found = list(seen)
compile("1", "canary", "eval")
assert len(seen) > len(found), "the hook does not see"
assert np.array_equal(first, second)
print(found)
"""


def test_a_load_from_beginning_to_end_starts_connects_unpickles_and_compiles_nothing(made, tmp_path):
    """A second artifact in a process that has imported what it needs by loading a first one."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in made.path.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, "-W", "ignore", "-c", AUDIT, str(made.path), str(copy)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
