"""Answers of a given form: what is asked for, and which tokens keep to it."""

from __future__ import annotations

__all__: list[str] = []
