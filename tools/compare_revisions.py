"""Shows whether two revisions of precast make the same artifacts, byte by byte.

    python tools/compare_revisions.py OLD [NEW] [--type TYPE ...] [--every] [--model NAME=PATH]

Tiny random checkpoints of `tests/zoo` are exported by each revision (NEW is by default what is checked out) with the
backends `onnx` and `export`, in this environment. Files are compared byte by byte; of config.json everything but the
format's number, the name of the input that says which cache positions are looked at, and what follows from these: the
digest. README.md names the release and is not compared. Ends with 1 where anything differs.

Without types a dozen are exported, with options of all kinds; with --every, all that the zoo has. --model adds a
checkpoint of one's own, such as --model smollm2=build/models/SmolLM2-135M-Instruct.Q4_1.gguf.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import with_tests  # noqa: F401

ROOT = Path(__file__).parents[1]
ZOOS = ("decoders", "encoders", "seq2seq")
FEW = (
    *("llama", "gpt2", "bloom", "gemma3_text", "gpt_oss", "mamba", "bert", "deberta-v2", "vit", "wav2vec2"),
    *("t5", "bart", "whisper"),
)
WAYS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"quantize": "int8"},
        {"quantize": "int4", "kv_cache": "int8"},
        {"batch_size": 2, "prefill_lengths": [8, 16]},
        {"backend": "export", "auto_cast": "matmul"},
        {"backend": "export", "quantize": "int4"},
    ],
    "bert": [{"batch_size": [1, 3], "sequence_length": [8, 24]}, {"backend": "export", "dtype": "bfloat16"}],
}
"""Options besides the plain export by each backend."""
BACKENDS = ("onnx", "export")
OLD_NAMES = {"rows": "cache_positions"}
UNCOMPARED = ("README.md", "bench.json")

# Run by each revision, whose roots are on its path: jobs in, a line for each out.
EXPORTS = """
import json, sys
from precast.exporter import ExportOptions, export
from precast.runtime.errors import PrecastError
for job in json.load(open(sys.argv[1])):
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in job["options"].items()}
    try:
        export(job["source"], job["target"], ExportOptions(**options))
        print("made", flush=True)
    except PrecastError as error:
        print(f"{type(error).__name__}: {error}".replace(job["target"], "OUT"), flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--type", action="append", default=[], dest="types", metavar="TYPE")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        types = asked.types or (None if asked.every else FEW)
        jobs = [*_of_the_zoo(place, types), *(_of_model(given) for given in asked.model)]
        told = [
            _export_all(revision, jobs, place / name) for revision, name in ((asked.old, "old"), (asked.new, "new"))
        ]
        differing = 0
        for index, (job, before, after) in enumerate(zip(jobs, *told, strict=True)):
            found = list(_differences(place / "old" / str(index), place / "new" / str(index), before, after))
            differing += bool(found)
            print(
                f"{job['name']}: {'; '.join(found) or ('identical' if after == 'made' else f'refused alike: {after}')}"
            )
    print(json.dumps({"exports": len(jobs), "differing": differing}))
    return int(differing > 0)


def _of_the_zoo(place: Path, types: Any) -> Iterator[dict[str, Any]]:
    """Jobs for every pair of a model type and a task, with a checkpoint each."""
    for zoo in ZOOS:
        module = import_module(f"zoo.{zoo}")
        for model_type, task in module.pairs():
            if types is not None and model_type not in types:
                continue
            source = module.make(place / "sources" / zoo / f"{model_type}-{task}", model_type, task)
            sizes = {"task": task, **module.options(model_type, task)}
            for way in [*({"backend": backend} for backend in BACKENDS), *WAYS.get(model_type, ())]:
                said = " ".join(f"{name}={value}" for name, value in way.items())
                options = {**sizes, "validate": False, **way}
                yield {"name": f"{model_type} {task} {said}", "source": str(source), "options": options}


def _of_model(given: str) -> dict[str, Any]:
    name, _, path = given.partition("=")
    return {"name": name, "source": str(Path(path).resolve()), "options": {"sequence_length": [256], "validate": False}}


def _export_all(revision: str | None, jobs: list[dict[str, Any]], folder: Path) -> list[str]:
    """What one revision says of each job, with the artifacts in `folder`, by the jobs' numbers."""
    folder.mkdir()
    root = ROOT
    if revision is not None:
        root = folder / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", root, revision], check=True)
    work = folder / "jobs.json"
    work.write_text(json.dumps([{**job, "target": str(folder / str(index))} for index, job in enumerate(jobs)]))
    try:
        path = os.pathsep.join(str(root / part) for part in ("runtime", "exporter", "cli"))
        environment = {**os.environ, "PYTHONPATH": path, "PRECAST_HOME": str(folder / "home")}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", EXPORTS, work],
            env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    finally:
        if revision is not None:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", root], check=True)
    return done.stdout.splitlines()


def _differences(old: Path, new: Path, before: str, after: str) -> Iterator[str]:
    """What the artifacts of one job differ in, in words."""
    if before != after:
        yield f"{before!r} became {after!r}"
    if "made" not in (before, after) or before != after:
        return
    names = {path.relative_to(each).as_posix() for each in (old, new) for path in each.rglob("*") if path.is_file()}
    for name in sorted(names - {*UNCOMPARED, "config.json"}):
        one, other = old / name, new / name
        if not (one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()):
            yield name
    yield from _differing(_config(old), _config(new), "config.json")


def _config(path: Path) -> Any:
    """config.json without what may differ, and with the names of today."""
    config = json.loads((path / "config.json").read_text())
    for name in ("digest", "format_version", "precast_version"):
        del config["precast"][name]
    for variant in config["precast"]["variants"]:
        for graph in variant["graphs"]:
            for spec in graph["inputs"]:
                spec["name"] = OLD_NAMES.get(spec["name"], spec["name"])
    return config


def _differing(one: Any, other: Any, at: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys()):
            yield from _differing(one.get(name), other.get(name), f"{at}.{name}")
    elif one != other:
        yield f"{at}: {json.dumps(one)[:80]} became {json.dumps(other)[:80]}"


if __name__ == "__main__":
    sys.exit(main())
