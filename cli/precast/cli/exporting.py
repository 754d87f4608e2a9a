"""The exporter, for the commands that need it: torch and its company, which take seconds to import."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

__all__ = ["check_installed", "load_exporter"]


def check_installed() -> None:
    """Raise PrecastError where a library of the exporter is missing. Imports none of them."""
    from precast.runtime.errors import PrecastError

    for name in ("torch", "transformers", "onnxscript"):
        if find_spec(name) is None:
            raise PrecastError(f"Exporting needs {name}, which is not installed: pip install 'precast[export]'")


def load_exporter() -> Any:
    """The package, with its libraries kept from drawing bars over ours."""
    from precast import exporter

    exporter.quiet_libraries()
    return exporter
