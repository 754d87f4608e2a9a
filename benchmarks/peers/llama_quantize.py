"""llama.cpp's own quantization: `… SOURCE.gguf TARGET.gguf TYPE [IMPORTANCE.npz]`; run by the peers' own Python.

IMPORTANCE has the mean square of each column of a layer's inputs, under the weight's name.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llama_cpp
import numpy as np

TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}


def main(source: str, target: str, kind: str, importance: str | None = None) -> None:
    """Write `target`."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = TYPES[kind], 1
    entries = _entries(np.load(importance)) if importance else None
    if entries is not None:
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_cpp.llama_model_imatrix_data))
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp could not quantize {source} to {kind}.")


def _entries(found: Any) -> Any:
    """An array that ends with a name that is null."""
    kind = llama_cpp.llama_cpp.llama_model_imatrix_data
    entries = (kind * (len(found) + 1))()
    for entry, name in zip(entries, found, strict=False):
        values = np.ascontiguousarray(found[name], np.float32)
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        _KEPT.append(values)
    return entries


_KEPT: list[Any] = []
"""What C reads must not be freed."""

if __name__ == "__main__":
    main(*sys.argv[1:])
