"""Subtitles: times and texts come back from what is written, whatever they are."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precast.runtime.pipelines.subtitles import as_srt, as_vtt

times = st.floats(0, 400_000).map(lambda value: round(value, 3))
texts = st.text() | st.text("->\n\r\u2028 &<>;1a", max_size=12)
chunks = st.lists(st.fixed_dictionaries({"timestamp": st.tuples(times, times), "text": texts}), max_size=5)
_TIMES = r"(\d{2,}):([0-5]\d):([0-5]\d)%s(\d{3})"


def read(block: str, point: str) -> tuple[float, float]:
    """The times of a line."""
    clock = _TIMES % re.escape(point)
    found = re.fullmatch(f"{clock} --> {clock}", block)
    assert found, block
    numbers = [int(each) for each in found.groups()]
    start, stop = (
        hours * 3600 + minutes * 60 + seconds + thousandths / 1000
        for hours, minutes, seconds, thousandths in (numbers[:4], numbers[4:])
    )
    return start, stop


@given(chunks)
def test_what_is_written_is_read_again(told):
    said = [(*chunk["timestamp"], " ".join(chunk["text"].split())) for chunk in told if chunk["text"].split()]
    srt, vtt = as_srt(told), as_vtt(told)
    cues = srt.split("\n\n") if srt else []
    assert vtt.startswith("WEBVTT\n")
    for number, ((start, stop, text), cue, other) in enumerate(
        zip(said, cues, vtt.split("\n\n")[1:], strict=True), start=1
    ):
        first, times_, *lines = cue.rstrip("\n").split("\n")
        assert first == str(number)
        assert read(times_, ",") == pytest.approx((start, max(start, stop)))
        assert lines == [re.sub("-{2,}>", "->", text)]
        assert "-->" not in lines[0]
        times_, *lines = other.rstrip("\n").split("\n")
        assert read(times_, ".") == pytest.approx((start, max(start, stop)))
        assert "-->" not in lines[0]
        assert [html.unescape(line) for line in lines] == [html.unescape(html.escape(text, quote=False))]


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0, "00:00:00,000"), (59.9996, "00:01:00,000"), (0.0005, "00:00:00,001"), (1.0005, "00:00:01,001"),
        (1.00049, "00:00:01,000"), (29.98, "00:00:29,980"), (3599.9999, "01:00:00,000"), (360_001.5, "100:00:01,500"),
    ],
)  # fmt: skip
def test_clocks_round_to_the_nearest_millisecond(seconds, written):
    assert as_srt([{"timestamp": (seconds, seconds), "text": "a"}]).splitlines()[1] == f"{written} --> {written}"


@pytest.mark.parametrize(
    ("timestamps", "end", "expected"),
    [
        ([(1.0, None)], 7.5, [(1, 7.5)]),
        ([(1.0, None)], None, [(1, 5)]),
        ([(8.0, None)], 7.5, [(8, 8)]),
        ([(None, None)], 7.5, [(0, 7.5)]),
        ([(0.0, 2.5), (None, 4.0), (None, None)], None, [(0, 2.5), (2.5, 4), (4, 8)]),
    ],
)
def test_times_that_are_not_known_have_others(timestamps, end, expected):
    told = as_vtt([{"timestamp": each, "text": "a"} for each in timestamps], end)
    assert [read(line, ".") for line in told.splitlines() if "-->" in line] == expected
