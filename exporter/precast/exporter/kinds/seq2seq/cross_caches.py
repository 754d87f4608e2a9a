"""Stand-ins for an encoder's states and for caches, with which modelling code is traced for one decoding step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from precast.runtime.errors import ExportError

__all__ = ["CrossLayer", "EncoderStates", "PairedCache"]


@dataclass
class EncoderStates(BaseModelOutput):
    """An encoder's output, with the fields that mixtures of experts add."""

    router_logits: Any = None
    router_probs: Any = None


class CrossLayer(CacheLayerMixin):
    """A cache layer of cross-attention that has its keys and values, or notes those of its first update."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, keys is not None

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """The layer's keys and values. Raises ExportError where it never got any."""
        if self.keys is None or self.values is None:
            raise ExportError("This architecture does not keep what its decoder looks at in the encoder in a cache.")
        # Attention may read a view, and an output of the graph is a tensor of its own.
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


class PairedCache(EncoderDecoderCache):
    """The caches of self- and cross-attention, whose length is one per row, [B, 1], so that positions are, too."""

    def __init__(self, own: Cache, cross: Cache, past: Tensor) -> None:
        super().__init__(own, cross)
        self.past = past

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.past
