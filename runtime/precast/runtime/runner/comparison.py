"""`compare_modes`: the same prompts in several modes, each in a process of its own; tokens, distributions, speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact.locks import Scratch
from ..bench.compare import ask_worker, describe_machine
from ..errors import InputError, UsageError
from ..generation.probabilities import log_softmax
from ..hosts.machine import usable_cores
from ..storage.hub import locate
from ..terminal import quoted
from .modes import MODES, check_mode, is_checkpoint

__all__ = ["Comparison", "Difference", "ModeResult", "compare_modes"]

Array = np.ndarray[Any, Any]
Report = Callable[[str], AbstractContextManager[Any]]

REFERENCE = "eager"


@dataclass(frozen=True)
class Difference:
    """The first token that is another than the eager model's: of which prompt, at which new token, and both ids; None
    for an answer that had ended."""

    prompt: int
    position: int
    eager: int | None
    found: int | None


@dataclass(frozen=True)
class ModeResult:
    """What one mode answered.

    Attributes:
        mode, model: its name, and what was opened.
        tokens: how many were generated, for all prompts together.
        equal_tokens: how many of the eager model's tokens came before the first difference of each prompt.
        first_difference: None where all tokens are equal.
        mean_kl: the KL divergence from the eager model's next-token distributions, in nats, on average over all tokens
            of the prompts.
        prefill_tokens_per_second, decode_tokens_per_second: of prompts, up to each one's first new token; and of all
            further ones. None where there is none.
        load_seconds, warm_up_seconds: opening it, and answering once before anything is timed.
        compile_seconds: of these, what torch.compile took; None in other modes.
        peak_rss_mb: the most memory that was resident, in 10^6 bytes.
        answers: the tokens of each prompt's answer.
    """

    mode: str
    model: str
    tokens: int
    equal_tokens: int
    first_difference: Difference | None
    mean_kl: float
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    load_seconds: float
    warm_up_seconds: float
    compile_seconds: float | None
    peak_rss_mb: float | None
    answers: list[list[int]]

    @property
    def is_equal(self) -> bool:
        """Whether all tokens are those of the eager model."""
        return self.first_difference is None


@dataclass(frozen=True)
class Comparison:
    """What `compare_modes` found: the machine, the request, and one result for each mode, the eager one first."""

    machine: dict[str, Any]
    prompts: list[str]
    max_new_tokens: int
    results: list[ModeResult]

    def to_json(self) -> str:
        """All of it as one JSON document."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=2)

    def table(self) -> Any:
        """A table for `rich` to print: a column for each mode."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD)
        table.add_column("", no_wrap=True)
        for result in self.results:
            table.add_column(result.mode, justify="right")
        for label, cell in _ROWS.items():
            table.add_row(label, *map(cell, self.results))
        return table

    def save_chart(self, path: str | Path) -> None:
        """Draw speed, memory and divergence of all modes as a PNG.

        Raises UsageError where matplotlib is missing, or the file cannot be written.
        """
        try:
            figures = import_module("matplotlib.figure")
        except ImportError as error:
            raise UsageError("A chart needs matplotlib: pip install 'precast[chart]'") from error
        figure = figures.Figure(figsize=(10, 3.2), layout="constrained")
        names = [result.mode for result in self.results]
        for axes, (title, values) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
            axes.bar(names, [values(result) or 0 for result in self.results], color="#c2410c")
            axes.set_title(title, fontsize=10)
            axes.tick_params(labelsize=8)
        try:
            figure.savefig(path, format="png", dpi=150)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}.") from error


def compare_modes(
    prompts: Sequence[str],
    *,
    model: str | Path | None = None,
    artifact: str | Path | None = None,
    modes: Sequence[str] = tuple(MODES),
    max_new_tokens: int = 32,
    repeat: int = 3,
    options: dict[str, Any] | None = None,
    compiled_options: dict[str, Any] | None = None,
    report: Report = lambda step: nullcontext(),
) -> Comparison:
    """Run the same prompts in several modes, and compare each with eager, which is always run.

    Args:
        prompts: texts; as many run together as the model's batch size says.
        model: the checkpoint; by default that of the artifact, where it is found.
        artifact: what was compiled of it; the mode `compiled` needs it.
        modes: names in MODES.
        max_new_tokens: of every answer at most; tokens are chosen greedily.
        repeat: how often each request is timed, after a warm-up; medians count.
        options: of `open_model` for the modes that are not compiled ahead of time; threads are one per usable core.
        compiled_options: the same for the mode `compiled`.
        report: told the name of each mode as it begins; a context manager around it.

    Raises:
        UsageError: an argument is wrong, or a mode cannot run what was given.
        PrecastError: a model cannot be opened, or fails.
    """
    texts = _check_request(prompts, max_new_tokens, repeat)
    # All modes get the same number of threads.
    threads = {"threads": usable_cores()}
    wanted = _plan_modes(modes, model, artifact, threads | (options or {}), threads | (compiled_options or {}))
    with Scratch() as folder:
        found = []
        for mode, (name, how) in wanted.items():
            job = {"model": str(name), "mode": mode, "options": how, "prompts": texts, "repeat": repeat,
                   "max_new_tokens": max_new_tokens, "logits": str(folder / f"{mode}.npz")}  # fmt: skip
            with report(mode):
                found.append((job, ask_worker("precast.runtime.runner.comparison_worker", f"{name} ({mode})", job)))
        results = [_judge(job, answer, found[0]) for job, answer in found]
    return Comparison(describe_machine(), texts, max_new_tokens, results)


def _check_request(prompts: Sequence[str], max_new_tokens: int, repeat: int) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise InputError("Give at least one prompt; each is a text of at least one character.")
    for name, value in (("max_new_tokens", max_new_tokens), ("repeat", repeat)):
        if type(value) is not int or value < 1:
            raise UsageError(f"{name} must be a whole number from 1, not {value!r:.80}.")
    return texts


def _plan_modes(
    modes: Sequence[str],
    model: str | Path | None,
    artifact: str | Path | None,
    options: dict[str, Any],
    compiled_options: dict[str, Any],
) -> dict[str, tuple[str | Path, dict[str, Any]]]:
    """What to open for each mode, with which options; the reference comes first."""
    for mode in modes:
        check_mode(mode)
    if model is None and artifact is None:
        raise UsageError("Name what to run: model=, a checkpoint, or artifact=, what was compiled of it, or both.")
    if artifact is not None:
        if is_checkpoint(artifact):
            raise UsageError(f"artifact={str(artifact)!r} is a checkpoint; name it as model=.")
        # Downloaded here: a child process gets a local directory.
        artifact = locate(artifact)
    wanted: dict[str, tuple[str | Path, dict[str, Any]]] = {}
    for mode in dict.fromkeys((REFERENCE, *modes)):
        if mode == "compiled":
            wanted[mode] = _compiled_subject(model, artifact, compiled_options)
        elif artifact is not None:
            # The artifact says how many rows and tokens; the checkpoint is its own unless another is named.
            wanted[mode] = artifact, {**options, **({} if model is None else {"checkpoint": str(model)})}
        else:
            assert model is not None, "one of them is given"
            wanted[mode] = model, options
    return wanted


def _compiled_subject(
    model: str | Path | None, artifact: str | Path | None, options: dict[str, Any]
) -> tuple[str | Path, dict[str, Any]]:
    if artifact is None and "sequence_length" not in options:
        raise UsageError(
            f"The mode compiled needs an artifact of {model}: precast export {quoted(model)} --batch-size 1 "
            f"--sequence-length 512 -o OUT, then artifact='OUT'. Or compare the modes "
            f"{' and '.join(mode for mode in MODES if mode != 'compiled')} alone."
        )
    found = model if artifact is None else artifact
    assert found is not None, "one of them is given"
    return found, options


def _judge(job: dict[str, Any], answer: dict[str, Any], reference: tuple[dict[str, Any], dict[str, Any]]) -> ModeResult:
    """The result of a mode, beside the reference's job and answer."""
    eager_job, eager = reference
    if answer["prompts"] != eager["prompts"]:
        raise UsageError(f"{job['model']} has another tokenizer than {eager_job['model']}: are they the same model?")
    equal, first = _compare_tokens(eager["tokens"], answer["tokens"])
    read = sum(map(len, answer["prompts"]))
    return ModeResult(
        mode=job["mode"],
        model=job["model"],
        tokens=sum(map(len, answer["tokens"])),
        equal_tokens=equal,
        first_difference=first,
        mean_kl=_mean_divergence(eager_job["logits"], job["logits"]),
        prefill_tokens_per_second=_rate(read, answer["prefill_seconds"]),
        decode_tokens_per_second=_rate(answer["decode_tokens"], answer["decode_seconds"]),
        load_seconds=answer["load_seconds"],
        warm_up_seconds=answer["warm_up_seconds"],
        compile_seconds=answer["compile_seconds"],
        peak_rss_mb=answer["peak_rss_mb"],
        answers=answer["tokens"],
    )


def _compare_tokens(expected: list[list[int]], found: list[list[int]]) -> tuple[int, Difference | None]:
    """How many tokens are equal before the first difference of each answer, and the first difference of all."""
    equal, first = 0, None
    for prompt, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        longest = max(len(theirs), len(ours))
        differing = (at for at in range(longest) if theirs[at : at + 1] != ours[at : at + 1])
        position = next(differing, longest)
        equal += position
        if position < longest and first is None:
            pair = [row[position] if position < len(row) else None for row in (theirs, ours)]
            first = Difference(prompt, position, *pair)
    return equal, first


def _mean_divergence(expected: str, found: str) -> float:
    """The mean KL divergence of the distributions in two files of logits, an array [tokens, vocabulary] per prompt."""
    with np.load(expected) as theirs, np.load(found) as ours:
        parts = [_divergence(theirs[name], ours[name]) for name in theirs.files]
    return max(0.0, float(np.concatenate(parts).mean()))


def _divergence(expected: Array, found: Array) -> Array:
    theirs, ours = (log_softmax(each).astype(np.float64) for each in (expected, found))
    result: Array = (np.exp(theirs) * (theirs - ours)).sum(-1)
    return result


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _describe_equality(result: ModeResult) -> str:
    if (first := result.first_difference) is None:
        return f"all {result.equal_tokens}"
    return f"{result.equal_tokens}; prompt {first.prompt + 1} differs at {first.position + 1}"


_ROWS: dict[str, Callable[[ModeResult], str]] = {
    "tokens equal to eager": _describe_equality,
    "mean KL from eager, nats": lambda result: _number(result.mean_kl),
    "prefill, tokens/s": lambda result: _number(result.prefill_tokens_per_second),
    "decode, tokens/s": lambda result: _number(result.decode_tokens_per_second),
    "load, s": lambda result: _number(result.load_seconds),
    "warm-up, s": lambda result: _number(result.warm_up_seconds),
    "of it torch.compile, s": lambda result: _number(result.compile_seconds),
    "peak memory, RSS, MB": lambda result: _number(result.peak_rss_mb),
}
_PANELS: dict[str, Callable[[ModeResult], float | None]] = {
    "prefill, tokens/s": lambda result: result.prefill_tokens_per_second,
    "decode, tokens/s": lambda result: result.decode_tokens_per_second,
    "peak memory, MB": lambda result: result.peak_rss_mb,
    "mean KL from eager": lambda result: result.mean_kl,
}
