"""The `aoti` backend: native code of AOTInductor, one library per graph, weights in one file beside them."""
