"""The artifact: a directory whose `config.json` says everything. Read, checked and written here, nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from ..errors import ArtifactError, FormatError
from ..terminal import quoted
from . import optimum_neuron, strict_json
from .graphs import CACHE_POSITIONS, DECODER_INPUTS, OF_TEXT, graph_problem, is_cache_positions, variant_problem
from .integrity import Contents, read_regular
from .lora import lora_inputs, lora_problem
from .ranks import ranks_problem
from .schema import FORMAT_VERSION, Contract, File, Graph, Input, Lora, Variant
from .stages import compiled_graphs, stages_problem
from .tasks import find_tasks, kind_of_roles

__all__ = [
    "CACHE_POSITIONS", "DECODER_INPUTS", "UNLISTED", "Artifact", "contract_digest", "is_artifact",
    "is_cache_positions", "parse_artifact", "read_artifact", "render_config", "vocabulary_of",
]  # fmt: skip

KEY = "precast"
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
        if contract := optimum_neuron.import_contract(config, path):
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
        hint = f" To make one from it: precast export {quoted(path)} -o OUT" if path.suffix == ".gguf" else ""
        raise ArtifactError(f"{path} is a file; a precast artifact is a directory with a config.json.{hint}") from None
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
    if problem := _prefix_problem(contract) or _lora_problem(contract):
        raise FormatError(f"{path / 'config.json'}: {problem}.")
    vocabulary, batch = vocabulary_of(config), contract.shapes.batch_size
    for variant in contract.variants:
        if missing := sorted(_named(variant) - set(contract.files)):
            raise FormatError(f"{path / 'config.json'}: variant {variant.name!r} uses {missing[0]}, not in files.")
        _check_task(variant, contract.task, path)
        if problem := next(_variant_problems(variant, vocabulary, batch, contract.lora), None):
            raise FormatError(f"{path / 'config.json'}: {problem}.")


def _prefix_problem(contract: Contract) -> str | None:
    """What is wrong with the prefix of a contract."""
    prefix = contract.prefix
    if prefix is None:
        return None
    if prefix.file not in contract.files:
        return f"the prefix uses {prefix.file}, not in files"
    for graph in (graph for variant in contract.variants for graph in variant.graphs):
        if not graph.cache or graph.states or graph.role == "encode":
            return f"graph {graph.name!r} has no place for a prefix, which takes caches, and no states"
        if not 1 <= prefix.length < graph.capacity:
            return f"the prefix takes {prefix.length} positions of {graph.capacity}"
    return None


def _lora_problem(contract: Contract) -> str | None:
    """What is wrong with the slots for adapters of a contract."""
    if contract.lora is None:
        return None
    for graph in (graph for variant in contract.variants for graph in variant.graphs):
        problem = "has no place for adapters" if graph.role == "encode" else lora_problem(contract.lora, graph)
        if problem:
            return f"graph {graph.name!r} {problem}"
    return None


def _variant_problems(variant: Variant, vocabulary: int | None, batch: int, lora: Lora | None) -> Iterator[str]:
    """What is wrong with the graphs of a variant: with each by itself first, since how they go together is asked of
    graphs that keep to what they say."""
    for graph in variant.graphs:
        if problem := graph_problem(graph, vocabulary):
            yield f"graph {graph.name!r} of variant {variant.name!r} {problem}"
    for graph in variant.graphs:
        if problem := _misfit(graph, variant, batch):
            yield f"graph {graph.name!r} of variant {variant.name!r} {problem}"
        if unfed := _unfed(graph, variant, lora):
            yield f"no encoder of variant {variant.name!r} makes the input {unfed[0]!r} of graph {graph.name!r}"
    if problem := variant_problem(variant) or ranks_problem(variant) or stages_problem(variant):
        yield f"variant {variant.name!r} {problem}"


def _check_task(variant: Variant, task: str, path: Path) -> None:
    """Raise FormatError where the graphs are not those of a model for the task."""
    kind = kind_of_roles(graph.role for graph in variant.graphs)
    kinds = {row.kind for row in find_tasks(task)}
    if not variant.graphs or (kinds and kind not in kinds):
        roles = ", ".join(dict.fromkeys(graph.role for graph in variant.graphs)) or "none"
        raise FormatError(
            f"{path / 'config.json'}: variant {variant.name!r} has graphs of the roles {roles}, which do not do {task}."
        )


def _misfit(graph: Graph, variant: Variant, batch_size: int) -> str | None:
    """What does not fit the other graphs and the model's batch."""
    decoders = [each for each in variant.graphs if each.role != "encode"]
    if graph in decoders:
        return f"has a batch of {graph.batch}, the model one of {batch_size}" if graph.batch != batch_size else None
    if decoders:
        read = set.intersection(*({spec.name for spec in each.inputs} for each in decoders))
        return next(
            (f"makes {spec.name}, which no decoder reads" for spec in graph.outputs if spec.name not in read), None
        )
    # Several batches may be compiled; the model's is the largest.
    rows, all_rows = _rows(graph), [_rows(each) for each in variant.graphs]
    if rows is None or rows > batch_size or batch_size not in all_rows:
        return f"has inputs of {rows} rows, the model a batch of {batch_size}"
    return None


def _rows(graph: Graph) -> int | None:
    """The batch of an encoder's graph, None where its inputs name none."""
    needed = [spec for spec in graph.inputs if spec.dtype == "float32" or spec.name == "input_ids"]
    axes = {axis: size for spec in needed for axis, size in zip(spec.axes or OF_TEXT, spec.shape, strict=True)}
    found = axes.get("batch")
    return found if isinstance(found, int) else None


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """How many tokens a checkpoint's configuration says that there are."""
    text = config.get("text_config")
    found = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    return found if type(found) is int and found > 0 else None


def _unfed(graph: Graph, variant: Variant, lora: Lora | None) -> list[str]:
    """Inputs of a decoder that are neither its own nor made by an encoder that fits."""
    if graph.role == "encode":
        return []
    own = {*DECODER_INPUTS, ENCODER_MASK, *(state.name_in for state in graph.states)}
    own |= {name for layer in graph.cache for name in (layer.key_in, layer.value_in)}
    own |= {spec.name for spec in lora_inputs(lora, graph.slots)} if lora else set()
    encoders = [each for each in variant.graphs if each.role == "encode"]
    others = [spec for spec in graph.inputs if spec.name not in own and not is_cache_positions(spec)]
    return [spec.name for spec in others if not _is_made(spec, encoders)]


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


def _named(variant: Variant) -> set[str]:
    return {*variant.weights, *(graph.file for graph in [*variant.graphs, *compiled_graphs(variant)])}
