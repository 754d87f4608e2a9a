"""The commands that read artifacts: their output, their JSON, their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from precast.cli import COMMANDS, cli, main
from precast.runtime import CompiledModelForCausalLM


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("inspect", path)`: exit code, standard output, standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["precast", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_generate_streams_the_text_and_says_how_fast(run, decoder):
    code, out, err = run("generate", decoder, "--prompt", "Water boils", "--max-new-tokens", 12, "-q")
    model = CompiledModelForCausalLM.from_pretrained(decoder)
    ids = model.tokenizer.encode("Water boils")
    expected = model.tokenizer.decode(model.generate([ids], max_new_tokens=12)[0, len(ids) :])
    assert (code, out, err) == (0, expected + "\n", "")
    _, _, err = run("generate", decoder, "--prompt", "Water boils", "--max-new-tokens", 12)
    assert "tokens/s, first token after" in err


def test_generate_json_is_one_document(run, decoder):
    code, out, _ = run("generate", decoder, "--prompt", "Water", "--max_new_tokens", 3, "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer.keys() == {"text", "prompt_tokens", "new_tokens", "decode_tokens_per_second", "first_token_seconds"}


def test_generate_chat_uses_the_template_and_stdin(run, decoder, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好".encode()), encoding="utf-8"))
    code, out, _ = run("generate", decoder, "--chat", "--system", "Be brief.", "--max-new-tokens", 4, "--json")
    model = CompiledModelForCausalLM.from_pretrained(decoder)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]
    expected = model.tokenizer.encode(model.tokenizer.apply_chat_template(talk), add_special_tokens=False)
    assert (code, json.loads(out)["prompt_tokens"]) == (0, len(expected))


def test_generate_samples_when_told_how(run, decoder):
    base = ("generate", decoder, "--prompt", "Water", "--max-new-tokens", 8, "-q")
    seeded = [run(*base, "--temperature", 5, "--seed", 3)[1] for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert seeded[0] != run(*base, "--temperature", 5, "--seed", 4)[1]
    assert run(*base, "--temperature", 0)[1] == run(*base)[1]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("generate", "{decoder}", "--prompt", "x " * 60), 2, r"prompt tokens.*capacity of 48"),
        (("generate", "{encoder}", "--prompt", "x"), 2, "compiled for feature-extraction"),
        (("generate", "{decoder}", "--prompt", ""), 2, "empty"),
        (("generate", "{decoder}", "--prompt", "x", "--top-p", "7"), 2, "top_p must lie between 0 and 1, not 7"),
        (("generate", "{decoder}", "--prompt", "x", "--system", "y"), 2, "add --chat"),
        (
            ("generate", "{decoder}", "--prompt", "x", "--prompt-lookup", "-1"),
            2,
            "prompt_lookup_num_tokens must be a whole number of at least 0",
        ),
        (("generate", "./missing", "--prompt", "x"), 1, "There is no directory ./missing"),
        (("generate", "{decoder}", "--prompt", "x", "--variant", "cuda"), 1, "no variant 'cuda'. It has: onnx"),
        (("generate", "{decoder}", "--prompt", "x", "--sha256", "0" * 64), 1, "not 000"),
        (("inspect", "{decoder}/model.onnx"), 1, "is a file; a precast artifact is a directory"),
        (("push", "{decoder}/missing", "user/repo"), 1, "There is no directory"),
        (("nonsense",), 2, "No such command 'nonsense'"),
        (("inspect",), 2, "Missing argument 'MODEL'"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line_and_the_right_code(run, decoder, encoder, words, code, message):
    import re

    words = [word.format(decoder=decoder, encoder=encoder) for word in words]
    found, out, err = run(*words)
    assert (found, out) == (code, "")
    assert re.search(message, err)
    assert "Traceback" not in err
    if words[0] != "nonsense":
        found, out, _ = run(*words, "--json")
        assert found == code
        assert json.loads(out)["error"]["message"]


def test_inspect_tells_what_is_there(run, decoder):
    code, out, _ = run("inspect", decoder)
    assert code == 0
    for part in (
        "text-generation",
        "runs here",
        "skipped: not validated",
        "decoder, batch 1, length 1–48",
        "trust tier graph",
    ):
        assert part in out
    _, out, _ = run("inspect", decoder, "--json", "--verify")
    assert json.loads(out)["refused"] == [None]


def test_env_names_versions_without_importing(run):
    code, out, _ = run("env", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["onnxruntime"]
    assert facts["backends"].startswith("onnx")


def test_completion_scripts_are_printed(run):
    assert "_PRECAST_COMPLETE" in run("completion", "bash")[1]
    assert run("completion", "tcsh")[0] == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_hyphens(run, name):
    code, out, _ = run(name, "-h")
    assert code == 0
    assert out.startswith("Usage: precast")
    command = cli.get_command(None, name)
    for parameter in command.params:
        for option in parameter.opts:
            assert "_" not in option or not option.startswith("-")


def test_help_imports_none_of_the_heavy_libraries():
    code = """
import sys
from precast.cli import main
sys.argv = ["precast", "--help"]
try:
    main()
except SystemExit:
    heavy = {"torch", "transformers", "onnxruntime", "numpy", "rich", "huggingface_hub"}
    print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_debugger_gets_the_traceback(run, monkeypatch):
    monkeypatch.setenv("PRECAST_DEBUG", "1")
    with pytest.raises(Exception, match="There is no directory"):
        run("inspect", "./missing")
