"""The planner's lengths pad least, against every other choice."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precast.runtime.bench.buckets import plan_buckets, waste
from precast.runtime.errors import UsageError

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(lengths=lengths, count=st.integers(1, 4), multiple=st.sampled_from([1, 4, 8]))
def test_no_choice_pads_less(lengths, count, multiple):
    plan = plan_buckets(lengths, count, multiple=multiple)
    ends = sorted({-(-length // multiple) * multiple for length in lengths})
    choices = [
        [*before, ends[-1]] for size in range(count) for before in combinations(ends[:-1], min(size, len(ends) - 1))
    ]
    assert plan.padding == pytest.approx(min(waste(lengths, choice) for choice in choices))
    assert plan.lengths == sorted(set(plan.lengths))
    assert len(plan.lengths) <= count
    assert all(each % multiple == 0 for each in plan.lengths)
    assert plan.padding <= plan.padding_of_one
    assert sum(plan.rows) == len(lengths)
    for bucket, rows, before in zip(plan.lengths, plan.rows, [0, *plan.lengths], strict=False):
        assert rows == sum(before < length <= bucket for length in lengths)


@given(lengths=lengths, longest=st.integers(8, 48))
def test_longer_texts_are_left_out_and_counted(lengths, longest):
    most = longest // 8 * 8
    if min(lengths) > most:
        with pytest.raises(UsageError, match="No text fits"):
            plan_buckets(lengths, 3, longest=longest)
        return
    plan = plan_buckets(lengths, 3, longest=longest)
    assert max(plan.lengths) <= longest
    assert plan.too_long == sum(length > most for length in lengths)


def test_many_lengths_are_planned_at_once():
    plan = plan_buckets([1 + index % 4096 for index in range(100_000)], 6)
    assert len(plan.lengths) == 6
    assert plan.padding < 0.15


@pytest.mark.parametrize(
    ("given_", "options", "message"),
    [
        ([], {}, "There is no text"),
        ([3, 0], {}, "at least 1 token, not 0"),
        ([3], {"count": 0}, "count must be at least 1, not 0"),
        ([3], {"multiple": 0}, "multiple must be at least 1"),
        ([3], {"longest": 7}, "No multiple of 8 fits into at most 7"),
    ],
)
def test_mistakes_are_named(given_, options, message):
    with pytest.raises(UsageError, match=message):
        plan_buckets(given_, **{"count": 2, **options})
