"""`backend="auto"`: compile with every backend that takes the options, time each on this host, keep the fastest.

    candidates -> export each, validated, into a folder beside the target -> time them in turns -> publish one

The timings go into the artifact's `bench.json`, which its digest does not cover, since they are this machine's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from precast.runtime.artifact import Artifact, read_artifact
from precast.runtime.artifact.backends import BACKENDS
from precast.runtime.artifact.publish import check_target, publish, staging
from precast.runtime.bench.compare import Ask, Request, Subject, ask_child, bench, describe_machine, plan, token_ids
from precast.runtime.errors import PrecastError, UsageError
from precast.runtime.hosts.machine import cpu_flags, usable_cores

from ..backends import compiler_of
from ..options import ExportOptions
from ..pipeline import OnPlan, export_variant
from ..progress import OnStep, prefixed

__all__ = ["ROUNDS", "Choice", "choose_backends", "export_fastest", "faster_here"]

ROUNDS = 3
"""Rounds of timing, each in processes of their own; the median counts."""

_FOLDERS = re.compile(r"(?<![\w./:])/(?:[^\s/'\"]+/)+")
"""The folders of an absolute path, without its last name; does not match URLs."""


@dataclass(frozen=True)
class Choice:
    """The candidates of `backend="auto"`.

    Attributes:
        names: backends to compile with, in the order of the table.
        left_out: why each other backend is none, by name.
    """

    names: list[str]
    left_out: dict[str, str]


class _LostError(Exception):
    """A candidate that could not be measured."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


@dataclass
class _Results:
    """What became of the candidates: artifacts that were made, errors, and by name why a backend is left out."""

    left_out: dict[str, str]
    made: dict[str, Artifact] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)

    def reject_candidate(self, name: str, error: Exception) -> None:
        """Leave a candidate out because of the error that it raised."""
        self.left_out[name] = _describe_error(error)
        self.errors.append(error)


def choose_backends(options: ExportOptions) -> Choice:
    """Choose the backends that take these options and whose compilers can be imported.

    Raises UsageError where none takes them: the error of the first backend.
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
        raise refused[0] if refused else UsageError(f"No backend can compile here. {_list_reasons(left_out)}")
    return Choice(names, left_out)


def faster_here(artifact: Artifact, options: ExportOptions) -> str | None:
    """A sentence on what is faster than the artifact on this CPU, where native code was so in every measurement
    (docs/benchmarks.md): quantized decoders with AVX-512 VNNI, and those of int8 with AVX2. None where nothing is."""
    variant, flags = artifact.contract.variants[0], cpu_flags()
    has_codes = variant.quantization is not None and any(graph.cache for graph in variant.graphs)
    is_measured = "avx512_vnni" in flags or ("avx2" in flags and options.quantization.quantize == "int8")
    if variant.backend != "onnx" or not (has_codes and is_measured) or not shutil.which(os.environ.get("CXX", "g++")):
        return None
    try:
        options.replace(backend="aoti").check()
    except UsageError:
        return None
    return (
        "Native code of such a model decodes faster on this CPU: backend='aoti' compiles it, backend='auto' measures "
        "both."
    )


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
    results = _Results(dict(choice.left_out))
    with staging(target) as folder:
        _compile(model, folder, options, choice.names, results, on_step, on_plan)
        result = _compare(results, on_step, ask)
        best = results.made[result["backend"]].path
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
    results: _Results,
    on_step: OnStep,
    on_plan: OnPlan,
) -> None:
    """Export with each backend into the folder of its name. Raises what the first raised, if all did."""
    for name in names:
        try:
            results.made[name] = export_variant(
                model, folder / name, options.replace(backend=name, force=False),
                prefixed(on_step, name), on_plan if name == names[0] else lambda plan: None,
            )  # fmt: skip
        except Exception as error:
            # Compilers may raise anything; the other candidates go on.
            results.reject_candidate(name, error)
    if not results.made:
        raise results.errors[0]


def _compare(results: _Results, on_step: OnStep, ask: Ask) -> dict[str, Any]:
    """Time the artifacts; one that fails is left out, and the others are timed anew. Returns the content of
    `bench.json`."""
    while results.made:
        subjects = [
            Subject(name, artifact, artifact.contract.variants[0], {}) for name, artifact in results.made.items()
        ]
        try:
            return _time(subjects, results, on_step, _name_failures(ask))
        except _LostError as lost:
            del results.made[lost.name]
            results.left_out[lost.name] = lost.reason
    raise PrecastError(f"No backend's artifact could be timed. {_list_reasons(results.left_out)}")


def _time(subjects: list[Subject], results: _Results, on_step: OnStep, ask: Ask) -> dict[str, Any]:
    requests = _choose_requests(subjects)
    ids = [token_ids(subject) if requests[0].prompt_length else [] for subject in subjects]
    rounds = [bench(subjects, request, ids, ROUNDS, on_step, ask) for request in requests]
    entries: dict[str, dict[str, Any]] = {
        subject.name: {
            "milliseconds": [
                _request_milliseconds(request, each[index]) for request, each in zip(requests, rounds, strict=True)
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
        "backend": min(entries, key=lambda name: _relative_time(entries[name]["milliseconds"], first)),
        "requests": [asdict(request) for request in requests],
        "candidates": entries,
        "left_out": results.left_out,
    }


def _choose_requests(subjects: list[Subject]) -> list[Request]:
    """The requests to time: a decoder's answer; of an encoder of text full batches of its smallest and of its largest
    sizes; of other models one run of the graphs."""
    first = subjects[0]
    try:
        whole = plan(subjects)
    except UsageError:
        return [Request("graphs", first.batch_size, 0, None, 0)]
    if whole.kind == "decoder":
        return [whole]
    sizes = sorted((graph.slots, _max_length(graph.length)) for graph in first.variant.graphs)
    return [plan(subjects, batch, length) for batch, length in dict.fromkeys((sizes[0], sizes[-1]))]


def _max_length(length: Any) -> int:
    return length if isinstance(length, int) else int(length.max)


def _request_milliseconds(request: Request, entry: dict[str, Any]) -> float:
    """The median time of a request over the rounds."""
    figures = entry["figures"]
    if request.kind != "decoder":
        return float(figures["call_p50_ms"]["median"])
    # The speed is that of all tokens after the first; a request for one token has none.
    speeds = (figures["tokens_per_second"] or {"rounds": []})["rounds"]
    rest = [1e3 * request.batch_size * ((request.new_tokens or 1) - 1) / speed for speed in speeds]
    first = figures["first_token_ms"]["rounds"]
    return float(f"{statistics.median(map(sum, zip(first, rest or [0.0] * len(first), strict=True))):.4g}")


def _relative_time(times: list[float], first: list[float]) -> float:
    """The geometric mean over the requests of a candidate's time relative to the first candidate's."""
    return statistics.geometric_mean([one / other for one, other in zip(times, first, strict=True)])


def _name_failures(ask: Ask) -> Ask:
    """`ask` with failures raised as _LostError, which names the candidate."""

    def ask_named(subject: Subject, job: dict[str, Any]) -> dict[str, float | None]:
        try:
            return ask(subject, job)
        except PrecastError as error:
            raise _LostError(subject.name, _describe_error(error)) from error

    return ask_named


def _describe_error(error: Exception) -> str:
    """The error in one line, without folders of this machine, since it goes into the artifact; with its type unless its
    message was written for users."""
    text = _FOLDERS.sub("", " ".join(str(error).split()))
    return text if isinstance(error, PrecastError) else f"{type(error).__name__}: {text}"


def _list_reasons(reasons: dict[str, str]) -> str:
    return " ".join(f"{name}: {reason}" for name, reason in reasons.items())
