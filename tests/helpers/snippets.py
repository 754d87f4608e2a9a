"""The fenced blocks of a document, and what runs them as a reader would: in order, in one folder."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from precast.cli import main

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_TO_READ = ("text",)
"""The languages of blocks that are nobody's commands: file trees, help texts."""
_MARK = re.compile(r"<!-- not run: ([^>]+) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block; `reason` is why the comment before it says that it is not run."""

    place: str
    line: int
    language: str
    text: str
    reason: str | None

    def commands(self) -> list[tuple[str, list[str]]]:
        """Of a console what is typed, each with the lines that it answers: the lines after a prompt, or all of them
        where there is no prompt."""
        lines = self.text.splitlines()
        starts = [index for index, line in enumerate(lines) if line.startswith("$ ")]
        ends = [*starts[1:], len(lines)]
        with_prompt = [(lines[start][2:], lines[start + 1 : end]) for start, end in zip(starts, ends, strict=False)]
        return with_prompt or [(line, []) for line in lines if line]


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document that can be run, in order."""
    text = document.read_text("utf-8")
    return [block for block in _blocks(text, document.name) if block.language not in _TO_READ]


def run(document: Path, reader: Reader) -> None:
    """Run all blocks of a document but those that are marked. Raises SnippetError for the first that fails."""
    for block in blocks(document):
        if not block.reason:
            reader.run(block)


def _blocks(text: str, place: str) -> Iterator[Block]:
    for fence in _FENCE.finditer(text):
        mark = _MARK.search(text[: fence.start()])
        line = text.count("\n", 0, fence.start()) + 2
        yield Block(place, line, fence["language"], textwrap.dedent(fence["text"]), mark and mark[1])


class SnippetError(AssertionError):
    """A snippet does not do what its document says."""


@dataclass
class Reader:
    """Somebody who types a document's snippets in `folder`.

    Attributes:
        local: of a Hub id or a placeholder, what stands for it here; called when it is first met.
        hub: the address of the Hub that is pushed to.
        names: what Python has defined so far.
        compares: whether commands have to answer what the document says that they do. `…` stands for lines that are
            left out, and at the end of a line for what follows there.
    """

    folder: Path
    local: Mapping[str, Callable[[], object]]
    hub: str = ""
    names: dict[str, object] = field(default_factory=dict)
    compares: bool = False

    def run(self, block: Block) -> None:
        """Raises SnippetError where a command or a line fails."""
        with _within(self.folder):
            if block.language == "python":
                self._python(block)
            elif block.language == "yaml":
                # A configuration: the commands below it run it.
                (self.folder / "job.yaml").write_text(self._local(block.text), "utf-8")
            elif block.language == "console":
                for command, answer in block.commands():
                    self._compare(answer, self.type(command, f"{block.place}:{block.line}"))
            else:
                raise SnippetError(
                    f"{block.place}:{block.line}: what runs {block.language or 'a block of no language'}?"
                )

    def type(self, command: str, place: str = "here") -> str:
        """Run a command in the folder, and return what it writes to standard output."""
        words = [
            str(self.local[word]()) if word in self.local else word for word in shlex.split(command, comments=True)
        ]
        with _within(self.folder):
            code, out, err = _runner(words)(words, self.hub)
        if code:
            raise SnippetError(f"{place}: {command}\nanswers {code}: {out}{err}")
        return out

    def _compare(self, expected: list[str], answer: str) -> None:
        if not self.compares:
            return
        pattern = "".join(_shown(line) for line in expected if line)
        if not re.match(pattern, answer.replace(self.hub or "nowhere", "https://huggingface.co") + "\n"):
            raise SnippetError(f"the document has {expected}, and the answer is {answer}")

    def _local(self, text: str, quote: str = "") -> str:
        """The text with what stands here for its models, each between quotes, or as a YAML value."""
        for name, here in self.local.items():
            if quote and f"{quote}{name}{quote}" in text:
                text = text.replace(f"{quote}{name}{quote}", repr(str(here())))
            elif not quote and f": {name}\n" in text:
                text = text.replace(f": {name}\n", f": {here()}\n")
        return text

    def _python(self, block: Block) -> None:
        text = self._local(block.text, '"')
        try:
            # As many lines before it as in the document, for a traceback's sake.
            code = compile("\n" * (block.line - 1) + text, block.place, "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, self.names)
        except Exception as error:
            raise SnippetError(f"{block.place}:{block.line}: {type(error).__name__}: {error}") from error


def _shown(line: str) -> str:
    """The pattern of a line that a document shows."""
    if line == "…":
        return r"(?:.*\n)*?"
    return re.escape(line.removesuffix("…")) + (r".*\n" if line.endswith("…") else r"\n")


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


Answer = tuple[int, str, str]


def _runner(words: list[str]) -> Callable[[list[str], str], Answer]:
    known = {"precast": _precast, "make": _make, "bash": _child}
    if words[0] not in known:
        raise SnippetError(f"What runs {words[0]}? Mark its block as one that is not run.")
    # huggingface_hub reads where the Hub is when it is imported.
    return _child if words[:2] == ["precast", "push"] else known[words[0]]


def _precast(words: list[str], hub: str) -> Answer:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return code, out.getvalue(), err.getvalue()


def _make(words: list[str], hub: str) -> Answer:
    """Whether there is such a target; it is not made."""
    return _done(["make", "-n", *words[1:]], cwd=ROOT)


def _child(words: list[str], hub: str) -> Answer:
    script = [sys.executable, "-c", "from precast.cli import main; main()"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_TOKEN": "x", "NO_PROXY": "127.0.0.1", "PATH": path}
    environment = {**os.environ, **own}
    return _done([*script, *words[1:]] if words[0] == "precast" else words, env=environment)


def _done(words: list[str], **options: object) -> Answer:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, **options)  # type: ignore[call-overload]
    return done.returncode, done.stdout, done.stderr
