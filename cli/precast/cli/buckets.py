"""`precast buckets`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .inputs import read_text
from .options import hub_options, json_option
from .output import echo, print_json

if TYPE_CHECKING:
    from precast.runtime.bench.buckets import Plan

__all__ = ["command"]


@click.command("buckets", epilog="precast buckets questions.txt --model out --count 3")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", metavar="DIR_OR_REPO", help="Whose tokenizer counts; not needed for a file of numbers.")
@click.option("--count", type=int, default=4, show_default=True, help="How many lengths at most.")
@click.option("--multiple", type=int, default=8, show_default=True, help="Of which each is a multiple.")
@click.option(
    "--max", "longest", type=int, metavar="N", help="The longest that the model takes; leave longer texts out."
)
@json_option
@hub_options
def command(
    file: Path, model: str | None, count: int, multiple: int, longest: int | None, as_json: bool, **hub: Any
) -> None:
    """Propose the sequence lengths to compile for, from FILE: texts such as will come, or their lengths, one a line."""
    from precast.runtime.bench.buckets import plan_buckets

    lengths = list(_read_lengths(file, model, **hub))
    plan = plan_buckets(lengths, count, multiple=multiple, longest=longest)
    option = f"--sequence-length {','.join(map(str, plan.lengths))}"
    if as_json:
        print_json({"texts": len(lengths), "option": option, **asdict(plan)})
        return
    echo(option)
    _print_table(plan, len(lengths))


def _print_table(plan: Plan, texts: int) -> None:
    echo(f"\n{'length':>8}{'texts':>10}{'share':>8}")
    for length, rows in zip(plan.lengths, plan.rows, strict=True):
        echo(f"{length:>8}{rows:>10}{rows / texts:>8.1%}")
    if plan.too_long:
        echo(f"{'longer':>8}{plan.too_long:>10}{plan.too_long / texts:>8.1%}")
    echo(
        f"\nOf all tokens {plan.padding:.1%} would be padding; with {plan.lengths[-1]} alone {plan.padding_of_one:.1%}."
    )


def _read_lengths(file: Path, model: str | None, **hub: Any) -> Iterable[int]:
    lines = [line for line in read_text(file, "FILE").splitlines() if line.strip()]
    if model is None:
        return _parse_numbers(file, lines)
    from precast.runtime.inputs.tokenizer import Tokenizer
    from precast.runtime.storage.hub import locate_tokenizer

    tokenizer = Tokenizer(locate_tokenizer(model, **hub))
    return (len(tokenizer.encode(line)) for line in lines)


def _parse_numbers(file: Path, lines: list[str]) -> list[int]:
    for number, line in enumerate(lines, 1):
        if not line.strip().isdecimal():
            raise click.UsageError(
                f"Line {number} of {file} is {line[:40]!r}, which is no length; for texts give --model, whose "
                f"tokenizer counts."
            )
    return [int(line) for line in lines]
