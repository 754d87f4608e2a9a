"""Answers beside answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def assert_same(found: Any, expected: Any) -> None:
    """Equal, but for the last digits of numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float | np.floating):
        assert math.isclose(found, expected, abs_tol=1e-4), (found, expected)
    else:
        assert found == expected


@contextmanager
def silence() -> Iterator[None]:
    """Within, transformers logs no warning and no error. (Python's own warnings are errors in any test.)"""
    import transformers

    said: list[str] = []
    ear = logging.Handler(logging.WARNING)
    ear.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log, before = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    log.addHandler(ear)
    try:
        yield
    finally:
        log.removeHandler(ear)
        transformers.logging.set_verbosity(before)
    assert said == []
