"""A tokenizer as the runtime reads it: tokenizer.json, and in tokenizer_config.json what holds, not what was written.

transformers leaves out of tokenizer_config.json what its classes say by themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .python_tokenizers import converted

__all__ = ["tokenizer_settings"]

_EFFECTIVE = ("padding_side", "truncation_side", "model_input_names", "model_max_length", "pad_token_type_id",
              "split_special_tokens", "clean_up_tokenization_spaces")  # fmt: skip
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_settings(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Save a tokenizer of transformers, and return its tokenizer_config.json with what its class says by itself."""
    tokenizer.save_pretrained(folder)
    written: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    if not tokenizer.is_fast and (made := converted(tokenizer)):
        made.tokenizer.save(str(folder / "tokenizer.json"))
        written |= made.settings
        if tokenizer.clean_up_tokenization_spaces:
            # Of a tokenizer in Python, byte pairs are no exception.
            written |= {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    effective = {name: getattr(tokenizer, name, None) for name in _EFFECTIVE}
    roles = {role: getattr(tokenizer, role, None) for role in _ROLES}
    found = {**effective, **{role: None if token is None else str(token) for role, token in roles.items()}}
    return {**written, **{name: value for name, value in found.items() if value is not None and name not in written}}
