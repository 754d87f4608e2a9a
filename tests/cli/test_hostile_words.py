"""What an artifact says of itself is shown as text, on one line each, in all commands."""

from __future__ import annotations

import json
import sys

import handmade
import pytest
from click.testing import CliRunner

from precast.cli import cli, output
from precast.runtime.artifact.schema import Source

NAME = "good/model\n  runs here   yes\x1b[2J\u202e"


@pytest.fixture
def hostile(tmp_path):
    """An artifact whose model has a name that would write to the screen."""
    source = Source(model=NAME, revision=None, weights_sha256="0" * 64)
    return handmade.make(tmp_path / "out", source=source).path


def _shown(*words):
    done = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert not {"\x1b", "\u202e", "\x9b"} & {*done.output}
    return done.output


def test_inspect(hostile):
    lines = _shown("inspect", hostile).splitlines()
    assert [line for line in lines if line.startswith("model ")] == [
        r"model                       good/model\n  runs here   yes\x1b[2J\u202e "
    ]
    assert len([line for line in lines if line.startswith("  runs here")]) == 1
    assert json.loads(_shown("inspect", hostile, "--json"))["source"]["model"] == NAME


def test_cache(hostile, tmp_path, monkeypatch):
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "artifacts").mkdir(parents=True)
    hostile.rename(tmp_path / "home" / "artifacts" / ("0" * 64))
    assert r"good/model\n  runs here   yes\x1b[2J\u202e" in _shown("cache", "list")


def test_errors_and_notes(capsys):
    output.note("\x1b[2J a\nb")
    output._print_error("\x1b[2J a\nb", "PrecastError")
    assert capsys.readouterr().err == "\\x1b[2J a\nb\nprecast: \\x1b[2J a b\n"


def test_an_answer_is_escaped_for_a_terminal_only(capsys, monkeypatch):
    for is_terminal, expected in ((True, "a\\x1b[2J\n"), (False, "a\x1b[2J\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda it=is_terminal: it)
        output.echo_answer("a\x1b[2J\n")
        assert capsys.readouterr().out == expected
