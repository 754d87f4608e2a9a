"""`precast cache`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from precast.runtime.terminal import printable

from .options import json_option
from .output import echo, print_json

if TYPE_CHECKING:
    from precast.runtime.storage.cache import Kept

__all__ = ["command"]


@click.group("cache", epilog="precast cache clear --all --dry-run")
def command() -> None:
    """Show or clear what precast keeps and can make or fetch again.

    \b
    prepacked  weights in the form of this machine's kernels, saved on first load
    hub        artifacts pulled from the Hub (the Hub's own cache is not touched)
    exports    artifacts that from_pretrained(export=True) made
    compiler   headers and pieces of native code, compiled at the first export
    """


@command.command("list")
@json_option
def _list_kept(as_json: bool) -> None:
    """Show what is kept, last used first."""
    from precast.runtime.artifact.store import home
    from precast.runtime.storage.cache import kept, total_bytes

    found = kept()
    if as_json:
        print_json({"home": str(home()), "bytes": total_bytes(found), "kept": [_describe_kept(each) for each in found]})
        return
    _print_kept(found)
    echo(f"{len(found)} kept in {home()}, {_format_megabytes(total_bytes(found))} on disk")


@command.command("clear", epilog="Safe at any time: models that are open keep their files until they are closed.")
@click.option("--prepacked", is_flag=True, help="Remove packed weights; the default.")
@click.option("--hub", is_flag=True, help="Remove artifacts pulled from the Hub.")
@click.option("--exports", is_flag=True, help="Remove artifacts that export=True made.")
@click.option("--compiler", is_flag=True, help="Remove compiled headers and pieces of native code.")
@click.option("--all", "everything", is_flag=True, help="Remove all of these.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed.")
@json_option
def _clear_kept(dry_run: bool, as_json: bool, everything: bool, **asked: bool) -> None:
    """Remove what is kept; without an option, packed weights."""
    from precast.runtime.storage.cache import KINDS, clear, kept, total_bytes

    kinds = list(KINDS) if everything else [kind for kind in KINDS if asked[kind]] or ["prepacked"]
    found = kept(*kinds) if dry_run else clear(*kinds)
    if as_json:
        print_json(
            {"dry_run": dry_run, "bytes": total_bytes(found), "removed": [_describe_kept(each) for each in found]}
        )
        return
    _print_kept(found)
    echo(f"{len(found)} {'to remove' if dry_run else 'removed'}, {_format_megabytes(total_bytes(found))}")


def _print_kept(found: list[Kept]) -> None:
    for each in found:
        size, made, used = _format_megabytes(each.size), _format_age(each.created), _format_age(each.used)
        echo(f"{each.kind:<10}  {printable(each.name, keep=''):<40}  {size:>12}  made {made}, used {used}")


def _describe_kept(each: Kept) -> dict[str, Any]:
    return {
        "kind": each.kind,
        "name": each.name,
        "path": str(each.path),
        "bytes": each.size,
        "created": _format_utc(each.created),
        "used": _format_utc(each.used),
    }


def _format_utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _format_megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _format_age(seconds: float) -> str:
    """How long ago, in the largest unit that fits."""
    passed = max(0, int(time.time() - seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= length:
            return f"{passed // length} {unit} ago"
    return "just now"
