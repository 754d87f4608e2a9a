"""What `precast.exporter.kinds` asks of this package."""

from __future__ import annotations

from .plan import plan
from .samples import answer, questions, scored
from .trace import trace

__all__ = ["answer", "plan", "questions", "scored", "trace"]
