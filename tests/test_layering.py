"""Who may import whom, what nobody may do, and what stays unloaded until it is needed.

The rule in words is in docs/architecture.md. All imports count: within functions and for type checkers, too.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from source_tree import FILES, PARTS, ROOT, imported_names, module_name

HEAVY = ("torch", "transformers", "optimum", "onnx", "onnxscript", "onnx_ir", "safetensors", "gguf", "accelerate")

_ENGINES = ("aoti_torch", "device", "export", "gpu", "neuron", "operator_checks", "operator_sizes", "torch_views")
NATIVE = tuple(f"precast.runtime.engines.{name}" for name in _ENGINES)
"""What runs on torch: imported when an artifact of these backends is opened."""

FOR_THE_EXPORTER = tuple(
    f"precast.runtime.{name}" for name in ("artifact", "hosts", "bench", "arguments", "child", "errors", "terminal")
)
"""Of the runtime the exporter knows the contract, the machine, timing in processes of their own, and what is below
all of them."""

DISTRIBUTIONS = {
    top: {canonicalize_name(name) for name in names} for top, names in metadata.packages_distributions().items()
}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())


def _within(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def _statements(path: Path) -> list[ast.stmt]:
    """The file's statements, without what is only there for type checkers."""
    body = ast.parse(path.read_text("utf-8")).body
    return [node for node in body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]


def _imported_on_load(path: Path) -> list[str]:
    """What importing the file imports: nothing of what its functions do."""
    statements = (node for node in _statements(path) if not isinstance(node, ast.FunctionDef | ast.ClassDef))
    return [name for node in statements for name in imported_names(path, node)]


def _may_import(part: str, name: str, module: str) -> bool:
    if module in NATIVE and _within(name, "torch"):
        return True
    if part == "runtime":
        return not _within(name, "precast.exporter", "precast.cli", *HEAVY)
    if part == "exporter" and _within(name, "precast.runtime"):
        return _within(name, *FOR_THE_EXPORTER)
    return part == "cli" or not _within(name, "precast.cli")


def test_there_is_something_to_check():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PARTS)
    path = ROOT / "runtime/precast/runtime/artifact/new.py"
    tree = ast.parse("from ..storage import hub\nfrom .schema import File\ndef f():\n import os.path")
    names = list(imported_names(path, tree))
    assert names == ["precast.runtime.storage.hub", "precast.runtime.artifact.schema.File", "os.path"]


@every_file
def test_imports_point_downwards(path):
    part, names = path.relative_to(ROOT).parts[0], imported_names(path, ast.parse(path.read_text("utf-8")))
    assert [name for name in names if not _may_import(part, name, module_name(path))] == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.is_relative_to(ROOT / "cli")], ids=lambda path: path.stem
)
def test_the_command_line_starts_without_the_heavy_libraries(path):
    assert not any(_within(name, "precast.exporter", "onnxruntime", *HEAVY) for name in _imported_on_load(path))


@every_file
def test_what_is_imported_is_declared(path):
    """The metadata asks for it, in its `export` extra where the exporter needs it. That another brings it is luck."""
    extras = ("", "export") if path.is_relative_to(ROOT / "exporter") else ("",)
    extras += ("torch",) if module_name(path) in NATIVE else ()
    # These say how to install what they lack.
    extras += ("files",) if module_name(path) == "precast.runtime.runner.rows" else ()
    extras += ("peft",) if module_name(path) == "precast.exporter.adapters.merge" else ()
    asked = [Requirement(line) for line in metadata.requires("precast") or ()]
    declared = {
        canonicalize_name(one.name)
        for one in asked
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras)
    }
    imported = {name.partition(".")[0] for node in _statements(path) for name in imported_names(path, node)}
    for name in imported - sys.stdlib_module_names - {"precast"}:
        assert DISTRIBUTIONS[name] & declared, f"{name} comes with {DISTRIBUTIONS[name]}"


def test_the_namespace_has_no_init_file():
    assert [path for part in PARTS for path in (ROOT / part).glob("precast/__init__.py*")] == []


@every_file
def test_nothing_is_pickled_and_no_error_is_swallowed(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert not any(_within(name, "pickle", "cloudpickle", "dill", "shelve") for name in imported_names(path, tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            # numpy.load and torch.load unpickle when they are told to.
            allowed = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert allowed.get("allow_pickle") != "True", f"line {node.lineno}"
            assert allowed.get("weights_only") != "False", f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler) and _catches_everything(node):
            silent = all(isinstance(line, ast.Pass | ast.Continue) or _is_text(line) for line in node.body)
            assert not silent, f"line {node.lineno} swallows every error"


def _catches_everything(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or re.search(r"\b(Base)?Exception\b", ast.unparse(handler.type)) is not None


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("precast.runtime", ("numpy", "onnxruntime", "tokenizers", "huggingface_hub", "msgspec", *HEAVY)),
        ("precast.runtime.errors", ("numpy", "onnxruntime", *HEAVY)),
        ("precast.runtime.artifact", ("numpy", "onnxruntime", *HEAVY)),
        ("precast.runtime.models.causal_lm", HEAVY),
        ("precast.runtime.models.text", HEAVY),
        ("precast.runtime.storage.hub", HEAVY),
        ("precast.runtime.models.training_loss", HEAVY),
        ("precast.runtime.pipelines", HEAVY),
        ("precast.runtime.runner.comparison", HEAVY),
        ("precast.runtime.runner.offline", HEAVY),
        ("precast.exporter.support", HEAVY),
        ("precast.exporter", HEAVY),
        ("precast.cli", ("numpy", "onnxruntime", "huggingface_hub", "msgspec", "rich", *HEAVY)),
    ],
)
def test_importing_loads_no_more_than_it_needs(module, absent):
    code = f"import sys, json, {module}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert module in loaded
    assert [name for name in absent if name in loaded] == []


@pytest.mark.parametrize(("setting", "expected"), [(None, "1"), ("0", "0")])
@pytest.mark.parametrize("module", ["precast.runtime", "precast.exporter"])
def test_telemetry_is_off_before_onnxruntime_is_imported(module, setting, expected, tmp_path):
    """It writes into the user's cache as soon as it is imported."""
    told = {} if setting is None else {"ORT_DISABLE_TELEMETRY": setting}
    kept = {
        name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    code = f"import os, {module}, onnxruntime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **told, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [expected]
    if expected == "1":
        assert list(tmp_path.iterdir()) == []
