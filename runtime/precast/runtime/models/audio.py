"""Encoders of sound: waveforms of any length up to the compiled one, or spectrograms of the compiled size."""

from __future__ import annotations

from .encoder_base import Encoder

__all__ = [
    "CompiledModelForAudioClassification",
    "CompiledModelForAudioFrameClassification",
    "CompiledModelForCTC",
    "CompiledModelForXVector",
]


class CompiledModelForAudioClassification(Encoder):
    """`.logits` [batch, labels]."""

    task = "audio-classification"


class CompiledModelForCTC(Encoder):
    """`.logits` [batch, frames, vocabulary]; `frames(samples)` says how many a row has."""

    task = "automatic-speech-recognition"


class CompiledModelForAudioFrameClassification(Encoder):
    """`.logits` [batch, frames, labels]; `frames(samples)` says how many a row has."""

    task = "audio-frame-classification"


class CompiledModelForXVector(Encoder):
    """`.logits` and `.embeddings` [batch, dim]."""

    task = "audio-xvector"
