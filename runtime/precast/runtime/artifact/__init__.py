"""The artifact: a directory whose `config.json` says everything. Read, checked and written here, nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from ..errors import ArtifactError, FormatError
from ..terminal import quoted
from . import optimum_neuron, strict_json
from .integrity import Contents, read_regular
from .schema import FORMAT_VERSION, Contract, File, Graph, Input, State, Variant

__all__ = [
    "UNLISTED", "Artifact", "contract_digest", "is_artifact", "parse_artifact", "read_artifact", "render_config",
]  # fmt: skip

KEY = "precast"
DECODER_INPUTS = ("input_ids", "past_lengths", "new_lengths", "logit_positions")
"""The first inputs of every decoder graph; its caches follow."""
ROWS = "rows"
"""A decoder's input, int64 [rows], 0, 1, …: the rows of its caches that attention looks at."""
ENCODER_MASK = "encoder_attention_mask"
"""An encoder-decoder's input, int64 [batch, positions], that says which encoded positions are no padding."""
UNLISTED = frozenset({"config.json", "README.md", "bench.json", ".gitattributes"})
"""Files that `files` never lists: the contract itself, and what may change without changing the model."""
_COMPANIONS = frozenset({".jinja", ".json", ".txt"})


@dataclass(frozen=True)
class Artifact:
    """An opened directory: `config` is the checkpoint's own configuration, `contract` is what precast adds."""

    path: Path
    config: dict[str, Any]
    contract: Contract

    @cached_property
    def contents(self) -> Contents:
        """The files that the contract lists; there is no other way to open one."""
        return Contents(self.path, self.contract.files)

    def companions(self) -> list[str]:
        """The listed files that say how to prepare inputs and how to answer: tokenizer, templates, settings."""
        named = {name for variant in self.contract.variants for name in _named(variant)}
        return [name for name in self.contract.files if name not in named and PurePosixPath(name).suffix in _COMPANIONS]

    def variant_files(self, variant: Variant) -> dict[str, File]:
        """What this variant needs: all files but those that only other variants name."""
        foreign = {name for other in self.contract.variants if other is not variant for name in _named(other)}
        foreign -= _named(variant)
        return {name: file for name, file in self.contract.files.items() if name not in foreign}


def read_artifact(path: str | Path) -> Artifact:
    """Parse `path/config.json` and check it against the contract, without touching any other file. What optimum-neuron
    compiled is read as if it were ours; its files, which it does not list, are hashed.

    Raises ArtifactError where there is no artifact, FormatError where it breaks the contract.
    """
    return parse_artifact(_read_config(Path(path)), Path(path))


def parse_artifact(data: bytes, path: Path) -> Artifact:
    """The artifact at `path` that a config.json with the content `data` makes: see read_artifact()."""
    config = strict_json.loads(data, str(path / "config.json"))
    if KEY not in config:
        if contract := optimum_neuron.imported(config, path):
            return _as_ours(contract, config, path)
        raise ArtifactError(
            f"{path} is not a precast artifact: its config.json has no {KEY!r} key. "
            f"To make one from this checkpoint: precast export {quoted(path)} -o OUT"
        )
    contract = _parse(config.pop(KEY), path)
    _check(contract, config, path)
    return Artifact(path, config, contract)


def _as_ours(contract: Contract, config: dict[str, Any], path: Path) -> Artifact:
    """What was made of another's words is held to the same rules as what is in a file of ours."""
    parsed = _parse(msgspec.to_builtins(contract), path)
    sealed = msgspec.structs.replace(parsed, digest=contract_digest(config, parsed))
    _check(sealed, config, path)
    return Artifact(path, config, sealed)


def is_artifact(path: Path) -> bool:
    """Does `path/config.json` say that it is an artifact's, whether or not it keeps the contract?"""
    try:
        return KEY in strict_json.loads(_read_config(path), str(path))
    except ArtifactError:
        return False


def render_config(config: dict[str, Any], contract: Contract) -> bytes:
    """The bytes of `config.json`: `config` plus the contract, with its digest filled in."""
    raw = msgspec.to_builtins(contract)
    raw["digest"] = contract_digest(config, contract)
    return strict_json.dumps({**config, KEY: raw})


def contract_digest(config: dict[str, Any], contract: Contract) -> str:
    """sha256 of config.json's canonical JSON without the digest itself."""
    raw = {key: value for key, value in msgspec.to_builtins(contract).items() if key != "digest"}
    return strict_json.canonical_digest({**config, KEY: raw})


def _read_config(path: Path) -> bytes:
    try:
        # One byte more than allowed is enough to refuse it.
        return read_regular(path / "config.json", strict_json.MAX_BYTES)
    except NotADirectoryError:
        raise ArtifactError(f"{path} is a file; a precast artifact is a directory with a config.json.") from None
    except FileNotFoundError:
        if os.path.exists(path):
            raise ArtifactError(f"{path} is not a precast artifact: it has no config.json.") from None
        raise ArtifactError(f"There is no directory {path}.") from None
    except OSError as error:
        raise ArtifactError(f"{path / 'config.json'} cannot be read: {error.strerror}.") from None


def _parse(raw: Any, path: Path) -> Contract:
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise FormatError(
            f"{path} has artifact format {version}; this precast reads formats up to {FORMAT_VERSION}. "
            f"Upgrade it: pip install -U precast"
        )
    try:
        return msgspec.convert(raw, Contract)
    except msgspec.ValidationError as error:
        raise FormatError(f"{path / 'config.json'} breaks the artifact contract at {KEY}: {error}.") from None


def _check(contract: Contract, config: dict[str, Any], path: Path) -> None:
    """What types cannot say: the digest, unique names, and that every file named is listed."""
    digest = contract_digest(config, contract)
    if digest != contract.digest:
        raise FormatError(
            f"{path / 'config.json'} was altered: its digest is {digest[:12]}… where it says "
            f"{contract.digest[:12]}…. Export or download the artifact again."
        )
    if contract.format_version < 1:
        raise FormatError(f"{path / 'config.json'}: there is no artifact format {contract.format_version}.")
    names = [variant.name for variant in contract.variants]
    if len(set(names)) != len(names):
        raise FormatError(f"{path / 'config.json'} names two variants alike: {', '.join(names)}.")
    for variant in contract.variants:
        if missing := sorted(_named(variant) - set(contract.files)):
            raise FormatError(f"{path / 'config.json'}: variant {variant.name!r} uses {missing[0]}, not in files.")
        for graph in variant.graphs:
            if hole := _graph_hole(graph):
                raise FormatError(f"{path / 'config.json'}: graph {graph.name!r} of variant {variant.name!r} {hole}.")
            if unfed := _unfed(graph, variant):
                raise FormatError(
                    f"{path / 'config.json'}: no encoder of variant {variant.name!r} makes the input {unfed[0]!r} of "
                    f"graph {graph.name!r}."
                )


def _unfed(graph: Graph, variant: Variant) -> list[str]:
    """Inputs of a decoder that are neither its own nor made by an encoder that fits."""
    if graph.role == "encode":
        return []
    own = {*DECODER_INPUTS, ENCODER_MASK, ROWS, *(state.name_in for state in graph.states)}
    own |= {name for layer in graph.cache for name in (layer.key_in, layer.value_in)}
    encoders = [each for each in variant.graphs if each.role == "encode"]
    return [spec.name for spec in graph.inputs if spec.name not in own and not _is_made(spec, encoders)]


def _is_made(wanted: Input, encoders: list[Graph]) -> bool:
    """Does every encoder make it, one row at a time and at most as long as wanted?"""
    made = [next((spec for spec in graph.outputs if spec.name == wanted.name), None) for graph in encoders]
    return bool(made) and all(
        spec is not None
        and [1, *wanted.shape[1:2], *wanted.shape[3:]] == [*spec.shape[:2], *spec.shape[3:]]
        and len(spec.shape) == len(wanted.shape) == 4
        and int(spec.shape[2]) <= int(wanted.shape[2])  # type: ignore[arg-type]
        for spec in made
    )


def _graph_hole(graph: Graph) -> str | None:
    """What the runtime takes for granted and a foreign file might not keep."""
    given, made = {spec.name for spec in graph.inputs}, {spec.name for spec in graph.outputs}
    if graph.role == "encode":
        sizes = [graph.length, *(size for spec in graph.outputs for size in spec.shape)]
        return None if all(isinstance(size, int) for size in sizes) else "is an encoder with a free dimension"
    if [spec.name for spec in graph.inputs[:4]] != list(DECODER_INPUTS) or not (graph.cache or graph.states):
        return f"is a decoder whose inputs are not {', '.join(DECODER_INPUTS)} and caches"
    if not graph.outputs or len(graph.outputs[0].shape) != 3 or not isinstance(graph.outputs[0].shape[-1], int):
        return "does not give logits [batch, positions, vocabulary] first"
    for layer in graph.cache:
        if not {layer.key_in, layer.value_in} <= given or not {layer.key_out, layer.value_out} <= made:
            return f"lacks the cache tensors of layer {layer.layer}"
    if graph.states and graph.length != 1:
        return "carries states through several tokens at once"
    return next((f"lacks {each.name_in}" for each in graph.states if not _is_held(each, given, made)), None)


def _is_held(state: State, given: set[str], made: set[str]) -> bool:
    return state.name_in in given and state.name_out in made


def _named(variant: Variant) -> set[str]:
    return {*variant.weights, *(graph.file for graph in variant.graphs)}
