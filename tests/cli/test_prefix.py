"""The command line answers after a prefix that is given to a model compiled without one."""

from __future__ import annotations

import json

import pytest
from prefixes import random_prefix

from precast.cli import generate


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """`prefix(2)`: the directory of a prefix for a Llama of one layer, with random numbers of this seed."""

    root = tmp_path_factory.mktemp("prefixes")
    return lambda seed: random_prefix(root / str(seed), seed)


def test_generate_answers_after_a_prefix(run, decoder, prefix, tmp_path):
    def ask(*arguments):
        return run("generate", decoder, "--prompt", "Water boils", "--max-new-tokens", 4, "-q", *arguments)

    first, second = (["--prefix-tuning", prefix(seed)] for seed in (1, 2))
    session, rows = ["--session", tmp_path / "session"], ["--output-file", tmp_path / "rows.jsonl"]
    answers = [ask(*given) for given in ([], first, second, [*first, *session], [*first, *session])]
    assert [status for status, *_ in answers] == [0] * 5
    assert len({out for _, out, _ in answers[:3]}) == 3
    assert answers[1][1] == answers[3][1] == answers[4][1]
    for others, words in ((second, "with a prefix of sha256"), ([], "begin with no prefix")):
        status, _, told = ask(*others, *session)
        assert (status, "was read after a prefix of sha256" in told, words in told) == (2, True, True), told
    assert ask(*first, *rows)[0] == 0
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["output"] == answers[1][1].removesuffix("\n")
    status, _, told = ask(*first, "--mode", "eager")
    assert (status, "--prefix-tuning is for compiled models" in told) == (2, True), told
    status, _, told = ask("--prefix-tuning", tmp_path)
    assert (status, "There is no prefix at" in told) == (2, True), told


def test_an_interrupted_run_goes_on_with_its_own_prefix(run, decoder, prefix, monkeypatch):
    runs = []
    monkeypatch.setattr(generate, "answer", lambda rows, files, work, *_, **__: runs.append(work["options"]))
    first, second = (["--prefix-tuning", prefix(seed)] for seed in (1, 2))
    for given in (first, first, second, []):
        assert run("generate", decoder, "--prompt", "Water", "--prompt", "And", "--seed", 1, *given)[0] == 0
    assert runs[0] == runs[1]
    assert len(set(runs)) == 3
