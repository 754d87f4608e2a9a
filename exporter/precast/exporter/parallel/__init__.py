"""Tensor parallelism: one program for several ranks, each with its part of the weights."""

__all__: list[str] = []
