"""Run samples through the compiled model in a fresh process, as a user will run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from precast.runtime import child
from precast.runtime.artifact.locks import Scratch
from precast.runtime.errors import ExportError

from ..kinds.samples import ValidationSample, write_samples

__all__ = ["run_samples"]

Array = np.ndarray[Any, Any]


def run_samples(
    artifact: Path, variant: str, samples: list[ValidationSample], sha256: str | None
) -> list[list[dict[str, Array]]]:
    """The artifact's outputs by name, per sample and row, from `precast.runtime.validation_worker` in an interpreter of
    its own. Raises ExportError where that fails."""
    with Scratch() as folder:
        inputs, outputs = folder / "samples.json", folder / "answers.npz"
        write_samples(samples, inputs)
        pinned = [sha256] if sha256 else []
        done = child.run("precast.runtime.validation_worker", artifact, inputs, outputs, variant, *pinned)
        if done.returncode:
            detail = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise ExportError(f"The compiled model could not be run to validate it: {detail}")
        with np.load(outputs) as archive:
            return [_read_rows(archive, index, sample.size) for index, sample in enumerate(samples)]


def _read_rows(archive: Any, sample: int, count: int) -> list[dict[str, Array]]:
    rows: list[dict[str, Array]] = [{} for _ in range(count)]
    for name in archive.files:
        index, row, output = name.split("/")
        if int(index) == sample:
            rows[int(row)][output] = archive[name]
    return rows
