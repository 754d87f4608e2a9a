"""An artifact in stages: processes that each have some of the layers, and give the model's own answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from ranks import PRECAST, eager_tokens, kill_at_random, others_than, run, workers_of
from transformers import AutoConfig

from precast.exporter import ExportOptions, export
from precast.exporter.checkpoint.resolve import resolve
from precast.runtime import CompiledModel, CompiledModelForCausalLM
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.tasks import get_task
from precast.runtime.distributed.convert import join
from precast.runtime.errors import HostError, IntegrityError, UsageError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ranks share memory as Linux has it")
PROMPTS = np.random.default_rng(0).integers(3, tiny.VOCABULARY, (3, 7))


@pytest.fixture(scope="module")
def source(checkpoint) -> Path:
    return checkpoint("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def made(source, artifact) -> Path:
    return artifact(source, pipeline_parallel=2, validate=True)


@pytest.fixture(scope="module")
def model(made):
    return CompiledModelForCausalLM.from_pretrained(made)


def generate(model, ids, count: int, **options):
    return model.generate(ids, max_new_tokens=count, eos_token_id=[], **options)


def test_tokens_are_those_of_the_eager_model(model, made, source):
    assert read_artifact(made).contract.variants[0].accuracy.status == "passed"
    for ids in PROMPTS:
        assert np.array_equal(generate(model, ids[None], 20), eager_tokens(source, ids[None], 20))


def test_logits_are_those_of_one_process(model, source, artifact):
    whole = CompiledModelForCausalLM.from_pretrained(artifact(source))
    for asked in (model, whole):
        asked.generate(PROMPTS[:1], max_new_tokens=1, eos_token_id=[])
    found, right = (each(input_ids=PROMPTS[:1]).logits for each in (model, whole))
    assert np.abs(found - right).max() <= 1e-5


def test_kept_prompts_and_sessions_have_caches_on_all_ranks(model, source):
    right = eager_tokens(source, PROMPTS[:1], 8)
    assert np.array_equal(generate(model, right, 8), eager_tokens(source, right, 8))
    other = model.new_session()
    assert np.array_equal(generate(other, PROMPTS[1:2], 4), eager_tokens(source, PROMPTS[1:2], 4))
    longer = eager_tokens(source, right, 8)
    assert np.array_equal(generate(model, longer, 2), eager_tokens(source, longer, 2))


def test_rank_0_has_the_caches_of_its_own_layers_alone(model):
    generate(model, PROMPTS[:1], 4)
    caches = model._session._caches
    assert [bool(caches[f"past_key_values.{layer}.key"].any()) for layer in range(2)] == [True, False]


def test_each_stage_has_files_of_its_own(made):
    (variant,) = read_artifact(made).contract.variants
    assert variant.name == "onnx-pp2"
    assert variant.weights == ["stage_0/model.onnx.data", "stage_1/model.onnx.data"]
    assert [stage.weights for stage in variant.stages] == [[name] for name in variant.weights]
    assert [[graph.file for graph in stage.graphs] for stage in variant.stages] == [
        ["stage_0/model.onnx"], ["stage_1/model.onnx"],
    ]  # fmt: skip
    sizes = [(made / name).stat().st_size for name in variant.weights]
    assert max(sizes) < 1.1 * min(sizes)


def test_a_batch_and_its_beams_move_caches_on_all_ranks(source, artifact):
    model = CompiledModelForCausalLM.from_pretrained(artifact(source, pipeline_parallel=2, batch_size=3))
    found = generate(model, PROMPTS, 9)
    for row, ids in zip(found, PROMPTS, strict=True):
        assert np.array_equal(row[None], eager_tokens(source, ids[None], 9))
    beams = generate(model, PROMPTS[:1], 9, num_beams=3)
    assert np.array_equal(beams, eager_tokens(source, PROMPTS[:1], 9, num_beams=3))


def test_a_stage_that_is_killed_ends_all_with_its_reason(made):
    model = CompiledModelForCausalLM.from_pretrained(made)
    generate(model, PROMPTS[:1], 2)
    (worker,) = set(workers_of(made)) - others_than(model)
    os.kill(worker, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(HostError, match=r"Rank 1 of 2 has failed: it was killed by SIGKILL; see .*rank_1.log"):
        generate(model, PROMPTS[1:2], 40)
    assert time.monotonic() - began < 5


def test_a_stage_that_shows_no_life_is_not_waited_for_longer_than_the_limit(made):
    model = CompiledModelForCausalLM.from_pretrained(made, rank_timeout=0.8)
    # One that takes longer shows that it is at it.
    (process,) = model._engine._group._processes.values()
    os.kill(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(HostError, match=r"lost each other: .*(gave no sign of life|took no command) within 0.8 "):
        generate(model, PROMPTS[:1], 20)
    assert time.monotonic() - began < 5
    os.kill(process.pid, signal.SIGCONT)


def test_an_interrupt_in_a_step_ends_the_stages_at_once(made, monkeypatch):
    model = CompiledModelForCausalLM.from_pretrained(made)
    (process,) = model._engine._group._processes.values()

    def interrupt(*_):
        raise KeyboardInterrupt

    generate(model, PROMPTS[:1], 2)
    monkeypatch.setattr("precast.runtime.engines.onnx._BoundGraph.__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS[1:2], 2)
    monkeypatch.undo()
    assert process.wait(5) == 0
    with pytest.raises(HostError, match="Rank 0 of 2 has failed: it was interrupted in a step"):
        generate(model, PROMPTS[:1], 2)


def test_a_file_of_a_stage_that_is_altered_or_missing_is_refused(made, tmp_path):
    for name, change in {
        "altered": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"),
        "missing": Path.unlink,
    }.items():
        copy = tmp_path / name
        shutil.copytree(made, copy)
        change(copy / "stage_1" / "model.onnx.data")
        with pytest.raises(IntegrityError, match=r"stage_1/model.onnx.data"):
            CompiledModelForCausalLM.from_pretrained(copy)
        assert not workers_of(copy)


def test_what_stages_do_not_do_is_refused(made, tmp_path):
    with pytest.raises(UsageError, match="provider='openvino': this model is 2 processes"):
        CompiledModel.from_pretrained(made, provider="openvino")
    with pytest.raises(UsageError, match="has whole layers in each of its stages"):
        join(made, tmp_path / "whole", trust_native_code=True)


def test_the_command_line_runs_stages(made):
    asked = [*PRECAST, "generate", str(made), "--prompt", "Water boils", "--max-new-tokens", "5", "--json"]
    plain, counted = run(asked), run([*asked, "--nproc", "2"])
    assert plain.returncode == counted.returncode == 0, plain.stderr + counted.stderr
    assert json.loads(plain.stdout)["text"] == json.loads(counted.stdout)["text"]
    wrong = run([*asked, "--nproc", "4"])
    assert wrong.returncode == 2
    assert re.search(
        r"--nproc 4 processes are asked for, and this artifact is compiled for 2: .*--pipeline-parallel 4", wrong.stderr
    )
    shown = run([*PRECAST, "inspect", str(made)]).stdout
    assert "2 processes, with 1, 1 cached layers and weights of" in " ".join(shown.split())


def test_stages_that_a_launcher_has_started_meet(made):
    asked = [*PRECAST, "generate", str(made), "--prompt", "Water boils", "--max-new-tokens", "5", "--json"]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29521"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(asked, env={**os.environ, **place, "RANK": "1"}, **pipes) as other:
        first = run(asked, **place, RANK="0")
        out, err = other.communicate(timeout=60)
    assert first.returncode == other.returncode == 0, (first.stderr, err)
    assert json.loads(first.stdout)["text"]
    assert out == ""


FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 64},
    "gptj": {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 64, "rotary_dim": 4},
    "bloom": {"n_head": 4, "n_layer": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "falcon": {"num_kv_heads": 4},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def compiled(source: Path, target: Path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export(str(source), target, ExportOptions(**{"sequence_length": 48, "pipeline_parallel": 2, **options}))


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind, stages, tmp_path):
    """Validation at export holds the stages to the eager model's logits and tokens; here is a prompt of our own."""
    config = AutoConfig.for_model(kind, **{**tiny._SHARED, "num_hidden_layers": 4, **FAMILIES[kind]})
    source = tiny.save_checkpoint(tmp_path / "checkpoint", config)
    made = compiled(source, tmp_path / "out", pipeline_parallel=stages)
    accuracy = made.contract.variants[0].accuracy
    assert accuracy.status == "passed"
    assert accuracy.figures["max_abs_difference"] <= 1e-5 * max(1.0, accuracy.figures["max_abs_reference"])
    found = generate(CompiledModelForCausalLM.from_pretrained(made.path), PROMPTS[:1], 9)
    assert np.array_equal(found, eager_tokens(source, PROMPTS[:1], 9))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "int8"},
        {"quantize": "int4", "group_size": 32},
        {"quantize": "a8w8"},
        {"quantize": "int8", "format": "qdq"},
        {"kv_cache": "int8"},
        {"prefill_lengths": (8, 16), "batch_size": 2},
        {"also": ("export",)},
        {"backend": "export"},
        {"backend": "export", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_options_give_what_one_process_gives(options, source, tmp_path):
    """What is rounded is rounded alike, so that bits of tokens are those of the same options without stages."""
    both = {"validate": False, **options}
    made, whole = (
        compiled(source, tmp_path / "two", **both),
        compiled(source, tmp_path / "one", **both, pipeline_parallel=1),
    )
    found, right = (
        generate(CompiledModelForCausalLM.from_pretrained(each.path), PROMPTS[:1], 12) for each in (made, whole)
    )
    assert np.array_equal(found, right)


@pytest.mark.slow
def test_kills_at_random_moments_leave_no_orphan_and_no_hang(made, tmp_path):
    kill_at_random(shutil.copytree(made, tmp_path / "copy"), 20)


SMOLLM2 = Path(__file__).parents[2] / "build" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.skipif(not SMOLLM2.exists(), reason="`make models` fetches the checkpoint")
def test_smollm2_in_two_stages(tmp_path):
    """Nine heads, which two ranks cannot share, and 30 layers, which they can."""
    made = compiled(SMOLLM2, tmp_path / "two", sequence_length=128)
    (variant,) = made.contract.variants
    assert variant.accuracy.status == "passed"
    sizes = [sum(made.contract.files[name].size for name in stage.weights) for stage in variant.stages]
    assert max(sizes) < 1.1 * min(sizes)
    model = CompiledModelForCausalLM.from_pretrained(made.path)
    checkpoint = resolve(str(SMOLLM2), ExportOptions())
    eager, ids = checkpoint.load(get_task("text-generation"), "float32"), model.tokenizer.encode("Water boils at")
    right = eager.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24, pad_token_id=0)
    assert np.array_equal(model.generate([ids], max_new_tokens=24), right.numpy()[:, : len(ids) + 24])
