"""Which adapters can be loaded at run time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .declaration import OptionsPart

__all__ = ["AdapterSlotOptions"]


@dataclass(frozen=True, kw_only=True)
class AdapterSlotOptions(OptionsPart):
    """Slots for LoRA adapters, which are loaded into a compiled decoder and switched from row to row.

    Attributes:
        lora_slots: how many adapters can be loaded at once; 0 compiles no slots.
        lora_rank: the largest rank that an adapter may have.
        lora_targets: patterns of the names of linear layers that adapters may change; none are all of the decoder's
            blocks.
    """

    lora_slots: int = 0
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = ()

    @property
    def is_asked(self) -> bool:
        """Whether slots are compiled."""
        return self.lora_slots != 0

    def problems(self) -> Iterator[str]:
        """See OptionsPart."""
        yield from super().problems()
        for name in ("lora_slots", "lora_rank"):
            value = getattr(self, name)
            if name in self.given(name) and (type(value) is not int or value < 1):
                yield f"{name} must be a whole number from 1, not {value!r:.80}."
        if self.is_asked and self.lora_rank is None:
            yield f"lora_slots={self.lora_slots} needs the largest rank of their adapters: give lora_rank=16, say."
        if not self.is_asked and (useless := self.given("lora_rank", "lora_targets")):
            yield f"{' and '.join(useless)} say which adapters fit into slots; give lora_slots=, too."
        if not isinstance(self.lora_targets, tuple | list) or not all(isinstance(x, str) for x in self.lora_targets):
            yield f"lora_targets= takes patterns of layers' names such as '*.q_proj', not {self.lora_targets!r:.80}."
