"""What an artifact says of the options that it was exported with, so that it can be made again."""

from __future__ import annotations

import json

from precast.runtime.artifact.integrity import sha256_of
from precast.runtime.artifact.schema import Variant
from precast.runtime.errors import ExportError, UsageError

from . import ExportOptions

__all__ = ["REQUEST", "parse_request", "render_request"]

REQUEST = "request"
"""The entry of a variant's compiler options that holds it."""

_LEFT_OUT = (
    "token", "force", "revision", "weights", "trust_remote_code", "validate", "also", "compiler_workdir", "lora",
    "force_base", "trust_pickle", "prefix_tuning",
)  # fmt: skip
"""Options that say where files are, or what the user allows: they are nothing of the artifact's."""


def render_request(options: ExportOptions) -> str:
    """The options of one variant, as JSON: those that are not as by default. A file is known by its hash."""
    defaults = ExportOptions.defaults()
    given = {name: value for name, value in options.as_keywords().items() if value != defaults[name]}
    if text := given.get("calibration"):
        given["calibration"] = sha256_of(text)
    kept = {name: value for name, value in given.items() if name not in _LEFT_OUT}
    return json.dumps({"backend": options.backend, **kept}, sort_keys=True)


def parse_request(variant: Variant) -> ExportOptions:
    """The options that a variant was exported with. Raises ExportError where they cannot be known."""
    text = variant.compiler.options.get(REQUEST)
    if not isinstance(text, str):
        raise ExportError(
            f"The variant {variant.name} does not say with which options it was exported, as those of earlier versions "
            f"and of other tools do not: export the checkpoint instead."
        )
    try:
        given = json.loads(text)
        if "calibration" in given:
            raise ExportError(
                f"The variant {variant.name} was exported with calibration= and a text of sha256 "
                f"{str(given['calibration'])[:12]}…, which is not in the artifact: export the checkpoint with it "
                "instead."
            )
        options = ExportOptions(
            **{name: tuple(each) if isinstance(each, list) else each for name, each in given.items()}
        )
        options.check()
    except (TypeError, ValueError, UsageError) as error:
        raise ExportError(
            f"The options with which the variant {variant.name} says that it was exported mean nothing to this version "
            f"of precast: {error} Export the checkpoint instead."
        ) from error
    return options
