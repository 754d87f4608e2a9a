"""The commands that read artifacts: their output, their JSON, their exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest

from precast.cli import COMMANDS, cli
from precast.cli.options import in_flags
from precast.runtime import CompiledModel, CompiledModelForCausalLM
from precast.runtime.errors import PrecastWarning, PublishError, UsageError


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
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好".encode()), encoding="utf-8"))
    code, out, _ = run("generate", decoder, "--chat", "--system", "Be brief.", "--max-new-tokens", 4, "--json")
    model = CompiledModelForCausalLM.from_pretrained(decoder)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]
    expected = model.tokenizer.encode(model.tokenizer.apply_chat_template(talk), add_special_tokens=False)
    assert (code, json.loads(out)["prompt_tokens"]) == (0, len(expected))


def test_generate_counts_one_token_without_a_speed(run, decoder):
    _, _, err = run("generate", decoder, "--prompt", "Water", "--max-new-tokens", 1)
    assert re.match(r"1 token, first token after [\d.]+ s", err)


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def test_generate_says_that_it_waits_for_a_terminal(run, decoder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO(b"Water")))
    _, _, err = run("generate", decoder, "--max-new-tokens", 1, "-q")
    assert err == "Type the prompt; Ctrl-D on a line of its own ends it.\n"


def test_generate_wants_text_from_standard_input(run, decoder, monkeypatch):
    """As a C locale opens it: bytes that are no text would pass, as halves of characters."""
    odd = io.TextIOWrapper(io.BytesIO(b"one\ncaf\xe9"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", odd)
    code, _, err = run("generate", decoder)
    assert (code, err) == (
        2, "precast: Standard input is not UTF-8 text: line 2 has the byte 0xe9. See precast generate -h.\n"
    )  # fmt: skip


def test_generate_samples_when_told_how(run, decoder):
    base = ("generate", decoder, "--prompt", "Water", "--max-new-tokens", 8, "-q")
    seeded = [run(*base, "--temperature", 5, "--seed", 3)[1] for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert seeded[0] != run(*base, "--temperature", 5, "--seed", 4)[1]
    assert run(*base, "--temperature", 0)[1] == run(*base)[1]


def test_generate_answers_in_a_form(run, decoder, tmp_path):
    (tmp_path / "schema.json").write_text('{"enum": ["a", "b", 7]}')
    (tmp_path / "rule.gbnf").write_text('root ::= "(" [ab] ")"')
    base = ("generate", decoder, "--prompt", "Water", "--max-new-tokens", 20, "-q")
    for asked, pattern in (
        (("--json-schema", tmp_path / "schema.json"), '"a"|"b"|7'),
        (("--grammar", tmp_path / "rule.gbnf"), r"\([ab]\)"),
        (("--regex", "x{3}y"), "xxxy"),
        (("--choice", "up", "--choice", "down"), "up|down"),
    ):
        code, out, err = run(*base, *asked)
        assert (code, err) == (0, "")
        assert re.fullmatch(pattern, out.strip())


def test_generate_keeps_a_session(run, decoder, tmp_path):
    file = tmp_path / "kept"
    base = ("generate", decoder, "--prompt", "Water boils", "--max-new-tokens", 12, "-q")
    plain = run(*base)
    assert run(*base, "--session", file) == plain
    before = file.read_bytes()
    assert run(*base, "--session", file) == plain
    assert file.read_bytes() == before
    file.write_bytes(before[:-1])
    code, out, err = run(*base, "--session", file)
    assert (code, out) == (1, "")
    assert "is damaged" in err


def test_generate_with_an_assistant_is_the_same_and_says_how_often_it_was_right(run, decoder):
    base = ("generate", decoder, "--prompt", "Water boils", "--max-new-tokens", 12)
    plain = run(*base, "-q")[1]
    code, out, err = run(*base, "--assistant", decoder)
    assert (code, out) == (0, plain)
    assert re.search(r"; (\d+) of \1 guesses were right\n$", err)
    figures = json.loads(run(*base, "--assistant", decoder, "--json")[1])
    assert figures["draft_tokens"] == figures["accepted_draft_tokens"] > 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("generate", "{decoder}", "--prompt", "x " * 60), 2, r"prompt tokens.*capacity of 48"),
        (("generate", "{encoder}", "--prompt", "x"), 2, "compiled for feature-extraction"),
        (("generate", "{decoder}", "--prompt", ""), 2, "empty"),
        (("generate", "{decoder}", "--prompt", "x", "--top-p", "7"), 2, "'--top-p': 7.0 is not in the range"),
        (("generate", "{decoder}", "--prompt", "x", "--system", "y"), 2, "add --chat"),
        (
            ("generate", "{decoder}", "--prompt", "x", "--prompt-lookup", "-1"),
            2,
            "'--prompt-lookup': -1 is not in the range",
        ),
        (("generate", "{decoder}", "--prompt", "x", "--temperature", "-1"), 2, "'--temperature': -1.0 is not in the"),
        (("generate", "{decoder}", "--prompt", "x", "--temperature", "nan"), 2, "--temperature must be .* 0, not nan"),
        (("generate", "{decoder}", "--prompt", "x", "--stop", ""), 2, "--stop is empty"),
        (("generate", "{decoder}", "--prompt", "x", "--regex", "(a"), 2, "--regex cannot be compiled: .*unclosed"),
        (("generate", "{decoder}", "--prompt", "x", "--regex", "a", "--choice", "b"), 2, "--regex and --choice each"),
        (("generate", "{decoder}", "--prompt", "x", "--grammar", "missing.lark"), 2, "--grammar: missing.lark cannot"),
        (("generate", "{decoder}", "--prompt", "x", "--assistant", "{encoder}"), 2, "compiled for feature-extraction"),
        (("predict", "{encoder}", "--text", "x", "--text", ""), 2, "--text is empty"),
        (("generate", "{decoder}", "--prompt", "x", "--max-new-tokens", "900"), 2, "Ask for --max-new-tokens 47 at mo"),
        (("generate", "{decoder}", "--prompt", "caf\udce9"), 2, r"argument 'caf\\udce9' is not UTF-8 text"),
        (("bench", "{decoder}", "--prompt-file", "{decoder}/model.onnx"), 2, "model.onnx is not UTF-8 text: line "),
        (("buckets", "{decoder}/model.onnx"), 2, "model.onnx is not UTF-8 text: line "),
        (("buckets", "{decoder}"), 2, "cannot be read: Is a directory"),
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
    words = [word.format(decoder=decoder, encoder=encoder) for word in words]
    found, out, err = run(*words)
    assert (found, out) == (code, "")
    assert re.search(message, err)
    assert "Traceback" not in err
    if words[0] != "nonsense":
        found, out, _ = run(*words, "--json")
        assert found == code
        assert json.loads(out)["error"]["message"]


def test_inspect_counts_what_weights_take(run, artifact, checkpoint):
    plain = artifact(checkpoint("llama"))
    _, out, _ = run("inspect", plain)
    assert re.search(
        r"  memory +[\d.]+ MB of weights and buffers, about [\d.]+ MB in 8 bits, about [\d.]+ MB in 4", out
    )
    (memory,) = json.loads(run("inspect", plain, "--json")[1])["memory"]
    model = CompiledModel.from_pretrained(plain, prepack=False)
    assert memory["parameters"] + memory["buffers"] == model.get_memory_footprint()
    assert memory["about_int4"] < memory["about_int8"] < memory["parameters"]
    rounded = artifact(checkpoint("llama"), quantize="int8", accept_loss=True)
    (found,) = json.loads(run("inspect", rounded, "--json")[1])["memory"]
    assert found.keys() == {"parameters", "buffers"}
    assert abs(memory["about_int8"] / (found["parameters"] + found["buffers"]) - 1) < 0.1
    assert "about" not in next(line for line in run("inspect", rounded)[1].splitlines() if "  memory" in line)


def test_inspect_tells_what_is_there(run, decoder):
    code, out, _ = run("inspect", decoder)
    assert code == 0
    for part in (
        "text-generation",
        "runs here",
        "skipped: not validated",
        "decoder, batch 1, length 1–48",
        "trust tier graph",
        "not verified: --verify",
    ):
        assert part in out
    assert json.loads(run("inspect", decoder, "--json")[1])["verified"] is False
    _, out, _ = run("inspect", decoder, "--json", "--verify")
    facts = json.loads(out)
    assert (facts["refused"], facts["verified"]) == ([None], True)


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
    for parameter in command.get_params(click.Context(command)):
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


# ---------------------------------------------------------------- what nobody foresaw


class Panic(BaseException):
    """As Rust's, which is no Exception."""


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (RuntimeError("two\nlines"), "RuntimeError: two lines — a fault of precast or of a library"),
        (KeyError(), "KeyError — a fault"),
        (Panic("index out of bounds"), "Panic: index out of bounds"),
        (OSError(28, "No space left on device", "out/x"), "No space left on device: out/x."),
        (MemoryError(), "There is not enough memory."),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "can't decode byte 0xff"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_nobody_foresaw_is_one_line_too(run, monkeypatch, error, part):
    def fail():
        raise error

    monkeypatch.setattr("precast.cli.env._collect_facts", fail)
    code, out, err = run("env")
    assert (code, out) == (1, "")
    assert err.startswith("precast: ")
    assert err.count("\n") == 1
    assert part in err
    assert "PRECAST_DEBUG=1 shows where" in err
    code, out, _ = run("env", "--json")
    assert (code, json.loads(out)["error"]["type"]) == (1, type(error).__name__)
    monkeypatch.setenv("PRECAST_DEBUG", "1")
    with pytest.raises(type(error)):
        run("env")


def test_a_json_call_without_room_for_its_document_is_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, which is always full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "precast", "env", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1, "precast: No space left on device. PRECAST_DEBUG=1 shows where.\n"
    )  # fmt: skip


def test_a_reader_that_leaves_is_no_error():
    command = f"'{sys.executable}' -m precast generate -h | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("U", "")


def test_a_gguf_file_is_no_artifact_yet(run, tmp_path):
    (tmp_path / "my model.gguf").write_bytes(b"GGUF")
    code, _, err = run("inspect", tmp_path / "my model.gguf")
    assert code == 1
    assert f"To make one from it: precast export '{tmp_path}/my model.gguf' -o OUT" in err


@pytest.mark.parametrize("words", [(), ("--option", "candidate_labels=")])
def test_labels_that_are_not_given_are_asked_for(run, encoder, monkeypatch, words):
    class Stub:
        @staticmethod
        def option_names():
            return ["candidate_labels"]

    monkeypatch.setattr("precast.runtime.pipelines.pipeline", lambda task, model: Stub())
    code, _, err = run("predict", encoder, "--text", "x", *words)
    assert (code, "--labels politics,sports" in err) == (2, True)


@pytest.mark.parametrize("words", [(), ("--quiet",)])
def test_no_bars_of_the_hub_where_there_are_none_of_ours(run, monkeypatch, words):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    run("validate", "x", *words)
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_an_interrupted_json_call_has_its_document(run, monkeypatch):
    monkeypatch.setattr("precast.cli.env._collect_facts", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    code, out, err = run("env")
    # click begins a new line, after the terminal's ^C.
    assert (code, out, err.lstrip()) == (130, "", "precast: Interrupted.\n")
    assert json.loads(run("env", "--json")[1])["error"]["type"] == "Interrupted"


def test_only_our_own_warnings_reach_the_terminal(run, monkeypatch):
    def warn():
        warnings.warn("of interest to developers", FutureWarning, stacklevel=1)
        warnings.warn("This GPU records nothing.", PrecastWarning, stacklevel=1)
        return {}

    monkeypatch.setattr("precast.cli.env._collect_facts", warn)
    assert run("env") == (0, "", "precast: This GPU records nothing.\n")


def test_what_an_encoding_lacks_is_escaped():
    """On a terminal that knows other letters; JSON stays JSON, also with halves of characters."""
    code = "import sys; from precast.cli.output import run_cli, print_json; import click\n"
    both = r"[click.echo('\xe9\u2026'), print_json('\xe9\U0001f600\udcff')][0]"
    code += f"run_cli(click.Command('x', callback=lambda: {both}))"
    command = [sys.executable, "-c", code]
    for encoding, text in (("iso-8859-1", r"é\u2026"), ("utf-8", "é…")):
        done = subprocess.run(command, capture_output=True, check=True, env={"PYTHONIOENCODING": encoding})
        first, second = done.stdout.decode(encoding).splitlines()
        assert (first, json.loads(second)) == (text, "é\U0001f600\udcff")


def test_the_command_is_a_module_too_which_runs_nothing_that_lies_around(tmp_path):
    (tmp_path / "click.py").write_text("print('mine')")
    done = subprocess.run(
        [sys.executable, "-m", "precast", "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.startswith("precast, version ")


def test_errors_speak_of_options_on_the_command_line_and_of_keywords_in_python(decoder, tmp_path):
    options = [click.Option([f"--{name}"]) for name in ("max-new-tokens", "force", "sha256", "top-k", "seed")]
    for said, typed in (
        ("Ask for max_new_tokens=47 at most.", "Ask for --max-new-tokens 47 at most."),
        ("top_k must be at least 0, not -3.", "--top-k must be at least 0, not -3."),
        ("seed must be a number; seeds grow.", "--seed must be a number; seeds grow."),
        ("Pinned by sha256=, or replace it with force=True.", "Pinned by --sha256, or replace it with --force."),
        ("The seed of /top_k/seed is --top-k.", "The seed of /top_k/seed is --top-k."),
        ("Or do_sample=False.", "Or --temperature 0."),
    ):
        assert in_flags(said, options) == typed
    model = CompiledModel.from_pretrained(decoder)
    model.save_pretrained(tmp_path / "copy")
    with pytest.raises(PublishError, match=r"copy exists and is not empty.* replace it with force=True"):
        model.save_pretrained(tmp_path / "copy")
    with pytest.raises(UsageError, match="Ask for max_new_tokens=47"):
        model.generate([[5]], max_new_tokens=900)
