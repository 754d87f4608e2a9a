"""`precast env`."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import click

from .options import json_option
from .output import echo, print_json

__all__ = ["command"]

_PACKAGES = (
    "precast", "numpy", "onnxruntime", "tokenizers", "huggingface-hub", "msgspec", "torch", "transformers", "optimum",
    "onnx", "onnxscript", "onnx-ir",
)  # fmt: skip


@click.command("env")
@json_option
def command(as_json: bool) -> None:
    """Show versions and machine facts, for bug reports. Nothing is imported to find them."""
    facts = _collect_facts()
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        echo(f"{name:<18}{value if value is not None else 'not installed'}")


def _collect_facts() -> dict[str, Any]:
    from precast.runtime.artifact.backends import BACKENDS
    from precast.runtime.artifact.store import home
    from precast.runtime.hosts.machine import installed_version, memory_bytes, usable_cores

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores usable": usable_cores(),
        "memory GB": round(memory_bytes() / 1e9, 1),
        "precast home": str(home()),
        "backends": ", ".join([*BACKENDS, *(found.name for found in metadata.entry_points(group="precast.backends"))]),
        **{name: installed_version(name) for name in _PACKAGES},
    }
