"""The door to the exporter, which is looked up by name: the runtime does not depend on it."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any

from ..artifact.store import home
from ..errors import UsageError

__all__ = ["export_once", "is_export_option", "look_up_exporter"]

_ASKED_BY = "from_pretrained(export=True)"
_WITHOUT = ("force",)
"""Options of an export that make no sense where what was made before is opened as it is."""


def export_once(model: str | Path, **options: Any) -> Path:
    """Export a checkpoint into the store, unless that has been done; returns the artifact's path.

    Raises UsageError without the exporter or for an unknown option, PrecastError as the export does.
    """
    exporter = look_up_exporter("export=True")
    settings = exporter.ExportOptions.of(options, _ASKED_BY, without=_WITHOUT)
    made: Path = look_up_exporter("export=True", "export_once").export_once(str(model), home() / "exports", settings)
    return made


def is_export_option(name: str, others: Collection[str]) -> bool:
    """Whether an argument is one of an export, ours or another library's, rather than one of `others`."""
    return name not in others and name in look_up_exporter("export=True").option_names()


def look_up_exporter(asked: str, *names: str) -> Any:
    """The package `precast.exporter`; `names` are what is wanted of it, which may import torch and its company.

    Raises UsageError where it is not installed, which says what was `asked`.
    """
    try:
        exporter = import_module("precast.exporter")
        for name in names:
            getattr(exporter, name)
    except ImportError as error:
        raise UsageError(f"{asked} needs the exporter: pip install 'precast[export]'") from error
    return exporter
