"""Runs test suites of other projects against precast, and prints how many of their tests hold.

    PYTHONPATH=tests:tests/helpers python -m foreign.run FOLDER [SUITE ...]

FOLDER is where the suites are, or are to be: what is missing is fetched from its public repository, at a revision that
is named here; transformers' is the tag of the installed release. What they import and we do not is installed into
FOLDER/packages, not into the environment.
Ends with 1 where a test has failed that tests/foreign/expected.py gives no reason for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from . import tally

TESTS = Path(__file__).parents[1]
LIMIT = 7200
"""Seconds that a suite may take."""


@dataclass(frozen=True)
class Source:
    """A public repository."""

    url: str
    revision: str
    """A tag, or a commit."""
    is_there: str
    """A file by which one knows that it is there."""


@dataclass(frozen=True)
class Suite:
    """Some files of a source, and the adapter that they are run with."""

    source: str
    adapter: str
    files: tuple[str, ...]


SOURCES = {
    "transformers": Source(
        "https://github.com/huggingface/transformers", f"v{version('transformers')}", "tests/generation/test_utils.py"
    ),
    "optimum-onnx": Source(
        "https://github.com/huggingface/optimum-onnx",
        "1939f27a1d04bd9fdf4c3b17eaa70a99dcd380c6",
        "tests/onnxruntime/test_decoder.py",
    ),
}
PACKAGES = ("datasets", "httpx", "parameterized", "timeout-decorator")
GENERATION = ("llama", "gpt2", "mistral", "qwen2", "bart", "t5")
PIPELINES = ("bert", "distilbert", "roberta", "gpt2", "llama", "vit", "resnet", "wav2vec2", "whisper")
SUITES = {
    "generation": Suite(
        "transformers",
        "generation",
        tuple(f"tests/models/{name}/test_modeling_{name}.py" for name in GENERATION),
    ),
    "processors": Suite(
        "transformers",
        "processors",
        ("tests/generation/test_logits_process.py", "tests/generation/test_stopping_criteria.py"),
    ),
    "pipelines": Suite(
        "transformers", "pipelines", tuple(f"tests/models/{name}/test_modeling_{name}.py" for name in PIPELINES)
    ),
    "optimum-onnx": Suite(
        "optimum-onnx",
        "optimum_onnx",
        tuple(f"tests/onnxruntime/test_{name}.py" for name in ("modeling", "decoder", "seq2seq")),
    ),
}


def main(given: list[str] | None = None) -> int:
    """Run the suites that are named, all by default; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}")
    asked = parser.parse_args(given)
    if unknown := [name for name in asked.suites if name not in SUITES]:
        parser.error(f"there is no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    folder = asked.folder.resolve()
    found = {}
    for name in asked.suites or SUITES:
        _get(SUITES[name].source, folder)
        lines = run(name, folder)
        found[name] = tally.figures(lines)
        _print(name, lines)
    print(json.dumps(found))
    return int(any(figures["failed"] for figures in found.values()))


def run(name: str, folder: Path) -> list[dict[str, Any]]:
    """What became of each test of a suite."""
    suite = SUITES[name]
    root, target = folder / suite.source, folder / f"{name}.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "--noconftest", "-q"]
    command += ["--tb=short", "--show-capture=no"]
    command += ["-p", "no:cacheprovider", "-p", "foreign.tally", "-p", f"foreign.{suite.adapter}", "-W", "ignore"]
    command += ["--tally", str(target), *suite.files]
    path = os.pathsep.join(map(str, (TESTS, TESTS / "helpers", root, folder / "packages")))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with (folder / f"{name}.log").open("w") as log, suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT, check=False
        )
    if not target.exists():
        sys.exit(f"The suite {name} did not end within {LIMIT} seconds, or did not run; {log.name} says which.")
    lines: list[dict[str, Any]] = json.loads(target.read_text("utf-8"))
    return lines


def _get(name: str, folder: Path) -> None:
    source, target = SOURCES[name], folder / name
    if not (target / source.is_there).exists():
        target.mkdir(parents=True, exist_ok=True)
        git = ["git", "-C", str(target)]
        steps = (["init", "-q"], ["fetch", "-q", "--depth", "1", source.url, source.revision],
                 ["checkout", "-q", "FETCH_HEAD"])  # fmt: skip
        if any(subprocess.run([*git, *step], check=False).returncode for step in steps):
            sys.exit(
                f"{name} {source.revision} could not be had. Where you have it, name its folder: make foreign FOREIGN=…"
            )
    if not (folder / "packages").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        constraints = TESTS.parent / "constraints.txt"
        subprocess.run([*pip, "-c", constraints, "--target", folder / "packages", *PACKAGES], check=True)


def _print(name: str, lines: list[dict[str, Any]]) -> None:
    print(f"{name}: {_counted(lines)}")
    for file, own in groupby(lines, lambda line: line["test"].partition("::")[0]):
        of_file = list(own)
        print(f"  {file}: {_counted(of_file)}")
        for line in of_file:
            if line["end"] in ("refused", "expected", "failed"):
                print(f"    {line['end']:8} {line['test']}: {line['words'].splitlines()[0]}")


def _counted(lines: list[dict[str, Any]]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in tally.figures(lines).items())


if __name__ == "__main__":
    sys.exit(main())
