"""The compiled model's answers, from a fresh process: what is judged is what a user will run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from precast.runtime import child
from precast.runtime.artifact.locks import Scratch
from precast.runtime.errors import ExportError

from ..kinds.samples import ValidationSample, write_samples

__all__ = ["ask"]

Array = np.ndarray[Any, Any]


def ask(
    artifact: Path, variant: str, samples: list[ValidationSample], sha256: str | None
) -> list[list[dict[str, Array]]]:
    """Run the probe in a fresh interpreter. Raises ExportError where it fails."""
    with Scratch() as folder:
        asked, answered = folder / "questions.json", folder / "answers.npz"
        write_samples(samples, asked)
        pinned = [sha256] if sha256 else []
        done = child.run("precast.runtime.validation_worker", artifact, asked, answered, variant, *pinned)
        if done.returncode:
            detail = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise ExportError(f"The compiled model could not be run to validate it: {detail}")
        with np.load(answered) as archive:
            return [_rows(archive, index, sample.size) for index, sample in enumerate(samples)]


def _rows(archive: Any, sample: int, count: int) -> list[dict[str, Array]]:
    rows: list[dict[str, Array]] = [{} for _ in range(count)]
    for name in archive.files:
        index, row, output = name.split("/")
        if int(index) == sample:
            rows[int(row)][output] = archive[name]
    return rows
