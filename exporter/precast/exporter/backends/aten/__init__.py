"""What the `export` and `aoti` backends share: programs of ATen operators with caches updated in place, and weights in
one file for all of them."""

from .lowering import Forms, Lowered, lower
from .safetensors import save_weights

__all__ = ["Forms", "Lowered", "lower", "save_weights"]
