"""The files of torch.export, read without torch."""

__all__: list[str] = []
