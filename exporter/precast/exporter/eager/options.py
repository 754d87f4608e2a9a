"""What opening a checkpoint without compiling it ahead of time can be asked for. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from precast.runtime.arguments import refuse_unknown
from precast.runtime.errors import UsageError

__all__ = ["EagerOptions"]

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EagerOptions:
    """The options of the modes `eager` and `torch-compile`.

    Attributes:
        checkpoint: where the checkpoint of an artifact lies, if not where the artifact says.
        batch_size: how many rows whoever forms batches should put into one; by default the artifact's, or 1. More are
            taken.
        sequence_length: the capacity in tokens, prompt and answer together; by default the artifact's, else as many as
            the model was made for. Caches of `torch-compile` have this size, so there the default is 2,048 at most.
        dtype: of weights and computation.
        device: "cpu", "cuda", or what else PyTorch calls one.
        threads: of the CPU, for all of PyTorch; 0 leaves them as they are.
        revision, token: of a Hub checkpoint.
        trust_remote_code: run modelling code that comes with the checkpoint.
    """

    checkpoint: str | None = None
    batch_size: int | None = None
    sequence_length: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 0
    revision: str | None = None
    token: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, keywords: Mapping[str, Any], asked_by: str) -> EagerOptions:
        """The options that are given by name. Raises UsageError for a name that there is not, or a wrong value."""
        refuse_unknown(asked_by, keywords, [each.name for each in fields(cls)])
        options = cls(**keywords)
        options.check()
        return options

    def check(self) -> None:
        """Raise UsageError for a value out of range."""
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype={self.dtype!r} is not known. Choose one of: {', '.join(DTYPES)}.")
        for name, least in (("batch_size", 1), ("sequence_length", 2), ("threads", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise UsageError(f"{name} must be a whole number from {least}, not {value!r:.80}.")
