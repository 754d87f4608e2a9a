"""Whisper's log-mel spectrograms, in numpy."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from ..inputs.spectrogram import Spectrogram

__all__ = ["LogMel"]

Array = np.ndarray[Any, Any]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]

# A spectrogram of 30 seconds is made of 1.2 million numbers; a file that asks for more than this asks for memory.
_LARGEST = 1 << 27
_HIGHEST_FREQUENCY = 8000.0
_QUIETEST = 1e-10
_FRAMES = 3000
"""Of a long sound so many are computed at a time, half a minute."""


class LogMel(msgspec.Struct, frozen=True, dict=True):
    """The settings of a WhisperFeatureExtractor; calling it computes the spectrograms of sounds.

    The formula is that of Whisper's `log_mel_spectrogram` (Radford et al. 2022, openai/whisper, whisper/audio.py) with
    the filters of librosa's `filters.mel`: a sound is padded to `chunk_length` seconds; frames of `n_fft` samples
    around every `hop_length`-th, the ends mirrored, are multiplied by a periodic Hann window; the powers of their
    spectrum are summed by triangles that lie evenly on Slaney's mel scale between 0 and 8000 Hz and have equal areas;
    of which the logarithm to base 10, at least -10 and at least 8 less than the sound's largest, plus 4, divided by 4.

    As in transformers, `return_attention_mask` changes nothing here, and `do_normalize` is no setting of a file. Equal
    to its numpy implementation to the last digits; its torch one rounds the spectrum to float32, which shows by up to
    5e-5 where a tone stands beside silence.
    """

    feature_size: _Count = 80
    sampling_rate: _Count = 16000
    hop_length: _Count = 160
    chunk_length: _Count = 30
    n_fft: _Count = 400
    padding_value: float = 0.0
    padding_side: Literal["left", "right"] = "right"
    dither: Annotated[float, msgspec.Meta(ge=0)] = 0.0

    def __post_init__(self) -> None:
        if self.n_fft // 2 >= self.samples:
            raise ValueError(f"n_fft {self.n_fft} is too much for chunks of {self.samples} samples")
        if self.samples // self.hop_length * max(self.n_fft, self.feature_size) > _LARGEST:
            raise ValueError(f"{self.samples} samples in steps of {self.hop_length} are more than memory is kept for")

    @property
    def samples(self) -> int:
        """The most samples of a sound."""
        return self.chunk_length * self.sampling_rate

    def __call__(self, sounds: list[Array]) -> Array:
        """float32 [sounds, feature_size, frames] of sounds of at most `samples` samples each."""
        return np.stack([self._short_spectrogram(self._pad_sound(sound)) for sound in sounds])

    def long_spectrogram(self, sound: Array) -> Spectrogram:
        """The spectrogram of a sound of any length, without padding, whose frames are computed when they are asked for:
        computing all at once would take ten times the sound's memory."""
        whole = self._add_noise(sound)
        count = self._count_frames(whole)
        parts = ((start, min(start + _FRAMES, count)) for start in range(0, count, _FRAMES))
        # A first pass, for what is as good as silence depends on the loudest of the whole sound.
        loudest = max(self._log_powers(whole, *part).max() for part in parts)
        return Spectrogram(
            self.feature_size, count, lambda start, stop: _scale(self._log_powers(whole, start, stop), loudest)
        )

    def _pad_sound(self, sound: Array) -> Array:
        missing = self.samples - len(sound)
        pads = (missing, 0) if self.padding_side == "left" else (0, missing)
        return self._add_noise(np.pad(sound.astype(np.float64), pads, constant_values=self.padding_value))

    def _add_noise(self, sound: Array) -> Array:
        """The sound with the file's dither: the same for every sound and every time, so that the same sound has the
        same answer."""
        if not self.dither:
            return sound
        noisy: Array = sound + self.dither * np.random.default_rng(0).standard_normal(len(sound))
        return noisy

    def _short_spectrogram(self, sound: Array) -> Array:
        log = self._log_powers(sound, 0, self._count_frames(sound))
        return _scale(log, log.max())

    def _count_frames(self, sound: Array) -> int:
        # As in Whisper, the last frame is left out.
        return (len(sound) + self.n_fft // 2 * 2 - self.n_fft) // self.hop_length

    def _log_powers(self, sound: Array, start: int, stop: int) -> Array:
        """The logarithms of these frames' powers, float64 [feature_size, stop - start]."""
        first = start * self.hop_length - self.n_fft // 2
        # What lies before the sound's beginning and after its end is its mirror image.
        places = np.abs(np.arange(first, first + (stop - start - 1) * self.hop_length + self.n_fft))
        mirrored = sound[np.minimum(places, 2 * (len(sound) - 1) - places)].astype(np.float64)
        frames = np.lib.stride_tricks.sliding_window_view(mirrored, self.n_fft)[:: self.hop_length]
        window = np.hanning(self.n_fft + 1)[:-1]
        powers = np.abs(np.fft.rfft(frames * window)) ** 2
        log: Array = np.log10(np.maximum(powers @ self._mel_filters, _QUIETEST)).T
        return log

    @cached_property
    def _mel_filters(self) -> Array:
        """[n_fft // 2 + 1, feature_size]: triangles from each centre to the next on either side."""
        highest = _hertz_to_mels(_HIGHEST_FREQUENCY)
        centres = _mels_to_hertz(np.linspace(0, highest, self.feature_size + 2))
        bins = np.linspace(0, self.sampling_rate // 2, 1 + self.n_fft // 2)[:, None]
        widths = np.diff(centres)
        rising, falling = (bins - centres[:-2]) / widths[:-1], (centres[2:] - bins) / widths[1:]
        areas = (centres[2:] - centres[:-2]) / 2
        filters: Array = np.maximum(0, np.minimum(rising, falling)) / areas
        return filters


def _scale(log: Array, loudest: float) -> Array:
    scaled: Array = (np.maximum(log, loudest - 8) + 4) / 4
    return scaled.astype(np.float32)


# Slaney's scale (Auditory Toolbox, 1998): even up to 1000 Hz, 200 / 3 Hz to a mel, and even in their logarithm above,
# a factor of 6.4 to 27 mels.
_BEND = 1000.0
_STEP = np.log(6.4) / 27


def _hertz_to_mels(hertz: float) -> float:
    """The mels of a frequency above the bend."""
    return float(_BEND * 3 / 200 + np.log(hertz / _BEND) / _STEP)


def _mels_to_hertz(mels: Array) -> Array:
    over = mels - _BEND * 3 / 200
    return np.where(over < 0, mels * 200 / 3, _BEND * np.exp(_STEP * np.maximum(over, 0)))
