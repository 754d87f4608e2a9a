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


def assert_steps_are_the_call(task: str | None, model: Any, inputs: list[Any], **options: Any) -> None:
    """A pipeline's three steps give what calling it gives, with options of its making as with options of the call; of
    one input, of all, and of more than the model takes at once."""
    from precast.runtime import CompiledModel, pipeline

    opened = CompiledModel.from_pretrained(model)
    told, plain = pipeline(task, opened, **options), pipeline(task, opened)
    for given in (inputs[0], inputs, inputs * opened.batch_size + inputs[:1]):
        expected = plain(given, **options)
        assert_same(told(given), expected)
        assert_same(told.postprocess(told.forward(told.preprocess(given))), expected)


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
