"""Validate an existing artifact against a checkpoint: `precast validate`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from precast.runtime.artifact import Artifact, read_artifact
from precast.runtime.artifact.integrity import vouch
from precast.runtime.artifact.locks import Scratch
from precast.runtime.artifact.schema import Accuracy, Variant
from precast.runtime.artifact.store import write_atomically
from precast.runtime.artifact.tasks import get_task, kind_of_roles
from precast.runtime.errors import AccuracyError, ExportError, UsageError
from precast.runtime.hosts.select import choose_variant, this_machine

from ..adapters.prefix import PrefixedModel, after_prefix, load_prefix
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.resolve import resolve
from ..checkpoint.sentence_transformers import OUTPUT as SENTENCES
from ..options import ExportOptions
from . import compare
from .metrics import Floor
from .record import describe_loss, record_accuracy
from .reference import make_reference

__all__ = ["validate_again"]


def validate_again(
    path: Path,
    model: str,
    options: ExportOptions,
    *,
    keep: bool,
    sha256: str | None = None,
    variant: str | None = None,
) -> Accuracy:
    """Compare a variant of an existing artifact with a checkpoint.

    The variant is held to the floor that it was made with, and a loss that was accepted then is accepted again. Native
    code runs only with proof, as in `from_pretrained`.

    Args:
        keep: write the verdict into the artifact's `config.json`.
        sha256: the artifact's digest, as proof.
        variant: its name; None is the first that runs here.

    Raises:
        UsageError: a bound that does not apply to this variant.
        AccuracyError: the answers differ.
        ArtifactError, CheckpointError: either cannot be opened.
    """
    artifact = read_artifact(path)
    checkpoint = resolve(model, options)
    _check_adapters(artifact, checkpoint)
    chosen = choose_variant(artifact.contract, this_machine(artifact.contract), variant, root=path)
    task = get_task(artifact.contract.task, kind_of_roles(graph.role for graph in chosen.graphs))
    loss, options = describe_loss(chosen), _as_compiled(options, chosen)
    if loss is not None and options.accuracy.given("atol"):
        raise UsageError(
            f"atol={options.accuracy.atol:g} bounds the difference of a model that computes in float32; the variant "
            f"{chosen.name} is {loss}, and what that costs is measured on answers as a whole. Leave atol= out."
        )
    outputs = {spec.name for graph in chosen.graphs for spec in graph.outputs}
    checkpoint = replace(checkpoint, embeds_sentences=SENTENCES in outputs)
    loaded, graphs = checkpoint.load(task, "float32"), chosen.graphs
    if prefix := artifact.contract.prefix:
        loaded = PrefixedModel(loaded, load_prefix(artifact, graphs[0]), prefix.positions)
        graphs = after_prefix(graphs, prefix.length)
    is_rounded = bool(chosen.quantization or chosen.kv_cache)
    is_scored = is_rounded or (loss is not None and task.kind == "decoder")
    reference = make_reference(loaded, checkpoint, task, graphs, artifact.contract.lora, is_scored=is_scored)
    del loaded
    try:
        accuracy = compare(path, chosen.name, reference, options, loss, sha256)
    except ExportError as error:
        _check_source(artifact, checkpoint, error)
        raise
    if keep:
        _rewrite_contract(artifact, chosen.name, accuracy)
    return accuracy


def _check_adapters(artifact: Artifact, checkpoint: Checkpoint) -> None:
    """Raise UsageError where other adapters are merged into the checkpoint than into the artifact's model."""
    compiled = [(each.sha256, each.weight) for each in artifact.contract.source.adapters]
    if compiled != [(each.sha256, each.weight) for each in checkpoint.adapters]:
        wanted = ", ".join(f"{each.name}:{each.weight:g} (sha256 {each.sha256[:8]}…)" for each in
                           artifact.contract.source.adapters)  # fmt: skip
        raise UsageError(
            f"{artifact.path} has other adapters merged into its model than lora= names: "
            f"{wanted or 'none'}. Give {'these' if wanted else 'none'}, in this order."
        )


def _check_source(artifact: Artifact, checkpoint: Checkpoint, error: ExportError) -> None:
    """Raise AccuracyError instead of `error` where the checkpoint has other weights than the artifact was made from."""
    source, found = artifact.contract.source, checkpoint.weights_sha256()
    if found != source.weights_sha256:
        raise AccuracyError(
            f"{artifact.path} does not give the answers of {checkpoint.given}. It was compiled from {source.model} "
            f"with weights of sha256 {source.weights_sha256[:8]}…, these have {found[:8]}…: is it the right checkpoint?"
        ) from error


def _as_compiled(options: ExportOptions, variant: Variant) -> ExportOptions:
    """The options, cast as the variant is, with the floor that it was held to and whether its loss was accepted."""
    cast = {name: variant.compiler.options[name] for name in ("auto_cast", "auto_cast_type")
            if name in variant.compiler.options}  # fmt: skip
    floor = {name: value for name, value in asdict(Floor.parse(variant.accuracy.reason)).items() if value is not None}
    accepts = variant.accuracy.status == "accepted"
    return options.replace(dtype=variant.dtype, accept_loss=accepts, **cast, **floor)


def _rewrite_contract(artifact: Artifact, variant: str, accuracy: Accuracy) -> None:
    """Replace config.json in one step, and vouch for the new digest."""
    with Scratch() as folder:
        renewed = record_accuracy(Artifact(folder, artifact.config, artifact.contract), variant, accuracy)
        write_atomically(artifact.path / "config.json", (folder / "config.json").read_bytes(), 0o644)
    vouch(renewed.contract.digest)
