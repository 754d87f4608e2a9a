"""Makes the support table, `exporter/precast/exporter/support.json` and `docs/support.md`, by trying everything.

    PRECAST_CORPUS=FOLDER python tools/support_table.py [--jobs 2] [TYPE ...]

Every pair of a model type and a task in `tests/zoo` is made into a tiny random checkpoint and exported with validation,
decoders also with `--quantize int8`. Where `FOLDER/configs` holds a published configuration for a pair, its line is
measured on that, with fewer and narrower layers and all else as published, and names it; the type's default
configuration, whose windows and chunks are as short as the texts, has to pass too, and is the one that is quantized.
All other lines are measured on defaults. Without the folder, lines that name a configuration are tried on their
defaults and kept as they are.

Workers try many pairs each; one that dies takes only its pair with it. With types named, only their lines are made
anew.
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

import with_tests  # noqa: F401
from corpus import PUBLISHED
from workers import attempt_all, serve
from zoo import configurations

from precast.runtime.artifact.tasks import TASKS, get_task
from precast.runtime.errors import PrecastError

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "exporter/precast/exporter/support.json"
PAGE = ROOT / "docs/support.md"
ZOOS = ("decoders", "language_models", "encoders", "seq2seq")
KINDS = {"decoders": "decoder", "language_models": "decoder", "encoders": "encoder", "seq2seq": "seq2seq"}
MEASURED = ("way", "difference", "kl_int8")
AXES = ("batch_size", "text_batch_size", "num_choices", "sequence_length", "audio_sequence_length")
WELL_KNOWN = (
    "llama", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma3_text", "gpt_oss", "phi3", "deepseek_v3",
    "gpt2", "bloom", "falcon", "mpt", "mamba2", "bert", "roberta", "deberta-v2", "modernbert", "distilbert",
    "vit", "dinov2", "swin", "convnext", "segformer", "yolos", "clip", "siglip", "wav2vec2", "hubert", "wavlm",
    "audio-spectrogram-transformer", "t5", "bart", "marian", "pegasus", "whisper",
)  # fmt: skip

Pair = tuple[str, str, str]
"""The zoo's name, the model type, the task."""


def pairs(zoo: str) -> list[Pair]:
    """All that the zoo has."""
    return [(zoo, *pair) for pair in import_module(f"zoo.{zoo}").pairs()]


def configuration(pair: Pair) -> Path | None:
    """The folder of the published configuration that the pair is measured on, if there is one."""
    return configurations.published_for(pair[1], _task(pair))


def _task(pair: Pair) -> Any:
    return get_task(pair[2], KINDS[pair[0]])


def attempt(pair: Pair, *, quantized: bool = True) -> dict[str, Any]:
    """Export one pair and compare; a line of the table, with `error` instead where it fails."""
    published = configuration(pair)
    if published is None:
        return _tried(pair, None, quantized)
    line = {"configuration": published.name} | _tried(pair, published, quantized)
    return line if "error" in line or expected_reason(pair) else _tried(pair, None, quantized) | line


def _tried(pair: Pair, published: Path | None, quantized: bool) -> dict[str, Any]:
    """How one configuration of a pair does: the published one, or else the default, which is `quantized` too."""
    line: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = _source(pair, published, Path(folder) / "source")
            sizes = _sizes(pair, published)
            line |= _measured(pair, _export(pair, source, Path(folder) / "out", **sizes))
            if quantized and not published and KINDS[pair[0]] == "decoder":
                line["kl_int8"] = _kl_of_int8(pair, source, Path(folder) / "int8", sizes)
        except PrecastError as error:
            line["error"] = f"{type(error).__name__}: {error}"
        except Exception as error:
            # Whatever transformers' own code raises for a configuration is this pair's result too.
            line["error"] = f"{type(error).__module__}.{type(error).__name__}: {error}"
    return line


def _source(pair: Pair, published: Path | None, path: Path) -> Path:
    zoo, model_type, task = pair
    if published:
        return configurations.make(path, published, _task(pair))
    made: Path = import_module(f"zoo.{zoo}").make(path, model_type, task)
    return made


def _sizes(pair: Pair, published: Path | None) -> dict[str, Any]:
    """Those of the zoo; images have the size that a published configuration says, where it says one."""
    zoo, model_type, task = pair
    sizes: dict[str, Any] = import_module(f"zoo.{zoo}").options(model_type, task)
    if published and task == "audio-xvector":
        # Convolutions over time, as published, read 15 frames at once.
        sizes = sizes | {"audio_sequence_length": (8000,)}
    says = published is not None and "image_size" in (published / "config.json").read_text("utf-8")
    return {name: sizes[name] for name in sizes if not (says and name == "image_size")}


def _measured(pair: Pair, artifact: Any) -> dict[str, Any]:
    variant = artifact.contract.variants[0]
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
    ways = {"encoder": "encoder", "seq2seq": "encoder and decoder"}
    return ways.get(KINDS[pair[0]]) or ("adapter" if pair[1] in ADAPTERS else "operator")


def _kl_of_int8(pair: Pair, source: Path, target: Path, sizes: dict[str, Any]) -> float | None:
    try:
        artifact = _export(pair, source, target, **sizes, quantize="int8", accept_loss=True)
    except PrecastError:
        return None
    return float(f"{artifact.contract.variants[0].accuracy.figures['kl_divergence']:.1g}")


def _export(pair: Pair, source: Path, target: Path, **options: Any) -> Any:
    from precast.exporter import ExportOptions, export

    return export(str(source), target, ExportOptions(task=pair[2], **options))


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
    named = {"configuration": line["configuration"]} if "configuration" in line else {}
    return known | named | {name: line[name] for name in MEASURED if line.get(name) is not None} | {"axes": axes(pair)}


def made_of(pair: Pair, line: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """The line anew; as it was `kept` where it names a published configuration that is not at hand."""
    made = as_line(pair, line)
    lacks = "configuration" in kept and "reason" not in made and not PUBLISHED.is_dir()
    return kept if lacks else made


def kept_lines() -> dict[tuple[str, str], dict[str, Any]]:
    """The lines of the table by type and task."""
    return {(line["model_type"], line["task"]): line for line in json.loads(TABLE.read_text("utf-8"))["lines"]}


def axes(pair: Pair) -> list[str]:
    """The sizes that an export of this pair must be given."""
    zoo, model_type, task = pair
    given = import_module(f"zoo.{zoo}").options(model_type, task)
    # A decoder takes what its configuration says where nothing is given; so do images, and batches of encoder-decoders.
    needed = {"encoder": AXES, "seq2seq": ("sequence_length",), "decoder": ()}[KINDS[zoo]]
    return [axis for axis in AXES if axis in given and axis in needed]


def write(lines: Iterable[dict[str, Any]]) -> None:
    """Write the table and its page."""
    from importlib.metadata import version

    ordered = sorted(lines, key=lambda line: (line["model_type"], line["task"]))
    body = ",\n".join(json.dumps(line, ensure_ascii=False) for line in ordered)
    TABLE.write_text(f'{{"transformers": "{version("transformers")}", "lines": [\n{body}\n]}}\n', "utf-8")
    PAGE.write_text(page(json.loads(TABLE.read_text("utf-8"))), "utf-8")


def page(table: dict[str, Any]) -> str:
    """`docs/support.md`."""
    lines = table["lines"]
    passed = [line for line in lines if "reason" not in line]
    published = sum("configuration" in line for line in passed)
    parts = [
        "# What is supported",
        "",
        f"Every model type of transformers {table['transformers']} was tried: a tiny random checkpoint is exported to "
        "`onnx` and compared with the eager model, padded on either side, at the edges of its shapes, and for decoders "
        "token by token. `precast tasks MODEL` answers from this table, and what it refuses is refused before a weight "
        "is downloaded. Whole files as people publish them are tried in [published.md](published.md).",
        "",
        *_summary(lines),
        "",
        "Models whose code comes with the checkpoint need `--trust-remote-code`. They, and types that are newer than "
        "the table, are compared at export like all others. The table is of `--backend onnx`; the tests put "
        "representatives of every kind through `export` and `aoti` as well.",
        "",
        f"Of the {len(passed)} lines that pass, {published} are measured on a published configuration, with fewer and "
        f"narrower layers and all else as published: the line names the checkpoint it is of, and the type's default "
        f"configuration passes too. The other {len(passed) - published} are measured on that default, made as small.",
        "",
        "How to read a line: the *difference* is the largest one, relative to `max(1, max|reference|)`; at most 1e-4 "
        "passes. `int8` is the KL divergence that `--quantize int8` costs with random weights and the default "
        "configuration: it says that the model can be quantized, not how well a trained one bears it. The *way* of a "
        "decoder is how its attention is compiled: as precast's one operator for cached attention (`operator`, or "
        "`adapter` where code of the model had to be replaced for that), or in `ordinary operators`, with the same "
        "answers but slower; `states` are models that carry states of a fixed size from token to token.",
        "",
        "This page is made by `python tools/support_table.py`.",
    ]
    for task in dict.fromkeys(line["task"] for line in sorted(lines, key=lambda line: line["task"])):
        parts += ["", f"## {task}", "", *_section([line for line in lines if line["task"] == task])]
    return "\n".join(parts) + "\n"


def _summary(lines: list[dict[str, Any]]) -> list[str]:
    """How many model types of each task pass, and the best known among them."""
    rows = ["| task | model types | among them |", "|---|---|---|"]
    for task in TASKS:
        types = {line["model_type"]: "reason" not in line for line in lines if line["task"] == task}
        known = ", ".join(name for name in WELL_KNOWN if types.get(name))
        rows.append(f"| {task} | {sum(types.values())} of {len(types)} | {known} |")
    return rows


def _section(lines: list[dict[str, Any]]) -> list[str]:
    passed, refused = ([line for line in lines if ("reason" in line) is wanted] for wanted in (False, True))
    rows = [f"{len(passed)} model types pass{f', {len(refused)} refused' if refused else ''}."]
    if passed:
        has_int8 = any("kl_int8" in line for line in passed)
        rows += ["", "| model type | configuration | way | difference |" + (" int8 |" if has_int8 else "")]
        rows += ["|---|---|---|---|" + ("---|" if has_int8 else "")]
        rows += [_row(line, has_int8) for line in passed]
    if refused:
        rows += ["", "| refused | because |", "|---|---|"]
        rows += [f"| {line['model_type']} | {line['reason']} |" for line in refused]
    return rows


def _row(line: dict[str, Any], has_int8: bool) -> str:
    cells = [line["model_type"], line.get("configuration", "default"), line["way"], f"{line['difference']:.0e}"]
    if has_int8:
        cells.append(f"{line['kl_int8']:.0e}" if "kl_int8" in line else "–")
    return f"| {' | '.join(cells)} |"


def parse_arguments(doc: str) -> argparse.Namespace:
    """The arguments of a program that tries what the zoo has."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("types", nargs="*", help="only these model types")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--zoo", choices=ZOOS, help="only this part")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen_pairs(asked: argparse.Namespace) -> list[Pair]:
    """All that the zoo has, of the part and the types that were named."""
    found = [pair for zoo in ZOOS if asked.zoo in (None, zoo) for pair in pairs(zoo)]
    return [pair for pair in found if not asked.types or pair[1] in asked.types]


def main() -> int:
    """Try what was asked for, say how it goes, write the table; 1 where something is not as the zoo says."""
    asked = parse_arguments(__doc__)
    if asked.worker:
        serve(lambda pair: attempt(tuple(pair)))
        return 0
    todo = chosen_pairs(asked)
    kept = kept_lines()
    made: dict[tuple[str, str], dict[str, Any]] = {}
    surprises = []
    for pair, answer in zip(todo, attempt_all(__file__, todo, asked.jobs), strict=True):
        line = {"model_type": pair[1], "task": pair[2], **answer}
        said = surprise(pair, line)
        print(f"{pair[1]:<32}{pair[2]:<32}{said or line.get('error', line.get('difference'))}", flush=True)
        if said:
            surprises.append(said)
        else:
            made[pair[1:]] = made_of(pair, line, kept.get(pair[1:], {}))
    # Read again: others may have been made meanwhile.
    kept = kept_lines()
    known = {pair[1:] for zoo in ZOOS for pair in pairs(zoo)}
    tried = {pair[1:] for pair in todo}
    write([*(line for key, line in kept.items() if key in known - tried), *made.values()])
    print("\n".join(["", *surprises, f"{len(made)} lines made, {len(surprises)} surprises"]))
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
