"""Forms of output files, one row per format: JSON lines, one JSON document, MindFormers' readable text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from ..errors import UsageError

__all__ = ["WRITERS", "json_line", "writer_of"]

Writer = Callable[[IO[bytes], Iterable[dict[str, Any]]], None]


def json_line(value: Any) -> bytes:
    """JSON on one line, UTF-8; halves of characters, which have no encoding, are escaped."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def writer_of(path: Path) -> Writer:
    """What writes a file of this name. Raises UsageError for a suffix that is unknown."""
    found = WRITERS.get(path.suffix.lower())
    if found is None:
        raise UsageError(
            f"{path} has no suffix that tells its form: .jsonl is a line of JSON for each row, .json one document, "
            f".txt the texts to read."
        )
    return found


def _write_lines(file: IO[bytes], rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        file.write(json_line(row) + b"\n")


def _write_document(file: IO[bytes], rows: Iterable[dict[str, Any]]) -> None:
    """An array; rows of PaddleNLP's predictor are lines, as it writes them."""
    for number, row in enumerate(rows):
        is_paddle = "src" in row and "input" not in row
        opening, between = (b"", b"\n") if is_paddle else (b"[\n", b",\n")
        file.write((between if number else opening) + json_line(row))
    file.write(b"\n" if is_paddle else b"\n]\n")


def _write_text(file: IO[bytes], rows: Iterable[dict[str, Any]]) -> None:
    """A list of {'text_generation_text': [text]}, as Python writes it, with a row on each line: MindFormers'
    text_generation_result.txt."""
    for number, row in enumerate(rows):
        file.write((b",\n " if number else b"[") + repr(_readable(row)).encode("utf-8", "backslashreplace"))
    file.write(b"]\n")


def _readable(row: dict[str, Any]) -> Any:
    if "error" in row:
        return {"error": row["error"]["message"]}
    return {"text_generation_text": [row["output"]]} if "output" in row else row.get("answer")


WRITERS: dict[str, Writer] = {
    ".jsonl": _write_lines, ".ndjson": _write_lines, ".json": _write_document, ".txt": _write_text,
}  # fmt: skip
