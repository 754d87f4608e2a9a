"""Describe errors of the libraries that read checkpoints, which raise anything at a broken file."""

from __future__ import annotations

__all__ = ["describe_error"]


def describe_error(error: BaseException) -> str:
    """The error's first line, with its type where the line says too little without it."""
    lines = str(error).strip().splitlines()
    if not lines or isinstance(error, KeyError):
        return f"{type(error).__name__} {str(error).strip()}".strip()
    return " ".join(line.strip() for line in (lines[:2] if lines[0].endswith(":") else lines[:1]))
