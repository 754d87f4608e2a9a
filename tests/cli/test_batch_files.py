"""`precast generate` and `precast predict` of whole files: each row's answer is the one that it gets alone."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import oracle
import pytest
import tiny

from precast.runtime import CompiledModel, pipeline

PROMPTS = [
    "Paris",
    "Water boils at 100",
    "今天天气",
    "The capital of France is Paris. " * 2,
    "A",
    "Größe",
    "a compiler",
]


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("llama")


@pytest.fixture(scope="module")
def pairs(artifact, source):
    """A decoder of batch 2, capacity 48."""
    return artifact(source, batch_size=2, dynamic_batch_size=True)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def expected_text(source, ids, count):
    tokenizer = tiny.tokenizer()
    return tokenizer.decode(oracle.greedy(source, ids, max_new_tokens=count), skip_special_tokens=True)


def test_rows_are_continued_as_transformers_continues_each_alone(run, source, pairs, decoder, tmp_path):
    tokenizer = tiny.tokenizer()
    (tmp_path / "in.txt").write_text("\n".join(PROMPTS) + "\n", "utf-8")
    words = ("--input-file", tmp_path / "in.txt", "--output-file", tmp_path / "out.jsonl", "--temperature", "0")
    code, out, err = run("generate", pairs, *words)
    assert (code, err) == (0, "")
    assert re.fullmatch(r".*out.jsonl: 7 rows in [\d.]+ s, [\d.e+]+ rows/s\n", out)
    for prompt, row in zip(PROMPTS, read(tmp_path / "out.jsonl"), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        # As long as fits: what a row gets does not depend on its neighbours.
        assert row["input"] == prompt
        assert row["output"] == expected_text(source, ids, 48 - len(ids))
        assert (row["prompt_tokens"], row["finish_reason"] in ("stop", "length")) == (len(ids), True)
        assert row["new_tokens"] == 48 - len(ids) or row["finish_reason"] == "stop"
    whole = (tmp_path / "out.jsonl").read_bytes()
    for name in (pairs, decoder):
        run("generate", name, *words, "--force")
        assert (tmp_path / "out.jsonl").read_bytes() == whole
    # To the terminal, in the same order; as one document.
    code, out, _ = run("generate", pairs, "--input-file", tmp_path / "in.txt", "--temperature", "0")
    assert [json.loads(line) for line in out.splitlines()] == read(tmp_path / "out.jsonl")
    _, out, _ = run("generate", pairs, "--temperature", "0", "--json", *(f"--prompt={each}" for each in PROMPTS))
    assert json.loads(out) == read(tmp_path / "out.jsonl")


def test_a_sampled_row_depends_on_its_place_alone(run, pairs, decoder, tmp_path):
    write(tmp_path / "in.jsonl", [{"id": n, "text": text} for n, text in enumerate(PROMPTS)])
    asked = ("--input-file", tmp_path / "in.jsonl", "--seed", "5", "--temperature", "2", "--max-new-tokens", "8")
    found = {}
    for name in (pairs, decoder):
        run("generate", name, *asked, "--output-file", tmp_path / "out.jsonl", "--force")
        found[name] = read(tmp_path / "out.jsonl")
    assert found[pairs] == found[decoder]
    assert found[pairs][3]["input"] == {"id": 3, "text": PROMPTS[3]}
    model = CompiledModel.from_pretrained(decoder)
    for index in (0, 3):
        ids = model.tokenizer.encode(PROMPTS[index])
        alone = model.generate([ids], do_sample=True, temperature=2.0, max_new_tokens=8, seed=5 + index)
        assert found[pairs][index]["output"] == model.tokenizer.decode(alone[0, len(ids) :], skip_special_tokens=True)


def test_conversations_rounds_and_cuts(run, source, pairs, tmp_path):
    tokenizer = tiny.tokenizer()
    chat = [{"role": "user", "content": "Hi"}]
    rows = [{"messages": chat}, {"src": "Water", "tgt": "?"}, {"src": ["a", "b"], "tgt": ["A", "B"]}, {"messages": 7}]
    write(tmp_path / "in.jsonl", rows)
    words = ("--input-file", tmp_path / "in.jsonl", "--output-file", tmp_path / "out.jsonl", "--max-new-tokens", "6")
    code, out, _ = run("generate", pairs, *words, "--max-input-tokens", "10", "--temperature", "0")
    assert code == 0
    assert "; 1 failed, with the reason in its row; 2 cut to 10 tokens" in out
    found = read(tmp_path / "out.jsonl")
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert found[0]["input"] == rows[0]
    assert found[0]["output"] == expected_text(source, ids[-10:], 6)
    assert found[1] == {**rows[1], "output": expected_text(source, tokenizer("Water")["input_ids"], 6)}
    assert found[2].keys() == {"src", "tgt", "output"}
    assert "a text, or messages" in found[3]["error"]["message"]
    plain = ("generate", pairs, "--input-file", tmp_path / "in.txt", "--max-new-tokens", "4", "--temperature", "0")
    (tmp_path / "in.txt").write_text("a\\nb\n\nc\n")
    _, out, _ = run(*plain, "--line-breaks", "--keep-blank-lines")
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["input"] for row in found] == ["a\nb", "", "c"]
    assert "no token of their own" in found[1]["error"]["message"]
    assert "Left out as blank: line 2 of" in run(*plain)[2]


def test_rows_that_do_not_fit_are_said_one_by_one(run, pairs, tmp_path):
    write(tmp_path / "in.jsonl", [{"prompt": "Paris " * 40}, {"prompt": "Paris"}])
    words = ("generate", pairs, "--input-file", tmp_path / "in.jsonl", "--max-new-tokens", "40")
    code, out, _ = run(*words)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert re.search(
        r"The prompt's \d+ tokens and 40 new ones do not fit into the compiled capacity of 48. Pass max_input_tokens=8",
        rows[0]["error"]["message"],
    )
    assert "output" in rows[1]
    code, out, err = run(*words, "--fail-fast")
    assert (code, out) == (2, "")
    assert err.startswith("precast: Row 1: The prompt's")
    assert "--max-input-tokens 8" in err
    write(tmp_path / "in.jsonl", [{"prompt": "Paris " * 40}])
    assert run(*words)[0] == 1, "no row could be answered"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--input-file", "{rows}", "--column", "txet"), "There is no column 'txet'. Did you mean text?"),
        (("--input-file", "{bare}"), "none of the columns prompt, text, messages, src; theirs are: a. .*--column NAME"),
        (("--input-file", "{none}"), "none.jsonl cannot be read: No such file"),
        (("--input-file", "{rows}", "--output-file", "o.pdf"), "o.pdf has no suffix that tells its form"),
        (("--resume",), "--resume and --force are of an output file; give --output-file"),
        (("--column", "text"), "--column and --input-format are of rows; give --input-file"),
        (("--input-file", "{rows}", "--session", "s"), "--session keeps one prompt"),
        (("--input-file", "{rows}", "--max-input-tokens", "48"), "--max-input-tokens 48 must be from 1 to 47"),
        (("--input-file", "{rows}", "--option", "num_beam=2"), "num_beam"),
        (("--option", "top_k=2", "--top-k", "3", "--prompt", "a"), "--option top_k=… says again"),
        (("--option", "a=1", "--option", "a=2", "--prompt", "a"), "--option a=… was given twice"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(run, pairs, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    files = {
        "rows": write(tmp_path / "rows.jsonl", [{"text": "a"}]), "bare": write(tmp_path / "bare.jsonl", [{"a": "a"}]),
        "none": tmp_path / "none.jsonl",
    }  # fmt: skip
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = run("generate", pairs, *(word.format(**files) for word in words))
    if "num_beam" in message:
        out = ""
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_predictions_of_files(run, encoder, artifact, checkpoint, tmp_path):
    write(tmp_path / "in.jsonl", [{"id": n, "text": text} for n, text in enumerate(PROMPTS)])
    words = ("--input-file", tmp_path / "in.jsonl", "--output-file", tmp_path / "out.jsonl", "-q")
    code, out, err = run("predict", encoder, *words, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["rows"] == 7
    model = CompiledModel.from_pretrained(encoder)
    vectors = [model.embed([text])[0] for text in PROMPTS]
    for row, text, vector in zip(read(tmp_path / "out.jsonl"), PROMPTS, vectors, strict=True):
        assert row["input"]["text"] == text
        assert row["answer"] == pytest.approx(vector.tolist(), abs=1e-5)
    reader = artifact(checkpoint("bert", "AutoModelForQuestionAnswering"), batch_size=3, sequence_length=(16, 48),
                      dynamic_batch_size=True)  # fmt: skip
    asked = [{"question": "When?", "context": text} for text in tiny.TEXTS] + [{"context": "a"}]
    write(tmp_path / "in.jsonl", asked)
    code, out, err = run("predict", reader, "--input-file", tmp_path / "in.jsonl", "--question", "Who?")
    found = [json.loads(line)["answer"] for line in out.splitlines()]
    assert found[2] == pipeline(model=reader)(asked[2])
    assert found[-1] == pipeline(model=reader)({"question": "Who?", "context": "a"})


def _precast(*words):
    return subprocess.Popen([sys.executable, "-m", "precast", *map(str, words)], stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "embed", "classify"])
def test_a_file_survives_ten_kills(command, pairs, encoder, artifact, checkpoint, tmp_path):
    """A thousand rows, killed ten times at random: complete, ordered, no row twice, byte for byte undisturbed."""
    shapes = {"batch_size": 3, "sequence_length": (16, 48), "dynamic_batch_size": True}
    if command == "generate":
        words = ["generate", pairs, "--seed", "3", "--max-new-tokens", "12"]
    elif command == "embed":
        words = ["predict", encoder]
    else:
        words = ["predict", artifact(checkpoint("bert", "AutoModelForSequenceClassification"), **shapes)]
    chance = random.Random(7)
    rows = [" ".join(chance.choices(["water", "Paris", "天气", "a", "compiler"], k=chance.randint(1, 7)))
            for _ in range(1000)]  # fmt: skip
    words += ["--input-file", write(tmp_path / "in.jsonl", [{"text": row} for row in rows]), "-q", "--output-file"]
    assert _precast(*words, tmp_path / "whole.jsonl").wait() == 0
    target, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for kill in range(10):
        size = len(whole) * (kill + chance.random()) / 11
        process = _precast(*words, target, "--resume")
        while process.poll() is None and not (partial.exists() and partial.stat().st_size > size):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
    assert _precast(*words, target, "--resume").wait() == 0
    assert target.read_bytes() == whole
    assert [json.loads(line)["input"]["text"] for line in whole.splitlines()] == rows
    assert not partial.exists()
