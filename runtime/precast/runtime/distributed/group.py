"""What rank 0 knows of the other ranks."""

from __future__ import annotations

from typing import Protocol

from .shared_memory import GroupMemory

__all__ = ["Group"]


class Group(Protocol):
    """The other ranks, as rank 0 knows them: the memory that all share, and where to look when they fail."""

    memory: GroupMemory
    advice: str

    def formed(self) -> None:
        """Called once all have come."""
        ...
