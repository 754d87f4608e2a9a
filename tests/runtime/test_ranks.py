"""An artifact for several ranks: processes that each have a part of the weights, and give the model's own answers."""

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
from msgspec.structs import replace
from ranks import PRECAST, eager_tokens, endless, kill_at_random, others_than, run, wait_until, workers_of
from transformers import AutoConfig

from precast.exporter import ExportOptions, export
from precast.exporter.checkpoint.resolve import resolve
from precast.runtime import CompiledModel, CompiledModelForCausalLM
from precast.runtime.artifact.ranks import ranks_problem
from precast.runtime.artifact.schema import Split
from precast.runtime.artifact.tasks import get_task
from precast.runtime.distributed import launcher, rendezvous, shared_memory
from precast.runtime.distributed.checks import check_asked
from precast.runtime.distributed.convert import join, split
from precast.runtime.distributed.rendezvous import Place, find_place, leave, meet
from precast.runtime.engines import Settings
from precast.runtime.errors import HostError, IntegrityError, UsageError

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ranks share memory as Linux has it"),
    # Tests beside each other have a core each.
    pytest.mark.filterwarnings("ignore:.*they will wait for each other"),
]
CAPACITY = 48
PROMPTS = np.random.default_rng(0).integers(3, tiny.VOCABULARY, (3, 7))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    changes = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), tiny.config_for("llama", **changes))


def compiled(checkpoint: Path, target: Path, **options):
    asked = {"backend": "aoti", "sequence_length": CAPACITY, "tensor_parallel": 2, **options}
    with warnings.catch_warnings():
        # Of more ranks than cores, and of dtypes that this CPU does not multiply.
        warnings.simplefilter("ignore")
        return export(str(checkpoint), target, ExportOptions(**asked))


@pytest.fixture(scope="module")
def artifact(checkpoint, tmp_path_factory):
    return compiled(checkpoint, tmp_path_factory.mktemp("ranks") / "out")


@pytest.fixture(scope="module")
def model(artifact):
    return CompiledModelForCausalLM.from_pretrained(artifact.path)


def test_tokens_are_those_of_the_eager_model(model, checkpoint):
    for ids in PROMPTS:
        found = model.generate(ids[None], max_new_tokens=20, eos_token_id=[])
        assert np.array_equal(found, eager_tokens(checkpoint, ids[None], 20))


def test_beams_and_kept_prompts_move_caches_on_all_ranks(model, checkpoint):
    right = eager_tokens(checkpoint, PROMPTS[:1], 8)
    longer = model.generate(right, max_new_tokens=8, eos_token_id=[])
    assert np.array_equal(longer, eager_tokens(checkpoint, right, 8))
    other = model.new_session()
    assert np.array_equal(other.generate(PROMPTS[1:2], max_new_tokens=4, eos_token_id=[])[:, :11],
                          eager_tokens(checkpoint, PROMPTS[1:2], 4))  # fmt: skip
    # The first session has its own caches still.
    assert np.array_equal(model.generate(longer, max_new_tokens=2, eos_token_id=[]),
                          eager_tokens(checkpoint, longer, 2))  # fmt: skip


def test_the_contract_says_how_weights_are_divided(artifact):
    (variant,) = artifact.contract.variants
    assert variant.name == "aoti-tp2"
    assert variant.ranks.count == variant.ranks.stored == 2
    assert variant.weights == ["model.safetensors", "rank_0/model.safetensors", "rank_1/model.safetensors"]
    sizes = {name: artifact.contract.files[name].size for name in variant.weights}
    assert sizes["rank_0/model.safetensors"] == sizes["rank_1/model.safetensors"] > 10 * sizes["model.safetensors"]
    assert artifact.contract.variants[0].graphs[0].cache[0].heads == 1


def test_inspect_tells_of_ranks(artifact):
    shown = run([*PRECAST, "inspect", str(artifact.path)]).stdout
    assert "2 processes, weights in 2 parts" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stored": 3}, "has weights of rank_0, rank_1, stored in 3 parts"),
        ({"count": 3}, "gives each part of .* to 2 ranks, of 3"),
    ],
)
def test_a_contract_whose_ranks_do_not_fit_is_refused(artifact, changes, words):
    (variant,) = artifact.contract.variants
    splits = {**variant.ranks.splits, "x": Split(dim=0, copies=2)} if "count" in changes else variant.ranks.splits
    bad = replace(variant, ranks=replace(variant.ranks, splits=splits, **changes))
    assert re.search(words, ranks_problem(bad))


def test_full_to_parts_to_full_is_bit_equal(artifact, model, tmp_path):
    whole = join(artifact.path, tmp_path / "whole")
    assert whole.contract.variants[0].weights == ["model.safetensors"]
    found = CompiledModelForCausalLM.from_pretrained(whole.path).generate(
        PROMPTS[:1], max_new_tokens=9, eos_token_id=[]
    )
    assert np.array_equal(found, model.generate(PROMPTS[:1], max_new_tokens=9, eos_token_id=[]))
    again = split(whole.path, 2, tmp_path / "two")
    assert again.contract.digest == artifact.contract.digest
    four = split(again.path, 4, tmp_path / "four")
    with pytest.raises(UsageError, match=r"compiled for 2 ranks, and its weights lie in 4 parts: precast split .*four"):
        CompiledModel.from_pretrained(four.path)
    assert join(four.path, tmp_path / "back").contract.digest == whole.contract.digest
    with pytest.raises(UsageError, match="which 5 ranks cannot share equally"):
        split(whole.path, 5, tmp_path / "five")
    assert not (tmp_path / "five").exists()


def test_a_rank_that_is_killed_ends_all_with_its_reason(artifact):
    model = CompiledModelForCausalLM.from_pretrained(artifact.path)
    (worker,) = set(workers_of(artifact.path)) - others_than(model)
    os.kill(worker, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(HostError, match=r"Rank 1 of 2 has failed: it was killed by SIGKILL; see .*rank_1.log"):
        model.generate(PROMPTS[:1], max_new_tokens=40, eos_token_id=[])
    assert time.monotonic() - began < 5
    with pytest.raises(HostError, match="SIGKILL"):
        model.generate(PROMPTS[:1], max_new_tokens=1)


@pytest.mark.parametrize("when", ["ready", "loading"])
def test_no_rank_outlives_rank_0(artifact, tmp_path, when):
    copy = tmp_path / "copy"
    shutil.copytree(artifact.path, copy)
    with endless(copy) as process:
        if when == "ready":
            assert process.stdout.readline() == "ready\n"
        else:
            wait_until(lambda: workers_of(copy), 30)
        assert workers_of(copy)
        process.kill()
    wait_until(lambda: not workers_of(copy), 5)


def test_a_model_that_is_let_go_ends_its_ranks(artifact, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifact.path, copy)
    model = CompiledModelForCausalLM.from_pretrained(copy, sha256=artifact.contract.digest)
    logs = model._engine._group.logs
    assert len(workers_of(copy)) == 1
    assert (logs / "rank_1.log").exists()
    del model
    wait_until(lambda: not workers_of(copy), 5)
    wait_until(lambda: not logs.exists(), 5)


def test_a_file_of_a_rank_that_is_altered_or_missing_is_refused(artifact, tmp_path):
    for name, change in {
        "altered": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"),
        "missing": Path.unlink,
    }.items():
        copy = tmp_path / name
        shutil.copytree(artifact.path, copy)
        change(copy / "rank_1" / "model.safetensors")
        with pytest.raises(IntegrityError, match=r"rank_1/model.safetensors"):
            CompiledModelForCausalLM.from_pretrained(copy)
    assert not workers_of(tmp_path / "altered")


def test_the_command_line_runs_ranks(artifact, tmp_path):
    asked = [*PRECAST, "generate", str(artifact.path), "--prompt", "Water boils", "--max-new-tokens", "5", "--json"]
    plain, counted = run(asked), run([*asked, "--nproc", "2"])
    assert plain.returncode == counted.returncode == 0, plain.stderr + counted.stderr
    assert json.loads(plain.stdout)["text"] == json.loads(counted.stdout)["text"]
    logged = run([*asked, "--rank-timeout", "30", "--log-dir", str(tmp_path / "logs")])
    assert json.loads(logged.stdout)["text"] == json.loads(plain.stdout)["text"]
    assert [each.name for each in (tmp_path / "logs").iterdir()] == ["rank_1.log"]
    wrong = run([*asked, "--nproc", "4"])
    assert wrong.returncode == 2
    assert "--nproc 4 processes are asked for, and this artifact is compiled for 2" in wrong.stderr
    joined = run([*PRECAST, "join", str(artifact.path), "-o", str(tmp_path / "whole"), "--json"])
    assert joined.returncode == 0, joined.stderr
    divided = run([*PRECAST, "split", str(tmp_path / "whole"), "--ranks", "2", "-o", str(tmp_path / "parts"), "--json"])
    assert json.loads(divided.stdout)["digest"] == artifact.contract.digest


def test_ranks_that_a_launcher_has_started_meet(artifact):
    """As torchrun starts them: the same command for each, told apart by the environment."""
    asked = [*PRECAST, "generate", str(artifact.path), "--prompt", "Water boils", "--max-new-tokens", "5", "--json"]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(asked, env={**os.environ, **place, "RANK": "1"}, **pipes) as other:
        first = run(asked, **place, RANK="0")
        out, err = other.communicate(timeout=60)
    assert first.returncode == other.returncode == 0, (first.stderr, err)
    assert json.loads(first.stdout)["text"] == json.loads(run(asked).stdout)["text"]
    assert out == ""
    assert not list(Path("/dev/shm").glob(f"precast-{os.getuid()}-{os.getpid()}-*"))
    own = run([*asked, "--log-dir", "logs"], **place, RANK="0")
    assert "--log-dir logs is for ranks that precast starts, and torchrun has started these" in own.stderr
    wrong = run(asked, **place | {"WORLD_SIZE": "3"}, RANK="0")
    assert wrong.returncode == 2
    assert "torchrun has started 3 processes, and this artifact is compiled for 2" in wrong.stderr


def test_ranks_of_other_models_or_versions_end_by_name(artifact, tmp_path, monkeypatch):
    join(artifact.path, tmp_path / "other")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
    asked = ["--prompt", "a", "--max-new-tokens", "2"]
    with subprocess.Popen(
        [*PRECAST, "generate", str(tmp_path / "other"), "--trust-native-code", *asked],
        env={**os.environ, **place, "RANK": "1"}, stderr=subprocess.PIPE,
    ) as other:  # fmt: skip
        first = run([*PRECAST, "generate", str(artifact.path), *asked], **place, RANK="0")
        assert other.wait(60) != 0
    digest = artifact.contract.digest
    assert f"rank 0 has opened an artifact with the digest {digest}, and this rank one with " in first.stderr
    assert "Traceback" not in first.stderr
    place = Place(0, 2, f"precast-versions-{os.getpid()}")
    memory = meet(place)
    assert memory.ranks == 2
    monkeypatch.setattr(rendezvous, "installed_version", lambda name: "9.9")
    with pytest.raises(HostError, match=r"Rank 0 runs precast \d.*, and this rank precast 9\.9: start all with one"):
        meet(Place(1, 2, place.name))
    leave(place)


def test_places_that_contradict_themselves_are_refused():
    assert find_place({}) is None
    with pytest.raises(UsageError, match="RANK='2' and WORLD_SIZE='2'"):
        find_place({"RANK": "2", "WORLD_SIZE": "2"})
    with pytest.raises(UsageError, match="2 of 4 ranks were started on this machine"):
        find_place({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})


def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_the_limit(artifact):
    model = CompiledModelForCausalLM.from_pretrained(artifact.path, rank_timeout=0.5)
    (worker,) = {process.pid for process in model._engine._group._processes.values()}
    os.kill(worker, signal.SIGSTOP)
    began = time.monotonic()
    words = r"lost each other: .*(did not come within|took no command within).*rank_timeout= lets them wait longer"
    with pytest.raises(HostError, match=words):
        model.generate(PROMPTS[:1], max_new_tokens=20, eos_token_id=[])
    assert time.monotonic() - began < 5


def test_every_rank_has_the_limit(artifact):
    """Rank 1 waits for nobody longer, whatever rank 0 does."""
    model = CompiledModelForCausalLM.from_pretrained(artifact.path, rank_timeout=7.5)
    (worker,) = {process.pid for process in model._engine._group._processes.values()}
    words = Path(f"/proc/{worker}/cmdline").read_bytes().decode().split("\0")
    assert words[words.index("--seconds") + 1] == "7.5"


def test_logs_in_a_folder_that_the_user_names_stay(artifact, tmp_path):
    logs = tmp_path / "some" / "logs"
    logs.mkdir(parents=True)
    (logs / "rank_1.log").write_text("of an earlier run\n")
    model = CompiledModelForCausalLM.from_pretrained(artifact.path, log_dir=logs)
    (process,) = model._engine._group._processes.values()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(HostError, match=rf"SIGKILL; see {re.escape(str(logs))}/rank_1.log"):
        model.generate(PROMPTS[:1], max_new_tokens=40, eos_token_id=[])
    again = CompiledModelForCausalLM.from_pretrained(artifact.path, log_dir=str(logs))
    again._engine._group.end()
    assert (logs / "rank_1.log").read_text() == "of an earlier run\nRank 1 ends, since rank 0: it is done.\n"
    (tmp_path / "rank_1.log").mkdir()
    for place, words in ((logs / "rank_1.log", "File exists"), (tmp_path, "rank_1.log: Is a directory")):
        with pytest.raises(UsageError, match=rf"log_dir={re.escape(str(place))} cannot be written into: .*{words}"):
            CompiledModelForCausalLM.from_pretrained(artifact.path, log_dir=place)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"rank_timeout": 0}, "rank_timeout must be a number of seconds above 0, not 0"),
        ({"rank_timeout": True}, "rank_timeout must be a number of seconds above 0, not True"),
        ({"log_dir": 3}, "log_dir must be the path of a folder, not 3"),
    ],
)
def test_options_of_ranks_that_mean_nothing(artifact, option, words):
    with pytest.raises(UsageError, match=words):
        CompiledModel.from_pretrained(artifact.path, **option)


def test_what_is_said_of_processes_is_refused_where_there_are_none(artifact):
    (variant,) = artifact.contract.variants
    for settings in (Settings(rank_timeout=5), Settings(log_dir=Path("logs"))):
        with pytest.raises(UsageError, match=r"=(5|logs) is for models of several ranks, and the variant aoti-tp2 is"):
            check_asked(replace(variant, ranks=None), None, settings)
    with pytest.raises(UsageError, match=r"nproc=2 is for ranks that are processes, and those of .* are NeuronCores"):
        check_asked(replace(variant, backend="neuron"), 2, Settings())


def test_an_interrupt_in_a_step_ends_the_ranks_at_once(artifact, monkeypatch):
    model = CompiledModelForCausalLM.from_pretrained(artifact.path)
    (process,) = model._engine._group._processes.values()

    def interrupt(*_):
        raise KeyboardInterrupt

    model.generate(PROMPTS[:1], max_new_tokens=2, eos_token_id=[])
    monkeypatch.setattr("precast.runtime.engines.aoti._Bound.__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPTS[1:2], max_new_tokens=2, eos_token_id=[])
    monkeypatch.undo()
    assert process.wait(5) == 0
    with pytest.raises(HostError, match="Rank 0 of 2 has failed: it was interrupted in a step"):
        model.generate(PROMPTS[:1], max_new_tokens=2, eos_token_id=[])


def test_cores_are_divided(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7, 9})
    assert [launcher.share_of_cores(rank, 2) for rank in range(2)] == [[4, 5], [6, 7]]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert launcher.share_of_cores(1, 2) == [3]


def test_more_ranks_than_there_is_room_for_are_refused():
    with pytest.raises(HostError, match="64 ranks are more than the 63"):
        shared_memory.GroupMemory.create(64)


FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {},
    "gemma2": {"head_dim": 16},
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": {"n_head": 4, "n_layer": 1},
    "olmo2": {},
    "starcoder2": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "deepseek_v3": {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 8, "q_lora_rank": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
                    "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 96, "head_dim": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def check_family(kind, tmp_path, **options) -> None:
    """Validation at export holds the ranks to the eager model's logits and tokens; here is a prompt of our own."""
    config = AutoConfig.for_model(kind, **{**tiny._SHARED, **FAMILIES[kind]})
    folder = tiny.save_checkpoint(tmp_path / "checkpoint", config)
    made = compiled(folder, tmp_path / "out", **options)
    assert made.contract.variants[0].accuracy.status == "passed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = CompiledModelForCausalLM.from_pretrained(made.path).generate(
            PROMPTS[:1], max_new_tokens=9, eos_token_id=[]
        )
    assert np.array_equal(found, eager_tokens(folder, PROMPTS[:1], 9))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind, ranks, tmp_path):
    check_family(kind, tmp_path, tensor_parallel=ranks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("parts", [{"moe_ep": 4}, {"moe_ep": 2, "online_split": True}], ids=str)
def test_experts_by_their_numbers(kind, parts, tmp_path):
    check_family(kind, tmp_path, tensor_parallel=4, **parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "int8"},
        {"quantize": "int8", "online_split": True},
        {"quantize": "int4", "symmetric": True, "group_size": 16},
        {"dtype": "bfloat16"},
        {"kv_cache": "float16"},
        {"prefill_lengths": (8, 16)},
        {"tensor_parallel": 4, "attn_tp": 2, "mlp_tp": 4},
        {"tensor_parallel": 4, "embed_tp": 1, "lmhead_tp": 1, "o_proj_tp": 2},
    ],
    ids=str,
)
def test_options(options, checkpoint, tmp_path):
    made = compiled(checkpoint, tmp_path / "out", accept_loss="quantize" in options or "dtype" in options, **options)
    assert made.contract.variants[0].accuracy.status in ("passed", "accepted")


@pytest.mark.slow
def test_a_batch_gives_each_row_its_own_answer(checkpoint, tmp_path):
    made = compiled(checkpoint, tmp_path / "out", batch_size=3)
    model = CompiledModelForCausalLM.from_pretrained(made.path)
    found = model.generate(PROMPTS, max_new_tokens=9, eos_token_id=[])
    for row, ids in zip(found, PROMPTS, strict=True):
        assert np.array_equal(row[None], eager_tokens(checkpoint, ids[None], 9))
    beams = model.generate(PROMPTS[:1], max_new_tokens=9, num_beams=3, eos_token_id=[])
    assert np.array_equal(beams, eager_tokens(checkpoint, PROMPTS[:1], 9, num_beams=3))


@pytest.mark.slow
def test_kills_at_random_moments_leave_no_orphan_and_no_hang(artifact, tmp_path):
    kill_at_random(shutil.copytree(artifact.path, tmp_path / "copy"), 50)


SMOLLM2 = Path(__file__).parents[2] / "build" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.skipif(not SMOLLM2.exists(), reason="`make models` fetches the checkpoint")
def test_smollm2_is_shared_by_three(tmp_path):
    """Nine heads and three key/value heads."""
    options = {"backend": "aoti", "sequence_length": 128}
    with pytest.raises(UsageError, match=r"2 cannot share the 9 attention heads and 3 key/value heads .* are 3, 9\."):
        export(str(SMOLLM2), tmp_path / "two", ExportOptions(**options, tensor_parallel=2))
    made = compiled(SMOLLM2, tmp_path / "three", tensor_parallel=3, sequence_length=128)
    assert made.contract.variants[0].accuracy.status == "passed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = CompiledModelForCausalLM.from_pretrained(made.path)
    checkpoint = resolve(str(SMOLLM2), ExportOptions())
    eager, ids = checkpoint.load(get_task("text-generation"), "float32"), model.tokenizer.encode("Water boils at")
    right = eager.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24, pad_token_id=0)
    assert np.array_equal(model.generate([ids], max_new_tokens=24), right.numpy()[:, : len(ids) + 24])
