"""Measuring artifacts in processes of their own, and choosing the lengths to compile for."""

__all__: list[str] = []
