"""`precast bench`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .inputs import read_text
from .options import json_option, model_options, quiet_option
from .output import print_json, step_reporter

if TYPE_CHECKING:
    from precast.runtime.bench.compare import Request, Subject

__all__ = ["command"]

_LABELS = {
    "load_seconds": "load, s",
    "cold_start_seconds": "load + first answer, s",
    "first_token_ms": "first token, ms",
    "tokens_per_second": "tokens/s",
    "tokens_per_second_per_row": "tokens/s per row",
    "inter_token_p50_ms": "between tokens p50, ms",
    "inter_token_p90_ms": "between tokens p90, ms",
    "inter_token_p99_ms": "between tokens p99, ms",
    "call_p50_ms": "call p50, ms",
    "call_p90_ms": "call p90, ms",
    "call_p99_ms": "call p99, ms",
    "sequences_per_second": "sequences/s",
    "peak_rss_mb": "peak memory, RSS, MB",
    "pss_mb": "memory, PSS, MB",
    "private_mb": "memory, private, MB",
}
_COUNT = click.IntRange(min=1)


@click.command("bench", epilog="precast bench out --compare out-int4 --new-tokens 64")
@click.argument("model")
@click.option("--compare", "others", multiple=True, metavar="OTHER", help="Measure this one in turns; repeatable.")
@click.option("--prompt-length", type=_COUNT, metavar="N", help="Tokens per row; by default 128 or what fits.")
@click.option("--new-tokens", type=_COUNT, metavar="N", help="Tokens to generate; by default 128 or what fits.")
@click.option("--batch-size", type=_COUNT, metavar="N", help="Rows; by default as many as were compiled.")
@click.option("--repeat", type=_COUNT, default=5, show_default=True, metavar="N", help="Rounds, a process for each.")
@click.option(
    "--prompt-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="Text for the prompts: all of it, or repeated or cut to --prompt-length.",
)  # fmt: skip
@click.option("--prompt-lookup", type=click.IntRange(min=0), default=0, metavar="N",
              help="Guess up to N tokens from earlier text, as generate does.")  # fmt: skip
@click.option("--save", is_flag=True, help="Keep what was found about MODEL, a local directory, in its bench.json.")
@model_options
@json_option
@quiet_option
def command(
    model: str,
    others: tuple[str, ...],
    prompt_length: int | None,
    new_tokens: int | None,
    batch_size: int | None,
    repeat: int,
    prompt_file: Path | None,
    prompt_lookup: int,
    save: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure the speed and memory of the artifact MODEL — a directory or a Hub repository — or compare it with others.

    Every round opens it in a fresh process, warms up with another prompt, and times one request. --revision,
    --subfolder and --sha256 are MODEL's, all other options count for every artifact.
    """
    from precast.runtime.bench.compare import bench, describe_machine, plan, token_ids

    if quiet:
        _no_bars()
    if save:
        _check_save_target(model)
    subjects = _find_subjects(model, others, options)
    text = None if prompt_file is None else read_text(prompt_file, "--prompt-file")
    ids = [token_ids(subject, text) for subject in subjects]
    if text is not None and prompt_length is None:
        prompt_length = len(ids[0])
    request = plan(subjects, batch_size, prompt_length, new_tokens, prompt_lookup)
    entries = bench(subjects, request, ids, repeat, step_reporter(quiet))
    result = {
        "machine": describe_machine(),
        "request": _complete_request(request, repeat, options),
        "artifacts": entries,
    }
    if save:
        _save_result(subjects[0].artifact.path / "bench.json", result)
    if as_json:
        print_json(result)
    else:
        _show_result(result)


def _no_bars() -> None:
    from precast.runtime.progress import quiet

    quiet()


def _check_save_target(model: str) -> None:
    from precast.runtime.errors import UsageError

    path = Path(model).expanduser()
    if not path.is_dir():
        raise UsageError(f"--save writes into a local directory, and {model} is none. Leave it out, or use --json.")
    if not os.access(path, os.W_OK):
        raise UsageError(f"--save may not write into {model}. Allow it, or leave --save out and use --json.")


def _find_subjects(model: str, others: Sequence[str], options: dict[str, Any]) -> list[Subject]:
    unpinned = {**options, "revision": None, "subfolder": None, "sha256": None}
    return [_find_subject(model, options), *(_find_subject(other, unpinned) for other in others)]


def _find_subject(model: str, options: dict[str, Any]) -> Subject:
    """Find or download an artifact here: a child process gets a local directory, and no token."""
    from precast.runtime.artifact import read_artifact
    from precast.runtime.bench.compare import Subject
    from precast.runtime.hosts.select import choose_variant, this_machine
    from precast.runtime.storage.hub import locate

    where = {name: options[name] for name in ("revision", "subfolder", "token", "local_files_only")}
    how = {name: value for name, value in options.items() if name not in where}
    artifact = read_artifact(locate(model, **where))
    place = {"device": options["device"], "provider": options["provider"], "root": artifact.path}
    variant = choose_variant(artifact.contract, this_machine(artifact.contract), options["variant"], **place)
    return Subject(model, artifact, variant, how)


def _complete_request(request: Request, repeat: int, options: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    from precast.runtime.hosts.machine import usable_cores

    place = {name: options[name] for name in ("device", "provider")}
    return {**asdict(request), **place, "threads": options["threads"] or usable_cores(), "repeat": repeat}


def _save_result(path: Path, result: dict[str, Any]) -> None:
    """Write the first artifact's results, without its path and its ratios to others, which mean nothing elsewhere."""
    from precast.runtime.artifact.store import write_atomically
    from precast.runtime.errors import PublishError

    own = {name: value for name, value in result["artifacts"][0].items() if name not in ("model", "ratios")}
    text = json.dumps({**result, "artifacts": [own]}, ensure_ascii=False, indent=2) + "\n"
    try:
        write_atomically(path, text.encode(), 0o644)
    except OSError as error:
        raise PublishError(f"{path} cannot be written: {error.strerror}.") from error


def _show_result(result: dict[str, Any]) -> None:
    from rich.console import Console

    machine, entries = result["machine"], result["artifacts"]
    console = Console(highlight=False)
    console.print(_describe_request(result["request"]), soft_wrap=True)
    console.print(
        f"{machine['cpu']}, {result['request']['threads']} threads; ONNX Runtime {machine['onnxruntime']}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    console.print(_spread_table(entries[0]) if len(entries) == 1 else _side_by_side(entries))


def _describe_request(request: dict[str, Any]) -> str:
    rows = f"{request['batch_size']} row{'s' if request['batch_size'] > 1 else ''} of {request['prompt_length']} tokens"
    new = f", {request['new_tokens']} new each" if request["new_tokens"] else ""
    lookup = f", guessing up to {request['prompt_lookup']}" if request["prompt_lookup"] else ""
    rounds = f"medians of {request['repeat']} rounds" if request["repeat"] > 1 else "1 round"
    return f"{rows}{new}{lookup}; {rounds}"


def _spread_table(entry: dict[str, Any]) -> Any:
    """The table of one artifact: every figure with its extremes."""
    table = _make_table(entry["model"], "lowest", "highest")
    for name, figure in entry["figures"].items():
        found = figure or dict.fromkeys(("median", "min", "max"))
        table.add_row(_LABELS[name], *(_format_number(found[key]) for key in ("median", "min", "max")))
    table.add_row("size on disk, MB", _format_number(entry["size_mb"]))
    return table


def _side_by_side(entries: list[dict[str, Any]]) -> Any:
    """The table of several artifacts: medians, each with its ratio to the first's."""
    table = _make_table(*(entry["model"] for entry in entries))
    for name in entries[0]["figures"]:
        medians = [(entry["figures"][name] or {}).get("median") for entry in entries]
        ratios = [entry["ratios"][name] for entry in entries]
        table.add_row(_LABELS[name], *map(_with_ratio, medians, ratios))
    sizes = [entry["size_mb"] for entry in entries]
    table.add_row("size on disk, MB", *(_with_ratio(size, size / sizes[0]) for size in sizes))
    return table


def _make_table(*names: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in names:
        # A name may hold brackets, which are not markup.
        table.add_column(Text(name), justify="right", overflow="fold")
    return table


def _with_ratio(median: float | None, ratio: float | None) -> str:
    return _format_number(median) if ratio is None else f"{_format_number(median)} ×{ratio:.2f}"


def _format_number(value: float | None) -> str:
    """Format a figure with four digits, the precision of the measurements."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
