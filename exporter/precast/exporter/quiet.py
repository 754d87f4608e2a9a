"""Keep libraries from drawing progress bars and logging between our own output."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_libraries", "silence"]


@contextmanager
def silence(*loggers: str) -> Iterator[None]:
    """Within this block drop warnings, and what these loggers say below an error: it is about their own internals."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)


def quiet_libraries() -> None:
    """For command lines: let transformers log errors only, and draw no progress bars."""
    import transformers.modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # This module uses tqdm directly, past transformers' own switch.
    gguf.tqdm = lambda tensors, **_: tensors
