"""Whether the Hub can be asked at all, found out once and at once: its client tries for half a minute, line by line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import PrecastWarning

__all__ = ["hub_or_cache"]


@contextmanager
def hub_or_cache() -> Iterator[str | None]:
    """For a download: yields None, or why the Hub cannot be asked, so that only its cache is left (local_files_only).

    Warns of it where the cache was enough and the user has not asked for that by HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield "HF_HUB_OFFLINE is set"
        return
    problem = _problem(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)
    yield problem
    if problem:
        warnings.warn(f"{problem}; what the Hub's cache holds was taken.", PrecastWarning, stacklevel=3)


def _problem(endpoint: str, seconds: float) -> str | None:
    """One request; any answer will do, also an error's."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        get_session().head(endpoint, timeout=seconds)
    except HTTPError as error:
        return f"{endpoint} cannot be reached ({str(error).strip() or type(error).__name__})"
    return None
