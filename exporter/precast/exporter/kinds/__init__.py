"""The kinds of models: how each is planned, traced and validated. One package and one row each."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from precast.runtime.artifact.tasks import Task

__all__ = ["KINDS", "kind_of"]

KINDS = {
    "encoder": "precast.exporter.kinds.encoder.kind",
    "decoder": "precast.exporter.kinds.decoder.kind",
    "seq2seq": "precast.exporter.kinds.seq2seq.kind",
}


def kind_of(task: Task) -> Any:
    """The module for models of `task`. Its functions are `plan`, `trace`, `validation_samples`, `held_out_samples`,
    `calibration_inputs` and `answer`."""
    return import_module(KINDS[task.kind])
