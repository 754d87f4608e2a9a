"""Subtitles of what a speech pipeline tells with times: SubRip (.srt) and WebVTT (.vtt)."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

__all__ = ["as_srt", "as_vtt"]

_ARROW = re.compile("-{2,}>")
_SECONDS_TO_READ = 4.0
"""How long a text stays whose end is not known."""


def as_srt(chunks: Iterable[Mapping[str, Any]], end: float | None = None) -> str:
    """SubRip of chunks {"timestamp": (start, end), "text"}. `end` is the sound's, in seconds, for a last chunk without
    one of its own."""
    cues = enumerate(_cues(chunks, end), 1)
    # The format has no way to write the arrow of its times in a text.
    return "\n".join(
        f"{number}\n{_clock(start, ',')} --> {_clock(stop, ',')}\n{_ARROW.sub('->', text)}\n"
        for number, (start, stop, text) in cues
    )


def as_vtt(chunks: Iterable[Mapping[str, Any]], end: float | None = None) -> str:
    """WebVTT of chunks, as for `as_srt`."""
    cues = (
        f"\n{_clock(start, '.')} --> {_clock(stop, '.')}\n{html.escape(text, quote=False)}\n"
        for start, stop, text in _cues(chunks, end)
    )
    return "".join(["WEBVTT\n", *cues])


def _cues(chunks: Iterable[Mapping[str, Any]], end: float | None) -> Iterator[tuple[float, float, str]]:
    """Start, end and text of each chunk that says something; a text has one line, for an empty one would end it."""
    latest = 0.0
    for chunk in chunks:
        start, stop = chunk["timestamp"]
        start = latest if start is None else start
        stop = (start + _SECONDS_TO_READ if end is None else end) if stop is None else stop
        latest = max(start, stop)
        if text := " ".join(chunk["text"].split()):
            yield start, latest, text


def _clock(seconds: float, point: str) -> str:
    """Hours, minutes, seconds and milliseconds, rounded once; hours have as many digits as they need."""
    milliseconds = int((Decimal(str(seconds)) * 1000).to_integral_value(ROUND_HALF_UP))
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"
