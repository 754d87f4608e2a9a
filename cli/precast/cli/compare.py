"""`precast compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .exporting import check_installed
from .inputs import read_lines
from .options import json_option, quiet_option
from .output import print_json, step_reporter

__all__ = ["command"]


@click.command("compare", epilog='precast compare out --prompt "Water boils at" --png modes.png')
@click.argument("model")
@click.option("--artifact", metavar="DIR", help="What was compiled of MODEL, where MODEL is the checkpoint.")
@click.option("--prompt", "prompts", multiple=True, help="A text to continue; repeatable.")
@click.option(
    "--input-file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), metavar="FILE",
    help="Prompts, one a line; '-' is standard input, which is read where nothing else is given.",
)  # fmt: skip
@click.option("--modes", metavar="A,B", help="Which modes: compiled, eager, torch-compile; by default all three.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True, metavar="N",
              help="At most so many for each prompt.")  # fmt: skip
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, metavar="N",
              help="How often each request is timed.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads; 0 is one per core.")
@click.option("--trust-native-code", is_flag=True, help="Run native code of the artifact that was built elsewhere.")
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that comes with the checkpoint.")
@click.option("--png", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Draw a chart into FILE.")
@json_option
@quiet_option
def command(
    model: str,
    artifact: str | None,
    prompts: tuple[str, ...],
    input_file: Path | None,
    modes: str | None,
    max_new_tokens: int,
    repeat: int,
    threads: int,
    trust_native_code: bool,
    trust_remote_code: bool,
    png: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the same prompts compiled, by eager transformers and by torch.compile, and compare tokens, speed and memory.

    MODEL is an artifact, whose checkpoint is found by the name that it holds; or the checkpoint, with --artifact. Each
    mode runs in a process of its own.
    """
    check_installed()
    from precast.runtime.runner import compare_modes
    from precast.runtime.runner.modes import MODES, is_checkpoint

    texts = [*prompts, *_read_texts(input_file)] if input_file is not None or prompts else [*read_lines()]
    cores = {"threads": threads} if threads else {}
    is_source = artifact is not None or is_checkpoint(model)
    found = compare_modes(
        texts, model=model if is_source else None, artifact=artifact if is_source else model,
        modes=modes.split(",") if modes else tuple(MODES), max_new_tokens=max_new_tokens, repeat=repeat,
        options={**cores, "trust_remote_code": trust_remote_code},
        compiled_options={**cores, "trust_native_code": trust_native_code}, report=step_reporter(quiet),
    )  # fmt: skip
    if png is not None:
        found.save_chart(png)
    if as_json:
        print_json(json.loads(found.to_json()))
    else:
        _show(found)


def _read_texts(path: Path | None) -> list[str]:
    """The prompts of a file, in any form that `precast generate` reads."""
    from precast.runtime.errors import UsageError
    from precast.runtime.runner.generating import PROMPT_COLUMNS
    from precast.runtime.runner.rows import Column, read_rows

    if path is None or str(path) == "-":
        return [] if path is None else [*read_lines()]
    rows = read_rows(path)
    column = Column(rows, None, PROMPT_COLUMNS)
    texts = [column.value(row) for row in rows]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UsageError(f"{path}: modes are compared on texts; this is {wrong[0]!r:.80}.")
    return texts


def _show(found: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    count = len(found.prompts)
    said = f"{count} prompt{'' if count == 1 else 's'}, up to {found.max_new_tokens} new tokens each"
    console.print(
        f"{said}; {found.machine['cpu']}, {found.machine['usable_cores']} cores", markup=False, soft_wrap=True
    )
    console.print(found.table())
