"""What is public is listed in `__all__`, exists, and says what it is for."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT / part).with_suffix("").parts).removesuffix(".__init__")
    for part in ("exporter", "runtime", "cli")
    for path in (ROOT / part).rglob("*.py")
)
LAZY = [
    (package, name)
    for package in ("precast.runtime", "precast.exporter", "precast.runtime.runner")
    for name in importlib.import_module(package).__all__
]

every_lazy_name = pytest.mark.parametrize(("package", "name"), LAZY, ids=lambda word: word.rpartition(".")[2])


def _doc(value: object) -> str:
    """The words that were written for `value` itself: a dataclass without any is given its signature."""
    doc = (value.__dict__.get("__doc__") or "") if isinstance(value, type) else (value.__doc__ or "")
    return "" if isinstance(value, type) and doc.startswith(f"{value.__name__}(") else doc.strip()


@pytest.mark.parametrize("name", MODULES)
def test_every_module_lists_what_is_public(name):
    module = importlib.import_module(name)
    assert _doc(module), "has no docstring"
    listed = module.__all__
    assert len(set(listed)) == len(listed)
    for public in listed:
        assert not public.startswith("_")
        value = getattr(module, public)
        if (inspect.isroutine(value) and value.__name__ == public) or inspect.isclass(value):
            assert _doc(value), f"{public} has no docstring"
        if isinstance(value, click.Command):
            assert value.help, f"{public} has no help"


@every_lazy_name
def test_lazy_names_are_those_of_their_modules(package, name):
    module = importlib.import_module(package)
    value = getattr(module, name)
    assert name in dir(module)
    assert name in sys.modules[value.__module__].__all__
    for method, member in inspect.getmembers(value, inspect.isroutine) if inspect.isclass(value) else ():
        if not method.startswith("_"):
            assert inspect.getdoc(member), f"{name}.{method} has no docstring"


@pytest.mark.parametrize("package", ["precast.runtime", "precast.exporter", "precast.runtime.runner"])
def test_other_names_are_not_there(package):
    module = importlib.import_module(package)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing
    assert set(module.__all__) <= set(dir(module))


def test_star_imports_in_a_fresh_interpreter():
    code = "from precast.runtime import *; from precast.exporter import *; print(CompiledModel, export)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("<class 'precast.runtime.models.base.CompiledModel'> <function export at ")
