"""Foreign words reach a terminal as text and a shell as one word."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from pathlib import Path

import handmade
import pytest

from precast.runtime import errors
from precast.runtime.artifact import read_artifact
from precast.runtime.errors import ArtifactError
from precast.runtime.terminal import escaped_json, printable, quoted

HOSTILE = "\x1b]52;c;aGk=\x07\x1b[2J\x9b31m\u202egnp.exe\u2066\r\x08\ud800\u2028\x7f"
VERBS = "bench|export|generate|inspect|predict|push|validate"
HARMLESS = "naïve 日本語 العربية עברית हिन्दी 👩‍👩‍👧 e\u0301 a\u00a0b"


def _is_obeyed(character):
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in (
        "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI",
    )  # fmt: skip


def test_all_that_a_terminal_obeys_is_escaped_and_nothing_else():
    for code in (*range(0x3000), *range(0xD800, 0xE000), *range(0x1F300, 0x1F400)):
        character = chr(code)
        if _is_obeyed(character):
            assert printable(character, keep="").isascii()
            assert printable(character, keep="").isprintable()
        elif character not in "\u061c\u200e\u200f":
            assert printable(character) == character
    assert printable(HARMLESS) == HARMLESS
    assert printable("a\n\tb\x1b") == "a\n\tb\\x1b"
    assert printable("a\nb", keep="") == "a\\nb"


def test_json_says_the_same():
    value = {HOSTILE: [HARMLESS, {"a": HOSTILE}]}
    text = json.dumps(value, ensure_ascii=False, indent=2)
    shown = escaped_json(text)
    assert json.loads(shown) == value
    assert not any(_is_obeyed(character) for character in shown.replace("\n", ""))


@pytest.mark.parametrize("word", ["a b", "$(id)", "x; rm -rf ~", "it's", "-o", "--force", "`id`", "", "a/b"])
def test_a_quoted_word_is_one_word_and_no_option(word):
    [found] = shlex.split(quoted(word))
    assert found in (word, f"./{word}")
    assert not found.startswith("-")


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_shows_nothing_that_a_terminal_obeys(name):
    error = getattr(errors, name)(f"{HOSTILE} {HARMLESS}")
    if isinstance(error, errors.PrecastError):
        assert str(error) == printable(f"{HOSTILE} {HARMLESS}")


def test_a_suggested_command_can_be_pasted(tmp_path):
    folder = tmp_path / "my model; touch x"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ArtifactError) as caught:
        read_artifact(folder)
    command = str(caught.value).partition("checkpoint: ")[2]
    assert shlex.split(command) == ["precast", "export", str(folder), "-o", "OUT"]


def test_every_suggested_command_quotes_what_is_not_ours():
    root = Path(handmade.__file__).parents[2]
    ours = (
        "contract.shapes",
        "flags",
        "given",
        "task_flag",
        "example",
        "length",
        "batch",
        "found.task",
        "settings.batch_size",
        "settings.capacity",
        "subject.",
        "size",
    )
    for part in ("exporter", "runtime", "cli"):
        for path in (root / part).rglob("*.py"):
            for command in re.findall(
                r"precast (?:export|inspect|predict|generate|validate|push|bench)\b[^\n]*", path.read_text()
            ):
                for value in re.findall(r"(?<!\{)\{([^{}]+)\}", command):
                    assert value.startswith(("quoted(", *ours)), f"{path}: {command}"
