"""The functions of a kind, for encoder-decoders (see `precast.exporter.kinds.kind_of`)."""

from __future__ import annotations

from .plan import plan
from .samples import answer, calibration_inputs, held_out_samples, validation_samples
from .trace import trace

__all__ = ["answer", "calibration_inputs", "held_out_samples", "plan", "trace", "validation_samples"]
