"""What the tests of the command line share."""

from __future__ import annotations

import sys

import pytest

from precast.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("inspect", path)`: exit code, standard output, standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["precast", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call
