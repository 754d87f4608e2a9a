"""What the support table is used for: early refusal, and telling what a model can be exported for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from precast.exporter import support
from precast.exporter.checkpoint.early import check_supported, read_config
from precast.exporter.support import Support, infer_task, supported_tasks, supported_types
from precast.runtime.errors import CheckpointError, UsageError

TABLE = (
    Support("llama", "text-generation", "operator", 1e-6),
    Support("llama", "text-classification", "encoder", 1e-6),
    Support("llamoid", "text-generation", reason="its caches are made of cheese"),
    Support("mixed", "text-generation", reason="it counts sheep"),
    Support("mixed", "fill-mask", "encoder", 1e-6),
)


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(support, "table", lambda: TABLE)


@pytest.fixture
def checkpoint_of(tmp_path):
    """`checkpoint_of("llama", "LlamaForCausalLM")`: a directory with that config.json and nothing else."""

    def make(model_type: str, architecture: str | None = None, **more: object) -> str:
        config = {"model_type": model_type, "architectures": [architecture] if architecture else None, **more}
        (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
        return str(tmp_path)

    return make


def test_a_refused_type_is_refused_with_its_reason_and_what_is_nearest(known, checkpoint_of):
    with pytest.raises(CheckpointError) as caught:
        check_supported(checkpoint_of("llamoid", "LlamoidForCausalLM"))
    message = str(caught.value)
    assert "'llamoid'" in message
    assert "made of cheese" in message
    assert "The nearest types that work: llama." in message
    assert "precast tasks --task text-generation" in message


def test_a_type_that_can_do_something_else_says_what(known, checkpoint_of):
    with pytest.raises(CheckpointError, match=r"sheep.*can be exported for: fill-mask"):
        check_supported(checkpoint_of("mixed", "MixedForCausalLM"))
    check_supported(checkpoint_of("mixed", "MixedForCausalLM"), "fill-mask")
    check_supported(checkpoint_of("mixed", "MixedForMaskedLM"))


def test_a_type_that_can_do_nothing_is_refused_whatever_its_class(known, checkpoint_of):
    with pytest.raises(CheckpointError, match="cheese"):
        check_supported(checkpoint_of("llamoid"))
    with pytest.raises(CheckpointError, match="cheese"):
        check_supported(checkpoint_of("llamoid", "LlamoidForDancing"))


@pytest.mark.parametrize("model_type", ["llama", "never-tried"])
def test_what_is_not_known_to_fail_goes_on(known, checkpoint_of, model_type):
    check_supported(checkpoint_of(model_type, "WhateverForCausalLM"))


def test_code_of_its_own_is_not_judged_by_the_type_it_claims(known, checkpoint_of):
    given = checkpoint_of("llamoid", "LlamoidForCausalLM", auto_map={"AutoModelForCausalLM": "code.Llamoid"})
    check_supported(given, trust_remote_code=True)
    with pytest.raises(CheckpointError, match="cheese"):
        check_supported(given)


def test_a_task_that_does_not_exist_is_said_to(known, checkpoint_of):
    with pytest.raises(UsageError, match="There is no task 'text-generaton'"):
        check_supported(checkpoint_of("llama", "LlamaForCausalLM"), "text-generaton")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_a_broken_configuration_is_for_whoever_opens_it(known, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert read_config(str(tmp_path)) is None
    check_supported(str(tmp_path))


def test_what_is_not_there_is_not_a_checkpoint(known, tmp_path):
    assert read_config(str(tmp_path / "nothing")) is None
    with pytest.raises(CheckpointError, match="neither a local path nor a checkpoint"):
        read_config("nobody/nothing")


def test_the_head_of_a_gguf_file_names_its_type(tmp_path):
    import gguf

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_config(str(path)) == {"model_type": "qwen2", "architectures": ["ForCausalLM"]}
    path.write_bytes(b"GGUF")
    assert read_config(str(path)) is None
    assert read_config(str(tmp_path / "none.gguf")) is None


def test_tasks_and_types_are_looked_up(known):
    assert list(supported_tasks("mixed")) == ["text-generation", "fill-mask"]
    assert supported_tasks("never-tried") == {}
    assert supported_types("text-generation") == ["llama"]
    assert infer_task({"architectures": ["BertForMaskedLM"]}) == "fill-mask"
    assert infer_task({"architectures": ["GPT2LMHeadModel"]}) == "text-generation"
    assert infer_task({}) is None


def test_the_command_refuses_without_torch_and_before_any_weights(checkpoint_of, tmp_path):
    """There is not even a weights file here."""
    refused = next(line for line in support.table() if line.reason and line.task == "text-generation")
    code = (
        "import sys; from precast.cli import main\n"
        f"sys.argv = ['precast', 'export', {checkpoint_of(refused.model_type, 'XForCausalLM')!r}, '-o', 'out']\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert refused.reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
