"""Makes the support table, `exporter/precast/exporter/support.json` and `docs/SUPPORT.md`, by trying everything.

    python tests/support.py [--jobs 2] [TYPE ...]

Every pair of a model type and a task in `tests/zoo` is made into a tiny random checkpoint and exported with validation,
decoders also with `--quantize int8`. Workers try many pairs each; one that dies takes only its pair with it. With types
named, only their lines are made anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from workers import attempt_all, serve

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "exporter/precast/exporter/support.json"
PAGE = ROOT / "docs/SUPPORT.md"
ZOOS = ("decoders", "encoders", "seq2seq")
AXES = ("batch_size", "text_batch_size", "num_choices", "sequence_length", "audio_sequence_length")

Pair = tuple[str, str, str]
"""The zoo's name, the model type, the task."""


def pairs(zoo: str) -> list[Pair]:
    """All that the zoo has."""
    return [(zoo, *pair) for pair in import_module(f"zoo.{zoo}").pairs()]


def attempt(pair: Pair) -> dict[str, Any]:
    """Export one pair and compare; a line of the table, with `error` instead where it fails."""
    from precast.runtime.errors import PrecastError

    zoo, model_type, task = pair
    line: dict[str, Any] = {"model_type": model_type, "task": task}
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = import_module(f"zoo.{zoo}").make(Path(folder) / "source", model_type, task)
            line |= _measured(pair, source, Path(folder) / "out")
            if zoo == "decoders":
                line["kl_int8"] = _kl_of_int8(pair, source, Path(folder) / "int8")
        except PrecastError as error:
            line["error"] = f"{type(error).__name__}: {error}"
        except Exception as error:
            # Whatever transformers' own code raises for a configuration is this pair's result too.
            line["error"] = f"{type(error).__module__}.{type(error).__name__}: {error}"
    return line


def _measured(pair: Pair, source: Path, target: Path) -> dict[str, Any]:
    variant = _export(pair, source, target).contract.variants[0]
    figures = variant.accuracy.figures
    assert variant.accuracy.status == "passed", variant.accuracy
    difference = figures["max_abs_difference"] / max(1.0, figures["max_abs_reference"])
    return {"way": _way(pair, variant), "difference": float(f"{difference:.1g}")}


def _way(pair: Pair, variant: Any) -> str:
    from precast.exporter.architectures import ADAPTERS

    if variant.graphs[-1].states:
        return "states"
    if "attention" in variant.compiler.options:
        return str(variant.compiler.options["attention"])
    ways = {"encoders": "encoder", "seq2seq": "encoder and decoder"}
    return ways.get(pair[0]) or ("adapter" if pair[1] in ADAPTERS else "operator")


def _kl_of_int8(pair: Pair, source: Path, target: Path) -> float | None:
    from precast.runtime.errors import PrecastError

    try:
        artifact = _export(pair, source, target, quantize="int8", accept_loss=True)
    except PrecastError:
        return None
    return float(f"{artifact.contract.variants[0].accuracy.figures['kl_divergence']:.1g}")


def _export(pair: Pair, source: Path, target: Path, **options: Any) -> Any:
    from precast.exporter import ExportOptions, export

    zoo, model_type, task = pair
    shapes = import_module(f"zoo.{zoo}").options(model_type, task)
    return export(str(source), target, ExportOptions(task=task, **shapes, **options))


# ---------------------------------------------------------------- the table


def expected_reason(pair: Pair) -> str | None:
    """Why the zoo says that this pair is refused."""
    refused = getattr(import_module(f"zoo.{pair[0]}"), "REFUSED", {})
    found: str | None = refused.get(pair[1:]) or refused.get(pair[1])
    return found


def surprise(pair: Pair, line: dict[str, Any]) -> str | None:
    """What is wrong where a pair does not do what the zoo says."""
    reason = expected_reason(pair)
    if reason is None and "error" in line:
        return f"{pair[1]} {pair[2]} fails: {line['error']}"
    if reason is not None and "error" not in line:
        return f"{pair[1]} {pair[2]} passes now; take it out of REFUSED ({reason})"
    return None


def as_line(pair: Pair, line: dict[str, Any]) -> dict[str, Any]:
    """The line as the table keeps it."""
    reason = expected_reason(pair)
    known = {"model_type": pair[1], "task": pair[2]}
    if reason:
        return known | {"reason": reason}
    return {name: line[name] for name in line if line[name] is not None} | {"axes": axes(pair)}


def axes(pair: Pair) -> list[str]:
    """The sizes that an export of this pair must be given."""
    zoo, model_type, task = pair
    given = import_module(f"zoo.{zoo}").options(model_type, task)
    # A decoder takes what its configuration says where nothing is given; so do images, and batches of encoder-decoders.
    needed = {"encoders": AXES, "seq2seq": ("sequence_length",), "decoders": ()}[zoo]
    return [axis for axis in AXES if axis in given and axis in needed]


def write(lines: Iterable[dict[str, Any]]) -> None:
    """Write the table and its page."""
    from importlib.metadata import version

    ordered = sorted(lines, key=lambda line: (line["model_type"], line["task"]))
    body = ",\n".join(json.dumps(line, ensure_ascii=False) for line in ordered)
    TABLE.write_text(f'{{"transformers": "{version("transformers")}", "lines": [\n{body}\n]}}\n', "utf-8")
    PAGE.write_text(page(json.loads(TABLE.read_text("utf-8"))), "utf-8")


def page(table: dict[str, Any]) -> str:
    """`docs/SUPPORT.md`."""
    lines = table["lines"]
    parts = [
        "# What is supported",
        "",
        f"Made by `python tests/support.py`, which exports a tiny random checkpoint of every model type (transformers "
        f"{table['transformers']}, backend `onnx`) and compares it with the eager model: padded on either side, at the "
        f"edges of its shapes, and for decoders token by token. The difference is the largest one, relative to "
        f"max(1, max|reference|); at most 1e-4 passes. `int8` is the KL divergence that `--quantize int8` costs with "
        f"these random weights: it says that the model can be quantized, not how well a trained one bears it.",
        "",
        "`precast tasks MODEL` answers from this table; what it refuses is refused before a weight is downloaded.",
    ]
    for task in dict.fromkeys(line["task"] for line in sorted(lines, key=lambda line: line["task"])):
        parts += ["", f"## {task}", "", *_section([line for line in lines if line["task"] == task])]
    return "\n".join(parts) + "\n"


def _section(lines: list[dict[str, Any]]) -> list[str]:
    passed, refused = ([line for line in lines if ("reason" in line) is wanted] for wanted in (False, True))
    rows = [f"{len(passed)} model types pass{f', {len(refused)} are refused' if refused else ''}."]
    if passed:
        has_int8 = any("kl_int8" in line for line in passed)
        rows += ["", "| model type | way | difference |" + (" int8 |" if has_int8 else "")]
        rows += ["|---|---|---|" + ("---|" if has_int8 else "")]
        rows += [_row(line, has_int8) for line in passed]
    if refused:
        rows += ["", "| refused | because |", "|---|---|"]
        rows += [f"| {line['model_type']} | {line['reason']} |" for line in refused]
    return rows


def _row(line: dict[str, Any], has_int8: bool) -> str:
    cells = [line["model_type"], line["way"], f"{line['difference']:.0e}"]
    if has_int8:
        cells.append(f"{line['kl_int8']:.0e}" if "kl_int8" in line else "–")
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Try what was asked for, say how it goes, write the table; 1 where something is not as the zoo says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="only these model types")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--zoo", choices=ZOOS, help="only this part")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        serve(lambda pair: attempt(tuple(pair)))
        return 0
    todo = [pair for zoo in ZOOS if asked.zoo in (None, zoo) for pair in pairs(zoo)]
    todo = [pair for pair in todo if not asked.types or pair[1] in asked.types]
    made: dict[tuple[str, str], dict[str, Any]] = {}
    surprises = []
    for pair, answer in zip(todo, attempt_all(__file__, todo, asked.jobs), strict=True):
        line = {"model_type": pair[1], "task": pair[2], **answer}
        said = surprise(pair, line)
        print(f"{pair[1]:<32}{pair[2]:<32}{said or line.get('error', line.get('difference'))}", flush=True)
        if said:
            surprises.append(said)
        else:
            made[pair[1:]] = as_line(pair, line)
    # Read now: others may have been made meanwhile.
    kept = {(line["model_type"], line["task"]): line for line in json.loads(TABLE.read_text("utf-8"))["lines"]}
    known = {pair[1:] for zoo in ZOOS for pair in pairs(zoo)}
    tried = {pair[1:] for pair in todo}
    write([*(line for key, line in kept.items() if key in known - tried), *made.values()])
    print("\n".join(["", *surprises, f"{len(made)} lines made, {len(surprises)} surprises"]))
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
