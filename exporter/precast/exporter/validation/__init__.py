"""Compare an artifact with the eager reference, in a fresh process. Fails closed: no verdict is no artifact."""

from __future__ import annotations

from pathlib import Path

from precast.runtime.artifact.schema import Accuracy

from ..options import ExportOptions
from .encoder_rules import judge_encoder
from .reference import Reference
from .rules import judge_cast, judge_float32, judge_loss
from .worker import run_samples

__all__ = ["compare"]


def compare(
    artifact: Path,
    variant: str,
    reference: Reference,
    options: ExportOptions,
    loss: str | None,
    sha256: str | None = None,
) -> Accuracy:
    """Run the reference's samples through a variant of the artifact at `artifact`, and judge its answers.

    Args:
        loss: how the variant is less than float32, in words; None where it is not.
        sha256: the artifact's digest where the caller built it and so trusts the code in it.

    Raises:
        AccuracyError: the answers differ by more than is allowed; it holds the figures.
        ExportError: the artifact could not be run.
    """
    answers = run_samples(artifact, variant, reference.samples, sha256)
    if loss is None:
        return judge_float32(reference, answers, options.atol)
    scored = next((sample for sample in reference.samples if sample.kind == "score"), None)
    if scored is None:
        return judge_cast(reference, answers, options, loss)
    judge = judge_loss if scored.rows else judge_encoder
    return judge(reference, answers, options, loss)
