"""Measure the speed and memory of artifacts: every repetition in a process of its own, artifacts in turns.

A machine's speed drifts by tens of percent within minutes, and everything on it drifts together: so artifacts that are
compared take turns, and what counts is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, TypeAlias

from .. import child, errors
from ..advice import suggest_larger
from ..artifact import Artifact
from ..artifact.schema import Dim, Variant
from ..artifact.tasks import kind_of_roles
from ..errors import InputError, PrecastError, UsageError
from ..hosts.machine import installed_version, memory_bytes, usable_cores
from ..inputs.companions import companions_of
from ..inputs.tokenizer import Tokenizer

__all__ = ["STRIDE", "Request", "Subject", "ask_child", "ask_worker", "bench", "describe_machine", "plan", "token_ids"]

Report: TypeAlias = Callable[[str], AbstractContextManager[Any]]
Ask: TypeAlias = Callable[["Subject", dict[str, Any]], dict[str, float | None]]

DEFAULT_LENGTH = 128
STRIDE = 17
"""Every row, those of the warm-up too, begins so many tokens further on in the text."""
PACKAGES = ("precast", "onnxruntime", "torch", "numpy", "tokenizers")

TEXT = """\
The lighthouse keeper wrote down the weather every evening, because the harbour master paid him a little for it and
because he liked to. On the first page of the new book he noted a north wind, a falling glass and two sails far out. By
midnight the rain had come, and with it a small boat whose crew had seen his lamp from nine miles away. They were
carrying seed potatoes, a clock for the school, forty sheets of window glass and a letter that nobody had thought
urgent. He gave them soup and dry coats. The youngest of them could not sleep and asked how the light was made to turn,
so he took her up the stairs and showed her the weights, the chain and the train of brass wheels, which he oiled twice a
week. "It would be simpler with a motor," she said. He agreed that it would, and that one day somebody would bring one;
until then it took eleven minutes to wind and ran for five hours. In the morning the sea was flat. They left him a pane
of glass for the broken window in the shed, and he recorded that as well: wind light, visibility good, one window
mended, the letter still unopened on the shelf beside the barometer.
"""


@dataclass(frozen=True)
class Subject:
    """One artifact to measure: the user's name for it, the variant that runs here, and the options of
    `from_pretrained` with which it is opened."""

    name: str
    artifact: Artifact
    variant: Variant
    options: dict[str, Any]

    @property
    def kind(self) -> str:
        """ "decoder", "encoder" or "seq2seq"."""
        return kind_of_roles(graph.role for graph in self.variant.graphs)

    @property
    def batch_size(self) -> int:
        """The compiled one."""
        return self.artifact.contract.shapes.batch_size

    @property
    def capacity(self) -> int:
        """How many tokens fit in a row; for decoders prompt and answer together."""
        prefix = self.artifact.contract.prefix
        whole = max(graph.capacity or _max_length(graph.length) for graph in self.variant.graphs)
        return whole - (prefix.length if prefix else 0)

    @property
    def size_mb(self) -> float:
        """On disk, in 10^6 bytes: what this variant needs."""
        return sum(file.size for file in self.artifact.variant_files(self.variant).values()) / 1e6


@dataclass(frozen=True)
class Request:
    """The work of every repetition: `batch_size` prompts of `prompt_length` tokens, and for decoders `new_tokens` more
    for each, guessing up to `prompt_lookup` at once. `kind` is that of the subjects, or "graphs": then their graphs are
    run on their own, over blank inputs, which works for models of every kind."""

    kind: str
    batch_size: int
    prompt_length: int
    new_tokens: int | None
    prompt_lookup: int


def plan(
    subjects: Sequence[Subject],
    batch_size: int | None = None,
    prompt_length: int | None = None,
    new_tokens: int | None = None,
    prompt_lookup: int = 0,
) -> Request:
    """One request that fits all subjects; what is None becomes their batch size, and 128 tokens or what fits.

    Raises UsageError where the subjects cannot be compared or take no such option, InputError where one is too small.
    """
    kind = _common_kind(subjects)
    for subject in subjects:
        _check_text(subject)
    if kind == "encoder" and (new_tokens is not None or prompt_lookup):
        raise UsageError(
            f"new_tokens and prompt_lookup are for decoders; {subjects[0].name} was compiled for "
            f"{subjects[0].artifact.contract.task}. Leave them out."
        )
    room = min(subject.capacity for subject in subjects)
    batch = batch_size or min(subject.batch_size for subject in subjects)
    prompt, new = _choose_lengths(kind, room, prompt_length, new_tokens)
    for subject in subjects:
        _check_batch(subject, batch)
        _check_length(subject, prompt, new)
    return Request(kind, batch, prompt, new if kind == "decoder" else None, prompt_lookup)


def _check_text(subject: Subject) -> None:
    first = subject.variant.graphs[0].inputs[0]
    if subject.kind == "seq2seq" or first.name != "input_ids" or len(first.shape) != 2:
        raise UsageError(
            f"{subject.name} was compiled for {subject.artifact.contract.task}; bench measures models of text: "
            f"decoders, and encoders of one text per row."
        )


def token_ids(subject: Subject, text: str | None = None) -> list[int]:
    """The tokens of `text`, by default of a built-in one; numbers that every vocabulary has, without a tokenizer.

    Raises UsageError where a text is given and gives no tokens.
    """
    if "tokenizer.json" not in subject.artifact.contents:
        if text is not None:
            raise UsageError(
                f"prompt_file needs a tokenizer, and {subject.name} has none. Leave it out: prompts are then made of "
                f"token ids."
            )
        vocabulary = _vocabulary_size(subject.artifact.config)
        return [index * 7919 % vocabulary for index in range(1, 4096)]
    ids = Tokenizer(subject.artifact.path, companions_of(subject.artifact)).encode(TEXT if text is None else text)
    if not ids:
        raise UsageError(f"The text of prompt_file has no tokens for {subject.name}. Give a file with some text.")
    return ids


def bench(
    subjects: Sequence[Subject], request: Request, ids: Sequence[list[int]], repeat: int, report: Report,
    ask: Ask | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure all subjects in `repeat` rounds, each round beginning with another one.

    Before the rounds each is opened and warmed up once, so that files are verified and weights prepacked, and what
    cannot run says so at once.

    Args:
        subjects: the first is what the others are compared with.
        request: from `plan`.
        ids: per subject, tokens from which prompts are cut.
        report: told each step's name; a context manager around it.
        ask: measures once, instead of a child process.

    Returns:
        Per subject what it is, its `figures`, those of `measure.measure`, with median, extremes and all rounds, and
        `ratios`: each figure over the first subject's, in the median over the rounds.

    Raises:
        PrecastError: what a child raised, or how it ended.
    """
    ask = ask or ask_child
    jobs = [_make_job(request, each) for each in ids]
    for subject, job in zip(subjects, jobs, strict=True):
        with report(f"open {subject.name}"):
            ask(subject, {**job, "rows": [], "options": subject.options})
    found: list[list[dict[str, float | None]]] = [[] for _ in subjects]
    for turn in range(repeat):
        for index in _rotate_order(len(subjects), turn):
            subject = subjects[index]
            with report(f"{turn + 1}/{repeat} {subject.name}"):
                # Verified when it was opened first: hashing is not loading.
                options = {**subject.options, "verify": False}
                found[index].append(ask(subject, {**jobs[index], "options": options}))
    return [_summarize_subject(subject, rounds, found[0]) for subject, rounds in zip(subjects, found, strict=True)]


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on: CPU, cores, memory in 10^9 bytes, system, versions."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: installed_version(name) for name in PACKAGES},
    }


def _common_kind(subjects: Sequence[Subject]) -> str:
    first = subjects[0]
    for other in subjects[1:]:
        if other.kind != first.kind:
            raise UsageError(
                f"{first.name} was compiled for {first.artifact.contract.task}, {other.name} for "
                f"{other.artifact.contract.task}: {first.kind}s and {other.kind}s have no figures in common. "
                f"Compare with another {first.kind}."
            )
    return first.kind


def _choose_lengths(kind: str, room: int, prompt: int | None, new: int | None) -> tuple[int, int]:
    """Prompt length and new tokens; what is not given is 128, or what is left of the room."""
    if kind == "encoder":
        return prompt or min(DEFAULT_LENGTH, room), 0
    if prompt is None:
        prompt = max(1, min(DEFAULT_LENGTH, room - new if new else room // 2))
    return prompt, new or max(1, min(DEFAULT_LENGTH, room - prompt))


def _check_batch(subject: Subject, batch: int) -> None:
    if batch > subject.batch_size and not subject.artifact.contract.shapes.dynamic_batch_size:
        raise InputError(
            f"batch_size={batch} is more than the {subject.batch_size} that {subject.name} was compiled for. Ask "
            f"for batch_size={subject.batch_size}. {_suggest_larger(subject, batch=batch)}"
        )


def _check_length(subject: Subject, prompt: int, new: int) -> None:
    need, room = prompt + new, subject.capacity
    if need <= room:
        return
    what = f"{prompt} prompt tokens and {new} new ones, {need} together," if new else f"{prompt} tokens per row"
    fix = f"new_tokens={room - prompt} at most" if new and prompt < room else f"prompt_length={max(1, room - new)}"
    raise InputError(
        f"{what} do not fit into the {room} that {subject.name} was compiled for. Ask for {fix}. "
        f"{_suggest_larger(subject, length=need)}"
    )


def _suggest_larger(subject: Subject, *, batch: int | None = None, length: int | None = None) -> str:
    length = length or subject.capacity
    flags = f"--batch-size {batch or subject.batch_size} --sequence-length {length}"
    return suggest_larger(subject.artifact, flags, length)


def _max_length(length: int | Dim) -> int:
    return length.max if isinstance(length, Dim) else length


def _vocabulary_size(config: dict[str, Any]) -> int:
    text = config.get("text_config")
    found = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    # Every vocabulary has a token 0.
    return found if isinstance(found, int) and found > 0 else 1


def _make_job(request: Request, ids: list[int]) -> dict[str, Any]:
    rows = [
        list(islice(cycle(ids), start, start + request.prompt_length))
        for start in range(0, 2 * request.batch_size * STRIDE, STRIDE)
    ]
    return {
        "rows": rows[: request.batch_size],
        "warm_up": rows[request.batch_size :],
        "new_tokens": request.new_tokens,
        "prompt_lookup": request.prompt_lookup,
        "is_bare": request.kind == "graphs",
    }


def _rotate_order(count: int, turn: int) -> list[int]:
    return [(turn + index) % count for index in range(count)]


def ask_child(subject: Subject, job: dict[str, Any]) -> dict[str, float | None]:
    """Run one repetition in a fresh interpreter. Raises what it raised, PrecastError where it ended otherwise."""
    job = {**job, "model": str(subject.artifact.path)}
    figures: dict[str, float | None] = ask_worker("precast.runtime.bench.worker", subject.name, job)["figures"]
    return figures


def ask_worker(module: str, name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Give a job to a module that measures `name` in a process of its own; its answer, JSON on the last line.

    Raises what it answers as `{"error": [class, message]}`, PrecastError where it ended otherwise.
    """
    done = child.run(module, given=json.dumps(job))
    if done.returncode == -signal.SIGINT:
        # Ctrl-C reaches the child first; it was meant for the whole command.
        raise KeyboardInterrupt
    if done.returncode:
        raise PrecastError(f"{name} could not be measured: {_describe_exit(done)}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        kind, message = answer["error"]
        raise getattr(errors, kind)(message)
    return answer


def _describe_exit(done: CompletedProcess[str]) -> str:
    if done.returncode > 0:
        return (done.stderr.strip() or f"the child process ended with exit status {done.returncode}").splitlines()[-1]
    name = signal.Signals(-done.returncode).name
    hint = " Perhaps memory ran out: try a smaller batch_size or prompt_length." if name == "SIGKILL" else ""
    return f"the child process was ended by {name}.{hint}"


def _summarize_subject(
    subject: Subject, rounds: list[dict[str, float | None]], first: list[dict[str, float | None]]
) -> dict[str, Any]:
    contract = subject.artifact.contract
    return {
        "model": subject.name,
        "digest": contract.digest,
        "task": contract.task,
        "variant": subject.variant.name,
        "quantization": subject.variant.quantization,
        "size_mb": round(subject.size_mb, 3),
        "figures": {name: _summarize_rounds([each[name] for each in rounds]) for name in rounds[0]},
        "ratios": {
            name: _median_ratio([each[name] for each in rounds], [each[name] for each in first]) for name in rounds[0]
        },
    }


def _summarize_rounds(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Median, extremes and the single values in the order of the rounds, to four digits; None where one is."""
    known = [_four_digits(value) for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {"median": _four_digits(statistics.median(known)), "min": min(known), "max": max(known), "rounds": known}


def _median_ratio(values: Sequence[float | None], first: Sequence[float | None]) -> float | None:
    """The median over the rounds of value / the first subject's value; None where one is missing or 0."""
    ratios = [mine / other for mine, other in zip(values, first, strict=True) if mine is not None and other]
    return _four_digits(statistics.median(ratios)) if len(ratios) == len(values) else None


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def _cpu_name() -> str:
    """The processor's name; Linux on ARM gives none, so there the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
