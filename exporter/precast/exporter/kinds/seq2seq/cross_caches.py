"""What modelling code is given in the place of an encoder's states and of caches, to trace one step of a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from precast.runtime.errors import ExportError

__all__ = ["Both", "Held", "States"]


@dataclass
class States(BaseModelOutput):
    """What an encoder gives, mixtures of experts too."""

    router_logits: Any = None
    router_probs: Any = None


class Held(CacheLayerMixin):
    """A cache layer that has keys and values already, or remembers those that it is given."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, keys is not None

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values. Raises ExportError where there are none."""
        if self.keys is None or self.values is None:
            raise ExportError("This architecture does not keep what its decoder looks at in the encoder in a cache.")
        # What attention reads may be a view; an output is a tensor of its own.
        return self.keys.contiguous(), self.values.contiguous()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else int(self.keys.shape[2])

    def get_max_length(self) -> int:
        return -1


class Both(EncoderDecoderCache):
    """A pair of caches whose length is each row's own, [B, 1], so that positions come out per row."""

    def __init__(self, own: Cache, cross: Cache, past: Tensor) -> None:
        super().__init__(own, cross)
        self.past = past

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.past
