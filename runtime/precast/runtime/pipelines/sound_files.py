"""Sounds as people give them: .wav files, arrays of one or two channels."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError

__all__ = ["as_samples", "read_wave"]

Array = np.ndarray[Any, Any]

_BLOCK = 1 << 20
"""Samples that are read at a time, so that a long file needs little more memory than its samples as float32."""
_UNKNOWN = 0x7FFFF000
"""Bytes that a header says, or more, where it was written before its sound, whose length nobody knew: into a pipe."""
_CONVERT = "Convert it (ffmpeg -i FILE -ac 1 -ar {rate} sound.wav), or give an array of samples."


def read_wave(path: Path, wanted: int) -> tuple[Array, int]:
    """Read the samples of a .wav file, float32 [samples] from -1 to 1, the mean of its channels; and how many a second
    has. Raises InputError for what is no such file, and for one that is cut off; `wanted` is the rate to convert to."""
    convert = _CONVERT.format(rate=wanted)
    try:
        with wave.open(str(path)) as file:
            width, channels, told = file.getsampwidth(), file.getnchannels(), file.getnframes()
            if width > 4:
                raise InputError(f"{path} has samples of {8 * width} bits; up to 32 can be read. {convert}")
            samples = _read_samples(file, width, channels)
            rate = file.getframerate()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (EOFError, RuntimeError, wave.Error) as error:
        # The library says nothing of a file that ends within its header.
        said = str(error) or "it is cut off"
        raise InputError(f"{path} cannot be read as a .wav file: {said}. {convert}") from error
    if len(samples) < told and told * width * channels < _UNKNOWN:
        raise InputError(
            f"{path} is cut off: its header says {told} samples, and it holds {len(samples)}. Make the file anew, or "
            f"hear what is there: ffmpeg -i FILE -ac 1 -ar {wanted} sound.wav"
        )
    if not len(samples):
        raise InputError(f"{path} holds no samples: there is nothing to hear.")
    return samples, rate


def _read_samples(file: wave.Wave_read, width: int, channels: int) -> Array:
    samples = np.empty(0, np.float32)
    while raw := file.readframes(_BLOCK):
        values = _as_floats(np.frombuffer(raw, np.uint8), width)
        block = values[: len(values) // channels * channels].reshape(-1, channels).mean(1)
        # In place, where the system can move pages.
        samples.resize(len(samples) + len(block), refcheck=False)
        samples[len(samples) - len(block) :] = block
    return samples


def _as_floats(raw: Array, width: int) -> Array:
    if width == 1:
        return raw.astype(np.float32) / 128 - 1
    # Little-endian samples of any width, moved to the top of 32 bits; a file that is cut off may end within one.
    wide = np.zeros((len(raw) // width, 4), np.uint8)
    wide[:, 4 - width :] = raw[: len(wide) * width].reshape(-1, width)
    return wide.view("<i4")[:, 0].astype(np.float32) / 2**31


def as_samples(given: Any) -> Array:
    """An array of samples as float32 [samples]: as in transformers, [channels, samples] of two channels at most are
    their mean. Raises InputError for anything else, for whole numbers, and for values that are no numbers."""
    if not isinstance(given, np.ndarray) or given.ndim not in (1, 2) or not given.size:
        raise InputError(
            f'A sound is a .wav file, an array [samples], or {{"raw": array, "sampling_rate": n}}; this is '
            f"{given!r:.80}."
        )
    if given.ndim == 2 and len(given) > 2:
        raise InputError(
            f"The sound is an array of {len(given)}x{given.shape[1]} values, and of [channels, samples] there are two "
            f"channels at most. Transpose it if its channels are last, or give the mean of its channels."
        )
    if given.dtype.kind != "f":
        raise InputError(
            f"The sound is an array of {given.dtype}, and samples are numbers from -1 to 1. Give "
            f"sound.astype('float32') / 32768 of what has 16 bits."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        samples = (given.mean(0) if given.ndim == 2 else given).astype(np.float32, copy=False)
        # It needs no memory, and is no number where any of them is none.
        total = samples.sum(dtype=np.float64)
    if not np.isfinite(total):
        place = int(np.argmin(np.isfinite(samples)))
        raise InputError(f"Sample {place} of the sound is {samples[place]}, no number; clean it first.")
    return samples
