"""What the `export` and `aoti` backends share: programs of ATen operators with caches updated in place, and weights in one
file for all of them."""
