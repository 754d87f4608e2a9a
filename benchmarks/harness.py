"""How contenders are measured: each in a process of its own, one repetition at a time, in turns.

Speeds of one machine drift by tens of percent within minutes, and all contenders drift together: so they take turns in
one run, and what counts is the median over the rounds of the ratio within a round.

Only the standard library is used here: peers import this module in environments of their own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "HERE",
    "Answer",
    "Contender",
    "ContenderError",
    "Target",
    "alternate",
    "environment",
    "ratios",
    "serve",
    "summary",
]

HERE = Path(__file__).resolve().parent


class ContenderError(Exception):
    """A contender ended before it answered; the message is the last it said."""


class Contender:
    """A child process, `python -m module arguments`, that does one repetition per request.

    Attributes:
        name: as it appears in tables and results.
        facts: what it said when it was ready, such as versions; empty before `start`.
    """

    def __init__(self, name: str, module: str, *arguments: object, python: str | Path = sys.executable) -> None:
        self.name, self.facts = name, {}  # type: tuple[str, dict[str, Any]]
        self._command = [str(python), "-m", module, *map(str, arguments)]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> Contender:
        """Spawn it and wait until it has loaded what it needs."""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            self._command, cwd=HERE, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True,
        )  # fmt: skip
        self.facts = self._answer()
        return self

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Let it do one repetition. Raises ContenderError."""
        process = self._running()
        assert process.stdin is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return self._answer()

    @property
    def process_id(self) -> int:
        """Of the child that runs."""
        return self._running().pid

    def close(self) -> None:
        """End it; a contender whose input ends leaves by itself."""
        if self._process is not None:
            self._process.communicate()
            self._errors.close()
            self._process = None

    def __enter__(self) -> Contender:
        return self.start()

    def __exit__(self, *details: object) -> None:
        self.close()

    def _running(self) -> subprocess.Popen[str]:
        assert self._process is not None, f"{self.name} was not started"
        return self._process

    def _answer(self) -> dict[str, Any]:
        process = self._running()
        assert process.stdout is not None
        if line := process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        process.wait()
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines() or [f"exit status {process.returncode}"]
        raise ContenderError(f"{self.name}: {last[-1]}")


def serve(
    facts: dict[str, Any],
    repeat: Callable[[dict[str, Any]], dict[str, Any]],
    force: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """A contender's side: say `facts`, then answer each request by a repetition.

    A request with a `text` is answered by `force`: it writes the logits after each of the text's tokens, float32
    `[tokens, vocabulary]`, to the file `logits`.
    """
    # Libraries print what they like; the answers have a channel of their own.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(facts), file=channel, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = force(request) if force and "text" in request else repeat(request)
        print(json.dumps(answer), file=channel, flush=True)


def environment() -> dict[str, str]:
    """The environment of all children: no network, a home that is no user's, bytecode kept as if installed."""
    changes = {
        "PRECAST_HOME": str(HERE.parent / "build" / "bench" / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    dropped = ("PYTHONDONTWRITEBYTECODE", "PYTHONPROFILEIMPORTTIME", "PRECAST_DEBUG")
    return {name: value for name, value in os.environ.items() if name not in dropped} | changes


def alternate(
    actions: Mapping[str, Callable[[], dict[str, Any]]], rounds: int, before: Callable[[str], None] = lambda text: None
) -> dict[str, list[dict[str, Any]]]:
    """Run every action once per round, each round beginning with another one; per name its results in order.

    `before` is told what comes next; when it returns, it begins.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in actions}
    names = list(actions)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            before(f"round {turn + 1} of {rounds}: {name}")
            results[name].append(actions[name]())
    return results


def summary(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Median, extremes and the single values, in the order of the rounds."""
    rounded = [float(f"{value:.{digits}g}") for value in values]
    return {"median": statistics.median(rounded), "min": min(rounded), "max": max(rounded), "rounds": rounded}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ours over theirs, round by round."""
    return summary([mine / other for mine, other in zip(ours, theirs, strict=True)])


@dataclass(frozen=True)
class Target:
    """A figure and the bound that it has to keep; `value` is None where it could not be measured."""

    name: str
    value: float | None
    bound: float
    is_floor: bool = False
    unit: str = ""

    @property
    def is_met(self) -> bool | None:
        """None where there is no value."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.is_floor else self.value <= self.bound

    def as_json(self) -> dict[str, Any]:
        """For the results."""
        return {**asdict(self), "is_met": self.is_met}


@dataclass
class Answer:
    """What a question found: figures for machines, a table for people, targets and remarks for both."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the results; the table only repeats the figures."""
        targets = [target.as_json() for target in self.targets]
        return {"title": self.title, "targets": targets, "notes": self.notes, "figures": self.figures}
