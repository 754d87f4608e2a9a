"""Does the artifact give the reference's answers? It is asked in a fresh process, and it fails closed."""

from __future__ import annotations

from pathlib import Path

from precast.runtime.artifact.schema import Accuracy

from ..options import ExportOptions
from .reference import Reference
from .rules import judge, judge_cast, judge_loss
from .worker import ask

__all__ = ["compare"]


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
    answers = ask(artifact, variant, reference.samples, sha256)
    if loss is None:
        return judge(reference, answers, options.atol)
    if any(sample.kind == "score" for sample in reference.samples):
        return judge_loss(reference, answers, options, loss)
    return judge_cast(reference, answers, options, loss)
