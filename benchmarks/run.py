"""`make bench`: measure decoding, export and start-up side by side with peers.

A table for people goes to standard error; the last line of standard output is one JSON document. Nothing here fails
because a figure is bad: a machine that others use gives other figures, which is why results name their machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import machine
from harness import HERE, Answer, Target
from plan import BUILD, Plan

QUESTIONS = (
    "export_cost", "decode", "startup", "schemes", "practice", "native", "generate", "rows", "replicas", "encoders",
    "contexts", "four_bits", "parallel",
)  # fmt: skip
MODEL = BUILD / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = HERE / "results"


def main() -> None:
    """Ask the questions, show the answers."""
    options = _options()
    plan = _plan(options)
    facts = _facts()
    answers: dict[str, Answer] = {}
    for name in options.only:
        answers[name] = import_module(name).measure(plan)
        _show(answers[name])
        if plan.artifact is None and (plan.work / "artifact").exists():
            # What an earlier question exported was made by this very code.
            plan = replace(plan, artifact=plan.work / "artifact")
    facts |= {"load_after": os.getloadavg()[0], "waited_in_vain": len(plan.given_up)}
    _warn_if_busy(facts)
    result = {**facts, "questions": {name: answer.as_json() for name, answer in answers.items()}}
    if options.save:
        _save(result)
    print(json.dumps(result, ensure_ascii=False))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=QUESTIONS, metavar=",".join(QUESTIONS))
    parser.add_argument("--model", type=Path, default=MODEL, help="the checkpoint, a .gguf file")
    parser.add_argument("--artifact", type=Path, help="measure this artifact instead of exporting the model")
    parser.add_argument(
        "--artifacts", type=_artifacts, default={}, metavar="NAME=DIR,…",
        help="of `schemes`, instead of exporting: fp32, source, int8, int4, or names of your own",
    )  # fmt: skip
    parser.add_argument(
        "--without", type=lambda text: tuple(text.split(",")), default=(), metavar="NAME,…",
        help="of `schemes`: leave out whose name contains one of these",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few repetitions, to see that all works")
    parser.add_argument(
        "--wait", type=float, default=0, metavar="SECONDS", help="before each repetition, for an idle machine, at most"
    )
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    if unknown := sorted(set(options.only) - set(QUESTIONS)):
        parser.error(f"there is no question {unknown[0]}; the questions are: {', '.join(QUESTIONS)}")
    return options


def _artifacts(text: str) -> dict[str, Path]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if bad := [name for name, _, path in pairs if not (Path(path) / "config.json").is_file()]:
        raise argparse.ArgumentTypeError(f"{bad[0]!r} needs =DIR of an artifact")
    return {name: Path(path).resolve() for name, _, path in pairs}


def _plan(options: argparse.Namespace) -> Plan:
    work = BUILD / "bench"
    artifact = options.artifact and options.artifact.resolve()
    if work / "artifact" not in (artifact, *options.artifacts.values()):
        shutil.rmtree(work / "artifact", ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    return Plan(
        model=options.model.resolve(),
        artifact=artifact,
        artifacts=options.artifacts,
        without=options.without,
        work=work,
        threads=machine.threads(),
        is_quick=options.quick,
        patience=options.wait,
        note=_note,
    )


def _facts() -> dict[str, Any]:
    return {
        "format": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.revision(),
        "machine": machine.describe(),
        "load_before": os.getloadavg()[0],
    }


def _show(answer: Answer) -> None:
    _say(f"\n{answer.title}")
    _say(_table([answer.header, *answer.rows]))
    _say(_table([_judged(target) for target in answer.targets]))
    for note in answer.notes:
        _say(f"  {note}")


def _judged(target: Target) -> list[str]:
    bound = f"{'>=' if target.is_floor else '<='} {target.bound:g} {target.unit}".rstrip()
    value = "not measured" if target.value is None else f"{target.value:.4g}"
    return [{True: "met", False: "NOT met", None: "unknown"}[target.is_met], target.name, value, bound]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; the first of words flush left, figures flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(_cell(*each) for each in zip(row, widths, strict=True)) for row in rows)


def _cell(text: str, width: int) -> str:
    return text.rjust(width) if text[:1].isdigit() else text.ljust(width)


def _warn_if_busy(facts: dict[str, Any]) -> None:
    """A figure from a busy machine is no figure; ratios suffer less, since contenders take turns."""
    facts["is_busy"] = facts["load_before"] > 0.3 * (os.cpu_count() or 1)
    if facts["is_busy"]:
        _say(f"\nOthers used the machine when this began (load {facts['load_before']:.1f}); consider --wait 60.")
    if facts["waited_in_vain"]:
        _say(f"{facts['waited_in_vain']} repetitions began although the machine was busy.")


def _save(result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    asked = tuple(result["questions"])
    part = "" if asked == QUESTIONS else "-" + "-".join(asked).replace("_", "-")
    path = RESULTS / f"{result['date'][:10]}-{machine.slug()}{part}.json"
    path.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8")
    _say(f"\nSaved to {path.relative_to(HERE.parent)}")


def _note(text: str) -> None:
    """Progress, on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    clear = "\033[K" if sys.stderr.isatty() else ""
    print(f"{clear}{text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
