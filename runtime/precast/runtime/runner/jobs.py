"""The worker of a job: what `Portable.as_job` says, made again in another process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import errors
from ..errors import PrecastError
from ..pipelines import pipeline
from .batches import Answers, Worker, answer_batch
from .descriptions import Opener, open_described
from .generating import GeneratingWorker
from .predicting import PredictingWorker
from .rows import Column, Row

__all__ = ["answer_request", "as_request", "error_of", "open_job", "report_error"]


def open_job(job: dict[str, Any], threads: int, opener: Opener = open_described) -> Worker:
    """The worker of a job, which computes with so many threads where the job does not say another number.

    Raises:
        PrecastError: the model cannot be opened.
    """
    model, column = opener(job["model"], threads), Column.of_names(job["columns"])
    if job["kind"] == "predict":
        return PredictingWorker(pipeline(job["task"], model), column, job["settings"], question=job["question"])
    settings = dict(job["settings"])
    if job["assistant"] is not None:
        settings["assistant_model"] = opener(job["assistant"], threads)
    return GeneratingWorker(model, column, settings, **job["prompts"])


def as_request(batch: Sequence[Any], fail_fast: bool) -> dict[str, Any]:
    """A planned batch, as JSON: its rows as they were found, which are quicker made ready again than sent so."""
    return {"rows": [[each.index, each.row.given, each.row.problem] for each in batch], "fail_fast": fail_fast}


def answer_request(request: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """{"answers"} of a request, or {"error"} as of `report_error`."""
    try:
        batch = [worker.prepare(index, Row(given, problem)) for index, given, problem in request["rows"]]
        answers: Answers = answer_batch(batch, worker, request["fail_fast"])
    except PrecastError as error:
        return report_error(error)
    return {"answers": answers}


def report_error(error: PrecastError) -> dict[str, Any]:
    """An error as JSON."""
    return {"error": [type(error).__name__, str(error)]}


def error_of(reported: Sequence[str]) -> PrecastError:
    """The error that was reported."""
    kind, message = reported
    found: type[PrecastError] = getattr(errors, kind, PrecastError)
    return found(message)
