"""from_pretrained(export=True): the same is made once and stays while it is open; anything else is made anew."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from precast.exporter import ExportOptions, reuse
from precast.exporter.checkpoint.resolve import resolve
from precast.exporter.reuse import _key
from precast.runtime import CompiledModel
from precast.runtime.artifact import read_artifact
from precast.runtime.artifact.publish import copy_artifact
from precast.runtime.artifact.store import home
from precast.runtime.errors import PublishError

ASKED = {"sequence_length": 48, "validate": False}


@pytest.fixture
def source(checkpoint, tmp_path):
    return shutil.copytree(checkpoint("llama"), tmp_path / "mine")


@pytest.fixture
def made(monkeypatch, tmp_path, decoder):
    """Which artifacts were exported: copies of one, since only where they lie is asked."""
    targets = []
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "home"))

    def export(model, target, options):
        targets.append(target)
        copy_artifact(read_artifact(decoder), target, force=options.force)

    monkeypatch.setattr(reuse, "export", export)
    return targets


def _opened(source, **options):
    return CompiledModel.from_pretrained(source, export=True, **{**ASKED, **options})


def test_a_second_call_opens_what_the_first_made(made, source):
    first = _opened(source)
    again = _opened(str(source), token="secret")
    assert made == [first.artifact.path] == [again.artifact.path]
    assert made[0].parent == home() / "exports"
    # Everything of the first that is opened late, is still there.
    for model in (first, again, first.new_session()):
        assert model.generate([[5, 9]], max_new_tokens=2).shape == (1, 4)
        assert model.tokenizer.decode([5])
    first.artifact.contents.verify(force=True)


def test_what_is_damaged_is_made_again(made, source):
    path = _opened(source).artifact.path
    (path / "tokenizer.json").write_text("{}")
    assert _opened(source).artifact.path == path
    (path / "config.json").unlink()
    shutil.rmtree(path)
    _opened(source)
    assert made == [path] * 3


def test_what_another_process_made_meanwhile_is_opened(made, source, monkeypatch):
    export = reuse.export

    def beaten(model, target, options):
        export(model, target, options)
        raise PublishError(f"{target} exists and is not empty.")

    monkeypatch.setattr(reuse, "export", beaten)
    assert _opened(source).artifact.path == made[0]


def _rewritten(name):
    def change(path):
        (path / name).write_bytes((path / name).read_bytes() + b"\n")

    return change


def _added(name):
    def change(path):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")

    return change


@pytest.mark.parametrize(
    "change",
    [_rewritten("model.safetensors"), *map(_rewritten, ("config.json", "generation_config.json", "tokenizer.json")),
     *map(_added, ("preprocessor_config.json", "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json",
                   "code.py")),
     lambda path: path.rename(path.with_name("other"))],
)  # fmt: skip
def test_other_files_are_another_export(source, change):
    options = ExportOptions(sequence_length=(48,))
    before = _key(resolve(str(source), options), options)
    assert _key(resolve(str(source), options), options) == before
    change(source)
    path = source if source.exists() else source.with_name("other")
    assert _key(resolve(str(path), options), options) != before


def test_other_options_versions_and_machines_are_another_export(source, tmp_path, monkeypatch, toy):
    options = ExportOptions(sequence_length=(48,))
    found = resolve(str(source), options)
    text = tmp_path / "text"
    text.write_text("one")
    calibrated = replace(options, quantize="int4", quantize_method="gptq", calibration=text)
    changed = [replace(options, **each) for each in ({"sequence_length": (32,)}, {"atol": 1e-3}, {"backend": "toy"})]
    keys = [_key(found, each) for each in (options, calibrated, *changed)]
    text.write_text("two")
    keys.append(_key(found, calibrated))
    monkeypatch.setattr(reuse, "cpu_flags", lambda: frozenset({"avx2"}))
    keys.append(_key(found, options))
    monkeypatch.setattr(reuse, "installed_version", lambda name: "9.9" if name == "torch" else "1.0")
    keys.append(_key(found, options))
    assert len(set(keys)) == len(keys)
    assert _key(found, replace(options, token="secret", force=True)) == keys[-1]
