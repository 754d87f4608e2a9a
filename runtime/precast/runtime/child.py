"""Start Python processes that import installed modules only, never those in the current directory.

`python -m` and `python -c` put the current directory first on the path of modules. A downloaded checkpoint with a
`numpy.py` in it would run as soon as somebody exports or times it from within.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

__all__ = ["command", "environment", "run"]

# Python 3.10 has no -P, so the entry is removed before anything is imported that is not built in. The module gets its
# arguments as with -m.
_START = """\
import sys
sys.path[:] = [place for place in sys.path if place]
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def run(
    module: str, *arguments: object, given: str = "", changes: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module as `python -m` does, with the text `given` as its input; its output is kept as text.

    `changes` are made to the environment; None takes a variable out.
    """
    return subprocess.run(
        command(module, *arguments), env=environment(changes), input=given, capture_output=True, text=True,
        errors="replace", check=False,
    )  # fmt: skip


def command(module: str, *arguments: object, python: object = None) -> list[str]:
    """The command line that runs a module in this interpreter, or in that at the path `python`; to be run with
    `environment()`."""
    return [str(python or sys.executable), "-c", _START, module, *map(str, arguments)]


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment with `changes`. An empty entry in PYTHONPATH, as `$PYTHONPATH:/more` leaves one where
    there was none, means the current directory to Python; here it is left out."""
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    made = {**os.environ, "PYTHONPATH": os.pathsep.join(places) or None, **(changes or {})}
    return {name: value for name, value in made.items() if value is not None}
