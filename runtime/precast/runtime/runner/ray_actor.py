"""What Ray starts on the nodes of a cluster: a model that answers batches, which come and go as JSON."""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..artifact import read_artifact
from ..artifact.store import home
from ..errors import PrecastError, UsageError
from ..hosts.machine import installed_version
from ..models.base import CompiledModel
from ..storage.hub import locate
from .batches import Worker
from .descriptions import Description, open_described
from .jobs import answer_request, open_job, report_error

__all__ = ["BatchActor"]


class BatchActor:
    """Answers batches of a job, given as JSON, with so many threads.

    What is wrong with this node is the answer to each of its batches: an error in the constructor would only let Ray
    start it again.
    """

    def __init__(self, job: str, threads: int) -> None:
        self._worker: Worker | None = None
        self._problem: dict[str, Any] = {}
        try:
            read = json.loads(job)
            _check_version(read["model"]["precast"])
            self._worker = open_job(read, threads, _open_on_node)
        except PrecastError as error:
            self._problem = report_error(type(error)(f"On the node {platform.node()}: {error}"))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """The answers of requests: {"number": […], "request": […]} in, {"number", "answer"} out."""
        return {
            "number": list(batch["number"]),
            "answer": [json.dumps(self._answer(json.loads(str(each)))) for each in batch["request"]],
        }

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._problem if self._worker is None else answer_request(request, self._worker)


def _check_version(wanted: str) -> None:
    if (found := installed_version("precast")) != wanted:
        raise UsageError(
            f"precast is {found} here, and {wanted} where the rows come from. Install one of them on both: "
            f"pip install precast=={wanted}"
        )


def _open_on_node(description: Description, threads: int) -> CompiledModel:
    """The model of a description; one that the Hub has is pulled by one process of this machine."""
    path = description["path"]
    if (name := description["name"]) is not None:
        with _locked(name):
            path = locate(name, **description["hub"])
        if (found := read_artifact(path).contract.digest) != description["digest"]:
            raise UsageError(
                f"{name} has the digest {found} on the Hub now, and {description['digest']} where the rows come from. "
                f"Pass revision=COMMIT to have the same everywhere."
            )
    return open_described({**description, "path": str(path)}, threads)


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Within this block no other process of this machine is in one of the same name, where files can be locked."""
    folder = home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / hashlib.sha256(name.encode()).hexdigest()[:16]).open("wb") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
