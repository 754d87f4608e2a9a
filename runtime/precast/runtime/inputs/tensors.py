"""Convert between numpy and torch, and allocate arrays. torch is only imported where its tensors are asked for."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np

from ..errors import OutOfMemoryError, UsageError

__all__ = [
    "ModelOutput",
    "allocate",
    "as_tensor",
    "as_tensors",
    "is_tensor",
    "convert_like",
    "to_python",
    "storage_dtype",
    "to_numpy",
    "allocate_together",
]


def storage_dtype(dtype: str) -> str:
    """The dtype of the arrays that hold tensors of `dtype`: numpy has no bfloat16, so its bits are held as uint16."""
    return "uint16" if dtype == "bfloat16" else dtype


def allocate(shape: Sequence[int], dtype: str) -> np.ndarray[Any, Any]:
    """Zeros of this shape, in the `storage_dtype` of a dtype. Raises OutOfMemoryError."""
    try:
        return np.zeros(shape, storage_dtype(dtype))
    except MemoryError as error:
        size = prod(shape) * np.dtype(storage_dtype(dtype)).itemsize / 2**30
        raise OutOfMemoryError(
            f"There is no memory for a buffer of the model of {size:,.1f} GiB, {dtype} {list(shape)}. Compile it for a "
            f"smaller batch or a shorter sequence."
        ) from error


_LINE = 64
"""Bytes of a cache line, to which arrays that are allocated together are aligned."""


def allocate_together(wanted: Mapping[str, tuple[Sequence[int], str]]) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of these shapes and dtypes, as `storage_dtype` says, in one piece of memory.

    Only such a piece is large enough for NumPy to ask the system for huge pages, from which attention reads caches of
    two thousand tokens more than twice as fast.
    """
    sizes = [prod(shape) * np.dtype(storage_dtype(dtype)).itemsize for shape, dtype in wanted.values()]
    starts = list(accumulate((-(-size // _LINE) * _LINE for size in sizes), initial=0))
    memory = allocate([starts[-1] + _LINE], "uint8")
    lines = memory[-memory.ctypes.data % _LINE :]
    return {
        name: lines[start : start + size].view(storage_dtype(dtype)).reshape(shape)
        for (name, (shape, dtype)), start, size in zip(wanted.items(), starts, sizes, strict=False)
    }


def to_numpy(value: Any) -> Any:
    """A torch tensor as a numpy array, anything else as it is."""
    return value.detach().cpu().numpy() if is_tensor(value) else value


def to_python(value: Any) -> Any:
    """The value with Python's own numbers and lists in place of numpy's and torch's."""
    value = to_numpy(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return [to_python(each) for each in value] if isinstance(value, list | tuple | set) else value


def convert_like(example: Any, array: np.ndarray[Any, Any]) -> Any:
    """`array` as a torch tensor where `example` is one. The memory is the array's own."""
    return as_tensor(array) if is_tensor(example) else array


def as_tensor(array: np.ndarray[Any, Any]) -> Any:
    """The array as a torch tensor over the same memory, where torch is imported."""
    return sys.modules["torch"].from_numpy(array)


def as_tensors(arrays: dict[str, np.ndarray[Any, Any]], kind: str | None) -> dict[str, Any]:
    """The arrays as they are, for None and "np", or as torch tensors over the same memory, for "pt".

    Raises UsageError for any other kind, and where there is no torch.
    """
    if kind is None or kind == "np":
        return arrays
    if kind != "pt":
        raise UsageError(f"return_tensors={kind!r} is not known; choose one of: np, pt.")
    try:
        torch = import_module("torch")
    except ImportError as error:
        raise UsageError(
            f"return_tensors='pt' makes tensors of torch, which cannot be imported: {error}. "
            f"pip install 'precast[torch]', or leave it out: models take numpy's arrays."
        ) from error
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor of torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


class ModelOutput(OrderedDict[str, Any]):
    """Named outputs: `output.logits`, `output["logits"]` and `output[0]` are the same tensor, as in transformers.

    Where transformers is imported they are also of its class of this name, by which its pipelines know outputs.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> ModelOutput:
        return super().__new__(_output_class() if cls is ModelOutput else cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Not transformers' own, which wants a dataclass.
        OrderedDict.__init__(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"This output has no {name!r}. It has: {', '.join(self)}.")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self:
            self[name] = value
        else:
            object.__setattr__(self, name, value)

    def __getitem__(self, key: str | int) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


def _output_class() -> type[ModelOutput]:
    transformers = sys.modules.get("transformers.utils.generic")
    return ModelOutput if transformers is None else _combine_classes(transformers.ModelOutput)


@cache
def _combine_classes(theirs: type) -> type[ModelOutput]:
    return type("ModelOutput", (ModelOutput, theirs), {})
