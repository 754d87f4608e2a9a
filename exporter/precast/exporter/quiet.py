"""Keep the libraries underneath from drawing bars and logging over what we report."""

from __future__ import annotations

__all__ = ["quiet_libraries"]


def quiet_libraries() -> None:
    """For command lines: transformers says nothing below an error and shows no bars."""
    import transformers.modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # This module uses tqdm directly, past transformers' own switch.
    gguf.tqdm = lambda tensors, **_: tensors
