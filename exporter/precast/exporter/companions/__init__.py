"""What an artifact holds beside its graphs and weights."""

__all__: list[str] = []
