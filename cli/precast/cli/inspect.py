"""`precast inspect`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from precast.runtime.terminal import printable

from .options import hub_options, json_option
from .output import echo, print_json

__all__ = ["command"]


@click.command("inspect", epilog="precast inspect out --json")
@click.argument("model")
@click.option("--subfolder", metavar="DIR", help="Where in MODEL the artifact lies.")
@click.option("--verify", is_flag=True, help="Hash every file again.")
@hub_options
@json_option
def command(
    model: str, subfolder: str | None, verify: bool, revision: str | None, token: str | None, as_json: bool
) -> None:
    """Show what the artifact MODEL is and whether it runs here. Nothing of it is executed."""
    import msgspec

    from precast.runtime.artifact import read_artifact
    from precast.runtime.hosts.select import Accepted, judge, neff_headers, this_machine
    from precast.runtime.models.base import verify_artifact
    from precast.runtime.storage.hub import locate

    artifact = read_artifact(locate(model, revision=revision, subfolder=subfolder, token=token))
    machine = this_machine(artifact.contract)
    headers = [neff_headers(artifact.path, variant) for variant in artifact.contract.variants]
    verdicts = [
        judge(variant, machine, found) for variant, found in zip(artifact.contract.variants, headers, strict=True)
    ]
    if verify:
        for variant in artifact.contract.variants:
            verify_artifact(artifact, variant, force=True)
    runs = [None if isinstance(verdict, Accepted) else verdict.reason for verdict in verdicts]
    memory = [_measure(artifact, variant) for variant in artifact.contract.variants]
    if as_json:
        told = [[asdict(header) for header in found] for found in headers]
        facts = {
            "path": str(artifact.path),
            "refused": runs,
            "verified": verify,
            "memory": memory,
            **({"neffs": told} if any(told) else {}),
        }
        print_json({**facts, **msgspec.to_builtins(artifact.contract)})
        return
    _print_facts(artifact, runs, headers, memory, verify)


def _describe_prefix(prefix: Any) -> str:
    first = prefix.length if prefix.positions == "after" else 0
    return f"{prefix.length} positions before every prompt ({prefix.method}); prompts begin at position {first}"


def _describe_slots(lora: Any) -> str:
    kinds = ", ".join(dict.fromkeys(f"*.{target.module.rpartition('.')[2]}" for target in lora.targets))
    return f"{lora.slots} LoRA adapters at once, of ranks up to {lora.rank}, for {len(lora.targets)} layers: {kinds}"


def _measure(artifact: Any, variant: Any) -> dict[str, int] | None:
    """The bytes of a variant's tensors, and about how many they would be in 8 and 4 bits; None for files that cannot be
    read, which opening the artifact would say."""
    from precast.runtime.engines.footprint import measure_footprint
    from precast.runtime.errors import ArtifactError

    try:
        found = measure_footprint(artifact, variant)
    except ArtifactError:
        return None
    is_rounded = variant.quantization is not None or not found.matrices
    rounded = {} if is_rounded else {f"about_int{bits}": found.quantized(bits) for bits in (8, 4)}
    return {"parameters": found.parameters, "buffers": found.buffers, **rounded}


def _print_facts(
    artifact: Any, runs: list[str | None], headers: list[list[Any]], memory: list[Any], verified: bool
) -> None:
    contract = artifact.contract
    rows = [
        ("path", artifact.path),
        ("digest", contract.digest),
        ("model", f"{contract.source.model} {contract.source.revision or ''}"),
        *(
            ("  merged into it", f"{each.name}, weight {each.weight:g}, sha256 {each.sha256}")
            for each in contract.source.adapters
        ),
        ("task", contract.task),
        (
            "batch size",
            f"{contract.shapes.batch_size}{' (larger ones in slices)' if contract.shapes.dynamic_batch_size else ''}",
        ),
        ("sequence length", ", ".join(map(str, contract.shapes.sequence_length))),
        *([("prefix", _describe_prefix(contract.prefix))] if contract.prefix else []),
        *([("adapter slots", _describe_slots(contract.lora))] if contract.lora else []),
        ("size", f"{sum(file.size for file in contract.files.values()) / 1e6:,.1f} MB in {len(contract.files)} files"),
        ("files", "verified" if verified else "not verified: --verify compares all with their hashes"),
    ]
    for variant, reason, neffs, taken in zip(contract.variants, runs, headers, memory, strict=True):
        accuracy = variant.accuracy
        rows += [
            (f"variant {variant.name}", f"{variant.backend}, {variant.dtype}, trust tier {variant.trust}"),
            *([("  weights", variant.quantization)] if variant.quantization else []),
            ("  memory", _describe_memory(taken)),
            *([("  key/value cache", variant.kv_cache)] if variant.kv_cache else []),
            *([("  libraries", _describe_libraries(variant))] if variant.backend == "aoti" else []),
            *([("  ranks", _describe_ranks(variant))] if variant.ranks else []),
            *([("  stages", _describe_stages(variant, contract.files))] if variant.stages else []),
            ("  runs here", "yes" if reason is None else f"no: {reason}"),
            ("  accuracy", f"{accuracy.status}: {accuracy.reason}"),
            *((f"    {name}", value) for name, value in accuracy.figures.items()),
            *((f"  graph {graph.name}", _describe_graph(graph)) for graph in variant.graphs),
            *(("  NEFF", words) for words in dict.fromkeys(map(_describe_neff, neffs))),
        ]
    for name, value in rows:
        # In one line each: a value with lines of its own could pass for others.
        echo(f"{printable(name, keep=''):<27} {printable(value, keep='')}")


def _describe_memory(taken: dict[str, int] | None) -> str:
    if taken is None:
        return "unknown: its files cannot be read"
    held = taken["parameters"] + taken["buffers"]
    rounded = [f", about {taken[name] / 1e6:,.1f} MB in {name[-1]} bits" for name in taken if name.startswith("about")]
    return f"{held / 1e6:,.1f} MB of weights and buffers{''.join(rounded)}"


def _describe_libraries(variant: Any) -> str:
    if variant.abi:
        return f"stand alone, interface {variant.abi}"
    calls = ", ".join(variant.requires_torch[:8])
    return f"need PyTorch{f': they call {calls}' if calls else ''}"


def _describe_ranks(variant: Any) -> str:
    ranks, are_cores = variant.ranks, variant.host.device == "neuron"
    fewer = "".join(f", {kind} in {parts} parts" for kind, parts in ranks.degrees.items())
    where = "whole in one file" if ranks.stored == 1 else f"in {ranks.stored} parts"
    return f"{ranks.count} {'NeuronCores' if are_cores else 'processes'}, weights {where}{fewer}"


def _describe_stages(variant: Any, files: Any) -> str:
    layers = [len(stage.graphs[0].cache) for stage in variant.stages]
    sizes = [sum(files[name].size for name in stage.weights) / 1e6 for stage in variant.stages]
    return (
        f"{len(layers)} processes, with {', '.join(map(str, layers))} cached layers and weights of "
        f"{', '.join(f'{size:,.1f}' for size in sizes)} MB"
    )


def _describe_neff(header: Any) -> str:
    features = f", features 0x{header.feature_bits:x}" if header.feature_bits else ""
    groups = f", {header.lnc_size} physical cores each" if header.lnc_size > 1 else ""
    return (
        f"version {header.version}, NeuronCores {header.cores}{groups}{features}, compiler {header.build or 'unnamed'}"
    )


def _describe_graph(graph: Any) -> str:
    length = graph.length if isinstance(graph.length, int) else f"{graph.length.min}–{graph.length.max}"
    cache = f", {len(graph.cache)} cached layers of {graph.capacity} tokens" if graph.cache else ""
    return f"{graph.role}, batch {graph.batch}, length {length}{cache}, {graph.file}"
