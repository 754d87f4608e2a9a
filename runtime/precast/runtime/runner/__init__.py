"""Work of many rows: files in, files out, in batches, resumable."""

__all__: list[str] = []
