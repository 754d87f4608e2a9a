"""`constraints.txt` pins everything that the tests need: a fresh clone gets what these were run with."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
# Builds of torch differ in what they bring along: CUDA's libraries, or nothing.
LEAVES = {"torch"}


def needed(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """Every distribution that `name` with these extras needs here, itself included."""
    found, todo = set(), [(name, extras)]
    while todo:
        current, wanted = todo.pop()
        if (current, wanted) in found:
            continue
        found.add((current, wanted))
        requirements = [] if current in LEAVES else metadata.requires(current) or []
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in found}


def test_whatever_the_tests_need_is_pinned():
    """If not: make constraints."""
    pinned = {canonicalize_name(name) for name in PINS}
    assert needed("precast", frozenset({"export", "dev"})) - pinned == {"precast"}
