"""`swap_weights()`: the weights of another checkpoint in the place of those of an artifact, without compiling.

    export with the options that the artifact was exported with, but for compiling
    -> are the programs those that were compiled? -> new weights beside the old compiled files -> validate -> publish

A compiler's work depends on programs and not on weights, so compiled files fit every checkpoint whose programs have the
hash that is in the contract. All the rest is the export of the new checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from precast.runtime.artifact import Artifact, read_artifact
from precast.runtime.artifact.backends import get_backend
from precast.runtime.artifact.integrity import require_trust
from precast.runtime.artifact.publish import copy_file
from precast.runtime.artifact.schema import Variant
from precast.runtime.errors import CheckpointError, ExportError
from precast.runtime.terminal import quoted

from .backends import Compiled, ProgramCompiler, WritesWeights, compiler_of
from .checkpoint.early import check_swap
from .checkpoint.resolve import resolve
from .kinds.plan import Plan
from .kinds.trace import Program
from .options import ExportOptions
from .options.request import parse_request
from .pipeline import OnPlan, export_variant, plan_variant
from .progress import OnStep
from .several.variants import make_variants

__all__ = ["preview_swap", "swap_weights"]


def swap_weights(
    artifact: str | Path,
    checkpoint: str,
    target: str | Path,
    options: ExportOptions | None = None,
    *,
    sha256: str | None = None,
    trust_native_code: bool = False,
    on_step: OnStep = lambda step: nullcontext(),
    on_plan: OnPlan = lambda plan: None,
) -> Artifact:
    """Make at `target` the artifact that an export of `checkpoint` would be, with the compiled files of `artifact`.

    Args:
        artifact: the directory of an artifact, which stays as it is.
        checkpoint: a Hub id, a checkpoint directory, or a .gguf file, with a model of the same program.
        target: the directory to make, all or nothing.
        options: how to find the checkpoint and whether to replace the target: `revision`, `token`, `weights`,
            `trust_remote_code` and `force`. All others are those that the artifact was exported with.
        sha256: the artifact's digest, as proof of its native code, which validation runs.
        trust_native_code: run it without proof.
        on_step, on_plan: as of `export`.

    Raises:
        CheckpointError: the checkpoint is missing, or another program than what was compiled.
        ExportError: the artifact's weights lie within its compiled files, or it does not say how it was exported.
        ArtifactError: the artifact is damaged, or holds native code without proof.
        PrecastError: a step failed as in an export; `target` is then as it was.
    """
    swap = _prepare(Path(artifact), checkpoint, Path(target), options or ExportOptions())
    swap.old.contents.verify()
    # The tier is the backend's, whatever the file claims for itself.
    if sha256 is not None or any(get_backend(part.variant.backend).trust == "native" for part in swap.parts):
        require_trust(str(artifact), swap.old.contract.digest, sha256=sha256, trust_native_code=trust_native_code)
    on_step = _without_compiling(on_step)
    first, *others = swap.parts
    if not others:
        return swap.make(first, swap.options.force, Path(target), on_step, on_plan)
    exports = {part.variant.name: partial(swap.make, part, False) for part in swap.parts}
    return make_variants(checkpoint, Path(target), swap.options, exports, on_step, on_plan)


def preview_swap(
    artifact: str | Path, checkpoint: str, target: str | Path | None = None, options: ExportOptions | None = None
) -> Plan:
    """The plan of `swap_weights` for the first variant, made without reading weights: whether the programs are the same
    shows only when they are traced. Raises PrecastError as `swap_weights` does."""
    swap = _prepare(Path(artifact), checkpoint, Path(target) if target else None, options or ExportOptions())
    plan = plan_variant(checkpoint, swap.parts[0].request)
    swap.check_task(plan)
    return plan


@dataclass(frozen=True)
class _Part:
    """A variant of the old artifact, the compiler that writes its weights, and the options it was exported with."""

    variant: Variant
    compiler: WritesWeights
    request: ExportOptions


@dataclass(frozen=True)
class _Swap:
    """What is asked for: a checkpoint in the place of that of an artifact, variant by variant."""

    old: Artifact
    checkpoint: str
    options: ExportOptions
    parts: list[_Part]

    def make(self, part: _Part, force: bool, target: Path, on_step: OnStep, on_plan: OnPlan) -> Artifact:
        """Make an artifact of one variant."""

        def check_plan(plan: Plan) -> None:
            self.check_task(plan)
            on_plan(plan)

        request = part.request.replace(force=force)
        return export_variant(self.checkpoint, target, request, on_step, check_plan, _WeightsOnly(self, part))

    def check_task(self, plan: Plan) -> None:
        """Raise CheckpointError where the checkpoint is for another task."""
        task = self.old.contract.task
        if plan.task.name != task:
            raise CheckpointError(
                f"{self.old.path} was compiled for {task}, and {self.checkpoint} is for {plan.task.name}: "
                f"{self.instead}"
            )

    @property
    def instead(self) -> str:
        """What to do where the compiled files do not fit, in words."""
        return f"compile it with precast export {quoted(self.checkpoint)} -o OUT."


class _WeightsOnly(ProgramCompiler):
    """A compiler that compiles nothing: it takes the old variant's files for the same programs, and writes weights."""

    def __init__(self, swap: _Swap, part: _Part) -> None:
        self.swap, self.part = swap, part

    def compile(self, programs: Iterable[Program], stage: Path, options: ExportOptions) -> Compiled:
        """See ProgramCompiler. Raises CheckpointError where the programs are others."""
        old = self.part.variant
        written = self.part.compiler.write_weights(programs, stage, old, options)
        if written.program != old.compiler.options.get("program"):
            raise CheckpointError(
                f"The weights of {self.swap.checkpoint} do not fit what is compiled in {self.swap.old.path} "
                f"({old.name}), since its program is another one: {self._describe_difference()}. Instead, "
                f"{self.swap.instead}"
            )
        compiled = {PurePosixPath(graph.file).name: graph.file for graph in old.graphs}
        for name in {graph.file for graph in written.graphs}:
            if not (stage / name).exists():
                copy_file(self.swap.old, compiled[name], stage / name)
        return written

    def _describe_difference(self) -> str:
        checkpoint = resolve(self.swap.checkpoint, self.part.request)
        is_gguf = checkpoint.gguf_file is not None
        new = json.loads(checkpoint.config.to_json_string()) if is_gguf else checkpoint.written_config
        if found := list(_differences(self.swap.old.config, new)):
            return f"{'; '.join(found[:8])}{'; …' if len(found) > 8 else ''}"
        return (
            "their configurations say the same, so it is in the weights (numbers or a mixture of widths that are "
            "compiled in, tensors shared by layers), or in this machine or these versions of precast and torch"
        )


_NOT_COMPILED = {"architectures", "dtype", "torch_dtype", "transformers_version"}
"""Entries of a configuration in which no program differs."""


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What two configurations say differently, an entry each; an entry that one of them leaves out is as by default."""
    for name in sorted((old.keys() & new.keys()) - _NOT_COMPILED):
        before, after = old[name], new[name]
        if before == after or name.endswith(("_token_id", "name_or_path")):
            continue
        if isinstance(before, dict | list) and isinstance(after, dict | list):
            yield f"{name} has {len(after)} entries and not {len(before)}" if len(before) != len(after) else name
        else:
            yield f"{name} is {after!r} and not {before!r}"


def _prepare(artifact: Path, checkpoint: str, target: Path | None, options: ExportOptions) -> _Swap:
    """Check what can be checked before any work. Raises PrecastError."""
    check_swap(artifact, checkpoint, target, options)
    old = read_artifact(artifact)
    if old.contract.prefix is not None:
        raise ExportError(
            f"{artifact} begins every row with a prefix, which belongs to the weights that it was trained with: export "
            f"the checkpoint, with prefix_tuning= where it has one of its own."
        )
    return _Swap(old, checkpoint, options, [_prepare_part(each, options) for each in old.contract.variants])


def _prepare_part(variant: Variant, options: ExportOptions) -> _Part:
    compiler = compiler_of(variant.backend)
    if not isinstance(compiler, WritesWeights):
        raise ExportError(
            f"The backend {variant.backend} compiles weights into its files, so that no others can take the place of "
            f"those of the variant {variant.name}: export the checkpoint instead."
        )
    if get_backend(variant.backend).trust == "native" and not variant.weights:
        raise ExportError(
            f"The weights of the variant {variant.name} lie within its compiled files (packed for a CPU's kernels, or "
            f"as inline_weights=True put them), and no others can take their place: export the checkpoint instead."
        )
    if variant.ranks:
        raise ExportError(
            f"The weights of the variant {variant.name} are divided between {variant.ranks.count} ranks, and no others "
            f"are put in their place: export the checkpoint instead."
        )
    if variant.stages:
        raise ExportError(
            f"The weights of the variant {variant.name} lie in the files of {len(variant.stages)} stages, and no "
            f"others are put in their place: export the checkpoint instead."
        )
    found = ("revision", "token", "weights", "trust_remote_code")
    return _Part(variant, compiler, parse_request(variant).replace(**{name: getattr(options, name) for name in found}))


def _without_compiling(on_step: OnStep) -> OnStep:
    """`on_step`, with "compile" called what it is here."""

    def step(what: str) -> AbstractContextManager[Any]:
        return on_step(what.replace("compile", "write weights"))

    return step
