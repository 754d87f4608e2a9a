"""The export, in six verbs: resolve, plan, trace, compile, validate, publish."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from precast.runtime.artifact import Artifact, read_artifact
from precast.runtime.artifact.backends import get_backend
from precast.runtime.artifact.integrity import vouch
from precast.runtime.artifact.publish import check_target, hash_files, publish, staging, write_config
from precast.runtime.artifact.schema import FORMAT_VERSION, Accuracy, Contract, Graph, Shapes, Source, Variant
from precast.runtime.errors import ExportError

from .backends import Compiled, NeedsTools, ProgramCompiler
from .backends.neuron.optimum_layout import check_layout, in_layout, lay_out
from .card import render_card
from .checkpoint.resolve import Checkpoint, resolve
from .checkpoint.sentence_texts import lower_case
from .checkpoint.sentence_transformers import embeds_sentences
from .checkpoint.tokenizer_files import tokenizer_settings
from .kinds.decoder.plan import DecoderPlan
from .kinds.plan import Plan, make_plan
from .kinds.trace import trace
from .options import ExportOptions
from .precision import cast, cast_of
from .progress import heard_by, tell_nobody
from .quantize.choose import calibration_rows, quantize_model
from .quantize.kv_cache import cache_scales
from .validation import Reference, compare, in_words, make_reference, record, without_device

__all__ = ["Report", "compiler_of", "export", "preview"]

Report = Callable[[str], AbstractContextManager[Any]]
_UNCHECKED = Accuracy(status="skipped", reason="not validated", figures={})


def export(
    model: str,
    target: str | Path,
    options: ExportOptions | None = None,
    *,
    report: Report = lambda step: nullcontext(),
    announce: Callable[[Plan], None] = lambda plan: None,
) -> Artifact:
    """Compile a checkpoint into an artifact at `target`, all or nothing.

    Args:
        model: a Hub id, a checkpoint directory, or a .gguf file.
        target: the directory to make.
        options: see ExportOptions.
        report: called with the name of each step; what it returns is entered for as long as the step takes. If that
            gives a function, long steps call it with how many of how many parts are done, and what comes now.
        announce: told the plan before the long work begins.

    Raises:
        PrecastError: its subclasses say which step failed; `target` is then as it was.
    """
    options, target = options or ExportOptions(), Path(target)
    if options.also or options.backend == "auto":
        return _export_several(model, target, options, report=report, announce=announce)
    options.check()
    compiler = _ready_compiler(options)
    check_target(target, force=options.force)
    with report("resolve"):
        checkpoint = in_layout(resolve(model, options), options)
    with report("plan"):
        plan = make_plan(checkpoint, options)
    announce(plan)
    with _explained(plan), staging(target) as stage:
        with report("load"):
            tokenizer = checkpoint.tokenizer
            loaded = checkpoint.load(plan.task, plan.dtype)
        reference = None
        if options.validate:
            with report("reference") as listener, heard_by(listener):
                is_scored = options.is_lossy and plan.task.kind == "decoder"
                reference = make_reference(loaded, checkpoint, plan.task, plan.outline(), is_scored=is_scored)
        scales, rounding = None, None
        if options.kv_cache == "int8" and isinstance(plan, DecoderPlan):
            with report("calibrate"):
                widths = [layer.head_dim for layer in plan.cache]
                scales = cache_scales(loaded, calibration_rows(checkpoint, options), widths)
        if options.quantize != "none":
            with report("quantize") as listener:
                rounding = quantize_model(loaded, checkpoint, options, listener or tell_nobody)
        with report("trace"):
            programs = list(trace(loaded, plan, scales))
            if how := cast_of(options):
                programs = cast(programs, how)
        contract = _draft(checkpoint, options, plan, [program.graph for program in programs], rounding)
        check_layout(contract, checkpoint, options)
        with report("compile") as listener, heard_by(listener):
            compiled = compiler.compile(programs, stage, options)
            _write_beside(stage, tokenizer, checkpoint, loaded)
            config = _config(checkpoint, loaded)
        del loaded, programs
        gc.collect()
        compiled = lay_out(compiled, contract, config, options, stage)
        contract = _complete(contract, compiled, {**plan.notes, **_cast_notes(options)}, stage)
        artifact = write_config(stage, config, contract)
        if reference is not None:
            with report("validate"):
                artifact = _validated(artifact, reference, options)
        with report("publish"):
            (stage / "README.md").write_text(render_card(artifact, checkpoint), "utf-8")
            publish(stage, target, force=options.force)
            vouch(artifact.contract.digest)
    return read_artifact(target)


@contextmanager
def _explained(plan: Plan) -> Iterator[None]:
    """Add to a failure why attention is in ordinary operators, where it is: the one may come of the other."""
    try:
        yield
    except ExportError as error:
        if reason := plan.notes.get("attention_because"):
            raise type(error)(f"{error} Attention is in ordinary operators here, because: {reason}") from error
        raise


def _export_several(model: str, target: Path, options: ExportOptions, **told: Any) -> Artifact:
    """`export` once with each backend, to keep the fastest or all of them; those modules call it in turn."""
    from .several.fallback import export_with_others
    from .several.fastest import export_fastest

    several = export_with_others if options.also else export_fastest
    return several(model, target, options, **told)


def _validated(artifact: Artifact, reference: Reference, options: ExportOptions) -> Artifact:
    """The artifact with the verdict on it; skipped where what it was compiled for is not here. Raises AccuracyError."""
    (variant,) = artifact.contract.variants
    asked = (variant.name, reference, options, in_words(variant), artifact.contract.digest)
    return record(artifact, variant.name, without_device(artifact) or compare(artifact.path, *asked))


def preview(model: str, options: ExportOptions) -> Plan:
    """What `export` would compile, without reading weights. Raises PrecastError as `export` does."""
    options.check()
    compiler_of(options.backend)
    return make_plan(in_layout(resolve(model, options), options), options)


def compiler_of(backend: str) -> ProgramCompiler:
    """What compiles for a backend. Raises UsageError where there is none of this name."""
    module, _, name = get_backend(backend).compiler.partition(":")
    compiler: ProgramCompiler = getattr(import_module(module), name)()
    return compiler


def _ready_compiler(options: ExportOptions) -> ProgramCompiler:
    """The backend's compiler, with the tools that it needs at hand. Raises ExportError."""
    compiler = compiler_of(options.backend)
    if isinstance(compiler, NeedsTools):
        compiler.check_tools(options)
    return compiler


def _draft(
    checkpoint: Checkpoint,
    options: ExportOptions,
    plan: Plan,
    graphs: list[Graph],
    rounding: str | None,
) -> Contract:
    """The contract as far as it is known before anything is compiled."""
    variant = Variant(
        name="-".join([options.backend, *_name_parts(options)]),
        backend=options.backend,
        dtype=options.dtype,
        quantization=rounding,
        kv_cache=None if options.kv_cache == "float32" else options.kv_cache,
        host=None,  # type: ignore[arg-type]
        compiler=None,  # type: ignore[arg-type]
        trust=get_backend(options.backend).trust,
        accuracy=_UNCHECKED,
        weights=[],
        graphs=graphs,
    )
    return Contract(
        format_version=FORMAT_VERSION,
        precast_version=version("precast"),
        digest="0" * 64,
        task=plan.task.name,
        source=Source(model=checkpoint.name, revision=checkpoint.revision, weights_sha256=checkpoint.weights_sha256()),
        shapes=Shapes(
            batch_size=plan.batch_size,
            sequence_length=list(plan.lengths),
            prefill_lengths=list(plan.prefill_lengths) if isinstance(plan, DecoderPlan) else [],
            dynamic_batch_size=plan.dynamic_batch_size,
        ),
        variants=[variant],
        files={},
    )


def _name_parts(options: ExportOptions) -> list[str]:
    """What tells this variant from the plain one."""
    parts = [] if options.quantize == "none" else [options.quantize]
    parts += [] if options.kv_cache == "float32" else [f"kv-{options.kv_cache}"]
    parts += [options.cast_type] if options.is_cast else []
    return parts + ([options.auto_cast] if options.auto_cast != "none" else [])


def _cast_notes(options: ExportOptions) -> dict[str, str]:
    is_cast = options.auto_cast != "none"
    return {"auto_cast": options.auto_cast, "auto_cast_type": options.cast_type} if is_cast else {}


def _complete(contract: Contract, compiled: Compiled, notes: dict[str, str], stage: Path) -> Contract:
    from msgspec.structs import replace

    variant = replace(
        contract.variants[0],
        host=compiled.host,
        compiler=replace(compiled.compiler, options={**compiled.compiler.options, **notes}),
        weights=compiled.weights,
        graphs=compiled.graphs,
    )
    return replace(contract, variants=[variant], files=hash_files(stage))


def _config(checkpoint: Checkpoint, model: Any) -> dict[str, Any]:
    """The checkpoint's configuration."""
    if checkpoint.gguf_file:
        config = json.loads(checkpoint.config.to_json_string(use_diff=True))
        config["architectures"] = [type(model).__name__]
    else:
        config = checkpoint.written_config
    return dict(_without_places(config))


def _without_places(value: Any) -> Any:
    """Without the traces, at any depth, that transformers leaves of where something was loaded from."""
    if isinstance(value, dict):
        return {key: _without_places(each) for key, each in value.items() if not _is_place(key, each)}
    return [_without_places(each) for each in value] if isinstance(value, list) else value


def _is_place(key: str, value: Any) -> bool:
    # A label of this name would have a number.
    return key.endswith("name_or_path") and (value is None or isinstance(value, str))


def _write_beside(stage: Path, tokenizer: Any | None, checkpoint: Checkpoint, model: Any) -> None:
    """The companions, with what sentence-transformers does to texts; lower case becomes the tokenizer's own. Raises
    CheckpointError."""
    files = checkpoint.sentence_files() if embeds_sentences(model) else {}
    for name, settings in files.items():
        _write_json(stage / name, settings)
        if settings.get("do_lower_case") and tokenizer is not None:
            lower_case(tokenizer, checkpoint.name)
    _write_companions(stage, tokenizer, model, checkpoint.processor_files)


def _write_companions(stage: Path, tokenizer: Any | None, model: Any, rules: dict[str, dict[str, Any]]) -> None:
    """Tokenizer, generation settings and rules for images and sounds, in the forms that transformers writes."""
    _write_rules(stage, rules)
    if tokenizer is not None:
        _write_json(stage / "tokenizer_config.json", _without_places(tokenizer_settings(tokenizer, stage)))
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        said = _without_places(json.loads(generation.to_json_string(ignore_metadata=True)))
        _write_json(stage / "generation_config.json", {name: said[name] for name in said if name[0] != "_"})


def _write_rules(stage: Path, rules: dict[str, dict[str, Any]]) -> None:
    """How images and sounds are prepared, in the files in which the checkpoint says so."""
    for name, settings in rules.items():
        _write_json(stage / name, _without_places(settings))


def _write_json(path: Path, value: Any) -> None:
    """As transformers writes it."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
