"""Tokenizing, checking, aligning and padding the caller's inputs."""

__all__: list[str] = []
