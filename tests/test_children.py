"""What lies in the user's current directory is never imported by a Python that we start."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import neuron_machine
import pytest

from precast.runtime import child

ROOT = Path(__file__).parent.parent
OURS = [path for part in ("exporter", "runtime", "cli") for path in (ROOT / part).rglob("*.py")]


@pytest.fixture(scope="module")
def names():
    """Of the modules that somebody could put in our way: all of the standard library, and all that is installed."""
    return sorted({*sys.stdlib_module_names, *metadata.packages_distributions(), *neuron_machine.MODULES})


@pytest.fixture
def trap(tmp_path, names, monkeypatch):
    """A current directory with a module of each name, which leaves a trace; and a function that returns the traces."""
    folder, seen = tmp_path / "trap", tmp_path / "seen"
    folder.mkdir()
    for name in names:
        if name.isidentifier():
            (folder / f"{name}.py").write_text(f"open({str(seen)!r}, 'a').write('{name} ')\n")
    monkeypatch.chdir(folder)
    return lambda: seen.read_text() if seen.exists() else ""


def test_the_trap_is_one(trap, names):
    assert {"msgspec", "numpy", "torch", "json", "ctypes", "runpy"} <= set(names)
    subprocess.run([sys.executable, "-c", "import msgspec"], check=True)
    assert trap() == "msgspec "


@pytest.mark.parametrize(
    "inherited", [None, "", os.pathsep, f"{os.pathsep}/no/such/place", f"/no/such/place{os.pathsep}"]
)
def test_a_child_does_not_import_from_the_current_directory(trap, monkeypatch, inherited):
    if inherited is not None:
        monkeypatch.setenv("PYTHONPATH", inherited)
    # It answers a job that it cannot do, after all its imports.
    done = child.run("precast.runtime.bench.worker", given=json.dumps({"model": "./missing", "options": {}}))
    assert json.loads(done.stdout.splitlines()[-1])["error"][0] == "ArtifactError"
    assert trap() == ""


def test_a_child_has_the_arguments_the_input_and_the_environment(tmp_path, monkeypatch):
    (tmp_path / "told.py").write_text(
        "import json, os, sys\n"
        "print(json.dumps([sys.argv, sys.stdin.read(), os.environ.get('A'), os.environ.get('B')]))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("A", "1")
    done = child.run("told", "x y", 7, given="ä", changes={"A": None, "B": "2"})
    assert json.loads(done.stdout) == [[str(tmp_path / "told.py"), "x y", "7"], "ä", None, "2"]


def test_bench_from_within_a_foreign_folder(trap):
    done = _run("bench", str(ROOT / "tests/artifacts/0.1.0/encoder"), "--repeat", "1", "-q", "--json")
    assert done.returncode == 0, done.stderr
    assert trap() == ""


def test_python_m_precast_from_within_a_foreign_folder(trap):
    # To find what -m names, Python itself imports from there, which python -P -m keeps it from.
    for name in sys.stdlib_module_names:
        Path(f"{name}.py").unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "precast", "cache", "list"], check=True, capture_output=True)
    assert trap() == ""


def test_a_child_of_inductor_does_not_import_from_the_current_directory(trap):
    workspace = pytest.importorskip("precast.exporter.backends.aoti.workspace")
    with workspace.compiler_workspace():
        subprocess.run([sys.executable, "-c", "from ctypes import cdll"], check=True)
    assert trap() == ""


@pytest.mark.slow
def test_an_export_from_within_a_foreign_folder(trap, checkpoint, tmp_path):
    """It is validated in a child; inductor has some of its own."""
    source = checkpoint("bert", "AutoModel")
    for file in source.iterdir():
        (Path.cwd() / file.name).write_bytes(file.read_bytes())
    shapes = ("--batch-size", "1", "--sequence-length", "16", "--backend", "aoti")
    done = _run("export", ".", *shapes, "-o", str(tmp_path / "out"), "-q")
    assert done.returncode == 0, done.stderr
    done = _run("validate", str(tmp_path / "out"), "--reference", ".", "-q")
    assert done.returncode == 0, done.stderr
    assert trap() == ""


@pytest.mark.slow
def test_compiling_for_neuron_from_within_a_foreign_folder(trap, checkpoint, tmp_path, monkeypatch):
    neuron_machine.install(monkeypatch, tmp_path)
    shapes = ("--batch-size", "1", "--sequence-length", "16", "--backend", "neuron", "--instance-type", "trn1")
    done = _run("export", str(checkpoint("bert", "AutoModel")), *shapes, "-o", str(tmp_path / "out"), "-q")
    assert done.returncode == 0, done.stderr
    assert trap() == ""


def _run(*words):
    """The installed command, which has its own folder first among the places, and not the current one."""
    precast = Path(sysconfig.get_path("scripts")) / "precast"
    return subprocess.run([precast, *words], capture_output=True, text=True, check=False)


def test_nobody_else_starts_an_interpreter():
    for path in OURS:
        asked = [node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8"))) if _names_the_interpreter(node)]
        assert not asked or path.name == "child.py", f"{path}, line {asked}"


def test_benchmarks_start_modules_of_others_isolated():
    found = 0
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            words = [ast.unparse(each) for each in getattr(node, "elts", ())]
            if "'-m'" in words and "sys.executable" in words:
                ours = words[words.index("'-m'") + 1].startswith("'contenders.")
                assert ours or "'-I'" in words, f"{path}, line {node.lineno}"
                found += 1
    assert found


def _names_the_interpreter(node):
    return isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.executable", "sys._base_executable")
