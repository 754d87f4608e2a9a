"""Counts what native code calls of PyTorch, over every model type of the tests: what libraries that stand alone lack.

    python tools/native_calls.py [--jobs 2] [--zoo decoders] [TYPE ...]

Every pair of a model type and a task in `tests/zoo` is lowered for `--backend aoti`, and AOTInductor writes its source,
which is read and not compiled. Prints each pair with the calls that the pieces of
`exporter/backends/aoti/standalone/cpp` lack, then the calls in the order of how many pairs make them; the last line is
JSON.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import with_tests  # noqa: F401
from support_table import KINDS, Pair, chosen_pairs, expected_reason, parse_arguments
from workers import attempt_all, serve

from precast.exporter.backends.aoti import compiler, library
from precast.exporter.backends.aoti.standalone import link

ROOT = Path(__file__).parents[1]
# What the interface to the runtime defines or PyTorch's headers answer themselves.
_CALL = re.compile(r"\b(aoti_torch_\w+|Sleef_\w+)\s*\(")


class _Enough(Exception):
    """All graphs were written; there is nothing to publish."""


def covered() -> set[str]:
    """The functions that the pieces have."""
    texts = [file.read_text("utf-8") for file in sorted(link._SOURCES.glob("*.cpp"))]
    return {name for text in texts for name in re.findall(r"^ABI [\w*]+[ *]+(\w+)\(", text, re.MULTILINE)}


def attempt(pair: Pair) -> dict[str, Any]:
    """The calls in the sources of a pair's graphs, or the error that kept them from being written."""
    zoo, model_type, task = pair
    called: set[str] = set()

    def write_sources(exported: Any, target: Path, isa: str, device: str = "cpu", *_: Any) -> None:
        options = library._OPTIONS | library._CPU_OPTIONS | {"aot_inductor.package_cpp_only": True}
        files = library._compile(exported, options, device == "cpu", None)
        sources = [Path(each).read_text("utf-8") for each in files if isinstance(each, str) and each.endswith(".cpp")]
        called.update(name for text in sources for name in _CALL.findall(text))
        target.write_bytes(b"")

    def stop(*_: Any, **__: Any) -> None:
        raise _Enough

    from precast.exporter import ExportOptions, export, pipeline

    module = import_module(f"zoo.{zoo}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = module.make(Path(folder) / "source", model_type, task)
            options = ExportOptions(
                task=task, backend="aoti", isa="avx2", validate=False, **module.options(model_type, task)
            )
            with (
                mock.patch.object(compiler, "build_library", write_sources),
                mock.patch.object(pipeline, "write_config", stop),
            ):
                export(str(source), Path(folder) / "out", options)
        except _Enough:
            return {"calls": sorted(called)}
        except Exception as error:
            # Whatever transformers or Inductor raise for a configuration is this pair's result.
            return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"error": "it was published"}


def main() -> int:
    """Count, and print."""
    asked = parse_arguments(__doc__)
    if asked.worker:
        serve(lambda pair: attempt(tuple(pair)))
        return 0
    todo = [pair for pair in chosen_pairs(asked) if not expected_reason(pair)]
    have, lacking, alone, tried = covered(), Counter[str](), Counter[str](), Counter[str]()
    for pair, answer in zip(todo, attempt_all(__file__, todo, asked.jobs), strict=True):
        missing = sorted(set(answer.get("calls", [])) - have)
        said = answer.get("error") or ", ".join(missing) or "stands alone"
        print(f"{pair[1]:<32}{pair[2]:<32}{said}", flush=True)
        if "error" not in answer:
            lacking.update(missing)
            tried[KINDS[pair[0]]] += 1
            alone[KINDS[pair[0]]] += not missing
    for name, count in lacking.most_common():
        print(f"{count:5} {name}")
    print(json.dumps({"tried": tried, "alone": alone, "lacking": dict(lacking.most_common())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
