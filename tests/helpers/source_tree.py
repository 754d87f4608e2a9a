"""The project's own modules as files and syntax: their names, and the names that they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("exporter", "runtime", "cli")
FILES = [path for part in PARTS for path in sorted((ROOT / part / "precast").rglob("*.py"))]


def module_name(path: Path) -> str:
    """`cli/precast/cli/env.py` -> `precast.cli.env`."""
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, tree: ast.AST) -> Iterator[str]:
    """The absolute dotted names that `tree`, a part of the file at `path`, imports anywhere."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{name.name}" for name in node.names)
