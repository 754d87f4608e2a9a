"""The files of an artifact beside its graphs: configuration, tokenizer, generation settings, processors.

All are written in the forms in which transformers and sentence-transformers write them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.sentence_texts import lower_case
from ..checkpoint.sentence_transformers import embeds_sentences
from ..checkpoint.tokenizer_files import save_tokenizer

__all__ = ["config_of", "write_companions"]


def config_of(checkpoint: Checkpoint, model: Any) -> dict[str, Any]:
    """The checkpoint's configuration, without paths of this machine."""
    if checkpoint.gguf_file:
        config = json.loads(checkpoint.config.to_json_string(use_diff=True))
        config["architectures"] = [type(model).__name__]
    else:
        config = checkpoint.written_config
    return dict(_without_paths(config))


def _without_paths(value: Any) -> Any:
    """Drop the paths, at any depth, that transformers writes of where something was loaded from."""
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items() if not _is_path(key, each)}
    return [_without_paths(each) for each in value] if isinstance(value, list) else value


def _is_path(key: str, value: Any) -> bool:
    # A label may have this name, but then its value is a number.
    return key.endswith("name_or_path") and (value is None or isinstance(value, str))


def write_companions(stage: Path, tokenizer: Any | None, checkpoint: Checkpoint, model: Any) -> None:
    """Write the companion files into `stage`. Where sentence-transformers lower-cases texts, the tokenizer will do so.

    Raises CheckpointError.
    """
    files = checkpoint.sentence_files() if embeds_sentences(model) else {}
    for name, settings in files.items():
        _write_json(stage / name, settings)
        if settings.get("do_lower_case") and tokenizer is not None:
            lower_case(tokenizer, checkpoint.name)
    for name, settings in checkpoint.processor_files.items():
        _write_json(stage / name, _without_paths(settings))
    if tokenizer is not None:
        _write_json(stage / "tokenizer_config.json", _without_paths(save_tokenizer(tokenizer, stage)))
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        said = _without_paths(json.loads(generation.to_json_string(ignore_metadata=True)))
        _write_json(stage / "generation_config.json", {name: said[name] for name in said if name[0] != "_"})


def _write_json(path: Path, value: Any) -> None:
    """Write JSON as transformers does."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
