"""The programs in tools/ start as their docstrings say: from anywhere, with nothing on the path."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from source_tree import ROOT


@pytest.mark.parametrize("name", ["compare_revisions", "published_page", "support_table"])
def test_a_program_starts(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / f"{name}.py", "--help"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["usage:", f"{name}.py"]), done.stderr
