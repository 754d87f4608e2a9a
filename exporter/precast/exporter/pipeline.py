"""The export of one variant, in six verbs: resolve, plan, trace, compile, validate, publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from msgspec.structs import replace
from torch import Tensor, nn

from precast.runtime.artifact import Artifact, read_artifact
from precast.runtime.artifact.backends import get_backend
from precast.runtime.artifact.integrity import vouch
from precast.runtime.artifact.publish import check_target, hash_files, publish, staging, write_config
from precast.runtime.artifact.schema import (
    FORMAT_VERSION,
    Accuracy,
    Contract,
    MergedAdapter,
    Prefix,
    Shapes,
    Source,
    Variant,
)
from precast.runtime.errors import ExportError

from .adapters.prefix import PrefixedModel, compute_prefix, store_prefix
from .backends import Compiled, HasLayouts, NeedsTools, ProgramCompiler, compiler_of
from .backends.dtypes import choose_dtype
from .backends.ranks import compile_ranks
from .backends.stages import compile_stages
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.resolve import resolve
from .companions.card import render_card
from .companions.files import config_of, write_companions
from .kinds.decoder.stages import cut_programs, find_layers
from .kinds.plan import Plan, make_plan
from .kinds.trace import Program, trace
from .memory import give_back_memory
from .options import ExportOptions
from .options.request import REQUEST, render_request
from .parallel.division import Division, divide
from .parallel.local_model import first_rank, local_model
from .precision import cast_programs, choose_cast
from .progress import OnStep, no_progress, progress_to
from .quantize.calls import calibration_rows
from .quantize.choose import quantize_model
from .quantize.kv_cache import cache_scales
from .validation import compare
from .validation.record import describe_loss, record_accuracy, skip_without_device
from .validation.reference import Reference, make_reference

__all__ = ["OnPlan", "export_variant", "plan_variant", "publish_with_card"]

OnPlan: TypeAlias = Callable[[Plan], None]
"""A callback that gets the plan of an export before the long work begins."""

_UNCHECKED = Accuracy(status="skipped", reason="not validated", figures={})


def export_variant(
    model: str,
    target: Path,
    options: ExportOptions,
    on_step: OnStep,
    on_plan: OnPlan,
    compiler: ProgramCompiler | None = None,
) -> Artifact:
    """Export with the one backend that the options name, by its compiler or by one that stands for it. Arguments and
    errors are those of `export`."""
    compiler = _ready_compiler(options, compiler or compiler_of(options.backend))
    check_target(target, force=options.force)
    with on_step("resolve"):
        checkpoint, options = _resolve(model, options, compiler)
    with on_step("plan"):
        plan = make_plan(checkpoint, options, first_rank)
    on_plan(plan)
    with _explain_failures(plan), staging(target) as stage:
        loaded, reference = _load(checkpoint, plan, options, on_step)
        give_back_memory()
        traced = _trace(loaded, checkpoint, plan, options, on_step)
        give_back_memory()
        artifact = _compile(traced, loaded, checkpoint, plan, options, compiler, stage, on_step)
        # Only the reference is still needed; memory must be free before validation opens the compiled model.
        del loaded, traced
        give_back_memory()
        artifact = _validate(artifact, reference, options, on_step)
        publish_with_card(artifact, checkpoint, target, options, on_step)
    return read_artifact(target)


def plan_variant(model: str, options: ExportOptions) -> Plan:
    """The plan of `export_variant`, made without reading weights. Raises PrecastError as it does."""
    options.check()
    compiler = compiler_of(options.backend)
    return make_plan(*_resolve(model, options, compiler), first_rank)


def _ready_compiler(options: ExportOptions, compiler: ProgramCompiler) -> ProgramCompiler:
    """The compiler, after checking the options and its tools. Raises UsageError, ExportError."""
    options.check()
    if isinstance(compiler, NeedsTools):
        compiler.check_tools(options)
    return compiler


def _resolve(model: str, options: ExportOptions, compiler: ProgramCompiler) -> tuple[Checkpoint, ExportOptions]:
    """The checkpoint as the layout can hold it, and the options with what it decides of them."""
    checkpoint = resolve(model, options)
    options = choose_dtype(options, checkpoint)
    return compiler.prepare(checkpoint, options) if isinstance(compiler, HasLayouts) else checkpoint, options


@contextmanager
def _explain_failures(plan: Plan) -> Iterator[None]:
    """Add to an ExportError why attention is in ordinary operators, where it is: that may be the cause."""
    try:
        yield
    except ExportError as error:
        if reason := plan.notes.get("attention_because"):
            raise type(error)(f"{error} Attention is in ordinary operators here, because: {reason}") from error
        raise


@dataclass(frozen=True)
class _Loaded:
    """A checkpoint in memory: `tokenizer` is None where it has none, `prefix` are the keys and values before every
    prompt, if there are any."""

    model: nn.Module
    tokenizer: Any | None
    prefix: list[Tensor]


def _load(
    checkpoint: Checkpoint, plan: Plan, options: ExportOptions, on_step: OnStep
) -> tuple[_Loaded, Reference | None]:
    """Load the eager model, and make the reference from its answers; None without validation."""
    with on_step("load"):
        tokenizer = checkpoint.tokenizer
        model = checkpoint.load(plan.task, plan.dtype)
        prefix = compute_prefix(plan.prefix, model, plan.layer_sizes) if plan.prefix else []
        loaded = _Loaded(model, tokenizer, prefix)
    give_back_memory()
    if not options.validate:
        return loaded, None
    with on_step("reference") as listener, progress_to(listener):
        is_scored = options.quantization.is_rounded or (options.is_lossy and plan.task.kind == "decoder")
        eager = PrefixedModel(model, prefix, plan.prefix.positions) if plan.prefix else model
        reference = make_reference(eager, checkpoint, plan.task, plan.outline(), plan.lora, is_scored=is_scored)
    return loaded, reference


@dataclass(frozen=True)
class _Traced:
    """The programs of each rank, of which there is one as a rule; how the weights are divided between several; the
    parts of the programs that each stage has, where they are cut; and how weights are quantized, in words."""

    programs: list[list[Program]]
    division: Division | None
    stages: list[list[Program]]
    quantization: str | None


def _trace(loaded: _Loaded, checkpoint: Checkpoint, plan: Plan, options: ExportOptions, on_step: OnStep) -> _Traced:
    """Quantize the model, divide it, trace it, cast the programs, and cut them, as far as the options ask."""
    scales, quantization = None, None
    if options.kv_cache == "int8":
        with on_step("calibrate"):
            scales = cache_scales(loaded.model, calibration_rows(checkpoint, options), plan.cache_widths)
    if options.quantize != "none":
        with on_step("quantize") as listener:
            quantization = quantize_model(loaded.model, checkpoint, plan, options, listener or no_progress)
    with on_step("trace"):
        division = divide(loaded.model, plan.degrees) if plan.degrees else None
        models = [loaded.model]
        if division:
            models = [local_model(loaded.model, division, rank) for rank in range(division.ranks)]
        programs = [list(trace(model, plan, scales)) for model in models]
        if how := choose_cast(options):
            programs = [cast_programs(each, how) for each in programs]
        stages = cut_programs(programs[0], find_layers(loaded.model), plan.stages) if plan.stages > 1 else []
    return _Traced(programs, division, stages, quantization)


def _compile(
    traced: _Traced,
    loaded: _Loaded,
    checkpoint: Checkpoint,
    plan: Plan,
    options: ExportOptions,
    compiler: ProgramCompiler,
    stage: Path,
    on_step: OnStep,
) -> Artifact:
    """Write the artifact into `stage`, all but its card: graphs, weights, companion files, and the contract."""
    layouts = compiler if isinstance(compiler, HasLayouts) else None
    programs = traced.programs[0]
    if layouts:
        layouts.check_graphs([program.graph for program in programs], plan.task, checkpoint, options)
    with on_step("compile") as listener, progress_to(listener):
        if traced.division:
            compiled = compile_ranks(compiler, traced.programs, traced.division, stage, options)
        elif traced.stages:
            compiled = compile_stages(compiler, [each.graph for each in programs], traced.stages, stage, options)
        else:
            compiled = compiler.compile(programs, stage, options)
        write_companions(stage, loaded.tokenizer, checkpoint, loaded.model)
        config = config_of(checkpoint, loaded.model)
        stored = store_prefix(plan.prefix, loaded.prefix, programs[0].graph, stage) if plan.prefix else None
    if layouts:
        compiled = layouts.lay_out(compiled, plan.task, config, options, stage)
    return write_config(
        stage, config, _contract(checkpoint, plan, options, compiled, traced.quantization, stored, stage)
    )


def _contract(
    checkpoint: Checkpoint,
    plan: Plan,
    options: ExportOptions,
    compiled: Compiled,
    quantization: str | None,
    prefix: Prefix | None,
    stage: Path,
) -> Contract:
    program = {} if compiled.program is None else {"program": compiled.program, REQUEST: render_request(options)}
    notes = {**plan.notes, **_cast_notes(options), **program}
    variant = Variant(
        name="-".join([options.backend, *_name_parts(options)]),
        backend=options.backend,
        dtype=options.dtype,
        quantization=quantization,
        kv_cache=None if options.kv_cache == "float32" else options.kv_cache,
        host=compiled.host,
        compiler=replace(compiled.compiler, options={**compiled.compiler.options, **notes}),
        trust=get_backend(options.backend).trust,
        accuracy=_UNCHECKED,
        weights=compiled.weights,
        graphs=compiled.graphs,
        abi=compiled.abi,
        requires_torch=list(compiled.requires_torch),
        ranks=compiled.ranks,
        stages=compiled.stages,
    )
    return Contract(
        format_version=FORMAT_VERSION,
        precast_version=version("precast"),
        digest="0" * 64,
        task=plan.task.name,
        source=_source(checkpoint),
        shapes=Shapes(
            batch_size=plan.batch_size,
            sequence_length=list(plan.lengths),
            prefill_lengths=list(plan.prefill_lengths),
            dynamic_batch_size=plan.dynamic_batch_size,
        ),
        variants=[variant],
        files=hash_files(stage),
        prefix=prefix,
        lora=plan.lora,
    )


def _source(checkpoint: Checkpoint) -> Source:
    return Source(
        model=checkpoint.name,
        revision=checkpoint.revision,
        weights_sha256=checkpoint.weights_sha256(),
        adapters=[
            MergedAdapter(name=each.name, sha256=each.sha256, weight=each.weight) for each in checkpoint.adapters
        ],
    )


def _name_parts(options: ExportOptions) -> list[str]:
    """What the variant's name has beside the backend: quantization, cache, precision and what the backend adds, where
    they are not plain."""
    parts = [] if options.quantize == "none" else [options.quantize]
    parts += [] if options.kv_cache == "float32" else [f"kv-{options.kv_cache}"]
    parts += [options.cast_type] if options.is_cast else []
    parts += [options.auto_cast] if options.auto_cast != "none" else []
    return [*parts, *options.backend_options.name_parts()]


def _cast_notes(options: ExportOptions) -> dict[str, str]:
    is_cast = options.auto_cast != "none"
    return {"auto_cast": options.auto_cast, "auto_cast_type": options.cast_type} if is_cast else {}


def _validate(artifact: Artifact, reference: Reference | None, options: ExportOptions, on_step: OnStep) -> Artifact:
    """Record the verdict in the artifact: "skipped" where the device it was compiled for is not here. Raises
    AccuracyError."""
    if reference is None:
        return artifact
    (variant,) = artifact.contract.variants
    with on_step("validate"):
        arguments = (variant.name, reference, options, describe_loss(variant), artifact.contract.digest)
        return record_accuracy(
            artifact, variant.name, skip_without_device(artifact) or compare(artifact.path, *arguments)
        )


def publish_with_card(
    artifact: Artifact, checkpoint: Checkpoint, target: Path, options: ExportOptions, on_step: OnStep
) -> None:
    """Write the model card, and put the staged artifact at `target`, all or nothing. Raises PublishError."""
    with on_step("publish"):
        (artifact.path / "README.md").write_text(render_card(artifact, checkpoint), "utf-8")
        publish(artifact.path, target, force=options.force)
        vouch(artifact.contract.digest)
