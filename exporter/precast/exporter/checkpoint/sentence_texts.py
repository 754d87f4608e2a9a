"""How sentence-transformers prepares texts before the transformer: prompts, lower case, a maximum length.

The settings are read once, here, and written into the artifact as that library writes them, with the length in effect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from tokenizers import normalizers

from precast.runtime.errors import CheckpointError

from .sentence_transformers import check_prompt

__all__ = ["lower_case", "sentence_files"]

PROMPTS = "config_sentence_transformers.json"
TRANSFORMER = "sentence_bert_config.json"
_TYPES: dict[str, dict[str, Any]] = {
    PROMPTS: {
        "prompts": dict[str, str],
        "default_prompt_name": str,
        "similarity_fn_name": Literal["cosine", "dot", "euclidean", "manhattan"],
    },
    TRANSFORMER: {"max_seq_length": int, "do_lower_case": bool},
}
"""The keys that are used, with their types, by file."""
_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_NAMES = [f"sentence_{kind}_config.json" for kind in _KINDS]
"""Older names of that file, of which the first that is there counts."""
_ARGUMENTS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
_HARMLESS = {"add_pooling_layer", "attn_implementation", "dtype", "padding_side", "torch_dtype", "trust_remote_code",
             "use_fast", "use_safetensors"}  # fmt: skip
"""Keys in `_ARGUMENTS` that do not change an embedding."""


def sentence_files(directory: Path, name: str, longest: int | None) -> dict[str, dict[str, Any]]:
    """Read the two files of settings, by name, as they go into the artifact.

    Args:
        directory: of the checkpoint.
        name: of the checkpoint.
        longest: where texts are cut if the checkpoint does not say.

    Raises:
        CheckpointError: a setting changes answers, and is not supported.
    """
    prompts = _read(directory / PROMPTS, name, _TYPES[PROMPTS])[1]
    default = prompts.get("default_prompt_name")
    if default is not None and default not in prompts.get("prompts", {}):
        known = ", ".join(prompts.get("prompts", {})) or "none"
        raise CheckpointError(
            f"{PROMPTS} of {name} has the default prompt {default!r}, which is not among its prompts ({known}). "
            f"Correct it, or set default_prompt_name to null."
        )
    check_prompt(directory, name, prompts.get("prompts", {}).get(default, ""))
    rules = _read_transformer(directory, name)
    length = rules.setdefault("max_seq_length", longest)
    if length is not None and length < 1:
        raise CheckpointError(f"The max_seq_length of {name} is {length}; texts are cut to 1 token or more.")
    return {PROMPTS: prompts, TRANSFORMER: rules}


def lower_case(tokenizer: Any, name: str) -> None:
    """Let a tokenizer of transformers read its texts in lower case, as the key do_lower_case asks for.

    Raises CheckpointError where it has no normalizer to change.
    """
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise CheckpointError(f"{TRANSFORMER} of {name} has do_lower_case, and its tokenizer is none of tokenizers.")
    given = inner.normalizer
    parts = [given[at] for at in range(len(given))] if isinstance(given, normalizers.Sequence) else [given]
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), *filter(None, parts)])


def _read_transformer(directory: Path, name: str) -> dict[str, Any]:
    path = next((directory / each for each in _NAMES if (directory / each).is_file()), directory / TRANSFORMER)
    whole, rules = _read(path, name, _TYPES[TRANSFORMER])
    for key, is_fine in _CHECKS.items():
        if whole.get(key) is not None and not is_fine(whole[key]):
            raise CheckpointError(
                f"{path.name} of {name} has {key}: {whole[key]!r:.80}, which changes its embeddings in a way that is "
                f"not compiled. Without modules.json the model is exported for its token vectors."
            )
    return rules


def _is_text(value: Any) -> bool:
    """Whether texts go to forward() and come back as its last_hidden_state."""
    ways = value.get("text") if isinstance(value, Mapping) and "message" not in value else None
    plain = {"method": "forward", "method_output_name": "last_hidden_state"}
    return isinstance(ways, Mapping) and {**plain, **ways} == plain


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "transformer_task": lambda value: value == "feature-extraction",
    "modality_config": _is_text,
    "module_output_name": lambda value: value == "token_embeddings",
    "processing_kwargs": lambda value: value == {},
    "tokenizer_name_or_path": lambda value: False,
    **dict.fromkeys(_ARGUMENTS, lambda value: isinstance(value, Mapping) and value.keys() <= _HARMLESS),
}
"""Keys whose other values are refused. Any other key says nothing about the embedding of a text."""


def _read(path: Path, name: str, types: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole file, and the keys that are used; null is like no value. Raises CheckpointError."""
    if not path.is_file():
        return {}, {}
    try:
        whole = msgspec.convert(json.loads(path.read_bytes()), dict[str, Any])
    except ValueError as error:
        raise CheckpointError(f"{path.name} of {name} cannot be used: {error}") from error
    return whole, {key: _convert_value(whole[key], kind, f"{path.name} of {name} has {key}")
                   for key, kind in types.items() if whole.get(key) is not None}  # fmt: skip


def _convert_value(value: Any, kind: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{where}: {json.dumps(value):.60}. {error}.") from None
