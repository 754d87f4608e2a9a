"""Read what was tuned to stand before every prompt: PEFT's prefixes and prompts, PaddleNLP's pre_caches.npy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from precast.runtime.artifact.integrity import sha256_of
from precast.runtime.artifact.prefix_files import KEY, PRE_CACHES, check_length, check_shape, find_file, read_method
from precast.runtime.errors import CheckpointError, UsageError

__all__ = ["LayerSizes", "PrefixFile", "check_fits", "read_prefix"]

LayerSizes: TypeAlias = tuple[int, int]
"""Heads, and the width of one, of a layer's keys and values."""

Method = Literal["prefix-tuning", "prompt-tuning", "p-tuning", "pre-caches"]


@dataclass(frozen=True)
class PrefixFile:
    """What a file holds of `length` positions before every prompt.

    Attributes:
        given: the path, as the user typed it.
        method: how it was tuned.
        tensor: in float32; of prefix-tuning [length, 2 * layers * heads * width], of pre-caches
            [layers, 2, heads, length, width], of the others embeddings [length, hidden size].
        sha256: of the file.
    """

    given: str
    method: Method
    tensor: Tensor
    length: int
    sha256: str

    @property
    def positions(self) -> Literal["after", "from-zero"]:
        """Where prompts begin to count their positions: PEFT's after the prefix, PaddleNLP's at 0."""
        return "from-zero" if self.method == "pre-caches" else "after"

    @property
    def is_embedded(self) -> bool:
        """Whether these are embeddings, whose keys and values the model has to compute."""
        return self.method in ("prompt-tuning", "p-tuning")


def read_prefix(given: str) -> PrefixFile:
    """Read the prefix at a path. Raises CheckpointError for a file that is none, or of no positions."""
    path = find_file(given)
    found = _read_pre_caches(given, path) if path.suffix == ".npy" else _read_adapter(given, path)
    check_length(given, found.length)
    if not bool(found.tensor.isfinite().all()):
        raise CheckpointError(f"{given} holds numbers that are not finite: its training has failed.")
    return found


def _read_pre_caches(given: str, path: Path) -> PrefixFile:
    try:
        values: Any = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read as an array of numbers: {error}") from error
    if not isinstance(values, np.ndarray) or values.ndim != 5 or values.shape[1] != 2 or values.dtype.kind != "f":
        what = f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
        raise CheckpointError(
            f"{path} holds {what}, where PaddleNLP's {PRE_CACHES} has floats [layers, 2, heads, positions, width]."
        )
    tensor = torch.from_numpy(values.astype(np.float32))
    return PrefixFile(given, "pre-caches", tensor, values.shape[3], sha256_of(path))


def _read_adapter(given: str, path: Path) -> PrefixFile:
    method = read_method(given, path.parent)
    try:
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(KEY) if KEY in file.keys() else None  # noqa: SIM118  (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    if tensor is None or tensor.ndim != 2 or not tensor.is_floating_point():
        raise CheckpointError(
            f"{path} has no matrix {KEY}, which a PEFT adapter of prefixes or prompts consists of. Was it saved by "
            f"model.save_pretrained()?"
        )
    return PrefixFile(given, method, tensor.float(), len(tensor), sha256_of(path))


def check_fits(prefix: PrefixFile, name: str, layers: Sequence[LayerSizes], hidden_size: int, capacity: int) -> None:
    """Raise CheckpointError for a prefix of another model than `name`, and UsageError for one that leaves no room.

    Args:
        layers: the heads and widths that the model caches, by layer.
        hidden_size: of its embeddings.
        capacity: the positions of its caches.
    """
    heads, width = layers[0]
    if prefix.method == "pre-caches":
        needed, axes = [len(layers), 2, heads, prefix.length, width], "layers, 2, heads, positions, width"
    elif prefix.is_embedded:
        needed, axes = [prefix.length, hidden_size], "positions, hidden size"
    else:
        needed, axes = [prefix.length, 2 * len(layers) * heads * width], "positions, 2 * layers * heads * width"
    check_shape(prefix.given, prefix.tensor.shape, name, needed, axes)
    if prefix.length >= capacity:
        raise UsageError(
            f"The prefix {prefix.given} has {prefix.length} positions and sequence_length={capacity} holds it together "
            f"with prompt and answer: give more than {prefix.length + 1}."
        )
