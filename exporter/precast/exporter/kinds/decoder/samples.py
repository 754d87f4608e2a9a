"""Validation samples for decoders, and the eager model's answers to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from precast.runtime.artifact.schema import Dim, Graph

from ...adapters.slots import apply_adapter
from ...architectures.cache_names import cache_argument, find_cache
from ..samples import Answer, ValidationSample, repeat_tokens
from .fused_attention import pick_logits

__all__ = ["answer", "calibration_inputs", "held_out_samples", "validation_samples"]

GREEDY_PROMPTS = 8
GREEDY_TOKENS = 24
POSITIONS = 16
HELD_OUT_LENGTH = 128


def validation_samples(graphs: list[Graph], texts: list[list[int]]) -> list[ValidationSample]:
    """Logits at the edges of the shapes, and greedy tokens."""
    return [*_logit_samples(graphs, texts), *_greedy_samples(graphs[0], texts)]


def held_out_samples(graphs: list[Graph], texts: list[list[int]]) -> list[ValidationSample]:
    """Each text, cut to a length that fits the graphs, to be scored token by token."""
    length = min(HELD_OUT_LENGTH, graphs[0].capacity)
    return [
        ValidationSample(f"held-out text {index + 1}", "score", [row], positions=[list(range(len(row)))])
        for index, row in enumerate(text[:length] for text in texts)
    ]


def calibration_inputs(graphs: list[Graph], texts: list[list[int]]) -> list[dict[str, Any]]:
    """The texts, each with a batch dimension of 1."""
    return [{"input_ids": np.array([text], np.int64)} for text in texts]


def _logit_samples(graphs: list[Graph], texts: list[list[int]]) -> list[ValidationSample]:
    graph, is_free = graphs[0], isinstance(graphs[0].length, Dim)
    batch, capacity = graph.slots, graph.capacity
    rows = [text[: min(64, capacity)] for text in (texts * (batch // len(texts) + 1))[:batch]]
    cases = {
        "texts": rows,
        "one token": [texts[0][:1]],
        f"all {capacity} tokens": [repeat_tokens(texts, capacity)],
        "a short batch": rows[: max(1, batch - 1)],
    }
    return [
        ValidationSample(
            name, "logits", rows, positions=[_spread_positions(len(row), POSITIONS if is_free else 2) for row in rows]
        )
        for name, rows in cases.items()
    ]


def _greedy_samples(graph: Graph, texts: list[list[int]]) -> list[ValidationSample]:
    """Prompts of different lengths: alone in a batch, and several together, padded on either side."""
    count = min(GREEDY_TOKENS, max(1, graph.capacity // 2))
    prompts = [text[: max(1, min(4 + 3 * index, graph.capacity - count))] for index, text in enumerate(texts)]
    prompts = prompts[:GREEDY_PROMPTS]
    if graph.slots == 1:
        return [ValidationSample(f"greedy {index}", "greedy", [row], count=count) for index, row in enumerate(prompts)]
    groups = [prompts[start : start + graph.slots] for start in range(0, len(prompts), graph.slots)]
    return [
        ValidationSample(f"greedy {index}", "greedy", rows, side=("left", "right")[index % 2], count=count)
        for index, rows in enumerate(groups)
    ]


def _spread_positions(length: int, count: int) -> list[int]:
    """Up to `count` positions spread over a row, its last among them."""
    step = max(1, -(-length // count))
    return list(range((length - 1) % step, length, step))


def answer(model: nn.Module, sample: ValidationSample, outputs: tuple[str, ...]) -> list[Answer]:
    """The eager answers, one row at a time and without padding."""
    adapters = sample.adapters or [""] * sample.size
    found = []
    for index, (row, adapter) in enumerate(zip(sample.rows, adapters, strict=True)):
        with apply_adapter(model, adapter):
            is_greedy = sample.kind == "greedy"
            found.append(
                _greedy(model, row, sample.count) if is_greedy else _logits(model, row, sample.positions[index])
            )
    return found


def _logits(model: nn.Module, row: list[int], positions: list[int]) -> Answer:
    with pick_logits(model, torch.tensor([positions])) as at:
        logits = at(model(input_ids=torch.tensor([row]), use_cache=False, return_dict=True).logits)
    return Answer({"logits": logits[0].float().numpy()})


def _greedy(model: nn.Module, row: list[int], count: int) -> Answer:
    tokens, margins, cache, ids = [], [], None, torch.tensor([row])
    name = cache_argument(model)
    for step in range(count):
        positions = _explicit_positions(model, len(row), step)
        result = model(input_ids=ids, use_cache=True, return_dict=True, **{name: cache}, **positions)
        best = result.logits[0, -1].float().topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        cache, ids = find_cache(result), best.indices[:1][None]
    return Answer({"tokens": np.array(tokens)}, np.array(margins))


COUNT_FROM_ZERO = frozenset({"bamba"})
"""Model types that count positions from the first token of every call unless they get `position_ids`, as generate()
passes them."""


def _explicit_positions(model: Any, length: int, step: int) -> dict[str, Tensor]:
    if model.config.model_type not in COUNT_FROM_ZERO:
        return {}
    positions = torch.arange(length + step)[None]
    return {"position_ids": positions[:, -1:] if step else positions}
