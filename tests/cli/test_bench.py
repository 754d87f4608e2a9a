"""`precast bench`: what is asked of the children, what is made of their answers. No time is ever judged."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import handmade
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precast.cli import main
from precast.runtime import CompiledModelForCausalLM, GenerationConfig
from precast.runtime.artifact import Artifact, read_artifact
from precast.runtime.bench.compare import STRIDE, Subject, bench, plan, token_ids
from precast.runtime.bench.worker import measure
from precast.runtime.errors import InputError, UsageError

SMALL = ("--repeat", "2", "--prompt-length", "8", "--new-tokens", "4", "--threads", "1")
DECODER_FIGURES = [
    "load_seconds", "cold_start_seconds", "first_token_ms", "tokens_per_second", "tokens_per_second_per_row",
    "inter_token_p50_ms", "inter_token_p90_ms", "inter_token_p99_ms", "peak_rss_mb", "pss_mb", "private_mb",
]  # fmt: skip
ENCODER_FIGURES = [
    "load_seconds", "cold_start_seconds", "call_p50_ms", "call_p90_ms", "call_p99_ms", "sequences_per_second",
    "peak_rss_mb", "pss_mb", "private_mb",
]  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(path, …)`: exit code, standard output, standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["precast", "bench", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def pair(checkpoint, artifact):
    """A decoder of batch 2 that runs larger batches in slices."""
    return artifact(checkpoint("llama"), batch_size=2, dynamic_batch_size=True)


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """`pretend(script)`: children run this shell script instead of Python."""

    def make(script: str) -> None:
        path = tmp_path / "child"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return make


def is_one_line(text: str, pattern: str) -> bool:
    """But for the empty one with which click follows a ^C."""
    return re.fullmatch(f".*{pattern}.*", text.strip()) is not None


def subject(name: str = "out", capacity: int = 48, batch: int = 1, **changes) -> Subject:
    """A decoder that nobody runs."""
    graph = msgspec.structs.replace(handmade.variant().graphs[0], capacity=capacity, batch=batch)
    variant = handmade.variant(graphs=[graph])
    contract = handmade.contract(variants=[variant], **changes)
    shapes = msgspec.structs.replace(contract.shapes, batch_size=batch, sequence_length=[capacity])
    return Subject(name, Artifact(Path("nowhere"), {}, msgspec.structs.replace(contract, shapes=shapes)), variant, {})


def ticking():
    """A clock that is read once a second."""
    return map(float, range(10**6)).__next__


def job(model, rows: int, **changes):
    """A job of prompts of five tokens."""
    prompts = [[5 + row, 6, 7, 8, 9] for row in range(2 * rows)]
    asked = {"model": str(model), "options": {}, "rows": prompts[:rows], "warm_up": prompts[rows:]}
    return {**asked, "new_tokens": 4, "prompt_lookup": 0, **changes}


def test_a_decoder_is_timed_from_the_request_to_each_token(decoder):
    figures = measure(job(decoder, 1), ticking())
    assert list(figures) == DECODER_FIGURES
    assert (figures["load_seconds"], figures["cold_start_seconds"], figures["first_token_ms"]) == (1, 2, 1000)
    assert figures["tokens_per_second"] == figures["tokens_per_second_per_row"] == 1
    assert {figures[f"inter_token_p{percent}_ms"] for percent in (50, 90, 99)} == {1000}


def test_a_step_of_a_batch_is_done_with_its_last_row(pair):
    figures = measure(job(pair, 2), ticking())
    assert (figures["first_token_ms"], figures["inter_token_p50_ms"]) == (2000, 2000)
    assert (figures["tokens_per_second"], figures["tokens_per_second_per_row"]) == (1, 0.5)


def test_slices_of_a_batch_follow_each_other(pair):
    """Three rows as two and one: eight readings for the first slice, then four."""
    figures = measure(job(pair, 3), ticking())
    assert figures["first_token_ms"] == 9000
    # Nine tokens after the first, in three gaps of two seconds and three of one.
    assert (figures["tokens_per_second"], figures["inter_token_p50_ms"]) == (1, 1500)


def test_one_new_token_has_no_speed(decoder):
    figures = measure(job(decoder, 1, new_tokens=1), ticking())
    assert list(figures) == DECODER_FIGURES
    assert figures["first_token_ms"] == 1000
    assert figures["tokens_per_second"] is figures["inter_token_p99_ms"] is None


def test_without_rows_a_model_is_only_opened_and_warmed_up(decoder, encoder):
    for model in (decoder, encoder):
        found = measure({**job(model, 1), "rows": []}, ticking())
        assert list(found) == ["load_seconds", "cold_start_seconds", "peak_rss_mb", "pss_mb", "private_mb"]


def test_every_request_computes_its_prompt_and_writes_all_of_its_tokens(decoder, monkeypatch):
    """Whatever the request before left, and whatever the checkpoint says about the end."""
    calls, reset, generate = [], CompiledModelForCausalLM.reset, CompiledModelForCausalLM.generate

    def spied_reset(self):
        calls.append("reset")
        reset(self)

    def spied_generate(self, ids, mask, **options):
        whole = generate(self, ids, mask, **options)
        calls.append(whole.shape[1] - len(ids[0]))
        return whole

    monkeypatch.setattr(CompiledModelForCausalLM, "reset", spied_reset)
    monkeypatch.setattr(CompiledModelForCausalLM, "generate", spied_generate)
    ending = GenerationConfig(eos_token_id=list(range(320)), do_sample=True, stop_strings=["e"])
    monkeypatch.setattr(CompiledModelForCausalLM, "generation_config", ending)
    measure(job(decoder, 1))
    assert calls == ["reset", 4, "reset", 4]


def test_an_encoder_is_timed_by_calls(encoder):
    figures = measure(job(encoder, 2), ticking())
    assert list(figures) == ENCODER_FIGURES
    assert (figures["cold_start_seconds"], figures["call_p90_ms"], figures["sequences_per_second"]) == (2, 1000, 2)


lengths = st.none() | st.integers(1, 400)


@given(room=st.integers(2, 300), prompt=lengths, new=lengths)
def test_a_request_fits_or_is_refused_with_both_numbers(room, prompt, new):
    subjects, least = [subject("small", room), subject("big", room + 9)], (prompt or 1) + (new or 1)
    if least > room:
        ask = "Ask for (new_tokens|prompt_length)=.* precast export user/tiny"
        words = rf"{least} together, do not fit into the {room} that small .* {ask}"
        with pytest.raises(InputError, match=words):
            plan(subjects, None, prompt, new)
        return
    request = plan(subjects, None, prompt, new)
    assert request.prompt_length + request.new_tokens <= room
    assert request.prompt_length == (prompt or request.prompt_length) >= 1
    assert request.new_tokens == (new or request.new_tokens) >= 1


@pytest.mark.parametrize(("room", "lengths"), [(512, (128, 128)), (200, (100, 100)), (3, (1, 2))])
def test_half_of_what_fits_is_prompt(room, lengths):
    request = plan([subject(capacity=room)])
    assert (request.prompt_length, request.new_tokens) == lengths


def test_what_fits_all_is_what_is_measured():
    request = plan([subject("a", 100, 4), subject("b", 60, 2)], prompt_lookup=3)
    assert (request.batch_size, request.prompt_length, request.new_tokens, request.prompt_lookup) == (2, 30, 30, 3)
    with pytest.raises(InputError, match="batch_size=3 is more than the 2 that b was compiled for"):
        plan([subject("a", 100, 4), subject("b", 60, 2)], batch_size=3)


def test_artifacts_take_turns_and_ratios_are_taken_within_a_round():
    """The second is twice, then four, then three times as fast, on a machine that slows down."""
    asked, speeds = [], {"a": iter([8.0, 4.0, 1.0]), "b": iter([16.0, 16.0, 3.0])}

    def ask(one, work):
        asked.append((one.name, len(work["rows"]), work["options"]["verify"]))
        return {"speed": next(speeds[one.name]), "none": None} if work["rows"] else {}

    subjects = [replace(subject(name), options={"verify": True}) for name in "ab"]
    steps = []
    found = bench(subjects, plan(subjects), [[1, 2, 3]] * 2, 3, lambda name: nullcontext(steps.append(name)), ask)
    assert asked[:2] == [("a", 0, True), ("b", 0, True)]
    assert asked[2:] == [(name, 1, False) for name in "abbaab"]
    assert steps == ["open a", "open b", "1/3 a", "1/3 b", "2/3 b", "2/3 a", "3/3 a", "3/3 b"]
    assert [each["ratios"] for each in found] == [{"speed": 1.0, "none": None}, {"speed": 3.0, "none": None}]
    assert found[0]["figures"]["speed"] == {"median": 4.0, "min": 1.0, "max": 8.0, "rounds": [8.0, 4.0, 1.0]}
    assert found[0]["figures"]["none"] is None


@given(length=st.integers(1, 40), batch=st.integers(1, 4), size=st.integers(1, 300))
def test_prompts_repeat_or_cut_the_text_and_the_warm_up_begins_elsewhere(length, batch, size):
    jobs, one, ids = [], subject(capacity=48, batch=4), list(range(size))
    bench([one], plan([one], batch, length), [ids], 1, nullcontext, lambda _, work: jobs.append(work) or {"x": 1.0})
    rows, warm_up = jobs[1]["rows"], jobs[1]["warm_up"]
    assert {len(row) for row in rows + warm_up} == {length}
    assert (len(rows), len(warm_up)) == (batch, batch)
    assert rows[0] == (ids * length)[:length]
    if size > 2 * batch * STRIDE:
        assert len({row[0] for row in rows + warm_up}) == 2 * batch


def test_without_a_tokenizer_prompts_are_ids_of_the_vocabulary(decoder, tmp_path):
    bare = subject()
    for config, most in (({"vocab_size": 50}, 50), ({"text_config": {"vocab_size": 7}}, 7), ({}, 1)):
        ids = token_ids(replace(bare, artifact=Artifact(tmp_path, config, bare.artifact.contract)))
        assert set(ids) == set(range(most))
    with pytest.raises(UsageError, match="prompt_file needs a tokenizer, and out has none"):
        token_ids(replace(bare, artifact=Artifact(tmp_path, {}, bare.artifact.contract)), "text")
    with_one = replace(bare, artifact=read_artifact(decoder))
    assert token_ids(with_one, "Water boils") == CompiledModelForCausalLM.from_pretrained(decoder).tokenizer.encode(
        "Water boils"
    )


def test_json_is_one_document_with_everything(run, decoder, pair):
    code, out, err = run(decoder, "--compare", pair, *SMALL, "--json")
    found = json.loads(out)
    assert code == 0
    assert found.keys() == {"machine", "request", "artifacts"}
    assert found["machine"].keys() >= {"cpu", "cores", "memory_gb", "python", "precast", "onnxruntime"}
    assert found["request"] == {
        "kind": "decoder", "batch_size": 1, "prompt_length": 8, "new_tokens": 4, "prompt_lookup": 0, "device": None,
        "provider": None, "threads": 1, "repeat": 2,
    }  # fmt: skip
    assert [each["model"] for each in found["artifacts"]] == [str(decoder), str(pair)]
    for each in found["artifacts"]:
        assert list(each["figures"]) == list(each["ratios"]) == DECODER_FIGURES
        assert {len(figure["rounds"]) for figure in each["figures"].values()} == {2}
        assert each["size_mb"] > 0
    assert set(found["artifacts"][0]["ratios"].values()) == {1.0}
    assert [line.split("  ")[1] for line in err.splitlines()] == [
        f"open {decoder}", f"open {pair}", f"1/2 {decoder}", f"1/2 {pair}", f"2/2 {pair}", f"2/2 {decoder}",
    ]  # fmt: skip


@pytest.mark.parametrize("compare", [(), ("{encoder}",), ("{encoder}", "{encoder}")])
def test_the_table_fits_a_terminal(run, encoder, compare):
    words = [word for other in compare for word in ("--compare", other.format(encoder=encoder))]
    code, out, err = run(encoder, *words, "--repeat", 1, "-q")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines()[2:])) <= 80
    assert out.startswith("3 rows of 48 tokens; 1 round\n")
    assert ("×1.00" in out) == bool(compare)
    assert "sequences/s" in out
    assert "tokens/s" not in out


def test_a_file_is_the_prompt_unless_a_length_is_given(run, decoder, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Water boils")
    few = ("--prompt-file", path, "--repeat", 1, "--new-tokens", 2, "--json", "-q")
    ids = CompiledModelForCausalLM.from_pretrained(decoder).tokenizer.encode("Water boils")
    assert json.loads(run(decoder, *few, "--prompt-lookup", 3)[1])["request"]["prompt_length"] == len(ids)
    assert json.loads(run(decoder, *few, "--prompt-length", 30)[1])["request"]["prompt_length"] == 30
    path.write_text("Water boils " * 40)
    code, _, err = run(decoder, *few)
    assert code == 2
    assert "do not fit into the 48" in err
    for data, message in ((b"", "has no tokens"), (b"\xff\xfe", "is not UTF-8 text")):
        path.write_bytes(data)
        code, out, err = run(decoder, *few)
        assert code == 2
        assert is_one_line(err, message)
        assert message in json.loads(out)["error"]["message"]


def test_saved_beside_the_model_without_a_word_about_this_place(run, decoder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(decoder, out)
    assert run(out, "--compare", decoder, *SMALL, "--save", "-q")[0] == 0
    saved = json.loads((out / "bench.json").read_text())
    assert saved.keys() == {"machine", "request", "artifacts"}
    [own] = saved["artifacts"]
    assert own.keys() & {"model", "ratios", "digest", "figures"} == {"digest", "figures"}
    assert str(tmp_path) not in (out / "bench.json").read_text()
    assert CompiledModelForCausalLM.from_pretrained(out, verify=True).capacity == 48
    (out / "bench.json").unlink()
    (out / "bench.json").mkdir()
    code, stdout, err = run(out, *SMALL, "--save", "-q")
    assert (code, stdout) == (1, "")
    assert "bench.json cannot be written" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("{decoder}", "--new-tokens", 41, "--prompt-length", 8), 2, "49 together, do not fit into the 48 that .* "
         "--new-tokens 40 at most. Compile a larger one.*: precast export CHECKPOINT .* --sequence-length 49"),
        (("{decoder}", "--prompt-length", 48), 2, "Ask for --prompt-length 47"),
        (("{encoder}", "--prompt-length", 49), 2, "49 tokens per row do not fit into the 48 .* --prompt-length 48"),
        (("{decoder}", "--batch-size", 2), 2, "--batch-size 2 is more than the 1 that "),
        (("{encoder}", "--new-tokens", 2), 2, "are for decoders; .* was compiled for feature-extraction"),
        (("{encoder}", "--prompt-lookup", 2), 2, "are for decoders"),
        (("{decoder}", "--compare", "{encoder}"), 2, "decoders and encoders have no figures in common"),
        (("{decoder}", "--compare", "./missing"), 1, "There is no directory ./missing"),
        (("user/repo", "--save"), 2, "--save writes into a local directory, and user/repo is none"),
        (("{decoder}", "--variant", "cuda"), 1, "no variant 'cuda'"),
        (("{decoder}", "--prompt-file", "/missing"), 2, "does not exist"),
        (("{decoder}", "--repeat", 0), 2, "x>=1"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_anything_runs(run, pretend, decoder, encoder, words, code, message):
    pretend("echo A child ran. >&2; exit 1")
    words = [str(word).format(decoder=decoder, encoder=encoder) for word in words]
    found, out, err = run(*words)
    assert (found, out) == (code, "")
    assert is_one_line(err, message)
    assert json.loads(run(*words, "--json")[1])["error"]["message"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--sha256", "0" * 64), 1, "not 000"),
        (("--batch-size", "2", "--prompt-lookup", "2"), 2, "Pass prompt_lookup_num_tokens=0 to go without"),
    ],
)
def test_what_a_child_refuses_is_refused_in_its_words(run, pair, words, code, message):
    found, out, err = run(pair, *SMALL, *words, "-q")
    assert (found, out) == (code, "")
    assert is_one_line(err, message)


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        (
            "echo Traceback >&2; echo 'RuntimeError: no luck' >&2; exit 3",
            1,
            "could not be measured: RuntimeError: no luck",
        ),
        ("exit 3", 1, "could not be measured: the child process ended with exit status 3"),
        ("kill -SEGV $$", 1, "the child process was ended by SIGSEGV."),
        ("kill -KILL $$", 1, "was ended by SIGKILL. Perhaps memory ran out: try a smaller --batch-size"),
        ("kill -INT $$", 130, "Interrupted."),
    ],
)
def test_a_child_that_fails_gets_one_line(run, pretend, decoder, script, code, message):
    pretend(script)
    found, out, err = run(decoder, "-q")
    assert (found, out) == (code, "")
    assert is_one_line(err, message)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_is_interrupted_takes_the_child_along(decoder, tmp_path, number, code):
    fifo, script = tmp_path / "running", tmp_path / "child"
    os.mkfifo(fifo)
    # Like a real one, it reads its job to the end first: then the parent waits for the answer.
    script.write_text(f"#!/bin/sh\ncat > {os.devnull}\nexec 3> {fifo}\necho running >&3\nexec sleep 600\n")
    script.chmod(0o755)
    prelude = f"import sys; sys.executable = {str(script)!r}; from precast.cli import main; main()"
    command = [sys.executable, "-c", prelude, "bench", decoder]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as parent, fifo.open("rb", 0) as child:
        assert child.readline() == b"running\n"
        parent.send_signal(number)
        _, err = parent.communicate()
        # The child holds the other end as long as it lives.
        assert select.select([child], [], [], 60)[0] == [child]
        assert child.read() == b""
    assert parent.returncode == code
    assert "Traceback" not in err
