"""Checkpoints: find, check and read them. Their files are untrusted input."""

__all__: list[str] = []
