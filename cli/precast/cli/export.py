"""`precast export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .backend_options import ExportCommand
from .exporting import check_installed, load_exporter
from .options import (
    LENGTHS,
    adapter_options,
    adapter_slot_options,
    cast_options,
    hub_options,
    in_flags,
    json_option,
    option_in,
    quantize_options,
    quiet_option,
)
from .output import echo, note, print_json, step_reporter

__all__ = ["command", "describe_plan", "show_result"]

_shape = option_in("Shapes")


@click.command(
    "export", cls=ExportCommand, epilog="precast export user/model --batch-size 1 --sequence-length 512 -o out"
)
@click.argument("model")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), help="The directory to make.")
@click.option("--task", metavar="TASK", help="Inferred from the checkpoint if not given; all: precast tasks.")
@_shape("--batch-size", type=LENGTHS, help="Rows per call. Encoders: several make buckets. Decoders: 1 if not given.")
@_shape(
    "--sequence-length", type=LENGTHS, default=(), show_default=False,
    help="Tokens per row; for a decoder prompt and answer together. Encoders: several make buckets.",
)  # fmt: skip
@_shape(
    "--decoder-sequence-length", type=int, metavar="N",
    help="Encoder-decoders: tokens per answer, where --sequence-length is the source's.",
)  # fmt: skip
@_shape("--prefill-lengths", type=LENGTHS, default=(), help="Decoders: fully static graphs with these prompt lengths.")
@_shape("--num-choices", type=int, metavar="N", help="Multiple choice: choices per row.")
@_shape("--text-batch-size", type=int, metavar="N", help="Images with texts: texts per call.")
@_shape("--audio-sequence-length", type=LENGTHS, default=(), help="Sound: samples per row, or frames of a spectrogram.")
@_shape(
    "--image-size", type=LENGTHS, default=(), metavar="HEIGHT[,WIDTH]",
    help="Images: pixels, by default as the checkpoint says.",
)  # fmt: skip
@_shape("--dynamic-batch-size", is_flag=True, help="Run larger batches in slices of --batch-size.")
@click.option(
    "--backend",
    default="onnx",
    show_default=True,
    metavar="NAME",
    help="What compiles and runs the model: onnx, aoti, export, neuron; auto: the fastest here of all that can.",
)
@adapter_options
@adapter_slot_options
@cast_options
@quantize_options
@click.option("--atol", type=float, default=1e-4, show_default=True, help="Allowed difference from the eager model.")
@click.option(
    "--also", multiple=True, metavar="NAME", help="Compile with this backend, too, into one artifact; repeatable."
)
@click.option("--layout", default="precast", show_default=True, metavar="NAME",
              help="Files named as: precast, optimum-neuron (with that library's section in config.json).")  # fmt: skip
@click.option("--no-validate", is_flag=True, help="Do not compare with the eager model; recorded as skipped.")
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that comes with the checkpoint.")
@click.option("--weights", metavar="PATH", help="File or folder of the weights, if not with MODEL's configuration.")
@click.option("--prefix-tuning", metavar="PATH",
              help="PEFT adapter of a prefix or prompts, or pre_caches.npy: stands before every prompt.")  # fmt: skip
@click.option("--push-to-hub", metavar="REPO", help="Upload the artifact when it is done.")
@click.option("--private", is_flag=True, help="With --push-to-hub: make the repository private.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("--force", is_flag=True, help="Replace an existing artifact.")
@hub_options
@json_option
@quiet_option
def command(
    model: str,
    target: Path | None,
    push_to_hub: str | None,
    private: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    no_validate: bool,
    **options: Any,
) -> None:
    """Compile MODEL — a Hub id, a checkpoint directory, or a .gguf file — into an artifact."""
    if target is None and not dry_run:
        raise click.UsageError("Missing option '-o': the directory to make.")
    if private and not push_to_hub:
        raise click.UsageError("--private says how --push-to-hub makes its repository; give both.")
    check_installed()
    # Nothing of this imports torch, so a mistake is answered at once.
    from precast.exporter import ExportOptions
    from precast.exporter.checkpoint.early import check_request

    settings = ExportOptions(validate=not no_validate, **options)
    check_request(model, target, settings)
    if not quiet:
        note(f"{'Planning' if dry_run else 'Exporting'} {model} …")
    exporter = load_exporter()
    if dry_run:
        _show_plans(exporter, model, settings, as_json)
        return
    on_step = step_reporter(quiet)
    on_plan = (lambda plan: None) if quiet else (lambda plan: note(describe_plan(plan)))
    artifact = exporter.export(model, target, settings, on_step=on_step, on_plan=on_plan)
    url = None
    if push_to_hub:
        from precast.runtime.storage.hub import push

        with on_step("push"):
            url = push(artifact, push_to_hub, private=private or None, token=options["token"])
    show_result(artifact, url, _comparison(artifact, settings), as_json)
    if not quiet and settings.backend == "onnx" and (advice := exporter.faster_here(artifact, settings)):
        note(_typed(advice))


def _show_plans(exporter: Any, model: str, settings: Any, as_json: bool) -> None:
    """The plan, with `--backend auto` that of the first, and which backends would be tried."""
    found: dict[str, Any] = {}
    if settings.backend == "auto":
        choice = exporter.choose_backends(settings)
        settings = settings.replace(backend=choice.names[0])
        found = {"backends": choice.names, "left_out": choice.left_out}
    plan = exporter.preview(model, settings)
    if as_json:
        print_json({**plan.as_json(), **found})
        return
    echo(describe_plan(plan))
    for name in found.get("backends", ()):
        echo(f"backend          {name}")
    for name, reason in found.get("left_out", {}).items():
        echo(f"no backend       {name}: {_typed(reason)}")


def _typed(message: str) -> str:
    """A message of the exporter with its options as they are typed."""
    context = click.get_current_context()
    return in_flags(message, context.command.get_params(context))


def describe_plan(plan: Any) -> str:
    """The plan of an export in lines for people."""
    facts = plan.as_json()
    lines = [
        f"task             {facts['task']} ({facts['model_type']})",
        f"batch size       {facts['batch_size']}{' (larger ones in slices)' if facts['dynamic_batch_size'] else ''}",
        *([f"sequence length  {', '.join(map(str, facts['sequence_length']))}"] if facts["sequence_length"] else []),
        *(f"input            {name} {shape}" for name, shape in facts.get("inputs", {}).items()),
        f"graphs           {', '.join(facts['graphs'])}",
        f"weights          {_megabytes(facts['weight_bytes'])} as {facts['dtype']}",
    ]
    if facts["auto_cast"] != "none":
        lines.append(f"auto-cast        {facts['auto_cast']}")
    if facts["quantize"] != "none":
        lines.append(f"quantized to     {facts['quantize']}")
    if "attention" in facts:
        lines.append(f"attention        {facts['attention']}: {facts['attention_because']}")
    if "prefix" in facts:
        lines.append(f"prefix           {facts['prefix']}, of the sequence length")
    if "adapters" in facts:
        lines.append(f"adapters         {facts['adapters']}")
    if "tokenizer" in facts:
        lines.append("tokenizer        none in the checkpoint: the artifact will take token ids, no texts")
    if facts["cache_bytes"]:
        lines.append(f"cache            {_megabytes(facts['cache_bytes'])}")
    return "\n".join([*lines, f"memory to export about {_megabytes(facts['memory_bytes'])}"])


def _comparison(artifact: Any, settings: Any) -> dict[str, Any] | None:
    """What `--backend auto` has found out, as it lies in the artifact."""
    if settings.backend != "auto":
        return None
    found: dict[str, Any] = json.loads((artifact.path / "bench.json").read_text("utf-8"))
    return found


def show_result(artifact: Any, url: str | None, comparison: dict[str, Any] | None, as_json: bool) -> None:
    """Print what was made, where it lies on the Hub, and what `--backend auto` has found out."""
    first, *others = artifact.contract.variants
    if _reads_text(first) and "tokenizer.json" not in artifact.contract.files:
        note(f"{artifact.path} has no tokenizer.json, so it takes token ids and no texts.")
    size = sum(file.size for file in artifact.contract.files.values())
    if as_json:
        result = {
            "path": str(artifact.path),
            "digest": artifact.contract.digest,
            "bytes": size,
            "accuracy": _accuracy(first),
            "url": url,
        }
        if others:
            result["variants"] = {variant.name: _accuracy(variant) for variant in artifact.contract.variants}
        print_json(result if comparison is None else {**result, "comparison": comparison})
        return
    for line in [] if comparison is None else _compared(comparison):
        echo(line)
    echo(f"{artifact.path}: {_megabytes(size)}, accuracy {first.accuracy.status}")
    for variant in [first, *others] if others else []:
        echo(f"  {variant.name:<16} {variant.accuracy.status}: {variant.accuracy.reason}")
    if url:
        echo(url)


def _reads_text(variant: Any) -> bool:
    return any(spec.name == "input_ids" for graph in variant.graphs for spec in graph.inputs)


def _accuracy(variant: Any) -> dict[str, Any]:
    return {"status": variant.accuracy.status, **variant.accuracy.figures}


def _compared(comparison: dict[str, Any]) -> list[str]:
    """A line for each backend: what each request took, in the order in which they are told, or why there is none."""
    asked = " | ".join(map(_request, comparison["requests"]))
    lines = [f"medians of {comparison['rounds']} rounds, ms: {asked}"]
    for name, entry in comparison["candidates"].items():
        kept = "  (kept)" if name == comparison["backend"] else ""
        lines.append(f"  {name:<8} {' | '.join(f'{value:,.4g}' for value in entry['milliseconds'])}{kept}")
    return lines + [f"  {name:<8} left out: {_typed(reason)}" for name, reason in comparison["left_out"].items()]


def _request(request: dict[str, Any]) -> str:
    if request["kind"] == "graphs":
        return "all graphs, over blank inputs"
    new = f" and {request['new_tokens']} new ones" if request["new_tokens"] else ""
    return f"batch {request['batch_size']}, {request['prompt_length']} tokens{new}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"
