"""What `precast.exporter.kinds` asks of this package."""

from __future__ import annotations

from .plan import plan
from .samples import answer, held_out_samples, validation_samples
from .trace import trace

__all__ = ["answer", "plan", "validation_samples", "held_out_samples", "trace"]
