"""One model used in every way at random, for half a minute (`make soak`: at length)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_half_a_minute_of_use_finds_no_wrong_answer_and_no_growth():
    paths = os.pathsep.join([str(HERE), str(HERE / "helpers"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "soak", "--seconds", "30"],
        check=False, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
