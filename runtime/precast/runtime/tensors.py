"""numpy in, numpy out; torch in, torch out. torch is never imported here, only recognised."""

from __future__ import annotations

import sys
from collections import OrderedDict
from functools import cache
from typing import Any

import numpy as np

__all__ = ["ModelOutput", "like", "storage", "to_numpy"]


def storage(dtype: str) -> str:
    """The dtype of the arrays that hold tensors of `dtype`: numpy has no bfloat16, so these are held as their bits."""
    return "uint16" if dtype == "bfloat16" else dtype


def to_numpy(value: Any) -> Any:
    """A torch tensor as a numpy array, anything else as it is."""
    return value.detach().cpu().numpy() if _is_tensor(value) else value


def like(example: Any, array: np.ndarray[Any, Any]) -> Any:
    """`array` as a torch tensor where `example` is one. The memory is the array's own."""
    return sys.modules["torch"].from_numpy(array) if _is_tensor(example) else array


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


class ModelOutput(OrderedDict[str, Any]):
    """Named outputs: `output.logits`, `output["logits"]` and `output[0]` are the same tensor, as in transformers.

    Where transformers is imported they are also of its class of this name, by which its pipelines know outputs.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> ModelOutput:
        return super().__new__(_also_theirs() if cls is ModelOutput else cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Not transformers' own, which wants a dataclass.
        OrderedDict.__init__(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"This output has no {name!r}. It has: {', '.join(self)}.")

    def __getitem__(self, key: str | int) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


def _also_theirs() -> type[ModelOutput]:
    transformers = sys.modules.get("transformers.utils.generic")
    return ModelOutput if transformers is None else _both(transformers.ModelOutput)


@cache
def _both(theirs: type) -> type[ModelOutput]:
    return type("ModelOutput", (ModelOutput, theirs), {})
