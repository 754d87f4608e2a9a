"""Files that other people write, changed at random: read, or refused with a PrecastError (`make fuzz`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.targets import TARGETS


def fuzz(*options, timeout):
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fuzz", *options],
        check=False, capture_output=True, text=True, timeout=timeout, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_every_kept_case_is_read_or_refused():
    fuzz("--replay", timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_half_a_minute_of_changes_finds_nothing(target):
    fuzz(target, "--seconds", "30", timeout=600)
