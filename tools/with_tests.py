"""Lets the programs beside it import the zoo and the helpers of the tests: `import with_tests` before those."""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [folder for folder in (str(_TESTS / "helpers"), str(_TESTS)) if folder not in sys.path]
