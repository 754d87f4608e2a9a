"""Shared by the backends `export`, `aoti` and `neuron`: programs of ATen operators that update caches in place, and
weights in one file for all of them."""

from .lowering import Lowered, LoweringOptions, lower
from .safetensors import save_weights

__all__ = ["Lowered", "LoweringOptions", "lower", "save_weights"]
