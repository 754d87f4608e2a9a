"""Artifacts of every release load, and answer as they did."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent / "artifacts"
RELEASES = sorted(path for path in HERE.glob("*/*") if (path / "config.json").is_file())


def test_there_are_some():
    assert RELEASES


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_old_artifact_answers_as_it_did(path):
    spec = importlib.util.spec_from_file_location("make_artifacts", HERE / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    expected = json.loads(path.with_suffix(".json").read_text())
    found = make.ask(path)
    assert np.allclose(found["first"], expected["first"], atol=1e-4)
    assert found.get("tokens") == expected.get("tokens")
