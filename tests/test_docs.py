"""What the documents say is so: commands parse, links lead somewhere, counts and maps are those of the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cli_page
import click
import pytest
from click.testing import CliRunner
from support_table import TABLE
from test_layering import FOR_THE_EXPORTER

from precast import exporter, runtime
from precast.cli import SETTINGS, cli
from precast.exporter.support import table
from precast.runtime.artifact.backends import BACKENDS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md", ROOT / "examples/README.md"]
)


def commands() -> list[str]:
    """Every `precast …` command line in the documents that is meant to be typed."""
    found = []
    for document in DOCUMENTS:
        for line in document.read_text("utf-8").splitlines():
            if match := re.match(r"\$ (precast .*?)(?:\s{2,}#.*)?$", line):
                found.append(match[1])
    return found


@pytest.mark.parametrize("line", commands())
def test_documented_commands_parse(line):
    """Names and options exist; nothing is run."""
    _, name, *words = shlex.split(line)
    command = cli.get_command(None, name)
    assert command is not None, name
    command.make_context(name, words, parent=click.Context(cli, **SETTINGS))


def test_the_readme_counts_what_the_support_table_has():
    lines = [line for line in table() if line.task == "text-generation"]
    passed = sum(line.passes for line in lines)
    assert f"{passed} of {len(lines)} model types" in README.read_text("utf-8")
    tried = json.loads(TABLE.read_text("utf-8"))["transformers"].rpartition(".")[0]
    assert f"every model type of transformers {tried}" in README.read_text("utf-8")


def test_the_help_names_every_backend():
    text = CliRunner().invoke(cli, ["export", "--help"], terminal_width=200).output
    (line,) = (line for line in text.splitlines() if "What compiles and runs the model" in line)
    assert ", ".join(BACKENDS) in line


def test_the_page_of_the_command_line_is_what_the_help_says(golden_text):
    """A renamed or vanished option shows up in review."""
    golden_text(cli_page.PAGE, cli_page.page())


# ------------------------------------------------------------ links and names

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^( *)```.*?^\1```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def _links(document: Path) -> set[str]:
    """Where the document links to, addresses on the web left out."""
    text = _CODE.sub("", document.read_text("utf-8"))
    found = {first or second for first, second in _LINK.findall(text)}
    return {target for target in found if not target.startswith(("https://", "http://"))}


def _anchors(document: Path) -> set[str]:
    """The headings of a document, as GitHub writes their anchors."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", document.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


_FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    for target in _links(document):
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


def test_the_site_is_built_without_a_warning(tmp_path):
    """As by make docs, which leaves it in build/site."""
    pytest.importorskip("mkdocs", reason="make docs installs what builds the site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api.html").read_text("utf-8")
    public = [f"{package.__name__}.{name}" for package in (exporter, runtime) for name in package.__all__]
    assert [name for name in public if name not in api] == []
    assert "results/" in (tmp_path / "index.html").read_text("utf-8")


_FILE = re.compile(r"`([\w.-]*(?:/[\w.-]+)+\.(?:py|h|c|sh|txt|jinja)|(?:[\w.-]+/)+)`")


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=lambda path: path.name
)
def test_files_that_a_document_names_are_there(document):
    """By the end of their paths: `quantize/methods.py`."""
    ours = [ROOT / part for part in ("exporter", "runtime", "cli", "tests", "tools", "benchmarks", "docs", "examples")]
    there = {f"/{path.relative_to(ROOT).as_posix()}{'/' * path.is_dir()}" for top in ours for path in top.rglob("*")}
    there |= {f"/{top.name}/" for top in ours}
    missing = {
        name
        for name in _FILE.findall(document.read_text("utf-8"))
        if not any(each.endswith(f"/{name}") for each in there)
    }
    assert missing <= {"precast/__init__.py"}


def test_every_document_is_in_the_index():
    index = _links(ROOT / "docs/README.md")
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= index


def test_the_readme_is_short():
    assert len(README.read_text("utf-8").split()) <= 1100


def test_the_map_has_every_room():
    """docs/architecture.md names every folder and module of the runtime's and the exporter's roots, and no other."""
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    for part in ("runtime", "exporter"):
        section = text.partition(f"### {part}\n")[2].partition("\n### ")[0]
        rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        named = {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
        there = {
            path.stem for path in (ROOT / part / "precast" / part).iterdir() if path.is_dir() or path.suffix == ".py"
        }
        assert named == there - {"__init__", "__pycache__"}


def test_the_import_rule_is_the_one_that_is_tested():
    text = (ROOT / "docs/architecture.md").read_text("utf-8").partition("**The import rule**")[2]
    first = re.search(r"^> - `cli -> exporter -> (.*)$", text, re.MULTILINE)[0]
    rooms = re.search(r"\{(.*?)\}", first)[1].split(", ") + re.findall(r"`(\w+)`", first)
    assert {f"precast.runtime.{name}" for name in rooms} == set(FOR_THE_EXPORTER)
