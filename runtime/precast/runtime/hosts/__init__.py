"""Facts about this machine, and the choice of the variant that runs on it."""

__all__: list[str] = []
