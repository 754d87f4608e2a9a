"""Artifacts on the Hub, and the caches on this machine."""

__all__: list[str] = []
