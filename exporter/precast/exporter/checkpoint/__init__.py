"""What an export starts from: files that other people wrote, found, checked and read."""

__all__: list[str] = []
