"""A decoder whose attention is one fused operator per layer, `cached_attention`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from precast.runtime.artifact.schema import Lora
from precast.runtime.errors import ExportError

from ...architectures import attention_interface
from ...architectures.cache_names import cache_argument
from ...operators.attention import Scales
from .lora_slots import adding_adapters

__all__ = ["FusedDecoder", "pick_logits", "takes_position_ids"]


class FusedDecoder(nn.Module):
    """One step of the model: tokens and caches in, logits at `logit_positions` and updated caches out. `scales` are
    those of caches in int8; `skipped` is how many cache positions lie before the model's first position; `lora` are the
    slots for adapters."""

    def __init__(
        self, model: nn.Module, layers: int, scales: Scales | None, skipped: int = 0, lora: Lora | None = None
    ) -> None:
        super().__init__()
        self.skipped, self.lora = skipped, lora
        self.model, self.layers = model, layers
        self.scales = nn.ParameterList(nn.Parameter(each, requires_grad=False) for each in scales or [])
        self.takes_position_ids, self.cache_argument = takes_position_ids(model), cache_argument(model)

    def forward(
        self, input_ids: Tensor, past_lengths: Tensor, new_lengths: Tensor, logit_positions: Tensor, past: list[Tensor],
        adapters: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:  # fmt: skip
        flat = list(self.scales)
        scales = list(zip(flat[0::2], flat[1::2], strict=True)) or None
        caches = attention_interface.Caches(
            list(zip(past[0::2], past[1::2], strict=True)), past_lengths, new_lengths, scales
        )
        arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": True, "return_dict": True}
        if self.takes_position_ids:
            positions = past_lengths[:, None].long() + torch.arange(input_ids.shape[1])[None]
            arguments["position_ids"] = (positions - self.skipped).clamp(min=0) if self.skipped else positions
        with (
            attention_interface.use_caches(caches) as cache,
            pick_logits(self.model, logit_positions) as pick,
            adding_adapters(self.model, self.lora, adapters),
        ):
            logits = pick(self.model(**arguments, **{self.cache_argument: cache}).logits)
        self._check(caches)
        return logits, *(tensor for index in range(self.layers) for tensor in caches.present[index])

    def _check(self, caches: attention_interface.Caches) -> None:
        if len(caches.present) != self.layers:
            raise ExportError(
                f"{type(self.model).__name__} has {self.layers} cached layers but {len(caches.present)} of them call "
                f"attention through transformers' AttentionInterface. This architecture needs an adapter: see "
                f"CONTRIBUTING.md, 'Add an architecture'."
            )


def takes_position_ids(model: Any) -> bool:
    """Whether the model, or the text model that it hands unknown arguments to, takes `position_ids`."""
    own = inspect.signature(model.forward).parameters
    if "position_ids" in own or all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in own.values()):
        return "position_ids" in own
    return "position_ids" in inspect.signature(model.get_decoder().forward).parameters


@contextmanager
def pick_logits(model: nn.Module, positions: Tensor) -> Iterator[Any]:
    """Within this block `model` computes logits for `positions` [B, K] only: hidden states are picked before the output
    embedding.

    Yields a function from the model's logits to [B, K, V], which picks them where there is no output embedding to hook.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        yield lambda logits: _pick(logits, positions)
        return
    handle = head.register_forward_pre_hook(lambda _, args: (_pick(args[0], positions), *args[1:]))
    try:
        yield lambda logits: logits
    finally:
        handle.remove()


def _pick(states: Tensor, positions: Tensor) -> Tensor:
    """[B, S, X] at [B, K] -> [B, K, X]."""
    return states.gather(1, positions[:, :, None].expand(-1, -1, states.shape[-1]))
