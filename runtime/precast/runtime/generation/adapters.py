"""LoRA adapters that are loaded at run time: the slots that graphs read them from, and peft's files.

All sessions of a model share the slots. Which one a row of a batch has is each session's own.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact.lora import adapter_bytes, weights_input
from ..artifact.peft_files import WEIGHT_FILES, hash_adapter
from ..artifact.schema import Lora, LoraTarget
from ..errors import InputError, OutOfMemoryError
from ..hosts.machine import available_bytes
from ..inputs.tensors import allocate
from .lora_files import LoraLayer, check_settings, read_layers

__all__ = ["AdapterSlots", "LoadedAdapter", "NO_SLOTS", "adapter_rows"]

Array = np.ndarray[Any, Any]


NO_SLOTS = (
    "this model was compiled without slots for adapters. Export it with lora_slots=1 and lora_rank=16, say, or merge "
    "the adapter into it: lora=PATH."
)


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter in a slot, from files in `path`. What caches hold was computed by one of the same `sha256`, or may not
    be used again."""

    name: str
    slot: int
    sha256: str
    path: Path


class AdapterSlots:
    """The adapters of a model, by name.

    Attributes:
        arrays: the inputs of graphs that hold them, by name; `artifact.lora` says how.
    """

    def __init__(self, lora: Lora) -> None:
        self._lora, self._lock = lora, threading.Lock()
        # The system gives memory for what is written only, so that empty slots take none.
        self.arrays = {
            weights_input(target): allocate([lora.slots + 1, lora.rank, target.inputs + target.outputs], "float32")
            for target in lora.targets
        }
        self._loaded: dict[str, LoadedAdapter] = {}

    @property
    def hashes(self) -> dict[str, str]:
        """The hash of the files of each that is loaded, by name."""
        return {name: each.sha256 for name, each in self._loaded.items()}

    @property
    def paths(self) -> dict[str, Path]:
        """Where the files of each were that is loaded, by name."""
        return {name: each.path for name, each in self._loaded.items()}

    def load(self, name: str, path: Path, base: str | None) -> None:
        """Read an adapter into a free slot.

        Args:
            name: how calls name it from then on.
            path: the directory that peft wrote.
            base: the model's id on the Hub, which the adapter has to name if it names any; None takes all.

        Raises InputError where it does not fit or no slot is free, OutOfMemoryError where there is no memory for it.
        """
        with self._lock:
            slot = self._find_free_slot(name)
            settings = check_settings(path, base)
            layers = read_layers(path, settings, self._lora)
            self._check_memory(name)
            for target in self._lora.targets:
                self._fill(target, slot, layers.get(target.module))
            self._loaded[name] = LoadedAdapter(name, slot, hash_adapter(path / WEIGHT_FILES[0]), path)

    def unload(self, name: str) -> None:
        """Give the slot of an adapter free. Raises InputError for one that is not loaded."""
        with self._lock:
            self.find(name)
            del self._loaded[name]

    def find(self, name: object) -> LoadedAdapter:
        """The adapter of this name. Raises InputError where there is none."""
        if isinstance(name, str) and (found := self._loaded.get(name)):
            return found
        near = get_close_matches(str(name), self._loaded, n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"No adapter {name!r:.80} is loaded.{guess} Loaded are: {self._list_names()}. "
            f"model.load_adapter({str(name)[:80]!r}, PATH) loads one."
        )

    def find_content(self, sha256: str) -> LoadedAdapter | None:
        """The adapter that was read from files of this hash, if one is loaded."""
        return next((each for each in self._loaded.values() if each.sha256 == sha256), None)

    def check_held(self, adapter: LoadedAdapter) -> None:
        """Raise InputError where the adapter was unloaded meanwhile, or another one is there by its name."""
        if self._loaded.get(adapter.name) is not adapter:
            raise InputError(
                f"The adapter {adapter.name!r} was unloaded while a call was using it. Unload it when all calls that "
                f"name it have ended."
            )

    def _list_names(self) -> str:
        return ", ".join(map(repr, self._loaded)) or "none"

    def _find_free_slot(self, name: str) -> int:
        if not isinstance(name, str) or not name:
            raise InputError(f"An adapter's name is a text, not {name!r:.80}.")
        if name in self._loaded:
            raise InputError(
                f"An adapter {name!r} is loaded already: model.unload_adapter({name!r}) first, or choose another name."
            )
        taken = {each.slot for each in self._loaded.values()}
        free = next((slot for slot in range(1, self._lora.slots + 1) if slot not in taken), None)
        if free is None:
            raise InputError(
                f"There is no slot for {name!r}: the model was compiled for {self._lora.slots} adapters at once, and "
                f"loaded are: {self._list_names()}. model.unload_adapter(NAME) frees one; lora_slots="
                f"{self._lora.slots + 1} compiles one more."
            )
        return free

    def _check_memory(self, name: str) -> None:
        needed, there = adapter_bytes(self._lora), available_bytes()
        if needed > there:
            raise OutOfMemoryError(
                f"The adapter {name!r} takes {needed / 1e6:,.0f} MB in its slot (float32, rank {self._lora.rank}), and "
                f"{there / 1e6:,.0f} MB of memory are free. A model compiled with a smaller lora_rank or for fewer "
                f"lora_targets takes less."
            )

    def _fill(self, target: LoraTarget, slot: int, layer: LoraLayer | None) -> None:
        """Write a layer's adapter into a slot; None for one that it does not change."""
        held: Array = self.arrays[weights_input(target)][slot]
        used = 0
        if layer is not None:
            used = len(layer.a)
            held[:used, : target.inputs] = layer.a
            held[:used, target.inputs :] = layer.b.T * np.float32(layer.scale)
        # Pages that were never written to stay without memory.
        if held[used:].any():
            held[used:] = 0


def adapter_rows(slots: AdapterSlots | None, given: Any, rows: int) -> list[LoadedAdapter | None]:
    """The adapter of each of so many rows, as calls name them: one name or None for all, or a list with one for each.

    Raises InputError for another number, a name that is not loaded, or any name where the model has no slots.
    """
    named = [given] * rows if given is None or isinstance(given, str) else given
    if not isinstance(named, list | tuple):
        raise InputError(f"adapter must be a name, None, or a list of these, not {given!r:.80}.")
    if len(named) != rows:
        raise InputError(
            f"adapter has {len(named)} names, and there are {rows} rows; give one for each, or one for all."
        )
    if slots is None and any(name is not None for name in named):
        raise InputError(f"adapter={given!r:.80}: {NO_SLOTS}")
    return [None if name is None or slots is None else slots.find(name) for name in named]
