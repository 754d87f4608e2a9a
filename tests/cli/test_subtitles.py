"""`precast predict` of sounds: times of long ones, and subtitles in files."""

from __future__ import annotations

import json
import re
import sys
import wave
from types import SimpleNamespace

import click
import numpy as np
import pytest
import speech

from precast.cli import main, subtitles
from precast.cli.subtitles import Hearing
from precast.runtime import pipeline
from precast.runtime.pipelines.subtitles import as_srt, as_vtt


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("predict", path)`: exit code, standard output, standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["precast", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory, artifact):
    """A compiled Whisper, and a folder with sounds of 3 and 40 seconds."""
    root = tmp_path_factory.mktemp("speaking")
    for seconds in (3, 40):
        with wave.open(str(root / f"{seconds}.wav"), "wb") as file:
            file.setnchannels(1), file.setsampwidth(2), file.setframerate(speech.RATE)
            file.writeframes((speech.sound(seconds) * 32767).astype("<i2").tobytes())
    return artifact(speech.whisper(root / "source"), batch_size=2, sequence_length=()), root


def heard(path):
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


def as_json(answer):
    return json.loads(json.dumps(answer))


def test_long_sounds_are_told_with_their_times(run, made):
    compiled, root = made
    ours = pipeline(model=compiled)
    told = {"task": "translate", "language": "de"}
    words = ("--option", "task=translate", "--option", "language=de")
    for seconds, asked in ((3, {}), (3, {"return_timestamps": True}), (40, {"return_timestamps": True})):
        path = root / f"{seconds}.wav"
        more = ("--option", "return_timestamps=true") if asked and seconds == 3 else ()
        code, out, err = run("predict", compiled, "--text", path, *words, *more)
        assert (code, err) == (0, "")
        assert json.loads(out) == {"input": str(path), "answer": as_json(ours(heard(path), **asked, **told))}
    code, out, _ = run("predict", compiled, "--text", root / "40.wav", "--option", "truncation=true", "--json")
    assert json.loads(out)[0]["answer"] == ours(heard(root / "40.wav"), truncation=True)


def test_subtitles_are_written_in_the_form_of_their_suffix(run, made, tmp_path):
    compiled, root = made
    expected = pipeline(model=compiled)(heard(root / "3.wav"), return_timestamps=True)
    assert len(expected["chunks"]) > 3
    forms = {
        "srt": as_srt(expected["chunks"], 3.0), "VTT": as_vtt(expected["chunks"], 3.0), "json": as_json(expected)
    }  # fmt: skip
    for suffix, text in forms.items():
        path = tmp_path / f"told.{suffix}"
        code, out, _ = run("predict", compiled, "--text", root / "3.wav", "--subtitles", path)
        written = path.read_text("utf-8")
        assert code == 0
        assert (json.loads(written) if suffix == "json" else written) == text
        assert json.loads(out)["answer"] == as_json(expected)
    path = tmp_path / "told.srt"
    path.write_text("mine")
    code, _, err = run("predict", compiled, "--text", root / "3.wav", "--subtitles", path)
    assert (code, path.read_text()) == (2, "mine")
    assert re.search(r"told\.srt is there already; replace it with --force", err)
    assert run("predict", compiled, "--text", root / "3.wav", "--subtitles", path, "--force")[0] == 0
    assert path.read_text("utf-8") == forms["srt"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--subtitles", "told.txt"), 2, r"told\.txt says no format; end it in one of: \.srt, \.vtt, \.json"),
        (("--subtitles", "told"), 2, "says no format"),
        (("--subtitles", "no/told.srt"), 2, "there is no directory no"),
        (("--subtitles", "told.srt", "--text", "{sound}"), 2, "those of one sound"),
        (("--subtitles", "told.srt", "--option", "return_timestamps=false"), 2, "needs times; leave out"),
        (("--force",), 2, "--resume and --force are of an output file"),
        (("--option", "return_timestamps=word"), 2, "times of single words"),
        (("--option", "chunk_length_s=30"), 2, "window by window"),
    ],
)
def test_mistakes_get_one_line(run, made, tmp_path, monkeypatch, words, code, message):
    compiled, root = made
    monkeypatch.chdir(tmp_path)
    given = [word.format(sound=root / "3.wav") for word in words]
    found, out, err = run("predict", compiled, "--text", root / "3.wav", *given)
    assert (found, out) == (code, "")
    assert re.search(message, err)
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_other_models_have_no_subtitles(run, encoder, tmp_path):
    path = tmp_path / "told.srt"
    code, _, err = run("predict", encoder, "--text", "Water", "--subtitles", path)
    assert (code, path.exists()) == (2, False)
    assert "--subtitles is for models that write down speech; this one does feature-extraction" in err
    contract = SimpleNamespace(task="automatic-speech-recognition")
    spelling = SimpleNamespace(model=SimpleNamespace(artifact=SimpleNamespace(contract=contract)))
    with pytest.raises(click.UsageError, match="needs times, which this model, one of CTC, does not write"):
        Hearing(path, False, ("a.wav",), True).ask(spelling, "a.wav", {})


def test_a_bar_moves_on_a_terminal(made, monkeypatch):
    """By the seconds that were heard, of a long sound."""
    seen: list = []

    class Bar:
        def __init__(self, name):
            seen.append(name)

        def __enter__(self):
            return lambda *at: seen.append(at)

        def __exit__(self, *_):
            seen.append("end")

    monkeypatch.setattr(subtitles, "bar", Bar)
    compiled, root = made
    pipe = pipeline(model=compiled)
    for quiet, name in ((False, "3.wav"), (True, "40.wav")):
        Hearing(None, False, (), quiet).ask(pipe, str(root / name), {})
    assert seen == []
    Hearing(None, False, (), False).ask(pipe, str(root / "40.wav"), {})
    assert seen[0] == f"hearing {root / '40.wav'}"
    assert seen[1] == (0, 40, "second")
    assert seen[-1] == "end"
    assert [at[0] for at in seen[1:-1]] == sorted(at[0] for at in seen[1:-1])
