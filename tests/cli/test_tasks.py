"""`precast tasks`: what a model can be exported for, from its config.json alone."""

from __future__ import annotations

import json
import sys

import pytest

from precast.cli import main
from precast.exporter.support import supported_types
from precast.runtime.artifact.tasks import TASKS


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("bert")`: exit code, standard output, standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["precast", "tasks", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capsys.readouterr()

    return call


def test_all_tasks(run):
    code, out, _ = run()
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(TASKS)
    code, out, _ = run("--json")
    assert {line["task"]: line["model_types"] for line in json.loads(out)} == {
        name: supported_types(name) for name in TASKS
    }


def test_one_task_names_its_types(run):
    _, out, _ = run("--task", "text-generation")
    assert "llama" in out
    code, _, err = run("--task", "juggling")
    assert code == 2
    assert "There is no task 'juggling'" in err


def test_a_checkpoint_and_its_bare_type_say_the_same(run, checkpoint):
    _, out, _ = run("bert", "--json")
    lines = json.loads(out)["tasks"]
    assert {"feature-extraction", "fill-mask", "text-classification"} <= {line["task"] for line in lines}
    axes = {line["task"]: line["axes"] for line in lines}
    assert axes["feature-extraction"] == ["batch_size", "sequence_length"]
    assert axes["multiple-choice"] == ["batch_size", "num_choices", "sequence_length"]
    assert axes["text-generation"] == []
    _, out, _ = run(checkpoint("bert", "AutoModelForMaskedLM"), "--json")
    assert [{**line, "inferred": False} for line in json.loads(out)["tasks"]] == lines
    assert [line["task"] for line in json.loads(out)["tasks"] if line["inferred"]] == ["fill-mask"]


def test_a_type_that_was_never_tried_is_said_to(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "brand-new"}')
    code, out, err = run(tmp_path)
    assert (code, out) == (0, "")
    assert "'brand-new' were never tried" in err


def test_what_is_neither_is_an_error(run, tmp_path):
    code, _, err = run(tmp_path / "nothing")
    assert code == 1
    assert "no config.json" in err
