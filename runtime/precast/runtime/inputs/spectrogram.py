"""The spectrogram of a long sound, of which a window is computed when it is heard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Spectrogram"]

Array = np.ndarray[Any, Any]


class Spectrogram:
    """A spectrogram float32 [mels, frames] that lies in no memory: `found[:, start:stop]` computes these frames.

    Args:
        mels, frames: its shape.
        compute: makes the frames from the first number to before the second, float32 [mels, stop - start].
    """

    def __init__(self, mels: int, frames: int, compute: Callable[[int, int], Array]) -> None:
        self.shape = (mels, frames)
        self._compute = compute

    def __getitem__(self, place: tuple[slice, slice]) -> Array:
        """These mels of these frames."""
        mels, frames = place
        start, stop, _ = frames.indices(self.shape[1])
        return self._compute(start, stop)[mels]
