"""Does the artifact give the reference's answers? It is asked in a fresh process, and it fails closed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from torch import nn

from precast.runtime import child
from precast.runtime.artifact import Artifact, read_artifact
from precast.runtime.artifact.integrity import vouch
from precast.runtime.artifact.locks import Scratch
from precast.runtime.artifact.publish import write_config
from precast.runtime.artifact.schema import Accuracy, Graph, Variant
from precast.runtime.artifact.store import write_atomically
from precast.runtime.artifact.tasks import Task, get_task, kind_of_roles
from precast.runtime.errors import AccuracyError, ExportError, UsageError
from precast.runtime.hosts.select import choose_variant, missing_device, this_machine

from ..architectures.last_eos_pooling import pools_last_end
from ..checkpoint.resolve import Checkpoint, resolve
from ..checkpoint.sentence_transformers import OUTPUT as SENTENCES
from ..kinds.samples import Question, make_questions, make_scored, write_questions
from ..options import ExportOptions
from ..progress import tell
from .metrics import CAST_ADVICE, QUANTIZED_ADVICE, Floor, check, divergence, floor_for, log_softmax, score
from .reference import Answer, answer

__all__ = [
    "Reference",
    "compare",
    "in_words",
    "judge",
    "judge_cast",
    "judge_loss",
    "make_reference",
    "record",
    "validate_again",
    "without_device",
]

Array = np.ndarray[Any, Any]
Pair: TypeAlias = tuple[Question, Answer, dict[str, Array]]


@dataclass(frozen=True)
class Reference:
    """Questions and the eager model's answers. Those to score, a vocabulary per token, are on disk, and go
    with this object."""

    questions: list[Question]
    answers: list[list[Answer]]


def make_reference(
    model: nn.Module, checkpoint: Checkpoint, task: Task, graphs: list[Graph], *, is_scored: bool
) -> Reference:
    """Ask the eager model everything that an artifact with these graphs will be asked."""
    asked = (task, graphs, checkpoint.tokenizer, checkpoint.vocabulary)
    questions = make_questions(*asked)
    if pools_last_end(model):
        questions = [each.ending_in(model.config.eos_token_id) for each in questions]  # type: ignore[union-attr, arg-type]
    folder = None
    if is_scored:
        questions += make_scored(*asked)
        folder = Scratch()
    answers = []
    for index, question in enumerate(questions):
        tell(index, len(questions), question.name)
        found = answer(model, question, task)
        if question.kind == "score" and folder:
            found = [_on_disk(found[0], folder.path / f"{index}.npy")]
        answers.append(found)
    reference = Reference(questions, answers)
    if folder:
        weakref.finalize(reference, folder.close)
    return reference


def _on_disk(found: Answer, path: Path) -> Answer:
    np.save(path, found.outputs["logits"])
    return Answer({"logits": np.load(path, mmap_mode="r")})


def compare(
    artifact: Path,
    variant: str,
    reference: Reference,
    options: ExportOptions,
    loss: str | None,
    sha256: str | None = None,
) -> Accuracy:
    """Ask a variant of the artifact at `artifact` and judge its answers. Raises AccuracyError with the figures if they
    differ.

    `loss` says in words how it is less than float32; `sha256` is the artifact's digest where the caller built it and
    so trusts the code in it.
    """
    answers = _ask(artifact, variant, reference.questions, sha256)
    if loss is None:
        return judge(reference, answers, options.atol)
    if any(question.kind == "score" for question in reference.questions):
        return judge_loss(reference, answers, options, loss)
    return judge_cast(reference, answers, options, loss)


def without_device(artifact: Artifact) -> Accuracy | None:
    """The verdict on an artifact just compiled for a device that is not here; None where it can be asked."""
    reason = missing_device(artifact.contract.variants[0], this_machine(artifact.contract))
    later = "precast validate compares it there"
    return Accuracy(status="skipped", reason=f"no device: {reason}; {later}", figures={}) if reason else None


def judge_loss(
    reference: Reference, answers: list[list[dict[str, Array]]], options: ExportOptions, loss: str
) -> Accuracy:
    """The rule for decoders that are less than float32: floors on what is lost on held-out text.

    At the edges of shapes (padding, one token, a full cache) the loss may be as large as short texts make it, but not
    of another kind: a mask that is wrong there costs nats.
    """
    pairs = list(_pairs(reference, answers))
    measured = [pair for pair in pairs if pair[0].kind != "greedy"]
    worst, _ = max(_differences(measured))
    scores = score((question.rows[0], mine.outputs["logits"], theirs["logits"])
                   for question, mine, theirs in pairs if question.kind == "score")  # fmt: skip
    edges = _agreement(measured)["kl_divergence"]
    figures: dict[str, int | float] = {
        **scores.as_figures(),
        "kl_divergence_at_edges": edges,
        "max_abs_difference": _two_digits(worst),
        **_count_greedy([pair for pair in pairs if pair[0].kind == "greedy"]),
    }
    floor = floor_for(options)
    # A faulty graph is no loss that could be accepted.
    _check_edges(edges, scores.kl_divergence)
    try:
        check(scores, floor, loss, CAST_ADVICE if options.is_cast else QUANTIZED_ADVICE)
    except AccuracyError:
        if not options.accept_loss:
            raise
        return Accuracy(status="accepted", reason=f"taken as it is, though not within {floor}", figures=figures)
    return Accuracy(status="passed", reason=f"compared with the eager fp32 model: {floor}", figures=figures)


ROW_ERRORS = {"bf16": 0.045, "fp16": 0.01, "tf32": 0.01}
"""‖difference‖ / ‖row‖; 0.045 is a cosine of 0.999."""
LARGEST_DIFFERENCES = {"bf16": 0.05, "fp16": 0.01, "tf32": 0.01}
"""max|difference| / max|reference|."""


def judge_cast(
    reference: Reference, answers: list[list[dict[str, Array]]], options: ExportOptions, loss: str
) -> Accuracy:
    """The rule for encoders and encoder-decoders that are less than float32: bounds on the error of every output's
    every row, and of every number. A row that is shorter than others is measured by the length that they have."""
    pairs = list(_pairs(reference, answers))
    measured, greedy = ([pair for pair in pairs if (pair[0].kind == "greedy") is it] for it in (False, True))
    worst, _ = max(_differences(measured))
    row_error, where = max(_row_errors(measured))
    difference, place = max(_relative_differences(measured))
    figures: dict[str, int | float] = {
        "max_abs_difference": _two_digits(worst),
        "max_relative_difference": _two_digits(difference),
        "max_row_error": _two_digits(row_error),
        "min_cosine": round(min(_cosines(measured)), 5),
        "questions": len(reference.questions),
        **_agreement(measured),
        **(_count_greedy(greedy) if greedy else {}),
    }
    bounds = ROW_ERRORS[options.cast_type], LARGEST_DIFFERENCES[options.cast_type]
    within = f"row error <= {bounds[0]:g}, difference <= {bounds[1]:g} of the largest value"
    if row_error <= bounds[0] and difference <= bounds[1]:
        return Accuracy(status="passed", reason=f"compared with the eager fp32 model: {within}", figures=figures)
    if options.accept_loss and row_error <= FAULT:
        return Accuracy(status="accepted", reason=f"taken as it is, though not within {within}", figures=figures)
    advice = (
        CAST_ADVICE if row_error <= FAULT else "Casting costs less: this is a fault of the graph, please report it."
    )
    raise AccuracyError(
        f"{loss[0].upper()}{loss[1:]}, the model does not give the reference's answers: a row is off by "
        f"{row_error:.2g} of its length at {where!r} where {bounds[0]:g} is allowed, and a number by {difference:.2g} "
        f"of the largest at {place!r} where {bounds[1]:g} is. Nothing was written. {advice}"
    )


FAULT = 0.5
"""An answer that is half another one is no rounding that could be accepted."""


def _row_errors(measured: list[Pair]) -> Iterator[tuple[float, str]]:
    for where, expected, found in _rows_of_outputs(measured):
        typical = np.mean([np.linalg.norm(row) for row in expected])
        for row, other in zip(expected, found, strict=True):
            yield float(np.linalg.norm(other - row) / max(np.linalg.norm(row), typical, TINY)), where


def _relative_differences(measured: list[Pair]) -> Iterator[tuple[float, str]]:
    for where, expected, found in _rows_of_outputs(measured):
        largest = max(float(np.abs(row).max()) for row in expected)
        for row, other in zip(expected, found, strict=True):
            yield float(np.abs(other - row).max()) / max(largest, TINY), where


def _cosines(measured: list[Pair]) -> Iterator[float]:
    for _, expected, found in _rows_of_outputs(measured):
        for row, other in zip(expected, found, strict=True):
            yield float(row.ravel() @ other.ravel() / max(np.linalg.norm(row) * np.linalg.norm(other), TINY))


TINY = 1e-30


def _rows_of_outputs(measured: list[Pair]) -> Iterator[tuple[str, list[Array], list[Array]]]:
    """Per question and output: its rows, of the reference and of the other."""
    grouped: dict[str, tuple[list[Array], list[Array]]] = {}
    for question, mine, theirs in measured:
        for name, expected in mine.outputs.items():
            rows, others = grouped.setdefault(f"{question.name}, {name}", ([], []))
            rows.append(expected.astype(np.float64))
            others.append(theirs[name].astype(np.float64))
    return ((where, *rows) for where, rows in grouped.items())


EDGE_NATS = 1.0
"""What a few tokens without context may lose on average; the wrong mask or position costs several times as much."""


def _check_edges(divergence: float, held_out: float) -> None:
    allowed = max(EDGE_NATS, 10 * held_out)
    if divergence > allowed:
        raise AccuracyError(
            f"At the edges of its shapes (padded, one token, a full cache) the compiled model is off by a KL "
            f"divergence of {divergence:.2g} where {allowed:.2g} is allowed and ordinary text loses {held_out:.2g}. "
            f"Nothing was written. This is a fault of the compiled graph rather than of rounding: please report it."
        )


def _count_greedy(pairs: list[Pair]) -> dict[str, int | float]:
    """Tokens before the first that differs; rounding moves close decisions, so this is a figure and no rule."""
    equal = sum(_first_difference(mine.outputs["tokens"], theirs["tokens"]) for _, mine, theirs in pairs)
    return {"greedy_tokens_equal": equal, "greedy_tokens": sum(len(mine.outputs["tokens"]) for _, mine, _ in pairs)}


def _first_difference(expected: Array, found: Array) -> int:
    differing = np.flatnonzero(expected != found)
    return int(differing[0]) if len(differing) else len(expected)


def judge(reference: Reference, answers: list[list[dict[str, Array]]], atol: float) -> Accuracy:
    """The rule for fp32: max|difference| <= atol * max(1, max|reference|) over all outputs, and greedy tokens equal
    except where the eager model's own lead was below twice that difference, where either token is right."""
    pairs = list(_pairs(reference, answers))
    measured = [pair for pair in pairs if pair[0].kind != "greedy"]
    worst, where = max(_differences(measured), default=(0.0, "nothing"))
    scale = max((float(np.abs(each).max()) for _, mine, _ in measured for each in mine.outputs.values()), default=0.0)
    allowed = atol * max(1.0, scale)
    if worst > allowed:
        raise AccuracyError(
            f"The compiled model does not give the reference's answers: they differ by {worst:.2g} at {where!r} where "
            f"{allowed:.2g} is allowed ({atol:g} of the largest value, {scale:.2g}). Nothing was written. "
            f"{_atol_advice(worst / max(1.0, scale))}"
        )
    figures: dict[str, int | float] = {
        "max_abs_difference": _two_digits(worst),
        "max_abs_reference": _two_digits(scale),
        "questions": len(reference.questions),
        **_agreement(measured),
        **_judge_greedy([pair for pair in pairs if pair[0].kind == "greedy"], worst),
    }
    return Accuracy(status="passed", reason=f"compared with the eager model, atol {atol:g}", figures=figures)


LARGEST_ATOL = 0.01
"""Of the largest value. What differs by more is no rounding of float32."""


def _atol_advice(difference: float) -> str:
    if difference * 1.1 > LARGEST_ATOL:
        return "Rounding costs less: this is a fault of the graph, please report it."
    return f"If that is good enough for you, --atol {difference * 1.1:.2g} allows it."


def record(artifact: Artifact, variant: str, accuracy: Accuracy) -> Artifact:
    """The artifact with a new verdict on one of its variants in its `config.json`."""
    variants = [
        msgspec.structs.replace(each, accuracy=accuracy) if each.name == variant else each
        for each in artifact.contract.variants
    ]
    contract = msgspec.structs.replace(artifact.contract, variants=variants)
    return write_config(artifact.path, artifact.config, contract)


def validate_again(
    path: Path,
    model: str,
    options: ExportOptions,
    *,
    keep: bool,
    sha256: str | None = None,
    variant: str | None = None,
) -> Accuracy:
    """Compare a variant of an existing artifact, by default the first that runs here, with a checkpoint; with `keep`
    the verdict goes into its `config.json`.

    Native code runs only with proof, as in `from_pretrained`; `sha256` is one. The variant is held to the floor that it
    was made with, and a loss that was accepted then is accepted again.

    Raises UsageError for a bound that is not of this variant, AccuracyError where the answers differ, ArtifactError and
    CheckpointError where either cannot be opened.
    """
    artifact = read_artifact(path)
    checkpoint = resolve(model, options)
    chosen = choose_variant(artifact.contract, this_machine(artifact.contract), variant, root=path)
    task = get_task(artifact.contract.task, kind_of_roles(graph.role for graph in chosen.graphs))
    words, options = in_words(chosen), _as_compiled(options, chosen)
    if words is not None and options.atol != ExportOptions.atol:
        raise UsageError(
            f"--atol {options.atol:g} bounds the difference of a model that computes in float32; the variant "
            f"{chosen.name} is {words}, and what that costs is measured on answers as a whole. Leave --atol out."
        )
    made = {spec.name for graph in chosen.graphs for spec in graph.outputs}
    checkpoint = replace(checkpoint, embeds_sentences=SENTENCES in made)
    loaded = checkpoint.load(task, "float32")
    is_scored = words is not None and task.kind == "decoder"
    reference = make_reference(loaded, checkpoint, task, chosen.graphs, is_scored=is_scored)
    del loaded
    try:
        accuracy = compare(path, chosen.name, reference, options, words, sha256)
    except ExportError as error:
        _check_source(artifact, checkpoint, error)
        raise
    if keep:
        _rewrite(artifact, chosen.name, accuracy)
    return accuracy


def _check_source(artifact: Artifact, checkpoint: Checkpoint, error: ExportError) -> None:
    """Raise AccuracyError instead of `error` where the checkpoint has other weights than the artifact was made from."""
    source, found = artifact.contract.source, checkpoint.weights_sha256()
    if found != source.weights_sha256:
        raise AccuracyError(
            f"{artifact.path} does not give the answers of {checkpoint.given}. It was compiled from {source.model} "
            f"with weights of sha256 {source.weights_sha256[:8]}…, these have {found[:8]}…: is it the right checkpoint?"
        ) from error


def in_words(variant: Variant) -> str | None:
    """How the variant is less than float32, or None where it is not."""
    cast = _cast_in_words(variant)
    rounded = f"quantized to {_grids(variant)}" if _grids(variant) else None
    return ", ".join(part for part in (rounded, cast) if part) or None


def _grids(variant: Variant) -> str:
    parts = [variant.quantization, f"{variant.kv_cache} caches" if variant.kv_cache else None]
    return " with ".join(part for part in parts if part)


def _cast_in_words(variant: Variant) -> str | None:
    if variant.dtype != "float32":
        return f"computed in {variant.dtype}"
    what, kind = (variant.compiler.options.get(name) for name in ("auto_cast", "auto_cast_type"))
    return f"with --auto-cast {what} to {kind}" if what else None


def _as_compiled(options: ExportOptions, variant: Variant) -> ExportOptions:
    """The options, cast as the variant is, with the floor that it was held to and whether its loss was accepted."""
    told = {name: variant.compiler.options[name] for name in ("auto_cast", "auto_cast_type")
            if name in variant.compiler.options}  # fmt: skip
    floor = {name: value for name, value in asdict(Floor.within(variant.accuracy.reason)).items() if value is not None}
    accepts = variant.accuracy.status == "accepted"
    return replace(options, dtype=variant.dtype, accept_loss=accepts, **told, **floor)  # type: ignore[arg-type]


def _rewrite(artifact: Artifact, variant: str, accuracy: Accuracy) -> None:
    """Replace config.json in one step, and vouch for the new digest."""
    with Scratch() as folder:
        renewed = record(Artifact(folder, artifact.config, artifact.contract), variant, accuracy)
        write_atomically(artifact.path / "config.json", (folder / "config.json").read_bytes(), 0o644)
    vouch(renewed.contract.digest)


def _ask(artifact: Path, variant: str, questions: list[Question], sha256: str | None) -> list[list[dict[str, Array]]]:
    """Run the probe in a fresh interpreter. Raises ExportError where it fails."""
    with Scratch() as folder:
        asked, answered = folder / "questions.json", folder / "answers.npz"
        write_questions(questions, asked)
        pinned = [sha256] if sha256 else []
        done = child.run("precast.runtime.validation_worker", artifact, asked, answered, variant, *pinned)
        if done.returncode:
            detail = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise ExportError(f"The compiled model could not be run to validate it: {detail}")
        with np.load(answered) as archive:
            return [_rows(archive, index, question.size) for index, question in enumerate(questions)]


def _rows(archive: Any, question: int, count: int) -> list[dict[str, Array]]:
    rows: list[dict[str, Array]] = [{} for _ in range(count)]
    for name in archive.files:
        index, row, output = name.split("/")
        if int(index) == question:
            rows[int(row)][output] = archive[name]
    return rows


def _pairs(reference: Reference, answers: list[list[dict[str, Array]]]) -> Iterator[Pair]:
    for question, mine, theirs in zip(reference.questions, reference.answers, answers, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            yield question, one, other


def _differences(measured: list[Pair]) -> Iterator[tuple[float, str]]:
    """The largest difference of every output, and where. Raises AccuracyError where one is no number at all."""
    for question, mine, theirs in measured:
        for name, expected in mine.outputs.items():
            found, where = theirs[name], f"{question.name}, {name}"
            if found.shape != expected.shape:
                shapes = f"{list(found.shape)} where the reference has {list(expected.shape)}"
                raise AccuracyError(f"The compiled model's answer to {where!r} has the shape {shapes}.")
            difference = float(np.abs(found.astype(np.float64) - expected).max())
            # NaN is neither above nor below any bound, so it must not reach a comparison.
            if not np.isfinite(difference):
                raise AccuracyError(f"The compiled model's answer to {where!r} holds NaN or infinity.")
            yield difference, where


def _agreement(measured: list[Pair]) -> dict[str, float]:
    """For decoders: how often the likeliest token is the same, and the mean KL divergence from the reference."""
    logits = [
        (mine.outputs["logits"], theirs["logits"]) for question, mine, theirs in measured if question.kind == "logits"
    ]
    if not logits:
        return {}
    expected, found = (np.concatenate(each).astype(np.float64) for each in zip(*logits, strict=True))
    mine, theirs = log_softmax(expected), log_softmax(found)
    return {
        "top1_agreement": round(float((expected.argmax(-1) == found.argmax(-1)).mean()), 3),
        "kl_divergence": _two_digits(max(0.0, float(divergence(mine, theirs).mean()))),
    }


def _judge_greedy(pairs: list[Pair], difference: float) -> dict[str, int | float]:
    equal = total = 0
    for question, mine, theirs in pairs:
        expected, found, margins = mine.outputs["tokens"], theirs["tokens"], mine.margins
        assert margins is not None, "greedy answers carry margins"
        first = _first_difference(expected, found)
        equal, total = equal + first, total + len(expected)
        if first < len(expected) and margins[first] >= 2 * difference:
            raise AccuracyError(
                f"The compiled model generates other tokens than the reference: at {question.name!r}, token "
                f"{first + 1} is {found[first]} instead of {expected[first]}, where the reference leads by "
                f"{margins[first]:.2g} and logits differ by {difference:.2g} at most. Nothing was written."
            )
    return {"greedy_tokens_equal": equal, "greedy_tokens": total} if pairs else {}


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
