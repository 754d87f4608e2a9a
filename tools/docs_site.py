"""Adds to the site of mkdocs.yml what is not in `docs/`: other pages, pictures, and the Python API."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from precast import exporter, runtime

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "docs/README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Documents by where they lie in the repository, and the names of their pages."""
PICTURES = "benchmarks/results/"
_LINK = re.compile(r"(!?)\[([^\]\[]*)\]\(([^)\s]+)\)")

Page = Any


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that are not in `docs/`."""
    for source, name in PAGES.items():
        if not (ROOT / "docs" / name).is_file() and files.get_file_from_path(name) is None:
            text = (ROOT / source).read_text("utf-8")
            files.append(File.generated(config, name, content=with_links_of_the_site(text, posixpath.dirname(source))))
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    files.append(File.generated(config, "api.md", content=api_page()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """The text of a page in `docs/`, whose links may lead out of that folder."""
    is_ours = page.file.generated_by is not None
    return markdown if is_ours else with_links_of_the_site(markdown, "docs")


def with_links_of_the_site(text: str, folder: str) -> str:
    """The text of a document in `folder`, with links to pages of the site; what is not in it loses its link."""

    def moved(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        path, anchor = target.partition("#")[0], target.partition("#")[2]
        if "://" in target or not path:
            return match[0]
        place = posixpath.normpath(posixpath.join(folder, path))
        name = PAGES.get(place) or _within("docs/", place) or _within(PICTURES, place, "results/")
        return f"{mark}[{words}]({name}{'#' if anchor else ''}{anchor})" if name else words

    return _LINK.sub(moved, text)


def _within(folder: str, place: str, instead: str = "") -> str | None:
    return instead + place.removeprefix(folder) if place.startswith(folder) else None


def api_page() -> str:
    """A page with the docstrings of all public names."""
    parts = ["# Python", "", "All of this is made of the docstrings. [usage.md](usage.md) shows it at work."]
    for package in (runtime, exporter):
        name = package.__name__
        parts += ["", f"## {name}", ""]
        parts += [_documented(f"{name}.{module}.{each}", f"{name}.{each}") for each, module in package._EXPORTS.items()]
    parts += ["", "## Errors", "", _documented("precast.runtime.errors", "precast.runtime.errors")]
    return "\n".join(parts) + "\n"


def _documented(place: str, shown: str) -> str:
    return f"::: {place}\n    options:\n      heading: {shown}\n      toc_label: {shown.rpartition('.')[2]}\n"
