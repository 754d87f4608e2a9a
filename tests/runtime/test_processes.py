"""Models that were dropped, and models in forks; native code's are with their artifacts in test_native_backends.py."""

from __future__ import annotations

import processes
import pytest

pytestmark = pytest.mark.skipif("not __import__('sys').platform.startswith('linux')", reason="looks into /proc")


def test_a_dropped_model_leaves_nothing_open(decoder):
    processes.check_loads(decoder)


def test_a_fork_goes_on_or_is_told_why_not(decoder):
    """Closing a session waits for its threads to end, which a fork has not got: ending must not."""
    processes.check_fork(decoder)
