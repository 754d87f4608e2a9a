"""`--replicas N`: the file of several processes is the one of one process, whoever of them dies."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import msgspec
import pytest
from prefixes import random_prefix

from precast.runtime import CompiledModel, CompiledModelForCausalLM, pipeline
from precast.runtime.artifact.schema import Ranks, Split, Stage
from precast.runtime.errors import InputError, PrecastError, PrecastWarning, UsageError
from precast.runtime.runner import replicas as replicas_module
from precast.runtime.runner.files import answer_file
from precast.runtime.runner.generating import GeneratingWorker
from precast.runtime.runner.predicting import PredictingWorker
from precast.runtime.runner.rows import Column, Row

WORDS = ["water", "Paris", "天气", "a", "compiler", "\u2028", '"\\n']
MODULE = "precast.runtime.runner.replica"


def texts(count, seed=7):
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 5))) for _ in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def replicas_of(parent):
    """The processes that are replicas of a process."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status, command = (folder / "stat").read_text(), (folder / "cmdline").read_text()
            except OSError:
                continue
            if MODULE in command and int(status.rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def pairs(artifact, checkpoint):
    """A decoder of batch 2, capacity 48."""
    return artifact(checkpoint("llama"), batch_size=2, dynamic_batch_size=True)


@pytest.fixture(scope="module")
def model(pairs):
    return CompiledModelForCausalLM.from_pretrained(pairs, threads=1)


@pytest.fixture
def answer(model, tmp_path):
    """`answer(name, rows, replicas=2)`: the bytes of a file of sampled answers; a worker of one's own is given rows'
    column and a seed."""
    warnings.simplefilter("ignore", PrecastWarning)

    def go(name, rows, make=None, settings=None, **options):
        def make_worker(seed):
            asked = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0, **(settings or {}), "seed": seed}
            return GeneratingWorker(model, Column(rows, None, ()), asked)

        answer_file(rows, tmp_path / name, {"seed": 5}, make or make_worker, **options)
        return (tmp_path / name).read_bytes()

    return go


def test_the_file_is_that_of_one_process(run, pairs, encoder, artifact, checkpoint, tmp_path):
    """Generated with a seed, embedded, classified: byte for byte, bad rows, cut ones and conversations among them."""
    rows = [{"text": each} for each in texts(12)]
    rows[3:3] = [{"text": "Paris " * 40}, {"text": 7}, {"none": 1}, {"text": [{"role": "user", "content": "Hi"}]}]
    shapes = {"batch_size": 3, "sequence_length": (16, 48), "dynamic_batch_size": True}
    classifier = artifact(checkpoint("bert", "AutoModelForSequenceClassification"), **shapes)
    sampled = ("--seed", "3", "--temperature", "2", "--max-new-tokens", "6", "--max-input-tokens", "12", "--chat")
    for number, words in enumerate(
        [("generate", pairs, *sampled), ("predict", encoder), ("predict", classifier, "--top", "2")]
    ):
        asked = (*words, "--input-file", write(tmp_path / "in.jsonl", rows), "--threads", "1", "--output-file")
        code, told, _ = run(*asked, tmp_path / f"{number}.jsonl")
        assert code == 0
        code, out, err = run(*asked, tmp_path / f"{number}-two.jsonl", "--replicas", "2")
        assert code == 0, err
        assert (tmp_path / f"{number}-two.jsonl").read_bytes() == (tmp_path / f"{number}.jsonl").read_bytes()
        assert re.findall("; .*", out) == re.findall("; .*", told)
    assert replicas_of(os.getpid()) == []


@pytest.mark.slow
def test_adapters_and_prefixes_go_along(pairs, checkpoint, artifact, tmp_path):
    """Each replica loads what the first process has loaded; adapters.py needs peft, which is slow to import."""
    from adapters import make_adapter

    slots = artifact(checkpoint("llama"), lora_slots=1, lora_rank=4)
    adapted = CompiledModelForCausalLM.from_pretrained(slots, threads=1)
    made = make_adapter(tmp_path / "adapter", checkpoint("llama"), "AutoModelForCausalLM", target_modules=["q_proj"])
    adapted.load_adapter("style", made)
    prefixed = CompiledModelForCausalLM.from_pretrained(pairs, threads=1)
    prefixed = prefixed.new_session(prefix=random_prefix(tmp_path / "prefix"))
    plain = CompiledModelForCausalLM.from_pretrained(pairs, threads=1)
    rows, found = [Row(each) for each in texts(6)], []
    for number, (model, settings) in enumerate(
        [(adapted, {"adapter": "style"}), (adapted, {}), (prefixed, {}), (plain, {})]
    ):
        for replicas in (1, 2):
            path = tmp_path / f"{number}-{replicas}.jsonl"
            asked = {"max_new_tokens": 8, "eos_token_id": [], **settings}
            worker = GeneratingWorker(model, Column(rows, None, ()), asked)
            answer_file(rows, path, {}, lambda seed, worker=worker: worker, replicas=replicas)
        assert path.read_bytes() == (tmp_path / f"{number}-1.jsonl").read_bytes()
        found.append(path.read_bytes())
    assert found[0] != found[1], "the adapter changes answers"
    assert found[2] != found[3], "and so does the prefix"


def test_more_of_them_than_cores_are_said(run, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(replicas_module, "usable_cores", lambda: 1)
    words = ("--prompt", "a", "--prompt", "Paris", "--prompt", "b", "--output-file", tmp_path / "o.jsonl")
    code, _, err = run("generate", pairs, *words, "--max-new-tokens", "2", "--replicas", "2")
    assert (code, "2 replicas share the 1 cores that this process may use" in err) == (0, True)


def test_a_replica_that_is_killed_loses_no_row(answer):
    rows = [Row(each) for each in texts(16)]
    killed = []

    def kill(count):
        if count and len(killed) < 2:
            victim = replicas_of(os.getpid())[0]
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    assert answer("two.jsonl", rows, replicas=2, advance=kill) == answer("one.jsonl", rows)
    assert len(killed) == 2
    assert replicas_of(os.getpid()) == []


def test_an_interrupt_ends_all_and_keeps_what_is_there(answer, tmp_path):
    rows, done = [Row(each) for each in texts(16)], []

    def stop(count):
        done.append(count)
        if sum(done) > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer("two.jsonl", rows, replicas=2, advance=stop)
    assert replicas_of(os.getpid()) == []
    told = []
    assert answer("two.jsonl", rows, replicas=2, resume=True, advance=told.append) == answer("one.jsonl", rows)
    assert told[0] == sum(done), "what was told of is kept"


def test_what_dies_again_and_again_ends_the_work(answer, monkeypatch, tmp_path):
    rows, real = [Row(each) for each in texts(6)], replicas_module.child.command
    monkeypatch.setattr(
        replicas_module.child, "command", lambda *words: [sys.executable, "-c", "import sys; sys.exit('no room')"]
    )
    with pytest.raises(
        PrecastError, match=r"died 3 times, the last at rows \d+, \d+: it ended with exit code 1: no ro"
    ):
        answer("o.jsonl", rows, replicas=2)
    monkeypatch.setattr(replicas_module.child, "command", real)
    assert answer("o.jsonl", rows, replicas=2, resume=True) == answer("one.jsonl", rows)


def test_the_first_bad_row_ends_it_as_in_one_process(answer, encoder):
    """Texts that only the model refuses, in several batches: the one that one process tells of."""
    model = CompiledModel.from_pretrained(encoder, threads=1)
    rows, said = [Row(each) for each in texts(12)], []
    for place in (2, 5, 9):
        rows[place] = Row("Paris " * (60 - place))

    def make_worker(seed):
        return PredictingWorker(pipeline(model=model), Column(rows, None, ()), {})

    for count in (1, 2):
        with pytest.raises(InputError) as caught:
            answer(f"{count}.jsonl", rows, make_worker, replicas=count, fail_fast=True)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert re.match(r"Row 10: A row has 153 tokens", said[0])


def test_other_files_than_those_that_were_opened_are_refused(answer, model, monkeypatch, tmp_path):
    """A replica opens the artifact of the same digest, or none."""
    rows = [Row(each) for each in texts(4)]

    def make_worker(seed):
        worker = GeneratingWorker(model, Column(rows, None, ()), {})
        job = worker.as_job("replicas=2")
        job["model"]["digest"] = "0" * 64
        monkeypatch.setattr(worker, "as_job", lambda asked: job)
        return worker

    with pytest.raises(PrecastError, match=f"not {'0' * 64}"):
        answer("o.jsonl", rows, make_worker, replicas=2)


class Shouts:
    """A worker that no other process can make."""

    batch_size = 2

    def prepare(self, index, row):
        raise AssertionError

    answer = prepare


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: Shouts(), "Shouts says nothing by which they could"),
        (lambda model: _worker(model, logits_processor=[print]), "cannot hold logits_processor="),
        (lambda model: _worker(model, bias={5: 1.0}), "cannot hold bias="),
        (lambda model: PredictingWorker(pipeline(model=model, top_k=3), Column([], None, ()), {}), "more than a task"),
        (lambda model: _worker(_changed(model)), "generation_config was changed"),
        (lambda model: _worker(_of_ranks(model)), "compiled for 2 ranks.*export the model without tensor_parallel"),
        (lambda model: _worker(_of_stages(model)), "compiled for 3 ranks.*export the model without pipeline_parallel"),
        (lambda model: _worker(_on_device(model)), "runs on cuda"),
    ],
)
def test_what_others_cannot_have_is_refused_by_name(answer, model, monkeypatch, make, message):
    monkeypatch.setattr(Shouts, "prepare", lambda self, index, row: replicas_module.Prepared(index, row, None))
    monkeypatch.setattr(GeneratingWorker, "prepare", Shouts.prepare)
    with pytest.raises(UsageError, match=f"^(replicas=2 |TextGen).*{message}"):
        answer("o.jsonl", [Row("a")], lambda seed: make(model), replicas=2)


def _worker(model, bias=None, **settings):
    worker = GeneratingWorker(model, Column([], None, ()), {})
    worker._given = {**settings, **({} if bias is None else {"bias": bias})}
    return worker


def _changed(model):
    other = model.new_session()
    other.generation_config = {"temperature": 3.0}
    return other


def _of_ranks(model):
    other = model.new_session()
    ranks = Ranks(count=2, splits={"w": Split(dim=0)}, degrees={}, stored=2)
    other.variant = msgspec.structs.replace(model.variant, ranks=ranks)
    return other


def _of_stages(model):
    other = model.new_session()
    other.variant = msgspec.structs.replace(model.variant, stages=[Stage(graphs=[], weights=[])] * 3)
    return other


def _on_device(model):
    other = model.new_session()
    other.opening = type(model.opening)("x", device="cuda")
    return other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", "a"), "--replicas answer the rows of an output file; give --output-file"),
        (("--prompt", "a", "--output-file", "o.jsonl", "--replicas", "0"), "--replicas"),
    ],
)
def test_where_they_mean_nothing(run, pairs, words, message):
    code, _, err = run("generate", pairs, "--replicas", "2", *words)
    assert (code, message in err) == (2, True), err


def test_none_are_started_for_what_is_done(answer, monkeypatch):
    rows = [Row(each) for each in texts(4)]
    whole = answer("o.jsonl", rows)
    monkeypatch.setattr(replicas_module.subprocess, "Popen", None)
    assert answer("o.jsonl", rows, replicas=2, resume=True) == whole
    with pytest.raises(UsageError, match="replicas='2' must be a whole number from 1"):
        answer("p.jsonl", rows, replicas="2")


def _precast(*words, **options):
    command = [sys.executable, "-m", "precast", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True, **options)


def _wait_for(condition, process):
    while process.poll() is None and not condition():
        time.sleep(0.002)


def test_ctrl_c_of_the_command(pairs, tmp_path):
    target, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    rows = write(tmp_path / "in.jsonl", [{"text": each} for each in texts(400)])
    words = ("--input-file", rows, "--output-file", target, "--replicas", "2")
    process = _precast("generate", pairs, *words, stderr=subprocess.PIPE)
    _wait_for(lambda: partial.exists() and partial.stat().st_size > 1000, process)
    started = replicas_of(process.pid)
    process.send_signal(signal.SIGINT)
    assert "Interrupted" in process.communicate()[1]
    assert (process.returncode, len(started)) == (130, 2)
    assert not any(Path(f"/proc/{each}").exists() for each in started)
    assert partial.exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "embed", "classify"])
def test_a_file_survives_ten_kills_of_any_of_them(command, pairs, encoder, artifact, checkpoint, tmp_path):
    """A thousand rows; a replica, or all by the one that writes, killed ten times at random: byte for byte undisturbed,
    and nobody is left."""
    shapes = {"batch_size": 3, "sequence_length": (16, 48), "dynamic_batch_size": True}
    if command == "generate":
        words = ["generate", pairs, "--seed", "3", "--max-new-tokens", "12"]
    elif command == "embed":
        words = ["predict", encoder]
    else:
        words = ["predict", artifact(checkpoint("bert", "AutoModelForSequenceClassification"), **shapes)]
    rows, chance = [{"text": each} for each in texts(1000)], random.Random(11)
    words += ["--input-file", write(tmp_path / "in.jsonl", rows), "--threads", "1", "-q", "--output-file"]
    assert _precast(*words, tmp_path / "whole.jsonl").wait() == 0
    whole, target, partial = (tmp_path / name for name in ("whole.jsonl", "out.jsonl", "out.jsonl.partial"))
    size, process, seen = whole.stat().st_size, None, set()
    for kill in range(10):
        if process is None or process.poll() is not None:
            process = _precast(*words, target, "--resume", "--replicas", "2")
        point = size * (kill + chance.random()) / 11
        _wait_for(lambda point=point: partial.exists() and partial.stat().st_size > point, process)
        found = replicas_of(process.pid)
        seen |= set(found)
        victim = chance.choice([process.pid, *found])
        if process.poll() is None:
            os.kill(victim, signal.SIGKILL)
        if victim == process.pid:
            process.wait()
    # A batch whose replica was killed three times ends the work, too.
    assert process.wait() in (0, 1, -signal.SIGKILL)
    assert _precast(*words, target, "--resume", "--replicas", "2").wait() == 0
    assert target.read_bytes() == whole.read_bytes()
    assert [json.loads(line)["input"] for line in whole.read_bytes().split(b"\n")[:-1]] == rows
    assert not partial.exists()
    time.sleep(0.2)
    assert not any(MODULE in _command(each) for each in seen)


def _command(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def test_python_says_as_much_as_the_command(encoder, tmp_path):
    warnings.simplefilter("ignore", PrecastWarning)
    opened = CompiledModel.from_pretrained(encoder, threads=1)
    rows = [Row(each) for each in texts(7)]
    found = []
    for count in (1, 2):
        worker = PredictingWorker(pipeline(model=opened), Column(rows, None, ()), {"pooling": "mean"})
        target = tmp_path / f"{count}.jsonl"
        summary = answer_file(rows, target, {}, lambda seed, worker=worker: worker, replicas=count)
        found.append(target.read_bytes())
        assert (summary.rows, summary.computed, summary.failed) == (7, 7, 0)
    assert found[0] == found[1]
