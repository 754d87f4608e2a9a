"""Tokens one after the other: settings, sampling, beams, and the session that holds the caches."""

__all__: list[str] = []
