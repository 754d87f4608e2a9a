"""What an export can be asked for, checked before any work starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from precast.runtime.artifact.schema import Dtype
from precast.runtime.errors import UsageError

from .quantize.methods import METHODS

__all__ = ["DTYPES", "GROUP_SIZES", "KV_CACHES", "QUANTIZE", "ExportOptions"]

DTYPES = ("float32",)
QUANTIZE = ("none", "source", "int8", "int4", "auto")
KV_CACHES = ("float32", "int8")
GROUP_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The arguments of `export()`.

    Attributes:
        task: a task name; None infers it from the checkpoint.
        batch_size: rows per call; required for encoders, which may be compiled for several, 1 for decoders if None.
        sequence_length: encoders: one or more compiled lengths (buckets); decoders: the cache's capacity in tokens,
            prompt and answer together, by default the model's max_position_embeddings.
        decoder_sequence_length: encoder-decoders: the capacity of the answer in tokens, its start included, by default
            as many as the model has positions for; sequence_length is then that of the source.
        num_choices: multiple-choice: choices per row.
        text_batch_size: zero-shot-image-classification: texts per call, where batch_size counts images.
        audio_sequence_length: sound: one or more compiled lengths, in samples (or frames, for models of spectrograms).
        image_size: pixels, (height, width) or (side,); by default what the checkpoint's configuration or its
            preprocessor_config.json says.
        prefill_lengths: decoders: compile fully static graphs with these prompt lengths and one for decoding.
        dynamic_batch_size: at run time, split larger batches into slices of `batch_size`.
        backend: what compiles, one of the backends' names.
        dtype: the dtype of weights, caches and results.
        atol: the allowed difference from the reference, relative to max(1, max|reference|).
        validate: compare with the eager model before publishing.
        revision, token: of a Hub checkpoint.
        trust_remote_code: run modelling code that comes with the checkpoint.
        quantize: "none"; "int8" or "int4", the linear layers' and embedding's weights on a grid; "source", the grid
            that the checkpoint's weights lie on already; "auto", the smallest mixture of int8 and int4 within `max_kl`.
        quantize_method: how weights get onto the grid, one of METHODS' names; None is "rtn" for int8, "search" for
            int4.
        group_size: weights that share a scale.
        symmetric: zero in the middle of each grid, or anywhere; None is True for int8, False for int4.
        skip: patterns of layers' names that stay as they are.
        calibration: a text file for methods that look at activations; None is a small text of our own.
        kv_cache: the caches' dtype; "int8" is rounded with scales from the calibration text.
        max_kl: the largest mean KL divergence from the eager fp32 model, in nats per token of held-out text.
        min_agreement: the smallest share of tokens for which the likeliest is the same.
        accept_loss: write the artifact even if it is below these floors, and record that.
        force: replace an existing artifact.
    """

    task: str | None = None
    batch_size: int | tuple[int, ...] | None = None
    sequence_length: tuple[int, ...] = ()
    decoder_sequence_length: int | None = None
    num_choices: int | None = None
    text_batch_size: int | None = None
    audio_sequence_length: tuple[int, ...] = ()
    image_size: tuple[int, ...] = ()
    prefill_lengths: tuple[int, ...] = ()
    dynamic_batch_size: bool = False
    backend: str = "onnx"
    dtype: Dtype = "float32"
    atol: float = 1e-4
    validate: bool = True
    revision: str | None = None
    token: str | None = None
    trust_remote_code: bool = False
    quantize: str = "none"
    quantize_method: str | None = None
    group_size: int = 32
    symmetric: bool | None = None
    skip: tuple[str, ...] = ()
    calibration: Path | None = None
    kv_cache: Dtype = "float32"
    max_kl: float | None = None
    min_agreement: float | None = None
    accept_loss: bool = False
    force: bool = False

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """All batch sizes that were given, from the smallest to the largest."""
        given = self.batch_size
        return () if given is None else (given,) if isinstance(given, int) else tuple(sorted(given))

    @property
    def is_lossy(self) -> bool:
        """Whether less than fp32 is asked for, so that the artifact is held to a loss rather than to a difference."""
        return self.quantize != "none" or self.kv_cache != "float32"

    def check(self) -> None:
        """Raise one UsageError that lists everything wrong with these options."""
        if holes := list(self._holes()):
            raise UsageError(" ".join(holes))

    def _holes(self) -> Iterator[str]:
        for flag, values in self._sizes().items():
            for value in values:
                if value < 1:
                    yield f"--{flag} must be at least 1, not {value}."
            if len(set(values)) != len(values) and flag != "image-size":
                what = "length" if "length" in flag else "size"
                yield f"--{flag} names a {what} twice: {','.join(map(str, values))}."
        if len(self.image_size) > 2:
            yield f"--image-size is HEIGHT,WIDTH or one number for both, not {','.join(map(str, self.image_size))}."
        if self.dtype not in DTYPES:
            yield f"--dtype {self.dtype!r} is not supported; the choices are: {', '.join(DTYPES)}."
        yield from self._quantization_holes()
        if not self.atol > 0:
            yield f"--atol must be above 0, not {self.atol}."

    def _sizes(self) -> dict[str, tuple[int, ...]]:
        """Every size that was given, by its flag."""
        return {
            "batch-size": self.batch_sizes,
            "sequence-length": self.sequence_length,
            "prefill-lengths": self.prefill_lengths,
            "decoder-sequence-length": () if self.decoder_sequence_length is None else (self.decoder_sequence_length,),
            "num-choices": () if self.num_choices is None else (self.num_choices,),
            "text-batch-size": () if self.text_batch_size is None else (self.text_batch_size,),
            "audio-sequence-length": self.audio_sequence_length,
            "image-size": self.image_size,
        }

    def _quantization_holes(self) -> Iterator[str]:
        choices = {"quantize": QUANTIZE, "kv-cache": KV_CACHES, "group-size": GROUP_SIZES}
        for flag, allowed in choices.items():
            if (value := getattr(self, flag.replace("-", "_"))) not in allowed:
                yield f"--{flag} {value!r} is not supported; the choices are: {', '.join(map(str, allowed))}."
        if self.quantize_method not in (None, *METHODS):
            known = ", ".join(METHODS)
            yield f"--method {self.quantize_method!r} is not supported; the choices are: {known}."
        if self.quantize in ("none", "source") and (useless := self._only_for_rounding()):
            yield f"{', '.join(useless)} say how weights are rounded, which --quantize {self.quantize} does not do."
        if not self.is_lossy and (useless := self._only_for_loss()):
            yield f"{', '.join(useless)} bound what quantization loses; without --quantize or --kv-cache, use --atol."
        if self.max_kl is not None and not self.max_kl > 0:
            yield f"--max-kl must be above 0, not {self.max_kl}."
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            yield f"--min-agreement must lie between 0 and 1, not {self.min_agreement}."
        if self.calibration is not None and not self.calibration.is_file():
            yield f"--calibration: there is no file {self.calibration}."

    def _only_for_rounding(self) -> list[str]:
        given = {"--method": self.quantize_method, "--symmetric/--asymmetric": self.symmetric}
        return [flag for flag, value in given.items() if value is not None]

    def _only_for_loss(self) -> list[str]:
        given = {
            "--max-kl": self.max_kl,
            "--min-agreement": self.min_agreement,
            "--accept-loss": self.accept_loss or None,
            "--calibration": self.calibration,
            "--skip": self.skip or None,
        }
        return [flag for flag, value in given.items() if value is not None]
