"""The shape of the code: rooms without circles, few arrows between them, small functions, words that do not mislead."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator

import pytest
from source_tree import FILES, ROOT, imported_names, module_name

MISLEADING = ("hole", "hindrance", "settle", "stretch", "question")
"""Words that stood for something else than they say, or for several things; docs/architecture.md has those instead."""


MODULES = {module_name(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}


def _imported(name: str, tree: ast.AST) -> Iterator[str]:
    """The modules of ours that the tree of the module `name` imports anywhere."""
    for one in imported_names(MODULES[name], tree):
        parts = one.split(".")
        prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        longest = next((each for each in prefixes if each in MODULES), name)
        if longest != name:
            yield longest


ARROWS = {name: set(_imported(name, tree)) for name, tree in TREES.items()}


def _room(name: str) -> str:
    """The folder directly below runtime, exporter or cli that a module is in; a loose module is a room of its own."""
    return ".".join(name.split(".")[:3])


def _circles(graph: dict[str, set[str]]) -> list[str]:
    """The nodes from which an arrow leads back to them."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    return [node for node in graph if node in reached(node)]


def _rooms(part: str) -> dict[str, set[str]]:
    """Which room of a part imports from which other."""
    graph: dict[str, set[str]] = {}
    for name, arrows in ARROWS.items():
        for other in arrows:
            if name.startswith(f"precast.{part}.") and other.startswith(f"precast.{part}."):
                graph.setdefault(_room(name), set()).update({_room(other)} - {_room(name)})
    return graph


def test_a_circle_would_be_found():
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    late = ast.parse("def f():\n    from .plan import Plan\nif TYPE_CHECKING:\n    from ..errors import UsageError")
    assert set(_imported("precast.runtime.models.base", late)) == {"precast.runtime.models", "precast.runtime.errors"}


def test_no_module_imports_itself_by_way_of_others():
    assert _circles(ARROWS) == []


@pytest.mark.parametrize(("part", "most"), [("runtime", 84), ("exporter", 75), ("cli", 61)])
def test_rooms_are_few_and_know_few_others(part, most):
    graph = _rooms(part)
    assert _circles(graph) == []
    assert sum(map(len, graph.values())) <= most


@pytest.mark.parametrize("part", ["runtime", "exporter"])
def test_few_modules_lie_loose(part):
    loose = [path.name for path in (ROOT / part / "precast" / part).glob("*.py") if path.name != "__init__.py"]
    assert len(loose) <= 10


def _length(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring, which is as long as there are arguments to explain."""
    text = function.body[0] if ast.get_docstring(function) else None
    return function.end_lineno - function.lineno + 1 - (text.end_lineno - text.lineno + 1 if text else 0)


def test_functions_are_small():
    functions = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lines = sorted(map(_length, functions))
    assert statistics.median(lines) <= 8
    assert lines[int(0.9 * len(lines))] <= 26
    assert lines[-1] <= 60


def _identifiers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        for name in ("name", "id", "attr", "arg", "asname"):
            if isinstance(found := getattr(node, name, None), str):
                yield found


# There a question is one that a user asks of a text.
ANSWERING = (
    "precast.runtime.pipelines.answers", "precast.runtime.runner.jobs", "precast.runtime.runner.predicting",
    "precast.cli.predict",
)  # fmt: skip


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ANSWERING])
def test_no_name_misleads(module):
    words = re.compile(rf"(?:^|_)(?:{'|'.join(MISLEADING)})(?:s|d|ed|ing)?(?:_|$)")
    plain = (re.sub(r"(?<=[a-z])(?=[A-Z])", "_", each).lower() for each in _identifiers(TREES[module]))
    assert sorted({each for each in plain if words.search(each) and "question_answering" not in each}) == []
