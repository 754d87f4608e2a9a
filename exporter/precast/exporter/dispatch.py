"""`export()`: a checkpoint compiled into an artifact, by one backend or by several."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from precast.runtime.artifact import Artifact
from precast.runtime.errors import UsageError

from .kinds.plan import Plan
from .options import AUTO, ExportOptions
from .pipeline import OnPlan, export_variant, plan_variant
from .progress import OnStep
from .several.fastest import export_fastest
from .several.variants import export_variants

__all__ = ["export", "preview"]


def export(
    model: str,
    target: str | Path,
    options: ExportOptions | None = None,
    *,
    on_step: OnStep = lambda step: nullcontext(),
    on_plan: OnPlan = lambda plan: None,
    **keywords: Any,
) -> Artifact:
    """Compile a checkpoint into an artifact at `target`, all or nothing.

    Args:
        model: a Hub id, a checkpoint directory, or a .gguf file.
        target: the directory to make.
        options: see ExportOptions; or its fields as `keywords`, as in `export(model, "out", batch_size=1)`.
        on_step: called with the name of each step; returns a context manager that is entered while the step runs. If
            it yields a function, long steps call that with the parts done, the total, and the name of the current part.
        on_plan: called with the plan before the long work begins.

    Raises:
        UsageError: an unknown option, or one that does not fit the others.
        PrecastError: a step failed, as its subclasses say; `target` is then as it was.
    """
    options, target = _merge_options(options, keywords), Path(target)
    options.check()
    if options.backend == AUTO:
        return export_fastest(model, target, options, on_step, on_plan)
    export_all = export_variants if len(options.per_variant()) > 1 else export_variant
    return export_all(model, target, options, on_step, on_plan)


def preview(model: str, options: ExportOptions | None = None, **keywords: Any) -> Plan:
    """The plan of `export`, made without reading weights. Raises PrecastError as `export` does."""
    return plan_variant(model, _merge_options(options, keywords))


def _merge_options(options: ExportOptions | None, keywords: dict[str, Any]) -> ExportOptions:
    if options is None:
        return ExportOptions.of(keywords)
    if keywords:
        raise UsageError(
            f"export() was given options and {', '.join(f'{name}=' for name in keywords)} beside them; put all into "
            f"one ExportOptions, or give all by name."
        )
    return options
