"""Several variants in one artifact: `--also BACKEND` for hosts that lack the first's device, `--isa LEVEL,LEVEL` for
CPUs of several kinds.

    export each into a folder beside the target -> move the further ones into the first -> publish

Every variant is validated by itself. The first lies at the top, each further one in a folder named after it; weights
that are equal byte by byte are stored once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import msgspec

from precast.runtime.artifact import Artifact, read_artifact
from precast.runtime.artifact.publish import check_target, hash_files, staging, write_config
from precast.runtime.artifact.schema import Contract, Graph, Variant
from precast.runtime.artifact.stages import compiled_graphs

from ..checkpoint.resolve import resolve
from ..options import ExportOptions
from ..pipeline import OnPlan, export_variant, publish_with_card
from ..progress import OnStep, prefixed

__all__ = ["export_variants", "make_variants"]

_SHARED = ".safetensors"
"""Weights that variants can share: engines find them by the contract. An ONNX graph names its own, beside it."""


def export_variants(model: str, target: Path, options: ExportOptions, on_step: OnStep, on_plan: OnPlan) -> Artifact:
    """Export each of `options.per_variant()`, and publish one artifact, all or nothing.

    Raises PrecastError: what the first export raised that failed; `target` is then as it was.
    """
    requests = options.replace(force=False).per_variant()
    names = ["-".join([request.backend, *request.backend_options.name_parts()]) for request in requests]
    exports = [partial(_export_one, model, request) for request in requests]
    return make_variants(model, target, options, dict(zip(names, exports, strict=True)), on_step, on_plan)


def _export_one(model: str, request: ExportOptions, path: Path, on_step: OnStep, on_plan: OnPlan) -> Artifact:
    return export_variant(model, path, request, on_step, on_plan)


def make_variants(
    model: str,
    target: Path,
    options: ExportOptions,
    exports: Mapping[str, Callable[[Path, OnStep, OnPlan], Artifact]],
    on_step: OnStep,
    on_plan: OnPlan,
) -> Artifact:
    """Call each of the exports, by the name that its steps are to have, and publish one artifact, all or nothing."""
    check_target(target, force=options.force)
    with staging(target) as folder:
        (_, export_first), *others = exports.items()
        first = export_first(folder / "first", on_step, on_plan)
        for name, export_other in others:
            other = export_other(folder / name, prefixed(on_step, name), lambda plan: None)
            first = _add_variant(first, other)
            shutil.rmtree(folder / name)
        publish_with_card(first, resolve(model, options), target, options, on_step)
    return read_artifact(target)


def _add_variant(first: Artifact, other: Artifact) -> Artifact:
    """Move the files of the other's variant into the first artifact, and add it to the contract."""
    (variant,) = other.contract.variants
    names = {name: _new_path(name, variant, first.contract, other.contract) for name in _variant_files(variant)}
    for name, path in names.items():
        if path not in first.contract.files:
            (first.path / path).parent.mkdir(parents=True, exist_ok=True)
            (other.path / name).rename(first.path / path)
    added = msgspec.structs.replace(
        variant,
        weights=[names[name] for name in variant.weights],
        graphs=_renamed(variant.graphs, names),
        stages=[
            msgspec.structs.replace(
                stage, weights=[names[name] for name in stage.weights], graphs=_renamed(stage.graphs, names)
            )
            for stage in variant.stages
        ],
    )
    variants = [*first.contract.variants, added]
    contract = msgspec.structs.replace(first.contract, variants=variants, files=hash_files(first.path))
    return write_config(first.path, first.config, contract)


def _variant_files(variant: Variant) -> list[str]:
    return list(dict.fromkeys([*variant.weights, *(graph.file for graph in compiled_graphs(variant))]))


def _renamed(graphs: Sequence[Graph], names: Mapping[str, str]) -> list[Graph]:
    return [msgspec.structs.replace(graph, file=names[graph.file]) for graph in graphs]


def _new_path(name: str, variant: Variant, first: Contract, other: Contract) -> str:
    """The path of a further variant's file: that of equal weights that are there already, else in its own folder."""
    if name.endswith(_SHARED):
        for held, file in first.files.items():
            if file == other.files[name] and held.endswith(_SHARED):
                return held
    return str(PurePosixPath(variant.name) / name)
