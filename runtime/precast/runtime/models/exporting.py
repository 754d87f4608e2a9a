"""The door to the exporter, which is looked up by name: the runtime does not depend on it."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any

from ..artifact.store import home
from ..errors import UsageError

__all__ = ["export_once", "is_export_option"]

_ASKED_BY = "from_pretrained(export=True)"
_WITHOUT = ("force",)
"""Options of an export that make no sense where what was made before is opened as it is."""


def export_once(model: str | Path, **options: Any) -> Path:
    """Export a checkpoint into the store, unless that has been done; returns the artifact's path.

    Raises UsageError without the exporter or for an unknown option, PrecastError as the export does.
    """
    exporter = _load()
    settings = exporter.ExportOptions.of(options, _ASKED_BY, without=_WITHOUT)
    try:
        # Only now torch and its company are imported.
        export = exporter.export_once
    except ImportError as error:
        raise _missing() from error
    made: Path = export(str(model), home() / "exports", settings)
    return made


def is_export_option(name: str, others: Collection[str]) -> bool:
    """Whether an argument is one of an export, ours or another library's, rather than one of `others`."""
    return name not in others and name in _load().option_names()


def _load() -> Any:
    try:
        return import_module("precast.exporter")
    except ImportError as error:
        raise _missing() from error


def _missing() -> UsageError:
    return UsageError("export=True needs the exporter: pip install 'precast[export]'")
