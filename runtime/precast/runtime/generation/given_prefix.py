"""Prefixes that are given at run time: PEFT's files, as keys and values for the caches of a model without one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..advice import suggest_larger
from ..artifact import Artifact
from ..artifact.integrity import sha256_of
from ..artifact.peft_files import WEIGHT_FILES
from ..artifact.prefix_files import KEY, PRE_CACHES, check_length, check_shape, find_file, read_method
from ..artifact.schema import Graph
from ..engines import Engine, owns_caches
from ..engines.safetensors_map import Weight, open_weights
from ..errors import CheckpointError, FormatError, InputError
from .lora_files import read_matrix
from .prefix import Prefix

__all__ = ["hash_prefix", "open_prefix"]

Array = np.ndarray[Any, Any]

_BAKE = "Compile it into the artifact, by an export with prefix_tuning=PATH."
_AXES = "positions, 2 * layers * heads * width"
_LARGEST_HALF = 65504
_HEAD_MULTIPLE = 8
"""Caches are compiled with heads that are so wide, or a multiple."""


def hash_prefix(given: str | Path) -> str:
    """The sha256 of the file that a prefix is read from. Raises InputError where there is none."""
    try:
        return sha256_of(_find_file(given))
    except OSError as error:
        raise _unreadable(given, error) from error


def open_prefix(given: str | Path, artifact: Artifact, graph: Graph, engine: Engine) -> Prefix:
    """Read a prefix for the caches of `graph`.

    Args:
        given: the folder of a PEFT adapter of type PREFIX_TUNING, or the file in it.
        artifact, graph, engine: the model that it is for.

    Raises InputError where the file holds none, or one of another kind or another model, and where the model has no
    place for it.
    """
    if problem := _find_blocker(artifact, graph, engine):
        raise InputError(f"prefix={str(given)!r:.200} has no place here: {problem}")
    path = _find_file(given)
    try:
        with open(path, "rb") as file:
            weights = open_weights([path], [file.fileno()])
            values, sha256 = _read_tensor(given, path, weights), sha256_of(file.fileno())
    except (OSError, FormatError) as error:
        raise _unreadable(given, error) from error
    tensors = _split(given, values, artifact, graph)
    _check_range(given, values, graph)
    return Prefix(len(values), tensors, sha256, str(given))


def _find_blocker(artifact: Artifact, graph: Graph, engine: Engine) -> str | None:
    """Why caches of this model cannot begin with a prefix, with the way out; None where they can."""
    if artifact.contract.prefix is not None:
        return (
            f"{artifact.path} was compiled with a prefix of {artifact.contract.prefix.length} positions, which every "
            f"row begins with. Give one to an artifact that was compiled without."
        )
    if graph.states or not graph.cache:
        return "the model carries states from token to token, and a prefix is keys and values alone. Leave it out."
    if owns_caches(engine):
        return "caches lie in the memory of a device. Open the model on the CPU: device='cpu'."
    if "int8" in {layer.dtype for layer in graph.cache}:
        return "caches are in int8, whose scales are those of texts. Compile the model without kv_cache='int8'."
    sizes = {(layer.heads, layer.head_dim) for layer in graph.cache}
    if len(sizes) > 1:
        return f"layers cache heads and widths of several sizes, {sorted(sizes)}, which a prefix has alike in all."
    return None


def _find_file(given: str | Path) -> Path:
    """The file of a prefix that can be read here. Raises InputError."""
    if not isinstance(given, str | os.PathLike):
        raise InputError(f"prefix must be the path of a PEFT adapter of type PREFIX_TUNING, not {given!r:.80}.")
    try:
        path = find_file(given)
        method = None if path.suffix == ".npy" else read_method(given, path.parent)
    except CheckpointError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise _unreadable(given, error) from error
    if method is None:
        raise InputError(
            f"{path} holds arrays of numpy, as PaddleNLP's {PRE_CACHES}: after those a prompt counts its positions "
            f"from 0, for which another graph is compiled. {_BAKE}"
        )
    if method != "prefix-tuning":
        raise InputError(
            f"{given} is of {method}: it holds embeddings, and their keys and values take the model's own layers to "
            f"compute, as an export does. {_BAKE}"
        )
    return path


def _unreadable(given: str | Path, error: Exception) -> InputError:
    return InputError(f"The prefix {given} cannot be read: {error}")


def _read_tensor(given: str | Path, path: Path, weights: Mapping[str, Weight]) -> Array:
    if KEY not in weights:
        raise InputError(
            f"{path} has no matrix {KEY}, which a PEFT adapter of a prefix consists of. Was it saved by "
            f"model.save_pretrained() as {WEIGHT_FILES[0]}?"
        )
    return read_matrix(weights[KEY], KEY, Path(given))


def _split(given: str | Path, values: Array, artifact: Artifact, graph: Graph) -> dict[str, Array]:
    """Keys and values [heads, length, width] by the names of the caches. Raises InputError where they are of another
    model, or leave no room."""
    layers, heads, length = len(graph.cache), graph.cache[0].heads, len(values)
    width = _head_width(artifact.config, graph.cache[0].head_dim)
    axes = f"{_AXES}, here with {layers} layers, {heads} heads of keys and values, width {width}"
    try:
        check_length(given, length)
        check_shape(given, values.shape, artifact.contract.source.model, [length, 2 * layers * heads * width], axes)
    except CheckpointError as error:
        raise InputError(str(error)) from error
    if length >= graph.capacity:
        # A token of a prompt and one of its answer.
        fewest = length + 2
        flags = f"--batch-size {graph.slots} --sequence-length {fewest}"
        raise InputError(
            f"The prefix {given} has {length} positions, and the model was compiled for {graph.capacity}, which it "
            f"shares with prompt and answer. {suggest_larger(artifact, flags, fewest)}"
        )
    names = [name for layer in graph.cache for name in (layer.key_in, layer.value_in)]
    return dict(zip(names, values.reshape(length, 2 * layers, heads, width).transpose(1, 2, 0, 3), strict=True))


def _head_width(config: Mapping[str, Any], compiled: int) -> int:
    """The width of a head, which caches have rounded up: what the configuration says where that rounds to the compiled
    one."""
    text = config.get("text_config")
    told = {**config, **(text if isinstance(text, dict) else {})}
    size, count, width = (
        next((told[name] for name in names if type(told.get(name)) is int and told[name] > 0), 0)
        for names in (("hidden_size", "n_embd"), ("num_attention_heads", "n_head"), ("head_dim",))
    )
    width = width or (size // count if count else 0)
    return width if compiled - _HEAD_MULTIPLE < width <= compiled else compiled


def _check_range(given: str | Path, values: Array, graph: Graph) -> None:
    largest = float(np.abs(values).max())
    if largest > _LARGEST_HALF and "float16" in {layer.dtype for layer in graph.cache}:
        raise InputError(
            f"The prefix {given} holds numbers up to {largest:g}, and this model's caches are in float16, which ends "
            f"at {_LARGEST_HALF}. Compile the model with caches in float32."
        )
