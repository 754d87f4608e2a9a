"""`precast export` refuses in one line: what was wrong in the user's own words, and what would be right."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import handmade
import pytest

from precast.cli import main
from precast.cli.output import describe_progress
from precast.exporter import ExportOptions
from precast.exporter.checkpoint.early import check_comparison
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.tasks import TASKS
from precast.runtime.errors import AccuracyError, CheckpointError, ExportError

SHAPES = ("--batch-size", 2, "--sequence-length", 16)


@pytest.fixture
def place(tmp_path, monkeypatch, checkpoint):
    """The current directory, with two checkpoints: `llama`, of 64 positions, and `bert`, which has no head."""
    shutil.copytree(checkpoint("llama"), tmp_path / "llama")
    shutil.copytree(checkpoint("bert", "AutoModel"), tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capfd, place):
    """`run("llama", "-o", "out")`: exit code, standard output, standard error."""

    def call(*words: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["precast", "export", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capfd.readouterr()

    return call


def _copy(place: Path, source: str, name: str, **files: bytes | None) -> str:
    """A copy of a checkpoint with files of other content, or without them (`model__json` is model.json)."""
    shutil.copytree(place / source, place / name)
    for file, content in files.items():
        path = place / name / file.replace("__", ".")
        path.unlink() if content is None else path.write_bytes(content)
    return name


def _check_refused(run, place: Path, words: tuple[object, ...], code: int, *parts: str) -> None:
    """One line on standard error with all `parts`, the same with --json as one document, and nothing written."""
    before = sorted(place.rglob("*"))
    found, out, err = run(*words, "-q")
    assert (found, out) == (code, ""), err
    assert err.startswith("precast: ")
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err
    found, out, err = run(*words, "-q", "--json")
    error = json.loads(out)["error"]
    assert (found, err) == (code, f"precast: {error['message']}\n")
    assert error["type"] == "UsageError" if code == 2 else error["type"].endswith("Error")
    assert sorted(place.rglob("*")) == before


# ---------------------------------------------------------------- what was typed


TASK_NAMES = ", ".join(TASKS)
WRONG = {
    "no model": (("-o", "out"), "Missing argument 'MODEL'", "precast export -h"),
    "no output": (("llama",), "Missing option '-o'"),
    "an unknown option": (("llama", "-o", "out", "--batchsize", 1), "--batchsize"),
    "private alone": (("llama", "-o", "out", "--private"), "--private", "--push-to-hub"),
    "an encoder's shapes": (
        ("bert", "-o", "out"),
        "'feature-extraction'", "Add --batch-size N and --sequence-length N",
        "precast export bert --batch-size 1 --sequence-length 64 -o OUT",
    ),
    "an encoder's batch size": (("bert", "-o", "out", "--sequence-length", 16), "Add --batch-size N, for"),
    "an encoder's length": (("bert", "-o", "out", "--batch-size", 2), "Add --sequence-length N, for"),
    "an unknown task": (("llama", "-o", "out", "--task", "juggling"), "'juggling'", TASK_NAMES),
    "a misspelt task": (
        ("llama", "-o", "out", "--task", "text-generaton"),
        "'text-generaton'", "Did you mean 'text-generation'?",
    ),
    "an unknown backend": (("llama", "-o", "out", "--backend", "tpu"), "'tpu'", "The backends are: onnx", ", or auto"),
    "auto and another": (
        ("llama", "-o", "out", "--backend", "auto", "--also", "onnx"), "--backend auto keeps one", "name both of them"
    ),
    "what no backend takes": (("llama", "-o", "out", "--backend", "auto", "--dtype", "int3"), "--dtype int3"),
    "an unknown dtype": (("llama", "-o", "out", "--dtype", "float8"), "--dtype float8", "the choices are: float32"),
    "a cast to what": (("llama", "-o", "out", "--auto-cast", "some"), "--auto-cast some", "none, matmul, all"),
    "a cast to int8": (
        ("llama", "-o", "out", "--auto-cast", "all", "--auto-cast-type", "int8"),
        "--auto-cast-type int8", "bf16, fp16",
    ),
    "a type for no cast": (("llama", "-o", "out", "--auto-cast-type", "fp16"), "--auto-cast-type fp16", "matmul or"),
    "cast twice": (
        ("llama", "-o", "out", "--dtype", "float16", "--auto-cast", "all"), "--auto-cast all", "--dtype float16"
    ),
    "two dtypes of caches": (
        ("llama", "-o", "out", "--backend", "export", "--dtype", "bfloat16", "--kv-cache", "float16"),
        "--dtype bfloat16 cannot be combined with --kv-cache float16", "or give --kv-cache int8",
    ),
    "a dtype without kernels": (
        ("llama", "-o", "out", "--dtype", "bfloat16"),
        "--dtype bfloat16 is not for --backend onnx", "computes in float32", "Backends that take it: ",
    ),
    "a cast without kernels": (
        ("bert", "-o", "out", *SHAPES, "--auto-cast", "matmul"), "--auto-cast matmul is not for --backend onnx"
    ),
    "an unknown level": (("llama", "-o", "out", "--isa", "sse2"), "--isa sse2", "native, avx2, avx512"),
    "a level for no code": (
        ("llama", "-o", "out", "--isa", "avx2"), "--isa avx2 is not for --backend onnx", "when it runs"
    ),
    "an unknown device": (("llama", "-o", "out", "--device", "npu"), "--device npu", "cpu, cuda"),
    "a device for no code": (("llama", "-o", "out", "--device", "cuda"), "--device cuda is not for --backend onnx"),
    "a bound for no loss": (("llama", "-o", "out", "--accept-loss"), "--accept-loss bound what is lost"),
    "batch size 0": (("llama", "-o", "out", "--batch-size", 0), "--batch-size must be at least 1, not 0"),
    "batch size x": (("llama", "-o", "out", "--batch-size", "x"), "'--batch-size'", "'x'", "whole number"),
    "length abc": (("llama", "-o", "out", "--sequence-length", "abc"), "'--sequence-length'", "'abc'", "whole number"),
    "lengths with a hole": (("bert", "-o", "out", "--sequence-length", "16,,32"), "'16,,32'", "separated by commas"),
    "length -1": (("llama", "-o", "out", "--sequence-length", "-1"), "--sequence-length must be at least 1, not -1"),
    "a length twice": (("bert", "-o", "out", "--batch-size", 1, "--sequence-length", "16,16"), "twice: 16,16"),
    "a decoder longer than made for": (
        ("llama", "-o", "out", "--sequence-length", 65),
        "--sequence-length 65", "llama", "max_position_embeddings allow 64",
    ),
    "an encoder longer than made for": (
        ("bert", "-o", "out", "--batch-size", 1, "--sequence-length", "16,65"),
        "--sequence-length 65", "max_position_embeddings allow 64",
    ),
    "several capacities": (
        ("llama", "-o", "out", "--sequence-length", "16,32"),
        "--sequence-length 16,32", "a decoder has one capacity", "the largest, 32",
    ),
    "a prompt over capacity": (
        ("llama", "-o", "out", "--sequence-length", 16, "--prefill-lengths", "8,32"),
        "--prefill-lengths 32 is more than --sequence-length 16",
    ),
    "an encoder's prefill": (
        ("bert", "-o", "out", *SHAPES, "--prefill-lengths", 8),
        "--prefill-lengths is not for the task 'feature-extraction'", "it takes: --batch-size, --sequence-length",
    ),
    "a revision of what is here": (("llama", "-o", "out", "--revision", "v1"), "--revision is for", "llama is one on"),
    "atol 0": (("llama", "-o", "out", "--atol", 0), "--atol must be above 0, not 0"),
    "atol nan": (("llama", "-o", "out", "--atol", "nan"), "--atol must be above 0, not nan"),
    "before MODEL is looked for": (("./missing", "-o", "out", "--batch-size", 0), "--batch-size must be at least 1"),
    "before MODEL is planned": (("./missing", "--dry-run", "--batch-size", 0), "--batch-size must be at least 1"),
    "several at once": (
        ("llama", "-o", "out", "--batch-size", 0, "--dtype", "int3"),
        "--batch-size must be at least 1, not 0", "--dtype int3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG.values(), ids=WRONG)
def test_wrong_usage(run, place, words):
    _check_refused(run, place, words[0], 2, *words[1:])


# ---------------------------------------------------------------- what was named


def test_a_checkpoint_that_is_none(run, place):
    (place / "notes.txt").write_text("hello")
    (place / "empty").mkdir()
    (place / "hollow").mkdir()
    (place / "hollow" / "model.gguf").write_bytes(b"GGUF")
    shutil.copytree(place / "hollow", place / "my own")
    handmade.make(place / "compiled")
    for model, *parts in (
        ("./missing", "There is no file or directory ./missing"),
        ("./in\ntwo lines", "There is no file or directory ./in two lines"),
        ("../a/b/c", "There is no file or directory ../a/b/c"),
        ("missing.gguf", "There is no file or directory missing.gguf"),
        ("someone/missing", "someone/missing is neither a local path nor a checkpoint that the Hub would give"),
        ("notes.txt", "notes.txt is a file; MODEL is a Hub id, a checkpoint directory, or a .gguf file"),
        ("empty", "empty is not a checkpoint: it has no config.json"),
        ("hollow", "hollow is not a checkpoint", "precast export hollow/model.gguf"),
        ("my own", "my own is not a checkpoint", "precast export 'my own/model.gguf'"),
        ("compiled", "compiled is an artifact", "precast inspect compiled"),
    ):
        _check_refused(run, place, (model, "-o", "out"), 1, *parts)


GGUFS = {
    "empty": (b"", "is not a GGUF file"),
    "a word": (b"GGUF", "is truncated: it ends within its header"),
    "zeros": (b"GGUF" + bytes(100), "cannot be used"),
    "endless counts": (b"GGUF\3\0\0\0" + b"\xff" * 100, "is truncated: it ends within its header"),
    "no metadata": (b"GGUF\3\0\0\0" + bytes(64), "cannot be used"),
    "another format": (b"junk" * 99, "is not a GGUF file"),
}


@pytest.mark.parametrize(("data", "part"), GGUFS.values(), ids=GGUFS)
def test_a_corrupt_gguf(run, place, data, part):
    (place / "corrupt.gguf").write_bytes(data)
    _check_refused(run, place, ("corrupt.gguf", "-o", "out"), 1, "corrupt", part)


def _config(**changes: object) -> bytes:
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "architectures": ["LlamaForCausalLM"]}
    return json.dumps({**config, **changes}).encode()


CONFIGS = {
    "cut": (b'{"model_type": ', "Expecting value"),
    "no text": (b"\xff\xfe", "can't decode byte 0xff"),
    "a list": (b"[]", "holds a list, not an object"),
    "no model type": (b"{}", "model_type"),
    "unknown model type": (_config(model_type="nonsense"), "`nonsense`"),
    "a word for a number": (_config(hidden_size="wide"), "'hidden_size' expected int, got str (value: 'wide')"),
    "heads that do not divide": (_config(num_attention_heads=5), "The hidden size (64)", "attention heads (5)"),
    "no heads": (_config(num_attention_heads=0), "modulo by zero"),
    "infinite": (_config(rope=float("inf")), "Infinity is not a JSON number"),
}


@pytest.mark.parametrize(("data", "parts"), [(data, parts) for data, *parts in CONFIGS.values()], ids=CONFIGS)
def test_a_corrupt_config(run, place, data, parts):
    name = _copy(place, "llama", "odd", config__json=data)
    _check_refused(run, place, (name, "-o", "out"), 1, "The configuration of odd cannot be used", *parts)


def test_a_type_that_cannot_do_the_task(run, place):
    words = ("llama", "-o", "out", "--task", "fill-mask", *SHAPES)
    _check_refused(
        run, place, words, 1, "'llama'", "cannot do fill-mask", "It can be exported for: ", "text-generation"
    )
    name = _copy(place, "llama", "odd", config__json=_config(architectures=["SomethingElse"]))
    _check_refused(run, place, (name, "-o", "out"), 1, "SomethingElse", "Give --task, one of: ", "text-generation")


FILES = {
    "no weights": ({"model__safetensors": None}, "odd has no weights"),
    "cut weights": ({"model__safetensors": b"\x40" + bytes(50)}, "The weights of odd cannot be loaded"),
    "other weights": ({"config__json": _config(vocab_size=99)}, "shapes are not those of config.json"),
    "cut tokenizer": ({"tokenizer__json": b"{"}, "The tokenizer of odd cannot be used"),
    "hollow tokenizer": ({"tokenizer__json": b'{"version": "1.0"}'}, "The tokenizer of odd cannot be used"),
    "a list for a tokenizer": ({"tokenizer_config__json": b"[]"}, "The tokenizer of odd cannot be used"),
}


@pytest.mark.parametrize(("files", "part"), FILES.values(), ids=FILES)
def test_corrupt_files(run, place, files, part):
    name = _copy(place, "llama", "odd", **files)
    _check_refused(run, place, (name, "-o", "out", "--sequence-length", 16, "--no-validate"), 1, part)


def test_weights_that_would_be_random(run, place):
    words = ("bert", "-o", "out", "--task", "text-classification", *SHAPES)
    parts = ("bert has no weights for classifier.bias, classifier.weight", "BertForSequenceClassification", "random")
    _check_refused(run, place, words, 1, *parts)


@pytest.mark.parametrize(
    "words",
    [("bert", "--task", "text-classification", *SHAPES), pytest.param(("corrupt.gguf",), marks=pytest.mark.slow)],
    ids=lambda words: words[0],
)
def test_the_libraries_below_keep_quiet(place, words):
    """In a process of its own: in ours, what they log would pass by the capture."""
    (place / "corrupt.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    command = [sys.executable, "-c", "from precast.cli import main; main()", "export", *words, "-o", "out", "-q"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("precast: ")
    assert done.stderr.count("\n") == 1, done.stderr


def test_targets_are_refused_before_any_work(run, place):
    (place / "file").write_text("mine")
    (place / "full").mkdir()
    (place / "full" / "notes").write_text("mine")
    handmade.make(place / "old")
    # The checkpoint is missing too, which nobody has looked for yet.
    for words, *parts in (
        (("-o", "file"), "file exists and is a file"),
        (("-o", "full"), "full exists and is not empty", "--force"),
        (("-o", "full", "--force"), "full holds something that is not an artifact"),
        (("-o", "old"), "old exists and is not empty", "--force"),
        (("-o", "llama", "--force"), "llama holds something that is not an artifact"),
    ):
        _check_refused(run, place, ("./missing", *words), 1, *parts)
    _check_refused(run, place, ("./missing", "-o", "old", "--force"), 1, "There is no file or directory ./missing")
    assert handmade.load(place / "old") == "old"


EARLY = """
import json, sys
from precast.cli import main
from precast.cli.output import describe_progress
from precast.exporter import ExportOptions
from precast.exporter.checkpoint.early import check_comparison
from precast.runtime.artifact import read_artifact

for words in json.loads(sys.argv[1]):
    sys.argv = ["precast", *words]
    try:
        main()
    except SystemExit as error:
        print(json.dumps([error.code, sorted({"torch", "transformers", "onnx"} & sys.modules.keys())]))
"""


def test_mistakes_are_answered_before_torch_is_imported(place):
    """It takes seconds, where each of these takes a fraction of one."""
    (place / "full").mkdir()
    (place / "full" / "notes").write_text("mine")
    handmade.make(place / "compiled")
    (place / "cut.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 100)
    export, sizes = ("export", "bert", "-o", "out"), ("--batch-size", "1", "--sequence-length", "16")
    calls = [
        (*export, "--batch-size", "0"),
        (*export, *sizes, "--backend", "tpu"),
        (*export, *sizes, "--method", "magic", "--quantize", "int8"),
        (*export, *sizes, "--task", "juggling"),
        (*export, *sizes, "--quantize", "auto"),
        (*export, *sizes, "--backend", "auto", "--dtype", "int3"),
        ("export", "bert", "-o", "full", *sizes),
        ("export", "bert", "-o", "out", "--sequence-length", "16"),
        ("export", "bert", "-o", "out", "--batch-size", "1", "--sequence-length", "65"),
        ("export", "llama", "-o", "out", "--sequence-length", "65", "--dry-run"),
        ("export", "./missing", "-o", "out"),
        ("export", "someone/missing", "-o", "out"),
        ("export", "compiled", "-o", "out"),
        ("export", "cut.gguf", "-o", "out"),
        ("validate", "compiled", "--reference", "compiled"),
        ("validate", "bert", "--reference", "bert"),
        ("validate", "compiled", "--reference", "./missing"),
        ("validate", "compiled", "--reference", "bert", "--atol", "0"),
        ("tasks", "someone/missing"),
    ]  # fmt: skip
    command = [sys.executable, "-c", EARLY, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(calls)
    for words, (code, imported), said in zip(calls, found, done.stderr.splitlines(), strict=True):
        assert code in (1, 2), words
        assert imported == [], (words, said)


LOSSY = """
import click
from precast.cli.output import run_cli

class Interrupted:
    def __del__(self):
        raise {error}

@click.command()
def long_work():
    Interrupted()
    for _ in range(10**8):
        pass

run_cli(long_work)
"""


@pytest.mark.parametrize(("error", "code"), [("KeyboardInterrupt", 130), ("SystemExit(143)", 143)])
def test_an_interrupt_during_garbage_collection_is_not_lost(error, code):
    """Python drops what is raised there, and freeing a model takes long enough for Ctrl-C to hit it."""
    command = [sys.executable, "-c", LOSSY.format(error=error)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.strip() == ("precast: Interrupted." if code == 130 else "")


# ---------------------------------------------------------------- --dry-run


def test_a_dry_run_shows_the_plan_and_writes_nothing(run, place):
    _copy(place, "llama", "light", model__safetensors=None)
    before = sorted(place.rglob("*"))
    code, out, err = run("light", "-o", "out", "--sequence-length", 16, "--prefill-lengths", "4,8", "--dry-run")
    assert (code, err) == (0, "Planning light …\n")
    for fact in (
        "text-generation (llama)",
        "batch size       1",
        "sequence length  16",
        "prefill_4, prefill_8, decode",
    ):
        assert fact in out
    code, out, err = run(
        "bert", "--batch_size", 2, "--sequence_length", "32,16", "--dynamic_batch_size", "--dry_run", "--json"
    )
    plan = json.loads(out)
    assert (code, err) == (0, "Planning bert …\n")
    assert (plan["task"], plan["model_type"], plan["dtype"]) == ("feature-extraction", "bert", "float32")
    assert (plan["batch_size"], plan["sequence_length"], plan["dynamic_batch_size"]) == (2, [16, 32], True)
    assert plan["graphs"] == ["model_16", "model_32"]
    assert sorted(place.rglob("*")) == before


def test_a_dry_run_refuses_what_an_export_would(run, place):
    _check_refused(run, place, ("bert", "--dry-run"), 2, "Add --batch-size N and --sequence-length N")
    _check_refused(run, place, ("./missing", "--dry-run"), 1, "There is no file or directory ./missing")


# ---------------------------------------------------------------- validate


def test_the_wrong_checkpoint_is_asked_about(decoder, checkpoint):
    from precast.exporter.checkpoint.resolve import resolve
    from precast.exporter.validation.revalidate import _check_source

    artifact, options = read_artifact(decoder), ExportOptions()
    with pytest.raises(CheckpointError, match=r"of type 'llama', and .* of type 'bert': is it the right checkpoint\?"):
        check_comparison(decoder, str(checkpoint("bert", "AutoModel")), options)
    other, error = checkpoint("llama", num_hidden_layers=2), ExportError("They differ.")
    check_comparison(decoder, str(other), options)
    with pytest.raises(AccuracyError, match=r"does not give the answers of .*: is it the right checkpoint\?"):
        _check_source(artifact, resolve(str(other), options), error)
    _check_source(artifact, resolve(str(checkpoint("llama")), options), error)


@pytest.mark.parametrize("difference", [1.24e-4, 9.99e-4, 1e-3, 0.009])
def test_the_tolerance_that_is_proposed_is_enough(difference):
    from precast.exporter.validation.rules import _atol_advice

    assert float(_atol_advice(difference).split("atol=")[1].split()[0]) >= difference
    assert "fault of the graph" in _atol_advice(difference * 100)


# ---------------------------------------------------------------- progress


def test_a_step_says_how_far_it_is_and_how_long_it_will_take():
    assert describe_progress("compile", 0, 3, "weights", 9.0) == "compile: weights (1 of 3)"
    assert describe_progress("reference", 4, 12, "a row", 10.0) == "reference: a row (5 of 12, about 20 s left)"
    assert describe_progress("quantize", 5, 10, "", 1.0) == "quantize (6 of 10)"
    assert describe_progress("quantize", 10, 10, "", 60.0) == "quantize (10 of 10)"


def test_the_reference_says_at_which_question_it_is(monkeypatch):
    from precast.exporter.kinds.samples import ValidationSample
    from precast.exporter.progress import progress_to
    from precast.exporter.validation import reference

    samples = [ValidationSample("short", "logits"), ValidationSample("long", "logits")]
    monkeypatch.setattr(reference, "make_samples", lambda *_: samples)
    monkeypatch.setattr(reference, "answer", lambda *_: [])
    told, anyone = [], SimpleNamespace(tokenizer=None, vocabulary=9)
    with progress_to(lambda *said: told.append(said)):
        reference.make_reference(None, anyone, None, [], None, is_scored=False)
    reference.make_reference(None, anyone, None, [], None, is_scored=False)
    assert told == [(0, 2, "short"), (1, 2, "long")]


# ---------------------------------------------------------------- success


def test_results_go_to_one_stream_and_progress_to_the_other(run, place, monkeypatch):
    told = []

    @contextmanager
    def bar(name):
        yield lambda done, total, what="": told.append((name, done, total, what))

    monkeypatch.setattr("precast.cli.output.bar", bar)
    words = ("llama", "--sequence_length", 16, "--no_validate")
    code, out, err = run(*words, "-o", "out")
    assert code == 0
    assert out.splitlines() == [out.strip()]
    assert out.startswith("out: ")
    assert err.startswith("Exporting llama …\n")
    assert told == [
        ("compile", 0, 3, "model in ONNX's operators"), ("compile", 1, 3, "model in ONNX Runtime's own"),
        ("compile", 2, 3, "weights"),
    ]  # fmt: skip
    assert [line.split()[0] for line in err.splitlines() if line.startswith("  ")] == [
        "resolve", "plan", "load", "trace", "compile", "publish",
    ]  # fmt: skip
    code, out, err = run(*words, "-o", "out", "--force", "--json", "-q")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["path"], result["accuracy"]["status"], result["url"]) == ("out", "skipped", None)
    assert result["digest"] == json.loads((place / "out" / "config.json").read_text())["precast"]["digest"]
