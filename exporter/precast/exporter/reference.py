"""The eager model's answers: the truth that a compiled model is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .questions import Question
from .trace import logits_at

__all__ = ["Answer", "answer"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Answer:
    """One row's outputs by name. For greedy tokens `margins` says by how much each led the second likeliest."""

    outputs: dict[str, Array]
    margins: Array | None = None


def answer(model: nn.Module, question: Question, outputs: tuple[str, ...]) -> list[Answer]:
    """What the eager `model` says, one row at a time and without padding."""
    with torch.inference_mode():
        if question.kind == "outputs":
            types: Sequence[list[int] | None] = question.types or [None] * len(question.rows)
            return [_encode(model, row, kinds, outputs) for row, kinds in zip(question.rows, types, strict=True)]
        if question.kind in ("logits", "score"):
            pairs = zip(question.rows, question.positions, strict=True)
            return [_logits(model, row, positions) for row, positions in pairs]
        return [_greedy(model, row, question.count) for row in question.rows]


def _encode(model: nn.Module, row: list[int], types: list[int] | None, outputs: tuple[str, ...]) -> Answer:
    inputs = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.int64)}
    if types is not None:
        inputs["token_type_ids"] = torch.tensor([types])
    result = model(**inputs, return_dict=True)
    return Answer({name: result[name][0].float().numpy() for name in outputs})


def _logits(model: nn.Module, row: list[int], positions: list[int]) -> Answer:
    with logits_at(model, torch.tensor([positions])) as at:
        logits = at(model(input_ids=torch.tensor([row]), use_cache=False, return_dict=True).logits)
    return Answer({"logits": logits[0].float().numpy()})


def _greedy(model: nn.Module, row: list[int], count: int) -> Answer:
    tokens, margins, cache, ids = [], [], None, torch.tensor([row])
    for _ in range(count):
        result = model(input_ids=ids, past_key_values=cache, use_cache=True, return_dict=True)
        best = result.logits[0, -1].float().topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        cache, ids = result.past_key_values, best.indices[:1][None]
    return Answer({"tokens": np.array(tokens)}, np.array(margins))
