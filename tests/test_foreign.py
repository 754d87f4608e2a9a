"""The adapters for other projects' test suites (`make foreign`), without the suites."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from foreign import run, tally
from foreign.pipelines import Both, Different

from precast.runtime.errors import InputError


def test_every_suite_has_an_adapter() -> None:
    """Each is a plugin that imports without the suite."""
    for suite in run.SUITES.values():
        adapter = import_module(f"foreign.{suite.adapter}")
        assert hasattr(adapter, "pytest_configure") or hasattr(adapter, "pytest_collection_modifyitems")
        assert suite.source in run.SOURCES
        assert suite.files


def test_suites_that_cannot_be_had_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=128))
    with pytest.raises(SystemExit, match=r"could not be had.*make foreign FOREIGN="):
        run.main([str(tmp_path), "processors"])


@pytest.mark.parametrize(
    ("raised", "is_ours", "end"),
    [
        (None, True, "passed"),
        (None, False, "not ours"),
        (InputError("num_beams=2 is refused"), True, "refused"),
        (TypeError("raw"), True, "failed"),
        (AssertionError("other tokens"), True, "failed"),
        (OSError("no such checkpoint"), False, "not ours"),
    ],
)
def test_how_a_test_ended(raised: Exception | None, is_ours: bool, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ours by name is a refusal, any other a failure, and what never came to ours counts for nothing."""
    monkeypatch.setattr(tally.Running, "reached", is_ours)
    assert tally.verdict(raised, "a_test", {})["end"] == end


def test_what_eager_refuses_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally.Running, "reached", True)
    with pytest.raises(KeyError) as raised:
        transformers.activations.get_activation("none of this name")
    assert tally.verdict(raised.value, "a_test", {})["end"] == "not ours"


def test_an_expected_failure_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally.Running, "reached", True)
    found = tally.verdict(AssertionError("no cache"), "suite::test_cache", {"test_cache$": "the cache stays inside"})
    assert found == {"end": "expected", "words": "the cache stays inside"}
    assert (
        tally.verdict(KeyError("raw"), "suite::test_cache", {"test_cache$": "the cache stays inside"})["end"]
        == "failed"
    )


def _ends(with_: Any) -> Any:
    """What answers so, or raises so."""

    def call(*_: Any, **__: Any) -> Any:
        if isinstance(with_, Exception):
            raise with_
        return with_

    return call


@pytest.mark.parametrize(
    ("ours", "theirs", "raised"),
    [
        ([{"score": 0.5}], [{"score": 0.50001}], None),
        ([{"score": 0.5}], [{"score": 0.6}], AssertionError),
        (["a", "b"], ["a"], AssertionError),
        (InputError("refused"), ValueError("theirs"), ValueError),
        (ValueError("raw"), ValueError("theirs"), Different),
        (["a"], ValueError("theirs"), Different),
        (InputError("refused"), ["a"], InputError),
    ],
)
def test_a_pipeline_of_ours_ends_as_theirs(ours: Any, theirs: Any, raised: type[Exception] | None) -> None:
    """An exception is no answer that a test of theirs expects of ours, unless ours refuses by name, too."""
    both = Both(_ends(ours), _ends(theirs), "text-classification")
    with nullcontext() if raised is None else pytest.raises(raised) as found:
        assert both("a text") == ours
    if raised is not None:
        assert found.type is raised


def test_a_suite_that_cannot_be_imported_has_not_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a suite of another release than the libraries that it tests."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/test_it.py").write_text("import nothing_of_this_name\n", "utf-8")
    monkeypatch.setitem(run.SUITES, "broken", run.Suite("broken", "processors", ("test_it.py",)))
    with pytest.raises(SystemExit, match=r"broken did not end within 7200 seconds, or did not run; .*broken\.log"):
        run.run("broken", tmp_path)
