"""Several processes that run one model: ranks, each with its part of the weights."""

__all__: list[str] = []
