"""Operators of our own, that programs are traced with and that each backend lowers."""

__all__: list[str] = []
