"""`backend="auto"`: every backend that takes the options compiles, each is timed on this host, the fastest is kept.

    candidates -> export each, validated, into a folder beside the target -> time them in turns -> publish one

What was found lies in the artifact's `bench.json`, which its digest does not cover: timings are this machine's.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from precast.runtime.artifact import Artifact, read_artifact
from precast.runtime.artifact.backends import BACKENDS
from precast.runtime.artifact.publish import check_target, publish, staging
from precast.runtime.bench.compare import Ask, Request, Subject, ask_child, bench, describe_machine, plan, token_ids
from precast.runtime.errors import PrecastError, UsageError
from precast.runtime.hosts.machine import usable_cores

from ..backends import compiler_of
from ..options import ExportOptions
from ..pipeline import OnPlan, export_variant
from ..progress import OnStep, prefixed

__all__ = ["ROUNDS", "Choice", "choose_backends", "export_fastest"]

ROUNDS = 3
"""Of timing, each in processes of their own; the median counts."""

_FOLDERS = re.compile(r"(?<![\w./:])/(?:[^\s/'\"]+/)+")
"""Of absolute paths, the part before the last name; nothing of addresses."""


@dataclass(frozen=True)
class Choice:
    """Attributes:
    names: backends to compile with, in the order of the table.
    left_out: why the others are none, by name.
    """

    names: list[str]
    left_out: dict[str, str]


class _LostError(Exception):
    """A candidate that could not be measured."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


@dataclass
class _Found:
    """What became of the candidates."""

    left_out: dict[str, str]
    made: dict[str, Artifact] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)

    def reject_candidate(self, name: str, error: Exception) -> None:
        """Leave a candidate out, with what it raised."""
        self.left_out[name] = _describe_error(error)
        self.errors.append(error)


def choose_backends(options: ExportOptions) -> Choice:
    """The backends that take these options and whose compilers can be imported.

    Raises UsageError where none takes them: that of the first.
    """
    names, left_out, refused = [], {}, []
    for name in BACKENDS:
        try:
            options.replace(backend=name).check()
            compiler_of(name)
        except UsageError as error:
            left_out[name] = _describe_error(error)
            refused.append(error)
        except ImportError as error:
            left_out[name] = f"{error.name} is not installed"
        else:
            names.append(name)
    if not names:
        raise refused[0] if refused else UsageError(f"No backend can compile here. {_listed(left_out)}")
    return Choice(names, left_out)


def export_fastest(
    model: str,
    target: Path,
    options: ExportOptions,
    on_step: OnStep,
    on_plan: OnPlan,
    *,
    choice: Choice | None = None,
    ask: Ask = ask_child,
) -> Artifact:
    """Compile with every candidate, publish the fastest at `target`, all or nothing. It holds `bench.json`:

        machine, threads, rounds; backend, the one that was kept; requests, what was timed;
        candidates, per backend `milliseconds` (per request, medians of the rounds: a decoder's whole answer, an
        encoder's pass, one run of the graphs of others) and `benches`, all figures of `precast bench`;
        left_out, per backend why it is none.

    Args:
        model, target, options, on_step, on_plan: as for `export`.
        choice: the candidates; None is `choose_backends(options)`.
        ask: times once, instead of a child process.

    Raises:
        PrecastError: what the first candidate raised, where all fail; `target` is then as it was.
    """
    choice = choice or choose_backends(options)
    check_target(target, force=options.force)
    found = _Found(dict(choice.left_out))
    with staging(target) as folder:
        _compile(model, folder, options, choice.names, found, on_step, on_plan)
        result = _compare(found, on_step, ask)
        best = found.made[result["backend"]].path
        text = json.dumps(result, ensure_ascii=False, indent=2) + "\n"
        (best / "bench.json").write_text(text, "utf-8")
        with on_step("publish"):
            publish(best, target, force=options.force)
    return read_artifact(target)


def _compile(
    model: str,
    folder: Path,
    options: ExportOptions,
    names: list[str],
    found: _Found,
    on_step: OnStep,
    on_plan: OnPlan,
) -> None:
    """Export with each backend into the folder of its name. Raises what the first raised, if all did."""
    for name in names:
        try:
            found.made[name] = export_variant(
                model, folder / name, options.replace(backend=name, force=False),
                prefixed(on_step, name), on_plan if name == names[0] else lambda plan: None,
            )  # fmt: skip
        except Exception as error:
            # Whatever a compiler raises is a reason to do without it.
            found.reject_candidate(name, error)
    if not found.made:
        raise found.errors[0]


def _compare(found: _Found, on_step: OnStep, ask: Ask) -> dict[str, Any]:
    """Time what was made; what fails is left out, and the others are timed anew. Returns what `bench.json` holds."""
    while found.made:
        subjects = [Subject(name, artifact, artifact.contract.variants[0], {}) for name, artifact in found.made.items()]
        try:
            return _result(subjects, found, on_step, _naming(ask))
        except _LostError as lost:
            del found.made[lost.name]
            found.left_out[lost.name] = lost.reason
    raise PrecastError(f"No backend's artifact could be timed. {_listed(found.left_out)}")


def _result(subjects: list[Subject], found: _Found, on_step: OnStep, ask: Ask) -> dict[str, Any]:
    requests = _requests(subjects)
    ids = [token_ids(subject) if requests[0].prompt_length else [] for subject in subjects]
    rounds = [bench(subjects, request, ids, ROUNDS, on_step, ask) for request in requests]
    entries: dict[str, dict[str, Any]] = {
        subject.name: {
            "milliseconds": [
                _milliseconds(request, each[index]) for request, each in zip(requests, rounds, strict=True)
            ],
            "benches": [each[index] for each in rounds],
        }
        for index, subject in enumerate(subjects)
    }
    first = entries[subjects[0].name]["milliseconds"]
    return {
        "machine": describe_machine(),
        "threads": usable_cores(),
        "rounds": ROUNDS,
        "backend": min(entries, key=lambda name: _relative(entries[name]["milliseconds"], first)),
        "requests": [asdict(request) for request in requests],
        "candidates": entries,
        "left_out": found.left_out,
    }


def _requests(subjects: list[Subject]) -> list[Request]:
    """What is timed: a decoder's answer; an encoder of text at its smallest and its largest sizes, full; of models of
    anything else the graphs."""
    first = subjects[0]
    try:
        whole = plan(subjects)
    except UsageError:
        return [Request("graphs", first.batch_size, 0, None, 0)]
    if whole.kind == "decoder":
        return [whole]
    sizes = sorted((graph.slots, _length(graph.length)) for graph in first.variant.graphs)
    return [plan(subjects, batch, length) for batch, length in dict.fromkeys((sizes[0], sizes[-1]))]


def _length(length: Any) -> int:
    return length if isinstance(length, int) else int(length.max)


def _milliseconds(request: Request, entry: dict[str, Any]) -> float:
    """The median over the rounds of what a request takes."""
    figures = entry["figures"]
    if request.kind != "decoder":
        return float(figures["call_p50_ms"]["median"])
    # Speed is that of all tokens after the first; there is none where only one is asked for.
    speeds = (figures["tokens_per_second"] or {"rounds": []})["rounds"]
    rest = [1e3 * request.batch_size * ((request.new_tokens or 1) - 1) / speed for speed in speeds]
    first = figures["first_token_ms"]["rounds"]
    return float(f"{statistics.median(map(sum, zip(first, rest or [0.0] * len(first), strict=True))):.4g}")


def _relative(mine: list[float], first: list[float]) -> float:
    """How much of the first candidate's time is taken, in the geometric mean over the requests."""
    return statistics.geometric_mean([one / other for one, other in zip(mine, first, strict=True)])


def _naming(ask: Ask) -> Ask:
    def asked(subject: Subject, job: dict[str, Any]) -> dict[str, float | None]:
        try:
            return ask(subject, job)
        except PrecastError as error:
            raise _LostError(subject.name, _describe_error(error)) from error

    return asked


def _describe_error(error: Exception) -> str:
    """A message written for the user, or the exception, in a line that goes into the artifact: where files lie here is
    nobody else's business."""
    text = _FOLDERS.sub("", " ".join(str(error).split()))
    return text if isinstance(error, PrecastError) else f"{type(error).__name__}: {text}"


def _listed(reasons: dict[str, str]) -> str:
    return " ".join(f"{name}: {reason}" for name, reason in reasons.items())
