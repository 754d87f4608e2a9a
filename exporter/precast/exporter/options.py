"""What an export can be asked for, checked before any work starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from precast.runtime.artifact.schema import Dtype
from precast.runtime.errors import UsageError

__all__ = ["DTYPES", "ExportOptions"]

DTYPES = ("float32",)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The arguments of `export()`.

    Attributes:
        task: a task name; None infers it from the checkpoint.
        batch_size: rows per call; required for encoders, 1 for decoders if None.
        sequence_length: encoders: one or more compiled lengths (buckets); decoders: the cache's capacity in tokens,
            prompt and answer together, by default the model's max_position_embeddings.
        prefill_lengths: decoders: compile fully static graphs with these prompt lengths and one for decoding.
        dynamic_batch_size: at run time, split larger batches into slices of `batch_size`.
        backend: what compiles, one of the backends' names.
        dtype: the dtype of weights, caches and results.
        atol: the allowed difference from the reference, relative to max(1, max|reference|).
        validate: compare with the eager model before publishing.
        revision, token: of a Hub checkpoint.
        trust_remote_code: run modelling code that comes with the checkpoint.
        force: replace an existing artifact.
    """

    task: str | None = None
    batch_size: int | None = None
    sequence_length: tuple[int, ...] = ()
    prefill_lengths: tuple[int, ...] = ()
    dynamic_batch_size: bool = False
    backend: str = "onnx"
    dtype: Dtype = "float32"
    atol: float = 1e-4
    validate: bool = True
    revision: str | None = None
    token: str | None = None
    trust_remote_code: bool = False
    force: bool = False

    def check(self) -> None:
        """Raise one UsageError that lists everything wrong with these options."""
        if holes := list(self._holes()):
            raise UsageError(" ".join(holes))

    def _holes(self) -> Iterator[str]:
        if self.batch_size is not None and self.batch_size < 1:
            yield f"--batch-size must be at least 1, not {self.batch_size}."
        for flag, values in (("sequence-length", self.sequence_length), ("prefill-lengths", self.prefill_lengths)):
            for value in values:
                if value < 1:
                    yield f"--{flag} must be at least 1, not {value}."
            if len(set(values)) != len(values):
                yield f"--{flag} names a length twice: {','.join(map(str, values))}."
        if self.dtype not in DTYPES:
            yield f"--dtype {self.dtype!r} is not supported; the choices are: {', '.join(DTYPES)}."
        if not self.atol > 0:
            yield f"--atol must be above 0, not {self.atol}."
