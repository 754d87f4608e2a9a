"""Eager models of transformers, exported to folders of this run."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from precast.exporter import ExportOptions, export, quiet_libraries
from precast.runtime import CompiledModel

BATCH = 4
LENGTH = 62
"""What RoBERTa's 64 positions have room for, beside padding's."""
_made: dict[str, Any] = {}
_folder = tempfile.TemporaryDirectory(prefix="precast-foreign-")
os.environ.setdefault("PRECAST_HOME", f"{_folder.name}/home")


def compiled(model: Any, **options: Any) -> Any:
    """Ours for an eager model, with its weights and configuration as they are now; made once for equal ones."""
    quiet_libraries()
    key = _fingerprint(model, options)
    if key not in _made:
        source, target = (Path(_folder.name) / kind / key for kind in ("source", "artifact"))
        # Without what a test has set for one call, which no file may hold: pad_token_id=-1.
        kept, model.generation_config = model.generation_config, GenerationConfig()
        model.save_pretrained(source)
        model.generation_config = kept
        sizes = sizes_of(model.config) | options
        _made[key] = CompiledModel.from_pretrained(
            export(str(source), target, ExportOptions(validate=False, **sizes)).path
        )
    return _made[key]


def sizes_of(config: Any) -> dict[str, Any]:
    """What any of a tester's requests fit into: several rows, and lengths as far as the positions go."""
    text = config.get_text_config(decoder=True)
    length = min(LENGTH, getattr(text, "max_position_embeddings", None) or LENGTH)
    sizes: dict[str, Any] = {"batch_size": BATCH, "dynamic_batch_size": True, "sequence_length": (length,)}
    return sizes | ({"decoder_sequence_length": length} if config.is_encoder_decoder else {})


def _fingerprint(model: Any, options: dict[str, Any]) -> str:
    found = hashlib.sha256(f"{type(model).__name__} {model.config.to_json_string()} {options}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
