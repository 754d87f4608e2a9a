"""Parse which NeuronCores a model is to use."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import UsageError

__all__ = ["read_cores"]


def read_cores(given: str | Sequence[int] | None) -> tuple[int, ...]:
    """Parse `"0-1,4"`, or check numbers; none for None. Cores are counted from 0, among those that the process sees
    (NEURON_RT_VISIBLE_CORES). Raises UsageError."""
    if given is None:
        return ()
    cores = _parse_cores(given) if isinstance(given, str) else tuple(given)
    if not cores or len(set(cores)) != len(cores) or min(cores) < 0:
        raise UsageError(f"cores={given!r} names no NeuronCores, or one twice. Write them as '0', '0-3' or '0,2'.")
    return cores


def _parse_cores(given: str) -> tuple[int, ...]:
    cores: list[int] = []
    for part in given.split(","):
        found = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part)
        if found is None:
            raise UsageError(f"cores={given!r} is not understood at {part!r}. Write it as '0', '0-3' or '0,2'.")
        first = int(found[1])
        cores += range(first, int(found[2] or first) + 1)
    return tuple(cores)
