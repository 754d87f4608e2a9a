"""Give memory back to the system while an export goes on."""

from __future__ import annotations

import ctypes
import gc
import sys

__all__ = ["give_back_memory"]


def give_back_memory() -> None:
    """Return what is no longer used: glibc keeps pages that lie between those in use until it is asked for them, a
    whole model's once that has been loaded tensor by tensor."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
