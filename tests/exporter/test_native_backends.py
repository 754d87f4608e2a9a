"""The `export` and `aoti` backends give eager's answers: any length, batch and padding side, token by token.

Native code takes seconds per layer to compile, so the fast lane compiles one model, whose equal layers are compiled
once; the slow lane all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import oracle
import processes
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import decoders as zoo

from precast.exporter import ExportOptions, export
from precast.runtime import CompiledModel, CompiledModelForCausalLM
from precast.runtime.errors import IntegrityError

CAPACITY = 48
FAST = [("llama", "aoti"), ("llama", "export")]
EVERY = [*tiny.DECODERS, *zoo.REPRESENTATIVES, "mamba", "jamba", "deepseek_v3"]
COMPILED = ["mistral", "gpt2", "gemma2", "gptj", "bloom", "gpt_oss", "mamba", "jamba", "deepseek_v3"]
"""As both backends lower programs alike, of the native one only those that meet other kernels: windows, products with
biases, soft caps, other rotations, ALiBi, sinks and experts, states, both, latents."""
SLOW = [
    each
    for each in [*((family, "export") for family in EVERY), *((family, "aoti") for family in COMPILED)]
    if each not in FAST
]
PAIRS = [*FAST, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)]
rows_of_any_length = st.lists(
    st.lists(st.integers(3, tiny.VOCABULARY - 1), min_size=1, max_size=CAPACITY), min_size=1, max_size=5
)
many = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request, checkpoint, artifact, tmp_path_factory):
    """One checkpoint and its artifact: batch 3, more rows in slices."""
    family, backend = request.param
    if family in tiny.DECODERS:
        # So many that native code has equal layers compiled once, those of gemma2 by twos.
        source = checkpoint(family, num_hidden_layers=4 if backend == "aoti" else 2)
    else:
        source = zoo.make(tmp_path_factory.mktemp("zoo") / family, family)
    # A level at which libraries stand alone whatever the CPU, and which test_standalone.py runs without PyTorch.
    level = {"isa": "avx2"} if request.param == FAST[0] else {}
    shapes = {"batch_size": 3, "sequence_length": (CAPACITY,), "dynamic_batch_size": True}
    compiled = artifact(source, backend=backend, **shapes, **level)
    return source, CompiledModelForCausalLM.from_pretrained(compiled)


@many
@given(rows=rows_of_any_length, side=st.sampled_from(["left", "right", "middle"]))
def test_logits_are_those_of_the_unpadded_row(pair, rows, side):
    source, model = pair
    oracle.check_logits(source, model, rows, side)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_greedy_tokens_are_transformers_own(pair, side):
    source, model = pair
    oracle.check_greedy(source, model, side, 20)


def test_a_cache_filled_to_the_brim(pair):
    """The last token that fits, and what attention looks at when that is everything."""
    source, model = pair
    oracle.check_brim(source, model, CAPACITY)


def test_sessions_have_caches_of_their_own(pair):
    source, model = pair
    other = model.new_session()
    first, second = [5, 9, 30, 7, 200], [80, 81]
    streams = [each.stream(np.array([row]), max_new_tokens=8) for each, row in ((model, first), (other, second))]
    found = list(zip(*streams, strict=False))
    for row, tokens in zip((first, second), zip(*found, strict=True), strict=True):
        assert oracle.greedy(source, row, max_new_tokens=8)[: len(tokens)] == list(tokens)


both = pytest.mark.parametrize("pair", FAST, ids="-".join, indirect=True)


@both
def test_a_dropped_model_leaves_nothing_open(pair):
    processes.check_loads(pair[1].artifact.path)


@both
def test_a_graph_that_is_exchanged_before_it_is_opened_is_not_run(pair, tmp_path):
    """Graphs are opened when first used: what took one's place meanwhile, as large and as old, is found out."""
    folder = shutil.copytree(pair[1].artifact.path, tmp_path / "copy")
    model = CompiledModelForCausalLM.from_pretrained(folder)
    file = folder / model.artifact.contract.variants[0].graphs[0].file
    before, other = file.stat(), tmp_path / "other"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    other.write_bytes(data)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    with pytest.raises(IntegrityError, match="was replaced after it was verified"):
        model.generate([[5, 9, 30]], max_new_tokens=2)


@pytest.mark.parametrize("pair", [FAST[0], pytest.param(FAST[1], marks=pytest.mark.slow)], ids="-".join, indirect=True)
def test_a_fork_goes_on_or_is_told_why_not(pair):
    artifact = pair[1].artifact
    processes.check_fork(artifact.path, has_threads=artifact.contract.variants[0].abi > 0)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [FAST[0], *((each, "aoti") for each in COMPILED)], ids="-".join, indirect=True)
def test_native_code_needs_no_torch(pair):
    source, model = pair
    assert model.artifact.contract.variants[0].requires_torch == []
    row = [5, 9, 30, 7, 200, 41, 17]
    [found] = processes.generate_without_torch(model.artifact.path, [row], 12)
    assert found[len(row) :] == oracle.greedy(source, row, max_new_tokens=12)


AUDIT = """
import sys
import torch

from precast.runtime import CompiledModelForCausalLM

forbidden, seen = ("subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "socket.", "pickle.",
                   "tempfile.", "shutil."), []
sys.addaudithook(lambda event, arguments: seen.append(event) if event.startswith(forbidden) else None)
model = CompiledModelForCausalLM.from_pretrained(sys.argv[1])
model.generate([[5, 9, 30]], max_new_tokens=2)
found = list(seen)
sys.audit("pickle.find_class", "canary", "canary")
assert len(seen) == len(found) + 1, "the hook does not see"
print(found)
"""


def test_no_load_starts_connects_or_unpickles_anything(pair):
    folder = str(pair[1].artifact.path)
    done = subprocess.run([sys.executable, "-c", AUDIT, folder], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["export", "aoti"])
def test_static_graphs_take_prompts_of_any_length(checkpoint, artifact, backend):
    source = checkpoint("llama")
    compiled = artifact(source, backend=backend, sequence_length=(CAPACITY,), prefill_lengths=(4, 16))
    model = CompiledModelForCausalLM.from_pretrained(compiled)
    assert [graph.name for graph in model.variant.graphs] == ["prefill_4", "prefill_16", "decode"]
    for length in (1, 3, 5, 17, 40):
        row = [(7 * n + length) % 300 + 3 for n in range(length)]
        found = model.generate(np.array([row]), max_new_tokens=8, do_sample=False)
        assert found[0, length:].tolist() == oracle.greedy(source, row, max_new_tokens=8)


@pytest.mark.parametrize("backend", ["export", pytest.param("aoti", marks=pytest.mark.slow)])
def test_guesses_are_checked_in_one_step(checkpoint, artifact, backend):
    """Prompt lookup: several tokens after a past, one row."""
    source = checkpoint("llama")
    model = CompiledModelForCausalLM.from_pretrained(artifact(source, backend=backend))
    row = [5, 9, 30, 7, 200, 5, 9, 30, 7, 200, 5, 9]
    found = model.generate(np.array([row]), max_new_tokens=16, prompt_lookup_num_tokens=4)
    assert found[0, len(row) :].tolist() == oracle.greedy(source, row, max_new_tokens=16)


@pytest.mark.parametrize("backend", ["export", pytest.param("aoti", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "int8"},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({"quantize": "int4"}, {"kv_cache": "int8"})),
    ],
    ids=str,
)
def test_rounded_models_pass_validation(checkpoint, tmp_path, backend, options):
    """Held to the loss of their scheme, as with the other backend; tiny random models lose more than real ones."""
    asked = ExportOptions(sequence_length=(CAPACITY,), backend=backend, accept_loss=True, **options)
    found = export(str(checkpoint("llama")), tmp_path / "out", asked)
    assert found.contract.variants[0].accuracy.status in ("passed", "accepted")
    assert found.contract.variants[0].accuracy.figures["kl_divergence"] < 0.5


@pytest.mark.parametrize("backend", ["export", pytest.param("aoti", marks=pytest.mark.slow)])
def test_encoders_in_buckets(checkpoint, artifact, backend):
    source = checkpoint("bert")
    options = {"batch_size": 2, "sequence_length": (16, 48), "task": "fill-mask", "dynamic_batch_size": True}
    model = CompiledModel.from_pretrained(artifact(source, backend=backend, **options))
    rows = [[5, 9, 30, 7], [80], [(7 * n) % 300 + 3 for n in range(40)]]
    for side in ("left", "right"):
        ids, mask = oracle.padded(rows, side)
        found = model(ids, mask).logits
        for row, values, keep in zip(rows, found, mask, strict=True):
            with torch.inference_mode():
                expected = oracle.eager(source, "AutoModelForMaskedLM")(input_ids=torch.tensor([row])).logits[0].numpy()
            assert np.abs(values[keep == 1] - expected).max() < 1e-4
