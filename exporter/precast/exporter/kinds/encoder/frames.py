"""From samples to frames: how many frames a model of sound makes of so many samples, by its convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from precast.runtime.artifact.schema import Frames

__all__ = ["Convolutions", "convolutions_of"]


@dataclass(frozen=True)
class Convolutions:
    """A chain of convolutions without padding: `stages` are their (kernel, stride), the first one first.

    A stage makes floor((n - kernel) / stride) + 1 frames of n
    (https://pytorch.org/docs/stable/generated/torch.nn.Conv1d.html).
    """

    stages: tuple[tuple[int, int], ...]

    def samples(self, frames: int) -> int:
        """The fewest samples that make so many frames."""
        for kernel, stride in reversed(self.stages):
            frames = (frames - 1) * stride + kernel
        return frames

    def as_frames(self, fewest: int) -> Frames:
        """The chain as one step: floors of floors are one floor."""
        return Frames(size=self.samples(1), step=prod(stride for _, stride in self.stages), fewest=fewest)


def convolutions_of(config: Mapping[str, Any]) -> Convolutions:
    """The convolutions that a model's configuration names: those of its feature encoder, then its adapter's, which pad
    such that they count as kernels of 1. Without any, every frame that is given is one."""
    stages = list(zip(_numbers(config, "conv_kernel"), _numbers(config, "conv_stride"), strict=True))
    if stages and config.get("add_adapter"):
        stages += [(1, int(config["adapter_stride"]))] * int(config["num_adapter_layers"])
    return Convolutions(tuple(stages))


def _numbers(config: Mapping[str, Any], name: str) -> Sequence[int]:
    found = config.get(name)
    # State-space models have one number of this name, which is something else.
    return [int(each) for each in found] if isinstance(found, (list, tuple)) else []
