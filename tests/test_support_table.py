"""The support table is current, and says no less than was promised."""

from __future__ import annotations

import json
from collections import Counter
from importlib.metadata import version

import pytest
import support
from test_pins import PINS

from precast.exporter.support import table
from precast.runtime.artifact.tasks import TASKS

RAW = json.loads(support.TABLE.read_text("utf-8"))
PAIRS = [pair for zoo in support.ZOOS for pair in support.pairs(zoo)]
FAMILIES = {"t5", "bart", "marian", "pegasus", "whisper"}


def test_the_table_is_of_the_pinned_transformers():
    """If not: python tests/support.py."""
    assert RAW["transformers"] == PINS["transformers"]


@pytest.mark.skipif(RAW["transformers"] != version("transformers"), reason="the table is of another transformers")
def test_the_table_has_every_pair():
    assert {(line.model_type, line.task) for line in table()} == {pair[1:] for pair in PAIRS}
    assert {line.task for line in table()} <= set(TASKS)


def test_the_page_is_the_table():
    assert support.PAGE.read_text("utf-8") == support.page(RAW)


def test_refusals_are_those_of_the_zoo():
    by_pair = {pair[1:]: pair for pair in PAIRS}
    for line in table():
        assert line.reason == (support.expected_reason(by_pair[line.model_type, line.task]) or "")


def test_what_passes_is_within_the_bound():
    assert all(0 <= line.difference <= 1e-4 for line in table())


def test_as_much_passes_as_was_promised():
    zoos = {pair[1:]: pair[0] for pair in PAIRS}
    count = Counter(zoos[line.model_type, line.task] for line in table() if line.passes)
    assert count["decoders"] >= 130
    assert count["encoders"] >= 35
    assert {line.model_type for line in table() if line.passes} >= FAMILIES


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(pair[1:]))
def test_every_line_of_the_table_is_so(pair):
    """Made anew, each pair passes or is refused as the zoo says."""
    assert support.surprise(pair, support.attempt(pair)) is None
