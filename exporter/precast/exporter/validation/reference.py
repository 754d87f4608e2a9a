"""The eager model's answers to the validation samples, to which a compiled model is held."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from precast.runtime.artifact.locks import Scratch
from precast.runtime.artifact.schema import Graph, Lora
from precast.runtime.artifact.tasks import Task

from ..adapters.slots import write_random_adapter
from ..architectures.last_eos_pooling import pools_last_eos
from ..checkpoint.checkpoint import Checkpoint
from ..kinds import kind_of
from ..kinds.samples import Answer, ValidationSample, make_held_out_samples, make_samples
from ..progress import progress

__all__ = ["Reference", "answer", "make_reference"]


@dataclass(frozen=True)
class Reference:
    """Samples, and the eager model's answers per row. Logits to score, a vocabulary per token, lie on disk and are
    deleted with this object."""

    samples: list[ValidationSample]
    answers: list[list[Answer]]


def make_reference(
    model: nn.Module, checkpoint: Checkpoint, task: Task, graphs: list[Graph], lora: Lora | None, *, is_scored: bool
) -> Reference:
    """Answer all samples for an artifact with these graphs by the eager model, with slots for adapters some with one;
    with `is_scored` held-out ones, too."""
    arguments = (task, graphs, checkpoint.tokenizer, checkpoint.vocabulary)
    samples = make_samples(*arguments)
    folder = Scratch() if is_scored or lora else None
    if lora and folder:
        write_random_adapter(lora, folder.path)
        samples += [_with_adapter(each, str(folder.path)) for each in _of_each_kind(samples)]
    if is_scored:
        samples += make_held_out_samples(*arguments)
    if pools_last_eos(model):
        samples = [each.ending_in(model.config.eos_token_id) for each in samples]  # type: ignore[union-attr, arg-type]
    answers = []
    for index, sample in enumerate(samples):
        progress(index, len(samples), sample.name)
        found = answer(model, sample, task)
        if sample.rows and sample.kind == "score" and folder:
            found = [_move_to_disk(found[0], folder.path / f"{index}.npy")]
        answers.append(found)
    reference = Reference(samples, answers)
    if folder:
        weakref.finalize(reference, folder.close)
    return reference


def _of_each_kind(samples: list[ValidationSample]) -> list[ValidationSample]:
    """The first sample of each kind."""
    return list({sample.kind: sample for sample in reversed(samples)}.values())


def _with_adapter(sample: ValidationSample, folder: str) -> ValidationSample:
    """The same sample with an adapter in every other row, the first among them."""
    adapters = [folder if row % 2 == 0 else "" for row in range(sample.size)]
    return replace(sample, name=f"{sample.name}, with an adapter", adapters=adapters)


def _move_to_disk(found: Answer, path: Path) -> Answer:
    np.save(path, found.outputs["logits"])
    return Answer({"logits": np.load(path, mmap_mode="r")})


def answer(model: nn.Module, sample: ValidationSample, task: Task) -> list[Answer]:
    """Answer a sample by the eager `model`, one row at a time and without padding."""
    with torch.inference_mode():
        answers: list[Answer] = kind_of(task).answer(model, sample, task.outputs)
        return answers
