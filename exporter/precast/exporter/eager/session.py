"""Step an eager decoder by hand: tokens in, logits out, over a cache of fixed capacity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch

from precast.runtime.errors import InputError

from ..architectures.cache_names import cache_argument

__all__ = ["EagerSession", "token_positions"]

Array = np.ndarray[Any, Any]


class EagerSession:
    """The cache of up to `batch` rows, stepped as the session of a compiled decoder is.

    Inside, rows are left-padded, as transformers wants them.

    Args:
        model: a decoder of transformers.
        cache: its cache, which is empty.
        batch, capacity: how many rows and tokens fit.
        step: what computes a decode step: the model, or its compiled form.
    """

    def __init__(self, model: Any, cache: Any, batch: int, capacity: int, step: Callable[..., Any]) -> None:
        self.batch, self.capacity = batch, capacity
        self._model, self._cache, self._step = model, cache, step
        self._name = cache_argument(model)
        self._taken = signature(model.forward).parameters
        self._mask = torch.zeros(0, 0, dtype=torch.int64)

    def reset(self) -> None:
        """Forget all tokens."""
        self._cache.reset()
        self._mask = self._mask[:, :0]

    def prefill(self, rows: Sequence[Array]) -> Array:
        """Take one prompt per row; returns the logits after each row's last token, [batch, vocabulary]."""
        self.reset()
        width = max(map(len, rows))
        ids = torch.zeros(self.batch, width, dtype=torch.int64)
        self._mask = torch.zeros(self.batch, width, dtype=torch.int64)
        # Rows that nobody uses see one token: attention to nothing is not defined.
        self._mask[len(rows) :, -1] = 1
        for index, row in enumerate(rows):
            ids[index, width - len(row) :] = torch.from_numpy(np.asarray(row, np.int64))
            self._mask[index, width - len(row) :] = 1
        return self._run(self._model, ids, is_first_iteration=True)

    def decode(self, tokens: Sequence[int | None]) -> Array:
        """Append one token to each row; a row that is given None, or none at all, is idle. Returns logits
        [batch, vocabulary]. Raises InputError where the cache is full."""
        if self._mask.shape[1] >= self.capacity:
            raise InputError(f"The cache holds {self.capacity} tokens, all that fit. Open the model with more.")
        given = [0 if token is None else token for token in tokens]
        ids = torch.tensor([*given, *[0] * (self.batch - len(given))])[:, None]
        self._mask = torch.cat([self._mask, torch.ones(self.batch, 1, dtype=torch.int64)], 1)
        return self._run(self._step, ids)

    def _run(self, call: Callable[..., Any], ids: torch.Tensor, **how: Any) -> Array:
        device = self._model.device
        if "logits_to_keep" in self._taken:
            how["logits_to_keep"] = 1
        if "position_ids" in self._taken:
            how["position_ids"] = token_positions(self._mask)[:, -ids.shape[1] :].contiguous().to(device)
        with torch.no_grad():
            inputs = self._model.prepare_inputs_for_generation(
                ids.to(device), attention_mask=self._mask.to(device), use_cache=True, **{self._name: self._cache}, **how
            )
            logits = call(**inputs, return_dict=True).logits[:, -1]
        found: Array = logits.float().cpu().numpy()
        return found


def token_positions(mask: torch.Tensor) -> torch.Tensor:
    """The position of each token in its row, counted without padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)
