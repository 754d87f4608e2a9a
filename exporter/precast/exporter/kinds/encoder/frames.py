"""The number of frames that the convolutions of a speech model make of so many samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from precast.runtime.artifact.schema import Frames

__all__ = ["Convolutions", "read_convolutions"]


@dataclass(frozen=True)
class Convolutions:
    """A chain of convolutions without padding: `stages` are their (kernel, stride), the first one first.

    A stage makes floor((n - kernel) / stride) + 1 frames of n
    (https://pytorch.org/docs/stable/generated/torch.nn.Conv1d.html).
    """

    stages: tuple[tuple[int, int], ...]

    def min_samples(self, frames: int) -> int:
        """The fewest samples that make so many frames."""
        for kernel, stride in reversed(self.stages):
            frames = (frames - 1) * stride + kernel
        return frames

    def as_frames(self, fewest: int) -> Frames:
        """The chain as one convolution, since floors of floors are one floor; `fewest` frames make a row."""
        return Frames(size=self.min_samples(1), step=prod(stride for _, stride in self.stages), fewest=fewest)


def read_convolutions(config: Mapping[str, Any]) -> Convolutions:
    """The convolutions that a model's configuration names: those of its feature encoder, then those of its adapter,
    whose padding makes them count as kernels of 1. An empty chain where the model takes frames."""
    stages = list(zip(_read_numbers(config, "conv_kernel"), _read_numbers(config, "conv_stride"), strict=True))
    if stages and config.get("add_adapter"):
        stages += [(1, int(config["adapter_stride"]))] * int(config["num_adapter_layers"])
    return Convolutions(tuple(stages))


def _read_numbers(config: Mapping[str, Any], name: str) -> Sequence[int]:
    found = config.get(name)
    # State-space models have a single number of this name, which means something else.
    return [int(each) for each in found] if isinstance(found, (list, tuple)) else []
