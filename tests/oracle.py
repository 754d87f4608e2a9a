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
