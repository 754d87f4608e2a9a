"""A pytest plugin that counts a foreign suite: passed, refused by name, failed, and not ours.

A test that ends with a PrecastError was refused by name, whose words are kept; one that ends otherwise, an exception of
ours that is no PrecastError included, has failed. One that never came to anything of ours is counted apart, whatever
its end.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from traceback import walk_tb
from typing import Any
from unittest import SkipTest

import pytest

from precast.runtime.errors import PrecastError

from .expected import EXPECTED

KINDS = ("passed", "refused", "expected", "failed", "not ours")


class Running:
    """The test that runs."""

    reached = False


def reached() -> None:
    """Note that the running test has come to something of ours."""
    Running.reached = True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tally", help="Where to write the figures, as JSON.")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TALLY] = []


def pytest_runtest_setup() -> None:
    Running.reached = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    raised = None if call.excinfo is None else call.excinfo.value
    if call.when == "call" or raised is not None:
        item.config.stash[_TALLY].append({"test": _name(item), **verdict(raised, item.nodeid, EXPECTED)})
    if isinstance(raised, PrecastError):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"refused: {raised}")
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Files that could not be imported are no suite without failures: nothing is written for them."""
    target = session.config.getoption("--tally")
    if target and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        Path(target).write_text(json.dumps(session.config.stash[_TALLY], indent=1) + "\n", "utf-8")


def figures(lines: list[dict[str, Any]]) -> dict[str, int]:
    """How many tests ended in which way."""
    counted = Counter(line["end"] for line in lines)
    return {kind: counted[kind] for kind in KINDS}


_TALLY = pytest.StashKey[list[dict[str, Any]]]()


def _name(item: pytest.Item) -> str:
    return f"{item.path.stem}::{'::'.join(item.nodeid.split('::')[1:])}"


def verdict(raised: BaseException | None, test: str, expected: dict[str, str]) -> dict[str, str]:
    """How a test ended that raised this; `expected` has reasons for failures, by patterns of tests' names."""
    words = "" if raised is None else f"{type(raised).__name__}: {raised}"[:400]
    if isinstance(raised, PrecastError):
        return {"end": "refused", "words": words}
    if not Running.reached or isinstance(raised, pytest.skip.Exception | SkipTest) or _is_theirs(raised):
        return {"end": "not ours", "words": words}
    if raised is None:
        return {"end": "passed", "words": ""}
    # Another answer may be meant to be; an exception never is.
    patterns = expected if isinstance(raised, AssertionError) else {}
    reason = next((why for pattern, why in patterns.items() if re.search(pattern, test)), None)
    return {"end": "failed", "words": words} if reason is None else {"end": "expected", "words": reason}


def _is_theirs(raised: BaseException | None) -> bool:
    """Whether eager transformers raised this where a test asked it, and not ours; a test's assertion is about both."""
    if raised is None or isinstance(raised, AssertionError):
        return False
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(raised.__traceback__)]
    ours, theirs = ([module for module in modules if module.startswith(name)] for name in ("precast.", "transformers."))
    return bool(theirs) and not ours
