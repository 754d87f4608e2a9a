"""The command line answers with adapters in slots, and says which slots there are."""

from __future__ import annotations

import json

import adapters as made
import pytest


@pytest.fixture(scope="module")
def slotted(checkpoint, artifact):
    return artifact(checkpoint("llama"), lora_slots=2, lora_rank=6)


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """`adapter(2)`: the directory of an adapter with random numbers of this seed."""
    root = tmp_path_factory.mktemp("adapters")

    def make(seed):
        path = root / str(seed)
        targets = ["q_proj", "down_proj"]
        return (
            path
            if path.exists()
            else made.make_adapter(path, checkpoint("llama"), "AutoModelForCausalLM", seed=seed, target_modules=targets)
        )

    return make


@pytest.fixture
def ask(run, slotted):
    def call(*arguments):
        status, out, _ = run("generate", slotted, "--prompt", "Water boils", "--max-new-tokens", 4, "-q", *arguments)
        assert status == 0
        return out

    return call


def test_generate_answers_with_an_adapter(ask, adapter, tmp_path):
    plain, adapted = ask(), ask("--adapter", f"style={adapter(1)}")
    assert plain != adapted != ask("--adapter", f"style={adapter(2)}")
    rows = [json.loads(line) for line in ask("--prompt", "And", "--adapter", f"style={adapter(1)}").splitlines()]
    assert [row["input"] for row in rows] == ["Water boils", "And"]
    assert rows[0]["output"] == adapted.removesuffix("\n")


def test_a_session_is_one_adapters(ask, run, slotted, adapter, tmp_path):
    first, second = (f"style={adapter(seed)}" for seed in (1, 2))
    session = ["--session", tmp_path / "session"]
    for _ in range(2):
        assert ask("--adapter", first, *session) == ask("--adapter", first)
    for others in (["--adapter", second], []):
        status, _, told = run("generate", slotted, "--prompt", "Water boils", *others, *session)
        assert (status, "was read with an adapter that is not loaded" in told) == (2, True), told


def test_an_interrupted_run_does_not_go_on_with_another_adapter(run, slotted, adapter, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Water"}\n{"prompt": "And"}\n')
    asked = (
        "generate",
        slotted,
        "--input-file",
        rows,
        "--output-file",
        tmp_path / "answers.jsonl",
        "--max-new-tokens",
        4,
        "-q",
    )
    fingerprints = []
    for seed in (1, 2):
        status, *_ = run(*asked, "--force", "--adapter", f"style={adapter(seed)}")
        assert status == 0
        fingerprints.append((tmp_path / "answers.jsonl").read_text())
    assert fingerprints[0] != fingerprints[1]


def test_mistakes_are_told(run, slotted, decoder, adapter):
    for path, arguments, message in [
        (slotted, ["--adapter", "style"], "--adapter 'style': give a name and a directory, as in style=./style-lora."),
        (
            slotted,
            ["--adapter", "style=x", "--mode", "eager"],
            "--adapter is for compiled models, not for",
        ),
        (
            slotted,
            ["--adapter", "style=nowhere"],
            "nowhere is no adapter of peft: there is no adapter",
        ),
        (
            decoder,
            ["--adapter", f"a={adapter(1)}"],
            "without slots for adapters. Export it with --lora-slots 1",
        ),
    ]:
        status, _, told = run("generate", path, "--prompt", "x", *arguments)
        assert (status, message in told) == (2, True), told


def test_inspect_tells_of_slots(run, slotted):
    _, out, _ = run("inspect", slotted)
    assert "2 LoRA adapters at once, of ranks up to 6, for 7 layers: *.q_proj, *.k_proj" in out
