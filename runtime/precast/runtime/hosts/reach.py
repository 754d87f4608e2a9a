"""Find out at once whether the Hub can be reached: its own client retries for half a minute."""

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
    problem = _ask_hub(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)
    yield problem
    if problem:
        warnings.warn(f"{problem}; what the Hub's cache holds was taken.", PrecastWarning, stacklevel=3)


def _ask_hub(endpoint: str, seconds: float) -> str | None:
    """Send the Hub one request; returns why it cannot be reached, None for any answer, an error's too."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        get_session().head(endpoint, timeout=seconds)
    except HTTPError as error:
        return f"{endpoint} cannot be reached ({str(error).strip() or type(error).__name__})"
    return None
