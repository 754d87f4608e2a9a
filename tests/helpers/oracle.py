"""The eager transformers model, which is always right."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers


@lru_cache(maxsize=4)
def eager(path: Path, auto: str = "AutoModelForCausalLM") -> Any:
    """The checkpoint, loaded by transformers, attention in plain operators."""
    cls = getattr(transformers, auto)
    return cls.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


def logits(path: Path, row: list[int]) -> np.ndarray:
    """Eager logits [length, vocabulary] of one sequence without padding."""
    with torch.inference_mode():
        return eager(path)(input_ids=torch.tensor([row]), use_cache=False).logits[0].numpy()


def greedy(path: Path, row: list[int], **options: Any) -> list[int]:
    """What transformers' own generate() appends to one prompt, greedily."""
    options = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0, **options}
    with torch.inference_mode():
        whole = eager(path).generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **options)
    return whole[0, len(row) :].tolist()


def padded(rows: list[list[int]], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded with token 0 on one side, or with padding in their middle; and the attention mask."""
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        gap = width - len(row)
        places = {"left": range(gap, width), "right": range(len(row))}.get(side)
        if places is None:
            half = len(row) // 2
            places = [*range(half), *range(half + gap, width)]
        ids[index, list(places)], mask[index, list(places)] = row, 1
    return ids, mask


def check_logits(source: Path, model: Any, rows: list[list[int]], side: str) -> None:
    """Each row's logits are those of the row alone."""
    ids, mask = padded(rows, side)
    found = model(ids, mask).logits
    for row, values, keep in zip(rows, found, mask, strict=True):
        expected = logits(source, row)
        assert np.abs(values[keep == 1] - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def check_greedy(source: Path, model: Any, side: str, count: int) -> None:
    """Rows of several lengths are continued by `count` tokens as transformers continues each alone."""
    rows = [[5, 9, 30, 7, 200], [80], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]]
    ids, mask = padded(rows, side)
    found = model.generate(ids, mask, max_new_tokens=count, do_sample=False)
    for row, values in zip(rows, found, strict=True):
        expected = greedy(source, row, max_new_tokens=count)
        assert values[ids.shape[1] :][: len(expected)].tolist() == expected


def check_brim(source: Path, model: Any, capacity: int) -> None:
    """The last token that fits, and what attention looks at when that is everything."""
    row = [(7 * n) % 300 + 3 for n in range(capacity - 6)]
    found = model.generate(np.array([row]), max_new_tokens=6, do_sample=False)
    expected = greedy(source, row, max_new_tokens=6)
    assert found[0, len(row) :][: len(expected)].tolist() == expected
