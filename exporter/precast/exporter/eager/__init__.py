"""A checkpoint as transformers runs it, in PyTorch, for the modes `eager` and `torch-compile`."""

__all__: list[str] = []
