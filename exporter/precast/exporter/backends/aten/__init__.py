"""Shared by the backends `export`, `aoti` and `neuron`: programs of ATen operators that update caches in place, and
weights in one file for all of them.

Nothing is imported here: a child process that reads lowered programs has no need of what makes them.
"""

__all__: list[str] = []
