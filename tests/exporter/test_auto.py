"""`--backend auto`: all that can compile do, the fastest is kept. Times are made up; none is ever judged."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy_backend

from precast.cli import main
from precast.exporter import ExportOptions, choose_backends, export, faster_here
from precast.exporter.several import fastest as fastest_module
from precast.exporter.several.fastest import Choice, export_fastest
from precast.runtime import CompiledModel, CompiledModelForCausalLM
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.backends import BACKENDS
from precast.runtime.artifact.integrity import verify_files
from precast.runtime.artifact.publish import copy_artifact
from precast.runtime.bench.compare import Subject
from precast.runtime.bench.worker import CALLS, STEPS, measure
from precast.runtime.errors import AccuracyError, CheckpointError, ExportError, PrecastError, PublishError, UsageError

OPTIONS = ExportOptions(backend="auto", sequence_length=(24,), validate=False)
MEMORY = {"peak_rss_mb": 1.0, "pss_mb": 1.0, "private_mb": 1.0}


@pytest.fixture
def two(toy, monkeypatch):
    """Two backends: `onnx`, and `toy`."""
    # Backwards, since what is deleted last comes back first: the table ends in the order that it had.
    for name in reversed([name for name in BACKENDS if name != "onnx"]):
        monkeypatch.delitem(BACKENDS, name)
    monkeypatch.setitem(BACKENDS, "toy", toy_backend.ROW)


@pytest.fixture
def made_before(two, artifact, monkeypatch):
    """Exports that were made once, and are copied."""

    def copy(model, target, options, *_):
        asked = {name: getattr(options, name) for name in ("backend", "batch_size", "sequence_length")}
        copy_artifact(read_artifact(artifact(Path(model), **asked)), target, force=options.force)
        return read_artifact(target)

    monkeypatch.setattr("precast.exporter.several.fastest.export_variant", copy)


def clock(**milliseconds):
    """What asks no child process: each backend's first token, or call, takes so long; every job is noted."""
    asked = []

    def ask(subject: Subject, job):
        asked.append((subject.name, job))
        taken = milliseconds[subject.name]
        if isinstance(taken, Exception):
            raise taken
        if not job["rows"]:
            return {"load_seconds": 0.1, **MEMORY}
        if job["new_tokens"]:
            return {"first_token_ms": taken[0], "tokens_per_second": taken[1], **MEMORY}
        return {"call_p50_ms": taken[len(job["rows"][0]) > 16], **MEMORY}

    ask.asked = asked
    return ask


def fastest(source, target, ask, options=OPTIONS, **choice):
    return export_fastest(
        str(source), target, options, lambda step: nullcontext(), lambda plan: None, ask=ask, **choice
    )


def compared(artifact):
    return json.loads((artifact.path / "bench.json").read_text())


# ---------------------------------------------------------------- the fastest


@pytest.mark.parametrize(
    ("onnx", "toy_", "best"),
    [
        ((10.0, 100.0), (20.0, 90.0), "onnx"),
        ((20.0, 90.0), (10.0, 100.0), "toy"),
        # 11 tokens after the first: 20 + 110 ms against 50 + 55 ms.
        ((20.0, 100.0), (50.0, 200.0), "toy"),
    ],
)
def test_the_fastest_is_kept(made_before, checkpoint, tmp_path, onnx, toy_, best):
    ask = clock(onnx=onnx, toy=toy_)
    made = fastest(checkpoint("llama"), tmp_path / "out", ask)
    assert [variant.backend for variant in made.contract.variants] == [best]
    found = compared(made)
    assert found["backend"] == best
    assert found["left_out"] == {}
    assert found["requests"] == [
        {"kind": "decoder", "batch_size": 1, "prompt_length": 12, "new_tokens": 12, "prompt_lookup": 0}
    ]
    for name, (first, speed) in {"onnx": onnx, "toy": toy_}.items():
        entry = found["candidates"][name]
        assert entry["milliseconds"] == [pytest.approx(first + 11e3 / speed, rel=1e-3)]
        assert entry["benches"][0]["figures"]["first_token_ms"]["rounds"] == [first] * 3
    assert found["machine"].keys() >= {"cpu", "onnxruntime", "torch"}
    timed = [name for name, job in ask.asked if job["rows"]]
    assert timed == ["onnx", "toy", "toy", "onnx", "onnx", "toy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "site"]


@pytest.mark.slow
def test_what_is_kept_is_the_artifact_of_its_backend(two, checkpoint, tmp_path):
    """Timings change no digest, the code is vouched for, and the config knows nothing of them."""
    source = checkpoint("llama")
    made = fastest(source, tmp_path / "auto", clock(onnx=(9.0, 9.0), toy=(1.0, 99.0)))
    verify_files(made.path, made.contract.files, force=True)
    ids = np.array([[5, 6, 7]])
    answer = CompiledModelForCausalLM.from_pretrained(made.path)(ids).logits
    made = fastest(source, tmp_path / "onnx-auto", clock(onnx=(1.0, 99.0), toy=(9.0, 9.0)))
    plain = export(str(source), tmp_path / "onnx", replace(OPTIONS, backend="onnx"))
    assert made.contract.digest == plain.contract.digest
    assert sorted(path.name for path in made.path.iterdir()) == sorted(
        ["bench.json", *(path.name for path in plain.path.iterdir())]
    )
    assert np.abs(CompiledModelForCausalLM.from_pretrained(made.path)(ids).logits - answer).max() < 1e-4


def test_an_encoder_is_timed_at_its_smallest_and_largest_sizes(made_before, checkpoint, tmp_path):
    options = replace(OPTIONS, batch_size=(1, 3), sequence_length=(8, 24))
    # 2 against 1 and 1 against 4: the one that is twice as fast in the geometric mean.
    ask = clock(onnx=(2.0, 1.0), toy=(1.0, 4.0))
    made = fastest(checkpoint("bert", "AutoModel"), tmp_path / "out", ask, options)
    found = compared(made)
    assert found["backend"] == "onnx"
    assert [(each["batch_size"], each["prompt_length"]) for each in found["requests"]] == [(1, 8), (3, 24)]
    assert [entry["milliseconds"] for entry in found["candidates"].values()] == [[2.0, 1.0], [1.0, 4.0]]
    assert {(len(job["rows"]), len(job["rows"][0])) for _, job in ask.asked if job["rows"]} == {(1, 8), (3, 24)}


# ---------------------------------------------------------------- those that fail


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AccuracyError("off by 1 where 1e-4\nis allowed"), "off by 1 where 1e-4 is allowed"),
        (
            RuntimeError("/usr/lib/gcc failed on '/tmp/here/a.cpp'; see https://gcc.gnu.org/bugs/x of user/model"),
            "RuntimeError: gcc failed on 'a.cpp'; see https://gcc.gnu.org/bugs/x of user/model",
        ),
    ],
)
def test_one_that_fails_is_left_out_with_its_reason(two, checkpoint, tmp_path, monkeypatch, error, reason):
    def fail(self, programs, stage, options):
        raise error

    monkeypatch.setattr(toy_backend.ToyCompiler, "compile", fail)
    made = fastest(checkpoint("llama"), tmp_path / "out", clock(onnx=(9.0, 9.0)))
    found = compared(made)
    assert (found["backend"], found["left_out"]) == ("onnx", {"toy": reason})
    assert list(found["candidates"]) == ["onnx"]


def test_one_that_cannot_be_timed_is_left_out(made_before, checkpoint, tmp_path):
    ask = clock(
        onnx=PrecastError("onnx could not be measured: the child process was ended by SIGKILL."), toy=(9.0, 9.0)
    )
    found = compared(fastest(checkpoint("llama"), tmp_path / "out", ask))
    assert found["backend"] == "toy"
    assert found["left_out"] == {"onnx": "onnx could not be measured: the child process was ended by SIGKILL."}


def test_what_was_there_stays_when_all_fail(two, checkpoint, tmp_path, monkeypatch):
    source, target = checkpoint("llama"), tmp_path / "out"
    before = export(str(source), target, replace(OPTIONS, backend="onnx")).contract.digest

    def fail(name):
        def compile_(self, programs, stage, options):
            raise ExportError(f"{name} cannot compile this.")

        return compile_

    monkeypatch.setattr(toy_backend.ToyCompiler, "compile", fail("toy"))
    monkeypatch.setattr("precast.exporter.backends.onnx.compiler.OnnxCompiler.compile", fail("onnx"))
    with pytest.raises(ExportError, match="onnx cannot compile this"):
        fastest(source, target, clock(), replace(OPTIONS, force=True))
    assert read_artifact(target).contract.digest == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "site"]


def test_what_was_there_is_replaced_by_force_only(made_before, checkpoint, tmp_path):
    source, target = checkpoint("llama"), tmp_path / "out"
    export(str(source), target, replace(OPTIONS, backend="onnx"))
    ask = clock(onnx=(9.0, 9.0), toy=(1.0, 99.0))
    with pytest.raises(PublishError, match="exists and is not empty"):
        fastest(source, target, ask)
    assert ask.asked == []
    made = fastest(source, target, ask, replace(OPTIONS, force=True))
    assert made.contract.variants[0].backend == "toy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "site"]


def test_a_checkpoint_that_is_none_is_the_first_ones_error(two, tmp_path):
    with pytest.raises(CheckpointError):
        fastest(tmp_path / "nowhere", tmp_path / "out", clock())


# ---------------------------------------------------------------- which are tried


def test_those_that_take_the_options_are_tried(two, monkeypatch):
    assert choose_backends(OPTIONS) == Choice(["onnx", "toy"], {})
    monkeypatch.setitem(BACKENDS, "toy", replace(toy_backend.ROW, takes=frozenset({"dtype"})))
    choice = choose_backends(replace(OPTIONS, dtype="bfloat16"))
    assert choice.names == ["toy"]
    assert "dtype='bfloat16' is not for backend='onnx'" in choice.left_out["onnx"]


def test_one_whose_libraries_are_missing_is_left_out(two, monkeypatch):
    monkeypatch.setitem(BACKENDS, "gone", replace(toy_backend.ROW, name="gone", compiler="no_such_module:Compiler"))
    choice = choose_backends(OPTIONS)
    assert choice.names == ["onnx", "toy"]
    assert choice.left_out == {"gone": "no_such_module is not installed"}


def test_options_that_nobody_takes_are_refused_as_by_the_first(two):
    with pytest.raises(UsageError, match="dtype='int3' is not supported"):
        choose_backends(replace(OPTIONS, dtype="int3"))


# ---------------------------------------------------------------- what an export by one backend says of another


@pytest.mark.parametrize(
    ("quantize", "flags", "compiler", "is_faster"),
    [
        ("int8", {"avx2"}, "g++", True),
        ("int8", set(), "g++", False),
        ("int8", {"avx2"}, "no-such-compiler", False),
        ("int4", {"avx2"}, "g++", False),
        ("int4", {"avx2", "avx512_vnni"}, "g++", True),
        ("none", {"avx2", "avx512_vnni"}, "g++", False),
    ],
)
def test_faster_is_what_was_measured_to_be(checkpoint, artifact, monkeypatch, quantize, flags, compiler, is_faster):
    asked = {"sequence_length": (16,), "quantize": quantize}
    loose = {} if quantize == "none" else {"accept_loss": True, "max_kl": 9.0}
    made = read_artifact(artifact(checkpoint("llama"), **asked, **loose))
    monkeypatch.setattr(fastest_module, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setenv("CXX", compiler)
    advice = faster_here(made, ExportOptions(validate=False, **asked, **loose))
    assert advice == (
        "Native code of such a model decodes faster on this CPU: backend='aoti' compiles it, backend='auto' measures "
        "both."
        if is_faster
        else None
    )


def test_nothing_is_advised_that_cannot_be_done(checkpoint, artifact, monkeypatch):
    asked = {"sequence_length": (16,), "quantize": "int8", "accept_loss": True, "max_kl": 9.0}
    made = read_artifact(artifact(checkpoint("llama"), **asked))
    monkeypatch.setattr(fastest_module, "cpu_flags", lambda: frozenset({"avx2"}))
    options = ExportOptions(validate=False, **asked)
    assert faster_here(made, options)

    def check(self):
        raise UsageError("aoti takes no such thing")

    monkeypatch.setattr(ExportOptions, "check", check)
    assert faster_here(made, options) is None


# ---------------------------------------------------------------- graphs timed for themselves


def _ticking():
    now = [0.0]

    def tick():
        now[0] += 1.0
        return now[0]

    return tick


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_graphs_of_any_model_can_be_timed(name, request, monkeypatch):
    path, runs = request.getfixturevalue(name), []
    bind = "precast.runtime.engines.onnx.OnnxEngine.bind"
    monkeypatch.setattr(bind, lambda self, graph, inputs, outputs: lambda: runs.append(graph))
    job = {"model": str(path), "options": {}, "rows": [[]], "warm_up": [], "is_bare": True}
    figures = measure(job, _ticking())
    graphs = CompiledModel.from_pretrained(path).variant.graphs
    times = 1 if name == "encoder" else STEPS
    assert {graph: runs.count(graph) for graph in runs} == {graph.name: 1 + CALLS * times for graph in graphs}
    assert figures["call_p50_ms"] == 1e3
    assert "call_p50_ms" not in measure({**job, "rows": []}, _ticking())


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_graphs_run_over_blank_inputs(name, request):
    job = {"model": str(request.getfixturevalue(name)), "options": {}, "rows": [], "warm_up": [], "is_bare": True}
    assert measure(job)["cold_start_seconds"] > 0


# ---------------------------------------------------------------- the command line


@pytest.fixture
def run(monkeypatch, capfd):
    """`run("llama", "-o", "out")`: exit code, standard output, standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["precast", "export", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capfd.readouterr()

    return call


def test_a_dry_run_lists_the_candidates(two, run, checkpoint, monkeypatch):
    monkeypatch.setitem(BACKENDS, "gone", replace(toy_backend.ROW, name="gone", compiler="no_such_module:Compiler"))
    words = (checkpoint("llama"), "--backend", "auto", "--dry-run")
    code, out, _ = run(*words)
    assert code == 0
    assert "backend          onnx\nbackend          toy\nno backend       gone: no_such_module is not" in out
    found = json.loads(run(*words, "--json")[1])
    assert found["backends"] == ["onnx", "toy"]
    assert found["left_out"] == {"gone": "no_such_module is not installed"}


@pytest.mark.parametrize("as_json", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_comparison_is_told(two, run, checkpoint, tmp_path, monkeypatch, as_json):
    monkeypatch.setattr("precast.exporter.several.fastest.ask_child", None)
    ask = clock(onnx=(10.0, 100.0), toy=(20.0, 90.0))
    monkeypatch.setattr(export_fastest, "__kwdefaults__", {**export_fastest.__kwdefaults__, "ask": ask})
    target = tmp_path / "out"
    words = ("--sequence-length", 24, "--backend", "auto", "--no-validate", "-o", target)
    code, out, err = run(checkpoint("llama"), *words, *(["--json"] if as_json else []))
    assert code == 0, err
    assert "toy: compile" in err
    if as_json:
        assert json.loads(out)["comparison"] == json.loads((target / "bench.json").read_text())
    else:
        assert out.splitlines()[:3] == [
            "medians of 3 rounds, ms: batch 1, 12 tokens and 12 new ones", "  onnx     120  (kept)", "  toy      142.2",
        ]  # fmt: skip


@pytest.mark.slow
def test_auto_from_beginning_to_end(two, run, checkpoint, tmp_path):
    """Validation, and timing in child processes."""
    code, out, err = run(checkpoint("llama"), "--sequence-length", 24, "--backend", "auto", "-o", tmp_path / "out")
    assert code == 0, err
    assert "(kept)" in out
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["candidates"].keys() == {"onnx", "toy"}
    made = read_artifact(tmp_path / "out")
    assert made.contract.variants[0].accuracy.status == "passed"
    assert CompiledModelForCausalLM.from_pretrained(made.path).generate([[5, 6]], max_new_tokens=2).shape == (1, 4)
