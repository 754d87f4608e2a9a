"""Which adapters are merged into the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from precast.runtime.errors import UsageError

from .declaration import OptionsPart

__all__ = ["AdapterOptions", "LoraRequest"]


@dataclass(frozen=True)
class LoraRequest:
    """One adapter, as `lora=` names it: `PATH_OR_REPO[@REVISION][:WEIGHT]`, the revision on the Hub alone.

    Attributes:
        name: a directory, or a repository of the Hub.
        revision: branch, tag or commit on the Hub.
        weight: how much of it is added to the model.
    """

    name: str
    revision: str | None = None
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraRequest:
        """Read one value of `lora=`. Raises UsageError."""
        if Path(text).expanduser().exists():
            # It may have a colon in its name.
            return cls(text)
        name, colon, weight = text.rpartition(":")
        name, value = (name, _read_weight(text, weight)) if colon else (text, 1.0)
        if Path(name).expanduser().exists():
            return cls(name, None, value)
        name, _, revision = name.partition("@")
        return cls(name, revision or None, value)


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(OptionsPart):
    """What is merged into the model before it is quantized and traced.

    Attributes:
        lora: adapters in the format of peft, each `PATH_OR_REPO[@REVISION][:WEIGHT]`, merged one after the other.
        force_base: take adapters that name another base model than the checkpoint.
        trust_pickle: read adapters that are pickled (.bin), of which nothing but tensors is loaded.
    """

    lora: tuple[str, ...] = ()
    force_base: bool = False
    trust_pickle: bool = False

    @property
    def requests(self) -> list[LoraRequest]:
        """The adapters in the order in which they are merged. Raises UsageError."""
        return [LoraRequest.parse(text) for text in self.lora]

    def problems(self) -> Iterator[str]:
        """See OptionsPart."""
        yield from super().problems()
        if not isinstance(self.lora, tuple | list) or not all(isinstance(each, str) for each in self.lora):
            yield f"lora= takes texts such as 'user/adapter:0.5', one for each adapter, not {self.lora!r:.80}."
            return
        for text in self.lora:
            try:
                LoraRequest.parse(text)
            except UsageError as error:
                yield str(error)
        if not self.lora and (useless := self.given("force_base", "trust_pickle")):
            yield f"{' and '.join(useless)} say which adapters are taken; give lora=, too."


def _read_weight(text: str, weight: str) -> float:
    try:
        value = float(weight)
    except ValueError:
        raise UsageError(
            f"lora={text!r}: the weight {weight!r} is not a number, and there is no directory of that whole name. "
            f"Write PATH_OR_REPO:0.5, or leave the weight out for 1."
        ) from None
    if not math.isfinite(value) or value == 0:
        raise UsageError(f"lora={text!r}: the weight must be a finite number other than 0, not {weight}.")
    return value
