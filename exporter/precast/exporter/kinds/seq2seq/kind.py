"""What `precast.exporter.kinds` asks of this package."""

from __future__ import annotations

from .plan import plan
from .samples import answer, validation_samples
from .trace import trace

__all__ = ["answer", "plan", "validation_samples", "trace"]
