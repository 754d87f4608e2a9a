"""The classes that users load: one per kind of model, over the same engines."""

__all__: list[str] = []
