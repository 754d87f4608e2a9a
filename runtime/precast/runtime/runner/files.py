"""A file of rows answered into another file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .batches import Answers, Asker, Worker, answer_here, answer_rows, input_of
from .journal import Journal
from .outputs import json_line
from .rows import Row

__all__ = ["FileSummary", "answer_file", "fingerprint"]


@dataclass(frozen=True)
class FileSummary:
    """What became of a file.

    Attributes:
        rows: how many there are.
        computed: how many this run answered; the others were there.
        failed: how many have an error in the place of an answer.
        seconds: how long this run took.
        seed: what its random choices began with, if there were any.
    """

    rows: int
    computed: int
    failed: int
    seconds: float
    seed: int | None

    def to_json(self) -> dict[str, Any]:
        """As JSON, with the rows per second of this run."""
        speed = round(self.computed / self.seconds, 2) if self.seconds and self.computed else None
        return {**asdict(self), "seconds": round(self.seconds, 3), "rows_per_second": speed}


def answer_file(
    rows: Sequence[Row], target: Path, work: Mapping[str, Any], make_worker: Callable[[int | None], Worker], *,
    resume: bool = False, force: bool = False, fail_fast: bool = False, replicas: int = 1,
    ray: str | None = None, ray_cpus: int = 1,
    advance: Callable[[int], None] = lambda rows: None,
) -> FileSummary:  # fmt: skip
    """Answer `rows` into a file, in their order.

    A run that was killed goes on with `resume`, and the file becomes the one that an undisturbed run writes.

    Args:
        rows: the rows.
        target: the file; its suffix says its form (outputs.WRITERS).
        work: what decides the answers beside the rows: {"model": …, "options": …}; with a "seed", which a run that
            goes on has from the first.
        make_worker: what answers, by that seed.
        resume, force: as of Journal.
        fail_fast: end at the first row that cannot be answered.
        replicas: how many processes answer side by side, each with the model and its share of the cores; what
            `make_worker` returns is then Portable, and plans only.
        ray: the address of a Ray cluster whose nodes answer instead, and
        ray_cpus: how many CPUs each of their actors has, as of RayCluster.
        advance: told how many rows more are done, those of an earlier run first.

    Raises:
        UsageError, PublishError: as of Journal, and as of `answer_rows`.
        PrecastError: replicas die again and again, or a node lacks something.
    """
    ask = _choose_asker(replicas, ray, ray_cpus)
    started, failed, computed = time.monotonic(), 0, 0
    told = {**work, "input": fingerprint([row.given for row in rows])}
    with Journal(target, told, resume=resume, force=force) as journal:
        if journal.is_complete:
            _check_complete(target, rows)
            advance(len(rows))
            return FileSummary(len(rows), 0, _count_errors(_read_rows(target)), 0.0, work.get("seed"))
        done = journal.done
        advance(len(done))

        def add(answers: Answers) -> None:
            nonlocal computed
            journal.add(answers)
            computed += len(answers)
            advance(len(answers))

        answer_rows(rows, make_worker(journal.work.get("seed")), add, done=done, fail_fast=fail_fast, ask=ask)
        failed = _count_errors(journal.rows())
        journal.finish()
        return FileSummary(len(rows), computed, failed, time.monotonic() - started, journal.work.get("seed"))


def _choose_asker(replicas: int, ray: str | None, ray_cpus: int) -> Asker:
    """Who answers. What one process runs imports nothing of the others."""
    if ray is not None:
        if replicas != 1:
            raise UsageError(
                f"replicas={replicas} are processes of this machine, and ray={ray!r} starts its own on every node; "
                f"pass one of them."
            )
        from .ray_cluster import RayCluster

        return RayCluster(ray, ray_cpus)
    if replicas == 1:
        return answer_here
    from .replicas import Replicas

    return Replicas(replicas)


def fingerprint(value: Any) -> str:
    """The SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _count_errors(rows: Any) -> int:
    return sum("error" in row for row in rows)


def _read_rows(target: Path) -> list[dict[str, Any]]:
    """The answers in a file of JSON; none in any other."""
    try:
        text = target.read_bytes().decode()
        found = json.loads(text) if text.startswith("[\n") else [json.loads(line) for line in text.split("\n") if line]
    except (ValueError, RecursionError):
        return []
    return [each for each in found if isinstance(each, dict)]


def _check_complete(target: Path, rows: Sequence[Row]) -> None:
    """Raise UsageError where a finished file does not answer these rows."""
    inputs = [json_line(input_of(row)) for row in rows]
    found = [
        json_line({name: row[name] for name in ("input", "src", "tgt") if name in row}) for row in _read_rows(target)
    ]
    if found != inputs:
        raise UsageError(
            f"{target} exists, nothing of an interrupted run lies beside it, and it does not answer these "
            f"{len(rows)} rows. Pass force=True to replace it, or name another file."
        )
