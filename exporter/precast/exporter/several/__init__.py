"""More than one compilation: backends beside each other, the fastest of them, exports kept for the next call."""

__all__: list[str] = []
