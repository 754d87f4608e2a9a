"""The companion files of an artifact, beside its graphs and weights: configuration, tokenizer, model card."""

__all__: list[str] = []
